"""Losses and targets, computed in float32 whatever the precision of the network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


def mean_square(
    guess: Float[Tensor, "*shape"], truth: Float[Tensor, "*shape"], weights: Tensor | None = None
) -> Float[Tensor, ""]:
    """Mean over all values. With as many hidden patches in every image this is MAE's masked mean.

    weights: see `weighted_mean`.
    """
    return weighted_mean((guess.float() - truth.float()).square(), weights)


def weighted_mean(values: Float[Tensor, "*shape"], weights: Tensor | None = None) -> Float[Tensor, ""]:
    """Mean of the values with weight 1, leaving out those with weight 0; 0 (with a graph) where none counts.

    weights: 0 or 1, of a shape that broadcasts to that of `values`; None weighs all alike, as `Tensor.mean`.
    """
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype).expand_as(values)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Context manager that disables autocast on devices that have it, which the meta device does not."""
    known = torch.amp.autocast_mode.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
