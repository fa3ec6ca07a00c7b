"""Exponential moving average of weights: kept beside the weights, for evaluation or as a teacher.

Used for the weights of MAE's training from scratch (He et al. 2021, Table 11). A step that was skipped for non-finite
numbers moves nothing, bit for bit: the device decides, and the host does not wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def warmed_up(decay: float, step: int) -> float:
    """The share of an average that stays at step `step` (0-based): less in the first steps, so that these fade."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def moved(average: Tensor, value: Tensor, decay: float, counted: Tensor | None = None) -> Tensor:
    """decay x average + (1 - decay) x value; `average` itself where `counted` (0-d bool) is False."""
    new = average.lerp(value, 1 - decay)
    return new if counted is None else torch.where(counted, new, average)


class MovingAverage:
    """The average of the trainable parameters of a module, by name; empty until the first `update`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.decay = decay
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int, counted: Tensor | None = None) -> None:
        """Move the average after step `step` (0-based); the first call copies the weights.

        counted: 0-d bool on the device, False where the step was skipped; None for a step that counted.
        """
        stays = warmed_up(self.decay, step)
        for name, parameter in self.parameters.items():
            before = self.values.get(name)
            now = parameter.detach()
            self.values[name] = now.clone() if before is None else moved(before, now, stays, counted)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continue from stored values, by name; {} starts anew. Raises KeyError for a name that is not averaged."""
        self.values = {name: value.to(self.parameters[name].device, copy=True) for name, value in values.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the parameters are their averages; afterwards they are, bit for bit, as before."""
        before = {name: self.parameters[name].detach().clone() for name in self.values}
        self._copy(self.values)
        try:
            yield
        finally:
            self._copy(before)

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)
