"""Batches for training and evaluation, made in this process or by workers.

Each request is an explicit list of images (`order.py`), so batches do not depend on the number of workers, and loading
can start at any position at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from unmask.batch import Batch
from unmask.data.decode.bad_image import BadImage
from unmask.data.image_reader import ImageReader, LoadedBatch
from unmask.data.order import Order, SampleIndices, places
from unmask.data.scan.scan import num_cores
from unmask.data.worker_pool import WorkerPool


class BatchIterator(Iterator[LoadedBatch], Protocol):
    """An iterator of batches with a method `close`, which ends the workers."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class MicroBatches:
    """`count` micro-batches of `size` samples each, beginning at sample number `start` of the training.

    rank, ranks: only the part of each micro-batch that one of several ranks takes, see `order.places`.
    """

    start: int
    size: int
    count: int
    rank: int = 0
    ranks: int = 1

    def requests(self, order: Order) -> Iterator[SampleIndices]:
        """Yield the samples of each micro-batch."""
        own = None if self.ranks == 1 else places(self.size, self.rank, self.ranks, order.repeats)
        for number in range(self.count):
            taken = order.take(self.start + number * self.size, self.size)
            yield taken if own is None else SampleIndices(taken.index[own], taken.epoch[own])


@dataclass
class _Batches:
    """Make one batch per request in a worker process."""

    images: ImageReader

    def make(self, request: SampleIndices, note: Callable[[int], None]) -> LoadedBatch:
        self.images.note = note
        return self.images[request]

    def name(self, row: int) -> str:
        return self.images.source.names[row]


def training_batches(
    images: ImageReader, wanted: MicroBatches, *, workers: int, pin: bool = False, folder: Path | None = None
) -> BatchIterator:
    """Return the wanted micro-batches, decoded by `workers` processes.

    The processes start immediately and end with the iterator. folder: see `WorkerPool`. Raises BadImage if a bad file
    cannot be replaced, and LoadingFailed if a worker dies or stalls.
    """
    order = Order(images.rows, images.seed, images.repeats)
    return _deliveries(images, wanted.requests(order), workers=workers, pin=pin, folder=folder)


def eval_batches(images: ImageReader, rows: np.ndarray, *, batch: int, workers: int = 0) -> Iterator[Batch]:
    """Return batches of the given rows in order, without randomness; the last batch may be smaller.

    Raises BadImage, LoadingFailed.
    """
    pieces = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    taken = [SampleIndices(piece.astype(np.int64), np.zeros(len(piece), np.int64)) for piece in pieces]
    return (delivery.batch for delivery in _deliveries(images, taken, workers))


def _deliveries(
    images: ImageReader, requests: Iterable[SampleIndices], workers: int, pin: bool = False, folder: Path | None = None
) -> BatchIterator:
    if workers:
        return WorkerPool(_Batches(images), requests, workers, caught=BadImage, pin=pin, folder=folder)
    made = (images[taken] for taken in requests)
    return (delivery.pin_memory() for delivery in made) if pin else made


def choose_workers(device: str, *, cached: bool, processes: int = 1) -> tuple[int, str]:
    """Return the number of loader workers, and the reason as a sentence.

    processes: number of training processes that share the cores of this machine.
    """
    cores = max(1, num_cores() // processes)
    if device == "cpu":
        if cached or cores < 2:
            return 0, "0 loader workers: the images are in memory and the CPU is busy training" if cached else (
                "0 loader workers: one core"
            )
        return max(1, cores // 4), f"{max(1, cores // 4)} loader workers: a quarter of {cores} cores; the others train"
    workers = max(1, min(cores - 1, 12))
    return workers, f"{workers} loader workers: {cores} cores, minus one for the main process"
