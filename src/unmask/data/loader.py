"""From a source to batches. Position is one integer: how many samples have been taken.

Sample number s belongs to pass s // n over the n images, at place s % n of that pass's order; order, crop, flip and
colour jitter are pure functions of (seed, epoch, image). Workers are handed explicit lists of images and keep no state,
so their number cannot change what is drawn, and starting anywhere costs nothing: there is no iterator to wind forward.
Passes follow one another without a gap, so no image is left out and a batch may be larger than the data set.

With `repeats` R every image that a pass comes to gives R samples in a row, each with its own crop, flip, jitter and
mask, for one reading and decoding (Hoffer et al. 2020, "Augment your batch"). The `epoch` of a sample counts how often
its image has been drawn before, which without repeats is the number of the pass; with them it is R * pass + repeat.

Maps of classes and boxes around objects (`Annotations`) are cut by the very box and flip that cut their image.

A file that has gone bad since the scan is replaced by another image drawn from the same counter-based stream, so every
run replaces it alike; it is reported with the batch. So is a file whose content has changed since the source was opened
(code CHANGED): a run never trains on changed content unnoticed.

Images kept in memory give the same pixels as images decoded anew, but for one case: a JPEG more than twice as large as
its crop needs is, when it is not kept, decoded at 1/2, 1/4 or 1/8 before it is resampled, which differs by a level or
two. So what a run draws depends on whether it keeps its images; that is decided once and is part of its plan, and a
resumed run does the same.
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
from unmask.data.order import Order, SampleIndices
from unmask.data.scan.scan import num_cores
from unmask.data.worker_pool import WorkerPool


class BatchIterator(Iterator[LoadedBatch], Protocol):
    """Batches as they are needed; `close` ends the workers that make them."""

    def close(self) -> None: ...


@dataclass
class _Positions:
    """The requests of a training: the micro-batches from a position on."""

    order: Order
    start: int
    count: int
    batches: int

    def __iter__(self) -> Iterator[SampleIndices]:
        for number in range(self.batches):
            yield self.order.take(self.start + number * self.count, self.count)


@dataclass
class _Batches:
    """What a worker process runs: one batch per request."""

    images: ImageReader

    def make(self, request: SampleIndices, note: Callable[[int], None]) -> LoadedBatch:
        self.images.note = note
        return self.images[request]

    def name(self, row: int) -> str:
        return self.images.source.names[row]


def training_batches(
    images: ImageReader,
    *,
    start: int,
    batch: int,
    batches: int,
    workers: int,
    pin: bool = False,
    folder: Path | None = None,
) -> BatchIterator:
    """`batches` deliveries of `batch` images from sample number `start` on, decoded by `workers` processes.

    The processes start now and end with the iterator. folder: see `WorkerPool`. Raises BadImage when a bad file cannot
    even be replaced, and LoadingFailed when a worker dies or stalls.
    """
    order = Order(images.rows, images.seed, images.repeats)
    return _deliveries(images, _Positions(order, start, batch, batches), workers, pin, folder)


def eval_batches(images: ImageReader, rows: np.ndarray, *, batch: int, workers: int = 0) -> Iterator[Batch]:
    """The given rows in order, none of it random; the last batch may be smaller. Raises BadImage, LoadingFailed."""
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


def choose_workers(device: str, *, cached: bool) -> tuple[int, str]:
    """How many decoding processes, and the reason as a sentence."""
    cores = num_cores()
    if device == "cpu":
        if cached or cores < 2:
            return 0, "0 loader workers: the images are in memory and the processor is busy training" if cached else (
                "0 loader workers: one core"
            )
        return max(1, cores // 4), f"{max(1, cores // 4)} loader workers: a quarter of {cores} cores, the rest trains"
    workers = max(1, min(cores - 1, 12))
    return workers, f"{workers} loader workers: {cores} cores, less one for the main process"
