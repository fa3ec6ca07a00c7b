"""Losses and targets, computed in float32 whatever the precision of the network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from unmask.nn.batch_sums import mean_count


def mean_square(
    guess: Float[Tensor, "*shape"], truth: Float[Tensor, "*shape"], weights: Tensor | None = None
) -> Float[Tensor, ""]:
    """Return the mean squared error. This mean equals MAE's masked mean if all images have equally many hidden patches.

    weights: see `weighted_mean`.
    """
    return weighted_mean((guess.float() - truth.float()).square(), weights)


def weighted_mean(values: Float[Tensor, "*shape"], weights: Tensor | None = None) -> Float[Tensor, ""]:
    """Return the mean of the values with weight 1, ignoring those with weight 0; a differentiable 0 if all weights are
    0.

    weights: 0 or 1, of a shape that broadcasts to that of `values` (None: all are 1). Their sum is that of the whole
    micro-batch, see `mean_count`.
    """
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype).expand_as(values)
    return (values * weights).sum() / mean_count(weights.sum(), least=1.0)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Context manager that disables autocast if the device supports autocast (the meta device does not)."""
    known = torch.amp.autocast_mode.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
