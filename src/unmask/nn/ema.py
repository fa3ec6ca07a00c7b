"""Exponential moving average of weights, for evaluation or as a teacher.

MAE's training from scratch evaluates such averages (He et al. 2021, Table 11). A step that was skipped because of
non-finite numbers leaves the average unchanged; the device checks this without synchronising with the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def warmed_up(decay: float, step: int) -> float:
    """Return the decay at step `step` (0-based): smaller in the first steps, so that early weights fade quickly."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def moved(average: Tensor, value: Tensor, decay: float, counted: Tensor | None = None) -> Tensor:
    """Return decay x average + (1 - decay) x value, or `average` itself if `counted` (0-d bool) is False."""
    new = average.lerp(value, 1 - decay)
    return new if counted is None else torch.where(counted, new, average)


class MovingAverage:
    """Averages of the trainable parameters of a module, by name; empty until the first `update`."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.decay = decay
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, step: int, counted: Tensor | None = None) -> None:
        """Move the average after step `step` (0-based); the first call copies the weights.

        counted: 0-d bool on the device, False if the step was skipped, or None if no step can be skipped.
        """
        stays = warmed_up(self.decay, step)
        for name, parameter in self.parameters.items():
            before = self.values.get(name)
            now = parameter.detach()
            self.values[name] = now.clone() if before is None else moved(before, now, stays, counted)

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Continue from stored values, by name; {} starts over. Raises KeyError for a name that is not averaged."""
        self.values = {name: value.to(self.parameters[name].device, copy=True) for name, value in values.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager in which the parameters hold their averages; on exit they are restored bit for bit."""
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
