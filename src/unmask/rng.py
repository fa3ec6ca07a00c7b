"""Stateless random numbers: every draw is a pure function of (seed, stream, epoch, dataset index).

Each of the four inputs is a separate input word of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3"), and no input is added to another. So order, crops and masks do not depend on the number of loader workers;
a resumed run needs no generator state; and a mask is the same on CPU and GPU, because the same integer arithmetic runs
on NumPy arrays and torch tensors.

Weights are not drawn here: their initialisation uses torch's own generator, seeded once with `train.seed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", np.ndarray, Tensor)

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Stream(IntEnum):
    """What random numbers are used for. Each purpose has its own stream of numbers.

    Results of runs depend on these numbers, so append new members and never renumber existing ones.
    """

    ORDER = 0
    CROP = 1
    FLIP = 2
    MASK = 3
    REPLACE = 4
    LABELS = 5
    SHAPES = 6
    SHAPES_NOISE = 7
    JITTER = 8
    CODES = 9
    COLOURS = 10
    PATHS = 11
    MIX = 12
    RAND_AUGMENT = 13
    ERASE = 14


def philox(counter: tuple[Array, Array, Array, Array], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Apply Philox4x32-10 to a counter of four int64 arrays of 32-bit words. The result has the same format.

    Signed 64-bit products overflow, but their low 64 bits are exact. The right shift keeps the sign, so the high word
    is masked after the shift.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & MASK32) ^ c1 ^ k0,
            p1 & MASK32,
            ((p0 >> 32) & MASK32) ^ c3 ^ k1,
            p0 & MASK32,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def words(seed: int, stream: Stream, epoch: Array, index: Array, count: int) -> Array:
    """Return (B, count) random 32-bit words as int64; row b only depends on (seed, stream, epoch[b], index[b])."""
    blocks = -(-count // 4)
    if isinstance(index, Tensor):
        like: dict[str, Any] = {"dtype": torch.int64, "device": index.device}
        block = torch.arange(blocks, **like)[None]
        zero = torch.zeros((len(index), blocks), **like)
    else:
        block = np.arange(blocks, dtype=np.int64)[None]
        zero = np.zeros((len(index), blocks), np.int64)
    counter: Any = (zero + block, zero + index[:, None], zero + epoch[:, None], zero + int(stream))
    out = philox(counter, (seed & MASK32, (seed >> 32) & MASK32))
    stacked: Any = torch.stack(out, -1) if isinstance(out[0], Tensor) else np.stack(out, -1)
    return stacked.reshape(len(index), -1)[:, :count]


def uniform(seed: int, stream: Stream, epoch: Array, index: Array, count: int) -> Array:
    """Return (B, count) float32 in [0, 1) with 24 random bits each, identical in NumPy and torch on any device."""
    top = words(seed, stream, epoch=epoch, index=index, count=count) >> 8
    scale = 2.0**-24
    return top.to(torch.float32) * scale if isinstance(top, Tensor) else top.astype(np.float32) * np.float32(scale)


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of the images in one epoch, (count,) int64, by sorting 64-bit random keys."""
    index = np.arange(count, dtype=np.int64)
    pair = words(seed, Stream.ORDER, epoch=np.full(count, epoch, np.int64), index=index, count=2)
    return np.lexsort((index, pair[:, 1], pair[:, 0]))


@dataclass(frozen=True)
class Draws:
    """The random draws of the images of one batch, which methods get as `Clock.rng`."""

    seed: int
    epoch: Tensor  # (B,) int64.
    index: Tensor  # (B,) int64.

    def uniform(self, count: int, stream: Stream = Stream.MASK) -> Tensor:
        """Return (B, count) float32 in [0, 1), on the batch's device."""
        return uniform(self.seed, stream, self.epoch, self.index, count)
