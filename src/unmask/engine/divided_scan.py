"""Scan images in all processes: each reads a part of the files once, and the writer combines the results.

The result, and the scan cache, are those of one process (`data/scan/scan.py`). The writer alone uses the cache, because
other hosts may have another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import TypeVar

import numpy as np

from unmask.data.decode.reading import Reading
from unmask.data.scan.scan import CHUNK, Scan, ScanWork, scan, scan_files
from unmask.data.sources.source import Source
from unmask.data.sources.tiff_samples import apply_reading, page_offsets
from unmask.engine.divided_batches import own_rows
from unmask.engine.world import World, current

T = TypeVar("T")

ROUND = 1.0  # seconds between deliveries to the writer
PARTS = 8  # smallest number of pieces of each process, so that slow files do not all belong to one of them


def read_as(source: Source, reading: Reading) -> Source:
    """Return `apply_reading(source, reading)` in all processes, which divide among them the files that it reads.

    Raises WorldError if the processes do not have the same files.
    """
    world = current()
    if world.alone or reading.pages != "samples":
        return apply_reading(source, reading)
    require_same_files(source, world)
    own = share(np.arange(len(source)), world).tolist()
    parts = world.gather({row: page_offsets(source, row) for row in own})
    offsets = {row: pages for part in parts for row, pages in part.items()}
    return apply_reading(source, reading, (offsets[row] for row in range(len(source))))


def scan_together(
    source: Source,
    *,
    sample: int | None = None,
    workers: int | None = None,
    channels: int | None = None,
    ignore_cache: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Scan:
    """Return the scan of a source in all processes; see `scan`. workers: number of worker processes of each process.

    progress: called by the writer. Raises WorldError if the processes do not have the same files.
    """
    world = current()
    if world.alone:
        return scan(
            source, sample=sample, workers=workers, channels=channels, ignore_cache=ignore_cache, progress=progress
        )
    require_same_files(source, world)
    work = world.on_writer(lambda: ScanWork(source, sample=sample, ignore_cache=ignore_cache))
    reading, rows = world.from_writer(lambda: (_of_writer(work).source.reading, _of_writer(work).rows))
    own = scan_files(source.with_reading(reading), share(rows, world), workers, sharing=world.local_size)
    with nullcontext() if work is None else work.stored():
        for row, found in delivered(world, own):
            _of_writer(work).add(row, found, progress)
    return world.from_writer(lambda: _of_writer(work).result(channels))


def _of_writer(work: ScanWork | None) -> ScanWork:
    assert work is not None, "only the writer calls this"
    return work


def require_same_files(source: Source, world: World) -> None:
    """Raise WorldError in all processes unless all have files of the same names and sizes."""
    if not world.alone:  # the fingerprint takes time
        world.require_same("the images", source.summary(), "give all hosts the same files")


def share(rows: np.ndarray, world: World) -> np.ndarray:
    """Return the rows that this process reads: every n-th piece, because neighbouring files are often alike."""
    length = max(1, min(CHUNK, len(rows) // (PARTS * world.size)))
    return own_rows(rows, length, world)


def delivered(world: World, own: Iterator[T]) -> Iterator[T]:
    """Yield the items of all processes in the writer, in any order, and none elsewhere. own: items of this process."""
    left = True
    while left:
        part, until = list[T](), time.monotonic() + ROUND
        unfinished = False
        for item in own:
            part.append(item)
            if unfinished := time.monotonic() > until:
                break
        parts = world.to_writer(part)
        yield from (item for each in parts for item in each)
        (left,) = world.any(unfinished)
