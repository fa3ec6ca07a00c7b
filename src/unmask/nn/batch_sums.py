"""Counts and statistics of a whole micro-batch, for a loss that is computed on equal parts of it.

The caller may divide a micro-batch into n equal parts, compute the loss of each part, and average the n losses and
their gradients. For a mean over a fixed number of values for each image, the average over the parts is the mean over
the micro-batch. For a mean over a number of values that depends on the data, such as the annotated pixels, each part
must divide its own sum by 1 / n of the count of the whole micro-batch: `mean_count`.

Losses use these functions for such counts, and do not know how the micro-batch is divided. Outside `part_of_batch` the
batch is the whole micro-batch, and each function returns what it is given. Sums must not require gradients. All parts
must call the functions in the same order with the same shapes, whatever their images, because every sum waits for all
parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Part:
    """One of `parts` equal parts of a micro-batch. total: sums a tensor over all parts."""

    parts: int
    total: Callable[[Tensor], Tensor]


_PART: ContextVar[_Part | None] = ContextVar("_PART", default=None)


@contextmanager
def part_of_batch(parts: int, total: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context manager in which batches are one of `parts` equal parts of a micro-batch, in this thread only.

    total: function that returns the sum of a tensor over all parts, the same on all of them; it must not change its
    argument.
    """
    before = _PART.set(_Part(parts, total) if parts > 1 else None)
    try:
        yield
    finally:
        _PART.reset(before)


def num_parts() -> int:
    """Return the number of equal parts of the micro-batch; 1 if the batch is the whole micro-batch."""
    part = _PART.get()
    return 1 if part is None else part.parts


def batch_sum(x: Tensor) -> Tensor:
    """Return the sum of `x` over all parts of the micro-batch; `x` itself if the batch is the whole micro-batch."""
    assert not x.requires_grad, "sums over the parts of a micro-batch have no gradient; detach the tensor"
    part = _PART.get()
    return x if part is None else part.total(x)


def mean_count(count: Tensor, least: float | None = None) -> Tensor:
    """Return the number by which the sum over this batch is divided, so that the average over all parts is the mean.

    count: sum of weights or number of values in this batch. least: smallest count of the whole micro-batch (None: no
    limit).
    """
    total = batch_sum(count)
    total = total if least is None else total.clamp(min=least)
    return total if num_parts() == 1 else total / num_parts()


def batch_var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unbiased variance and the mean of the rows of `x`, (B, D), over the whole micro-batch: (D,) each."""
    if num_parts() == 1:
        return torch.var_mean(x, 0)
    count = len(x) * num_parts()
    mean = batch_sum(x.sum(0)) / count
    return batch_sum((x - mean).square().sum(0)) / (count - 1), mean
