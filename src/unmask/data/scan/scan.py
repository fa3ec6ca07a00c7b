"""Scan all files before training: find unreadable files, and compute sizes, kinds, mean and standard deviation.

Files (all, or an evenly spaced sample) are decoded in full, one at a time, and only sums are stored. The caller decides
which share of bad files is too large. The result does not depend on the number of processes, nor on which files were in
the scan cache (`scan_cache.py`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
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
RESCAN_SAMPLE = 256
CHUNK = 64
GUARDED_MEMORY = 128 << 20  # Files that need more bytes to decode are decoded in a separate process.
GUARDED_PARTS = 64  # Files with more JPEG scans or TIFF pages than this are decoded in a separate process, too.
MOST_SECONDS = 10.0  # Limit on processor time per file.
PATIENCE = 5.0  # Worker processes are started if more than this many seconds of work remain.


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used. code: reason code of BadImage; detail: the reason in words."""

    name: str
    code: str
    detail: str


@dataclass
class Scan:
    """Result of a scan. Sizes are (H, W) in pixels as displayed; mean and std are per channel, in the files' units.

    layouts: number of files by format, channels as decoded, and layout.
    reading: how the files were decoded.
    decisions: a sentence about each setting of `reading` that was decided for this data set.
    absent_share: share of absent pixels in readable files.
    absent_files: number of files with absent pixels.
    empty_files: number of files in which all pixels are absent.
    digests: (files,) uint64, see `source.content_digest`; 0 for files that could not be read.
    """

    source: str
    files: int
    checked: int
    known: int = 0  # Number of checked files taken from the scan cache.
    forgotten: str = ""  # Why the results could not be cached.
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
    decisions: tuple[str, ...] = ()
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
        """Number of usable images in the source; an estimate if only a sample was checked."""
        return round(self.files * self.good / self.checked) if self.sampled else self.good

    @property
    def bad_fraction(self) -> float:
        return len(self.bad) / max(1, self.checked)

    @property
    def tolerated(self) -> Counter[str]:
        """Number of files with each harmless fault."""
        found: Counter[str] = Counter()
        for (_, _, layout), count in self.layouts.items():
            found.update(dict.fromkeys(layout.tolerated, count))
        return found

    def applied_to(self, source: Source) -> Source:
        """Return the scanned source, decoded as it was in the scan, with the digests that the scan computed."""
        return source.with_reading(self.reading).with_digests(self.digests)

    @property
    def sampled(self) -> bool:
        return self.checked < self.files


def scan(
    source: Source,
    *,
    sample: int | None = None,
    workers: int | None = None,
    channels: int | None = None,
    ignore_cache: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Scan:
    """Decode every file and return the result. sample: number of evenly spaced files to decode instead of all.

    workers: number of processes, 0 for this process, or None for one per core if the work is long.
    channels: number of channels to convert images to, or None for the most frequent number. Files that cannot be
    converted are reported as bad.
    ignore_cache: also decode files whose results are in the scan cache.
    Open settings of `source.reading` are decided first; `Scan.applied_to` returns a source with these settings.
    """
    work = ScanWork(source, sample=sample, ignore_cache=ignore_cache)
    with work.stored():
        for found in scan_files(work.source, work.rows, workers):
            work.add(*found, progress)
    return work.result(channels)


class ScanWork:
    """A scan whose files are read by the caller, in any order: `scan` reads them, or several processes do.

    source: the source, decoded by the settings decided for it. rows: rows to read, without those in the scan cache.
    """

    def __init__(self, source: Source, *, sample: int | None, ignore_cache: bool) -> None:
        self._start, self._began = time.monotonic(), time.time()
        rows = np.arange(len(source))
        if sample is not None and sample < len(rows):
            rows = np.unique(np.linspace(0, len(rows) - 1, sample).astype(np.int64))
        self._scan = Scan(source.name, files=len(source), checked=len(rows))
        self._scan.reading, self._scan.decisions = choose_reading(source, rows.tolist())
        self.source = source.with_reading(self._scan.reading)
        self._known = load_records(self.source)
        self._before: list[FileRecords] = []
        if self._known is not None and not ignore_cache:
            self._before = [self._known.at(np.flatnonzero(np.isin(self._known.rows, rows)))]
        self._done = self._scan.known = sum(map(len, self._before))
        self.rows = np.setdiff1d(rows, self._before[0].rows) if self._before else rows
        self._faults: dict[int, BadFile] = {}
        self._seen = FileRecordsBuilder()

    def add(self, row: int, found: FileRecord | BadImage, progress: Callable[[int], object] | None = None) -> None:
        """Add the result of one file. progress: called with the number of finished files now and then."""
        if isinstance(found, BadImage):
            self._faults[row] = BadFile(self.source.names[row], found.code, found.detail)
        else:
            self._seen.add(row, found)
        self._done += 1
        if progress is not None and (self._done % CHUNK == 0 or self._done == self._scan.checked):
            progress(self._done)

    @contextmanager
    def stored(self) -> Iterator[None]:
        """Context manager that stores the added results at the end, also when interrupted, so that a long scan is not
        repeated.
        """
        try:
            yield
        finally:
            known, new, bad = self._known, self._new(), list(self._faults)
            stale = known is not None and bool(np.isin(known.rows, bad).any())
            if stale or (len(new) and is_worth_storing(self._began)):
                self._scan.forgotten = store_records(self.source, _all_known(known, new, bad), self._began)

    def result(self, channels: int | None) -> Scan:
        """Return the scan, after the results of all `rows` have been added. channels: see `scan`."""
        result, source = self._scan, self.source
        records = joined([*self._before, self._new()])
        result.digests = np.zeros(len(source), np.uint64)
        result.digests[records.rows] = records.digests
        _summarise(result, source, records=records, faults=self._faults, channels=channels)
        result.seconds = time.monotonic() - self._start
        return result

    def _new(self) -> FileRecords:
        return joined([self._seen.build()])


def num_cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _all_known(known: FileRecords | None, new: FileRecords, bad: list[int]) -> FileRecords:
    """Return the new records, joined with the cached records of files that were not scanned this time."""
    if known is None:
        return new
    return joined([known.at(np.flatnonzero(~np.isin(known.rows, [*new.rows.tolist(), *bad]))), new])


def scan_files(
    source: Source, rows: np.ndarray, workers: int | None, sharing: int = 1
) -> Iterator[tuple[int, FileRecord | BadImage]]:
    """Decode the files of these rows, in their order, and yield (row, the record or the error of its file).

    workers: see `scan`. sharing: number of processes that share the cores of this machine.
    """
    start, todo = time.monotonic(), rows.tolist()
    if workers is None:
        workers = max(1, num_cores() // sharing)
        for done, row in enumerate(todo):
            if workers > 1 and done and done % CHUNK == 0:
                left = (time.monotonic() - start) / done * (len(todo) - done)
                if left > PATIENCE:
                    todo = todo[done:]
                    break
            yield row, _scan_file(source, row)
        else:
            return
    if workers <= 0:
        yield from ((row, _scan_file(source, row)) for row in todo)
        return
    chunks = [todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK)]
    while chunks:
        done = 0
        try:
            with process_pool(workers, _begin, (source,)) as pool:
                for chunk, found in zip(chunks, pool.map(_scan_many, chunks), strict=True):
                    yield from zip(chunk, found, strict=True)
                    done += 1
        except BrokenProcessPool:
            # A file killed its worker (out of memory, or a crash in a decoder). Scan this chunk with one process for
            # each file to find that file. If it is in a later chunk instead, it will break the next pool.
            for row in chunks[done]:
                yield row, _scan_separately(source, row)
            done += 1
        chunks = chunks[done:]


_source: Source | None = None  # source of a worker process, sent once instead of with every chunk


def _begin(source: Source) -> None:
    global _source
    _source = source


def _scan_many(rows: list[int]) -> list[FileRecord | BadImage]:
    assert _source is not None
    return [_scan_file(_source, row) for row in rows]


def _scan_separately(source: Source, row: int) -> FileRecord | BadImage:
    try:
        with process_pool(1, _begin, (source,)) as pool:
            return pool.submit(_scan_many, [row]).result()[0]
    except BrokenProcessPool:
        return BadImage("CORRUPT", "decoding the file crashed the process")


def _scan_file(source: Source, row: int, like: tuple[int, str] | None = None) -> FileRecord | BadImage:
    """Decode one file and return its record or its error.

    like: (channels, dtype) of the data set to convert to, None for no conversion. A file whose header predicts high
    memory use or a long time is decoded in a separate process with limits on both.
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
        return BadImage("CORRUPT", "decoding the file crashed the process")


def _decoded(data: bytes, head: Header, like: tuple[int, str] | None, nodata: Nodata) -> FileRecord:
    """Return the record of an image, computed piece by piece to avoid a second copy of a large image."""
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
    return FileRecord(
        size=(head.height, head.width),
        channels=channels,
        dtype=dtype,
        format=head.format,
        layout=layout,
        valid=there,
        sums=sums,
        squares=squares,
        digest=digest,
    )


def _sums(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums (C,) of the values and of their squares for pixels (n, C)."""
    if flat.dtype == np.uint8:  # summing a histogram is exact and fast
        counts = np.stack([np.bincount(flat[:, c], minlength=256) for c in range(flat.shape[1])])
        levels = np.arange(256, dtype=np.float64)
        return counts @ levels, counts @ levels**2
    values = flat.astype(np.float64)
    return values.sum(0), (values**2).sum(0)


def _summarise(
    result: Scan, source: Source, records: FileRecords, faults: dict[int, BadFile], channels: int | None
) -> None:
    result.channels = Counter(records.channels.tolist())
    result.dtypes = Counter(records.dtypes.astype(str).tolist())
    result.formats = Counter(records.formats.astype(str).tolist())
    kinds = zip(records.formats.astype(str).tolist(), records.channels.tolist(), records.layouts.tolist(), strict=True)
    for (kind, own_channels, code), count in Counter(kinds).items():
        result.layouts[kind, own_channels, Layout.from_code(code)] = count
    wanted_channels = channels or (result.channels.most_common(1)[0][0] if len(records) else 0)
    wanted_dtype = _widest(result.dtypes) if len(records) else "uint8"
    unlike = _unlike(records, wanted_channels, wanted_dtype)
    for place, error in unlike.items():
        row = int(records.rows[place])
        faults[row] = BadFile(source.names[row], error.code, error.detail)
    if unlike:
        records = records.at(np.setdiff1d(np.arange(len(records)), list(unlike)))
    result.constant = constant_images(source, records)
    result.bad_rows = np.array(sorted(faults), np.int64)
    result.bad = [faults[row] for row in sorted(faults)]
    result.good_rows = records.rows
    result.channels_majority, result.dtype_majority = wanted_channels, wanted_dtype
    if len(records):
        sizes = records.sizes.astype(np.int64)
        result.min_size, result.max_size = _pair(sizes.min(0)), _pair(sizes.max(0))
        result.median_size = _pair(np.median(sizes, axis=0))
        width = np.dtype(wanted_dtype).itemsize * wanted_channels
        result.decoded_bytes = float(sizes.prod(1).mean()) * width
        pixels = sizes.prod(1)
        result.absent_share = 1 - float(records.valid.sum() / pixels.sum())
        result.absent_files, result.empty_files = int((records.valid < pixels).sum()), int((records.valid == 0).sum())
        result.mean, result.std = _statistics(source, records, wanted_channels, wanted_dtype)


def _unlike(records: FileRecords, channels: int, dtype: str) -> dict[int, BadImage]:
    """Return the positions of the records that cannot be converted to `channels` and `dtype`, with the error."""
    found: dict[int, BadImage] = {}
    for own_channels in np.unique(records.channels).tolist():
        for own_dtype in np.unique(records.dtypes).tolist():
            try:
                pixels_module.conform(np.zeros((1, 1, own_channels), own_dtype.decode()), channels, dtype)
            except BadImage as error:
                there = (records.channels == own_channels) & (records.dtypes == own_dtype)
                found |= dict.fromkeys(np.flatnonzero(there).tolist(), error)
    return found


def _widest(dtypes: Counter[str]) -> str:
    """Return the most frequent dtype, but uint16 if both it and uint8 occur, because only uint8 can be converted."""
    common = dtypes.most_common(1)[0][0]
    return "uint16" if common == "uint8" and dtypes["uint16"] else common


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _statistics(
    source: Source, records: FileRecords, channels: int, dtype: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of an evenly spaced sample, in the data set's channels and units.

    Absent pixels are excluded.
    """
    alike = records.at(np.flatnonzero((records.channels == 1) | (records.channels == channels)))
    if not len(alike):  # colour images read as gray: sums per channel do not give the standard deviation of the luma
        rows = records.rows[_evenly(len(records), RESCAN_SAMPLE)]
        again = FileRecordsBuilder()
        for row in rows.tolist():
            if isinstance(found := _scan_file(source, row, (channels, dtype)), FileRecord):
                again.add(row, found)
        alike = again.build()
    if not alike.valid.any():
        return (0.0,) * channels, (1.0,) * channels
    count, sums, squares = 0, np.zeros(channels), np.zeros(channels)
    alike = alike.at(_evenly(len(alike), STATISTICS_SAMPLE))
    for place, start in enumerate(alike.starts.tolist()):
        own = slice(start, start + int(alike.channels[place]))  # the sum of a gray image is broadcast
        scale = 257 if dtype == "uint16" and alike.dtypes[place] == b"uint8" else 1
        count += int(alike.valid[place])
        sums, squares = sums + alike.sums[own] * scale, squares + alike.squares[own] * scale**2
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std = np.where(
        std > 1e-6 * np.maximum(1e-6, np.abs(mean)), std, 1.0
    )  # avoid division by zero for constant channels
    return tuple(mean.tolist()), tuple(std.tolist())


def _evenly(count: int, most: int) -> np.ndarray:
    """Return at most `most` evenly spaced positions below `count`."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))
