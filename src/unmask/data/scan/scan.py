"""Scan every file before training: which can be read, of what size and kind, and their mean and standard deviation.

Decodes each file in full (or an even sample of them), one at a time, and stores only sums. The caller decides which
share of bad files is too large. The result does not depend on the number of processes, nor on which files were in the
scan cache (`scan_cache.py`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import numpy as np

from unmask.data.decode import bad_image, decode
from unmask.data.decode import nodata as nodata_module
from unmask.data.decode import pixels as pixels_module
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.choose_reading import choose_reading
from unmask.data.decode.image_header import Header
from unmask.data.decode.layout import Layout
from unmask.data.decode.limited_process import SLACK, Crashed, TooSlow, call_in_process
from unmask.data.decode.nodata import Nodata
from unmask.data.decode.reading import Reading
from unmask.data.scan.odd_images import Constant, constant_images
from unmask.data.scan.scan_cache import (
    FileRecord,
    FileRecords,
    FileRecordsBuilder,
    is_worth_storing,
    joined,
    load_records,
    store_records,
)
from unmask.data.sources.source import Source, content_digest
from unmask.system.processes import process_pool

STATISTICS_SAMPLE = 10_000
LOOK_AGAIN = 256
CHUNK = 64
GUARDED_MEMORY = 128 << 20  # bytes; files that need more are decoded in their own process
GUARDED_PARTS = 64  # likewise for files of more JPEG scans or TIFF pages
MOST_SECONDS = 10.0  # of processor time per file
PATIENCE = 5.0  # seconds of remaining work from which processes are started


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used. code: reason code of BadImage; detail: the same in words."""

    name: str
    code: str
    detail: str


@dataclass
class Scan:
    """Result of a scan. Sizes are (H, W) in pixels as displayed; mean and std per channel in the files' units.

    layouts: how many files there are by format, channels as decoded, and layout. reading: how they were decoded, and
    settled: what of that was decided for this data set, and why. absent_share: of the pixels of good files, how many
    hold no data; absent_files: files with such pixels, empty_files: those without any other. digests: (files,) uint64,
    those of the files that could be read, 0 for others; see `open_source.content_digest`.
    """

    source: str
    files: int
    checked: int
    known: int = 0  # number of checked files taken from the scan cache
    forgotten: str = ""  # why the results could not be cached
    bad: list[BadFile] = field(default_factory=list)
    bad_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    good_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    min_size: tuple[int, int] = (0, 0)
    median_size: tuple[int, int] = (0, 0)
    max_size: tuple[int, int] = (0, 0)
    channels: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    layouts: Counter[tuple[str, int, Layout]] = field(default_factory=Counter)
    reading: Reading = field(default_factory=Reading)
    settled: tuple[str, ...] = ()
    constant: Constant | None = None
    channels_majority: int = 0
    dtype_majority: str = "uint8"
    absent_share: float = 0.0
    absent_files: int = 0
    empty_files: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    decoded_bytes: float = 0.0  # mean per image
    seconds: float = 0.0

    @property
    def good(self) -> int:
        return len(self.good_rows)

    @property
    def usable(self) -> int:
        """Number of usable images of the source, an estimate if only a sample was checked."""
        return round(self.files * self.good / self.checked) if self.sampled else self.good

    @property
    def bad_fraction(self) -> float:
        return len(self.bad) / max(1, self.checked)

    @property
    def tolerated(self) -> Counter[str]:
        """Number of files by fault that loses no pixel."""
        found: Counter[str] = Counter()
        for (_, _, layout), count in self.layouts.items():
            found.update(dict.fromkeys(layout.tolerated, count))
        return found

    @property
    def sampled(self) -> bool:
        return self.checked < self.files


def scan(
    source: Source,
    *,
    sample: int | None = None,
    workers: int | None = None,
    channels: int | None = None,
    anew: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Scan:
    """Decode every file, or `sample` of them evenly spread.

    workers: processes; 0 is this one; None starts one a core when there turns out to be work for more than a few
    seconds. channels: what the images must conform to; None means what most of them are. Files that cannot
    conform are bad. What `source.reading` leaves open is settled first, and set there. anew: decode files too that
    could be read before and have not changed since.
    """
    start, began = time.monotonic(), time.time()
    rows = np.arange(len(source))
    if sample is not None and sample < len(rows):
        rows = np.unique(np.linspace(0, len(rows) - 1, sample).astype(np.int64))
    result = Scan(source.name, files=len(source), checked=len(rows))
    source.reading, result.settled = choose_reading(source, rows.tolist())
    result.reading = source.reading
    known = load_records(source)
    before = [] if known is None or anew else [known.at(np.flatnonzero(np.isin(known.rows, rows)))]
    result.known = sum(map(len, before))
    faults: dict[int, BadFile] = {}
    seen = FileRecordsBuilder()
    try:
        todo = np.setdiff1d(rows, before[0].rows) if before else rows
        for done, (row, found) in enumerate(_look_at(source, todo, workers), result.known + 1):
            if isinstance(found, BadImage):
                faults[row] = BadFile(source.names[row], found.code, found.detail)
            else:
                seen.add(row, found)
            if progress is not None and (done % CHUNK == 0 or done == len(rows)):
                progress(done)
    finally:  # also when interrupted, so that a long scan is not repeated
        new = seen.looks()
        stale = known is not None and bool(np.isin(known.rows, list(faults)).any())
        if stale or (len(new) and is_worth_storing(began)):
            result.forgotten = store_records(source, _all_known(known, new, list(faults)), began)
    looks = joined([*before, new])
    result.digests = np.zeros(len(source), np.uint64)
    result.digests[looks.rows] = looks.digests
    _summarise(result, source, looks, faults, channels)
    result.seconds = time.monotonic() - start
    return result


def num_cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _all_known(known: FileRecords | None, new: FileRecords, bad: list[int]) -> FileRecords:
    """Return the new records and the known ones of files that were not scanned now."""
    if known is None:
        return new
    return joined([known.at(np.flatnonzero(~np.isin(known.rows, [*new.rows.tolist(), *bad]))), new])


def _look_at(source: Source, rows: np.ndarray, workers: int | None) -> Iterator[tuple[int, FileRecord | BadImage]]:
    start, todo = time.monotonic(), rows.tolist()
    if workers is None:
        workers = num_cores()
        for done, row in enumerate(todo):
            if workers > 1 and done and done % CHUNK == 0:
                left = (time.monotonic() - start) / done * (len(todo) - done)
                if left > PATIENCE:
                    todo = todo[done:]
                    break
            yield row, _look(source, row)
        else:
            return
    if workers <= 0:
        yield from ((row, _look(source, row)) for row in todo)
        return
    chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    while chunks:
        done = 0
        try:
            with process_pool(workers, _begin, (source,)) as pool:
                for chunk, found in zip(chunks, pool.map(_look_many, chunks), strict=True):
                    yield from zip(chunk, found, strict=True)
                    done += 1
        except BrokenProcessPool:
            # A file killed its worker (out of memory, a crash in a decoder). Find it, one process for each file; it may
            # also lie in a later chunk, and then it will break the next pool.
            for row in chunks[done]:
                yield row, _look_apart(source, row)
            done += 1
        chunks = chunks[done:]


_source: Source | None = None  # of a worker process, sent once instead of with every chunk


def _begin(source: Source) -> None:
    global _source
    _source = source


def _look_many(rows: list[int]) -> list[FileRecord | BadImage]:
    assert _source is not None
    return [_look(_source, row) for row in rows]


def _look_apart(source: Source, row: int) -> FileRecord | BadImage:
    try:
        with process_pool(1, _begin, (source,)) as pool:
            return pool.submit(_look_many, [row]).result()[0]
    except BrokenProcessPool:
        return BadImage("CORRUPT", "decoding it killed the process")


def _look(source: Source, row: int, like: tuple[int, str] | None = None) -> FileRecord | BadImage:
    """Decode one file, unchanged or converted `like` the data set's channels and dtype.

    A file whose header predicts much memory or time is decoded in its own process, with limits on both.
    """
    try:
        data = source.read(row)
        head = decode.header(data, source.reading)
        if head.memory > GUARDED_MEMORY or head.scans > GUARDED_PARTS or len(head.pages) > GUARDED_PARTS:
            limits = {"memory": bad_image.limits.MAX_DECODE_BYTES + SLACK, "seconds": MOST_SECONDS}
            return call_in_process(_decoded, data, head, like, source.reading.nodata, **limits)
        return _decoded(data, head, like, source.reading.nodata)
    except BadImage as error:
        return error
    except MemoryError:
        return BadImage("TOO_MANY_PIXELS", "not enough memory to decode it")
    except TooSlow:
        return BadImage("TIMEOUT", f"it takes longer than {MOST_SECONDS:.0f} s to decode; save it again, or smaller")
    except Crashed:
        return BadImage("CORRUPT", "decoding it killed the process")


def _decoded(data: bytes, head: Header, like: tuple[int, str] | None, nodata: Nodata) -> FileRecord:
    """Return the record of an image, from pieces, to avoid a second copy of a large one."""
    tolerated: list[str] = []
    sums = squares = np.zeros(0)
    channels, dtype, there, declared = head.channels, head.dtype, 0, nodata_module.declared(data)
    for number, piece in enumerate(decode.pieces(data, head, tolerated=tolerated)):
        valid = nodata_module.valid_pixels(piece, nodata, declared)
        if like is not None:
            piece = pixels_module.conform(piece if valid is None else nodata_module.filled(piece, valid), *like)
        flat = piece.reshape(-1, piece.shape[2]) if valid is None else piece[valid]  # (valid pixels, C)
        more, more_squares = _sums(flat)
        there += len(flat)
        sums, squares = (sums + more, squares + more_squares) if number else (more, more_squares)
        channels, dtype = piece.shape[2], str(piece.dtype)
    layout = replace(head.layout, tolerated=tuple(tolerated))
    digest = content_digest(data)
    return FileRecord((head.height, head.width), channels, dtype, head.format, layout, there, sums, squares, digest)


def _sums(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (C,) sums of the values and of their squares, of pixels (n, C)."""
    if flat.dtype == np.uint8:  # exact and fast: sums of a histogram
        counts = np.stack([np.bincount(flat[:, c], minlength=256) for c in range(flat.shape[1])])
        levels = np.arange(256, dtype=np.float64)
        return counts @ levels, counts @ levels**2
    values = flat.astype(np.float64)
    return values.sum(0), (values**2).sum(0)


def _summarise(
    result: Scan, source: Source, looks: FileRecords, faults: dict[int, BadFile], channels: int | None
) -> None:
    result.channels = Counter(looks.channels.tolist())
    result.dtypes = Counter(looks.dtypes.astype(str).tolist())
    result.formats = Counter(looks.formats.astype(str).tolist())
    kinds = zip(looks.formats.astype(str).tolist(), looks.channels.tolist(), looks.layouts.tolist(), strict=True)
    for (kind, own_channels, code), count in Counter(kinds).items():
        result.layouts[kind, own_channels, Layout.from_code(code)] = count
    wanted_channels = channels or (result.channels.most_common(1)[0][0] if len(looks) else 0)
    wanted_dtype = _widest(result.dtypes) if len(looks) else "uint8"
    unlike = _unlike(looks, wanted_channels, wanted_dtype)
    for place, error in unlike.items():
        row = int(looks.rows[place])
        faults[row] = BadFile(source.names[row], error.code, error.detail)
    if unlike:
        looks = looks.at(np.setdiff1d(np.arange(len(looks)), list(unlike)))
    result.constant = constant_images(source, looks)
    result.bad_rows = np.array(sorted(faults), np.int64)
    result.bad = [faults[row] for row in sorted(faults)]
    result.good_rows = looks.rows
    result.channels_majority, result.dtype_majority = wanted_channels, wanted_dtype
    if len(looks):
        sizes = looks.sizes.astype(np.int64)
        result.min_size, result.max_size = _pair(sizes.min(0)), _pair(sizes.max(0))
        result.median_size = _pair(np.median(sizes, axis=0))
        width = np.dtype(wanted_dtype).itemsize * wanted_channels
        result.decoded_bytes = float(sizes.prod(1).mean()) * width
        pixels = sizes.prod(1)
        result.absent_share = 1 - float(looks.valid.sum() / pixels.sum())
        result.absent_files, result.empty_files = int((looks.valid < pixels).sum()), int((looks.valid == 0).sum())
        result.mean, result.std = _statistics(source, looks, wanted_channels, wanted_dtype)


def _unlike(looks: FileRecords, channels: int, dtype: str) -> dict[int, BadImage]:
    """Return the positions of records that do not fit channels and dtype, with the reason."""
    found: dict[int, BadImage] = {}
    for own_channels in np.unique(looks.channels).tolist():
        for own_dtype in np.unique(looks.dtypes).tolist():
            try:
                pixels_module.conform(np.zeros((1, 1, own_channels), own_dtype.decode()), channels, dtype)
            except BadImage as error:
                there = (looks.channels == own_channels) & (looks.dtypes == own_dtype)
                found |= dict.fromkeys(np.flatnonzero(there).tolist(), error)
    return found


def _widest(dtypes: Counter[str]) -> str:
    """Return the most frequent dtype, but uint16 instead of uint8 if both occur: only uint8 can be converted."""
    common = dtypes.most_common(1)[0][0]
    return "uint16" if common == "uint8" and dtypes["uint16"] else common


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _statistics(
    source: Source, looks: FileRecords, channels: int, dtype: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, in the data set's channels and units, of an even sample.

    Absent pixels do not count.
    """
    alike = looks.at(np.flatnonzero((looks.channels == 1) | (looks.channels == channels)))
    if not len(alike):  # colour images read as gray: sums per channel do not give the deviation of the luma
        rows = looks.rows[_evenly(len(looks), LOOK_AGAIN)]
        again = FileRecordsBuilder()
        for row in rows.tolist():
            if isinstance(found := _look(source, row, (channels, dtype)), FileRecord):
                again.add(row, found)
        alike = again.looks()
    if not alike.valid.any():
        return (0.0,) * channels, (1.0,) * channels
    count, sums, squares = 0, np.zeros(channels), np.zeros(channels)
    alike = alike.at(_evenly(len(alike), STATISTICS_SAMPLE))
    for place, start in enumerate(alike.starts.tolist()):
        own = slice(start, start + int(alike.channels[place]))  # one channel, or as many as all
        scale = 257 if dtype == "uint16" and alike.dtypes[place] == b"uint8" else 1
        count += int(alike.valid[place])
        sums, squares = sums + alike.sums[own] * scale, squares + alike.squares[own] * scale**2
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std = np.where(std > 1e-6 * np.maximum(1e-6, np.abs(mean)), std, 1.0)  # do not scale a constant channel
    return tuple(mean.tolist()), tuple(std.tolist())


def _evenly(count: int, most: int) -> np.ndarray:
    """Return at most `most` positions of `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))
