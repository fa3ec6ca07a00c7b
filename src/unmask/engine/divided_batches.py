"""Evaluate images in all processes: each computes every n-th batch, and the writer receives the results in order.

The batches are those of one process, so the results have the same bits. `data/order.py` divides batches for training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from unmask.engine.world import World

T = TypeVar("T")


def own_rows(rows: np.ndarray, batch: int, world: World) -> np.ndarray:
    """Return the rows of the batches that this process computes. rows: (N,). batch: number of rows of a batch."""
    return rows[np.arange(len(rows)) // batch % world.size == world.rank]


def in_order(own: Iterator[T], batches: int, world: World) -> Iterator[T]:
    """Yield the results of all batches in order in the writer, and none elsewhere. All processes must call this.

    own: the results of the batches of this process. batches: the number of batches of all processes together.
    """
    if world.alone:
        yield from own
        return
    for start in range(0, batches, world.size):
        mine = [next(own)] if start + world.rank < batches else []
        for each in world.to_writer(mine):
            yield from each
