"""Looks at every file before training: what can be read, of what size and kind, with which mean and deviation.

Decodes each file in full (or an even sample of them), one at a time, and keeps only sums. It judges nothing: what share
of bad files is too much is the caller's to say.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from unmask.data import decode
from unmask.data.decode import BadImage
from unmask.data.sources import Source

STATISTICS_SAMPLE = 10_000
CHUNK = 64
EXTENSION_OF = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"), "BMP": (".bmp",), "GIF": (".gif",), "NPY": (".npy",),
}  # fmt: skip


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used, and why: a reason code for machines, a detail for people."""

    name: str
    code: str
    detail: str


@dataclass(frozen=True)
class _Seen:
    """One readable file; sums per channel are of its values and their squares."""

    size: tuple[int, int]
    channels: int
    dtype: str
    format: str
    values: int
    sums: np.ndarray
    squares: np.ndarray


@dataclass
class Scan:
    """What a source holds. Sizes are (H, W) in pixels as displayed; mean and std per channel in the files' units."""

    source: str
    files: int
    checked: int
    bad: list[BadFile] = field(default_factory=list)
    bad_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    good_rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    min_size: tuple[int, int] = (0, 0)
    median_size: tuple[int, int] = (0, 0)
    max_size: tuple[int, int] = (0, 0)
    channels: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    wrong_extensions: int = 0
    channels_majority: int = 0
    dtype_majority: str = "uint8"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    decoded_bytes: float = 0.0  # of one image, on average
    seconds: float = 0.0

    @property
    def good(self) -> int:
        return len(self.good_rows)

    @property
    def bad_fraction(self) -> float:
        return len(self.bad) / max(1, self.checked)

    @property
    def sampled(self) -> bool:
        return self.checked < self.files


def scan(
    source: Source,
    *,
    sample: int | None = None,
    workers: int = 0,
    channels: int | None = None,
    dtype: str | None = None,
    progress: Callable[[int], object] | None = None,
) -> Scan:
    """Decode every file, or `sample` of them evenly spread.

    channels, dtype: what the images must conform to; None means what most of them are. Files that cannot conform are bad.
    """
    start = time.monotonic()
    rows = np.arange(len(source))
    if sample is not None and sample < len(rows):
        rows = np.unique(np.linspace(0, len(rows) - 1, sample).astype(np.int64))
    result = Scan(source.name, files=len(source), checked=len(rows))
    seen: dict[int, _Seen] = {}
    faults: dict[int, BadFile] = {}
    for done, (row, found) in enumerate(_look_at(source, rows, workers), 1):
        if isinstance(found, BadImage):
            faults[row] = BadFile(source.names[row], found.code, found.detail)
        else:
            seen[row] = found
        if progress is not None and (done % CHUNK == 0 or done == len(rows)):
            progress(done)
    _summarise(result, source, seen, faults, channels, dtype)
    result.seconds = time.monotonic() - start
    return result


def _look_at(source: Source, rows: np.ndarray, workers: int) -> Iterator[tuple[int, _Seen | BadImage]]:
    if workers <= 0:
        for row in rows.tolist():
            yield row, _look(source, row)
        return
    chunks = [rows[i : i + CHUNK].tolist() for i in range(0, len(rows), CHUNK)]
    done = 0
    try:
        with ProcessPoolExecutor(workers) as pool:
            for chunk, found in zip(chunks, pool.map(_look_many, [source] * len(chunks), chunks), strict=True):
                yield from zip(chunk, found, strict=True)
                done += 1
    except BrokenProcessPool:
        # A file killed its worker (out of memory, a crash in a decoder). Find it: one process for each file.
        for chunk in chunks[done:]:
            for row in chunk:
                yield row, _look_apart(source, row)


def _look_many(source: Source, rows: list[int]) -> list[_Seen | BadImage]:
    return [_look(source, row) for row in rows]


def _look_apart(source: Source, row: int) -> _Seen | BadImage:
    try:
        with ProcessPoolExecutor(1) as pool:
            return pool.submit(_look, source, row).result()
    except BrokenProcessPool:
        return BadImage("CORRUPT", "decoding it killed the process")


def _look(source: Source, row: int) -> _Seen | BadImage:
    try:
        data = source.read(row)
        head = decode.header(data)
        pixels = decode.decode(data)
    except BadImage as error:
        return error
    except MemoryError:
        return BadImage("TOO_MANY_PIXELS", "not enough memory to decode it")
    flat = pixels.reshape(-1, pixels.shape[2])
    if pixels.dtype == np.uint8:  # exact and fast: sums of a histogram
        counts = np.stack([np.bincount(flat[:, c], minlength=256) for c in range(flat.shape[1])])
        levels = np.arange(256, dtype=np.float64)
        sums, squares = counts @ levels, counts @ levels**2
    else:
        values = flat.astype(np.float64)
        sums, squares = values.sum(0), (values**2).sum(0)
    size = (pixels.shape[0], pixels.shape[1])
    return _Seen(size, pixels.shape[2], str(pixels.dtype), head.format, len(flat), sums, squares)


def _summarise(
    result: Scan,
    source: Source,
    seen: dict[int, _Seen],
    faults: dict[int, BadFile],
    channels: int | None,
    dtype: str | None,
) -> None:
    result.channels = Counter(found.channels for found in seen.values())
    result.dtypes = Counter(found.dtype for found in seen.values())
    result.formats = Counter(found.format for found in seen.values())
    wanted_channels = channels or (result.channels.most_common(1)[0][0] if seen else 0)
    wanted_dtype = dtype or (_widest(result.dtypes) if seen else "uint8")
    for row, found in list(seen.items()):
        try:
            decode.conform(np.zeros((1, 1, found.channels), found.dtype), wanted_channels, wanted_dtype)
        except BadImage as error:
            faults[row] = BadFile(source.names[row], error.code, error.detail)
            del seen[row]
    for row, found in seen.items():
        suffix = PurePosixPath(source.names[row]).suffix.lower()
        result.wrong_extensions += bool(suffix) and suffix not in EXTENSION_OF.get(found.format, (suffix,))
    result.bad_rows = np.array(sorted(faults), np.int64)
    result.bad = [faults[row] for row in sorted(faults)]
    result.good_rows = np.array(sorted(seen), np.int64)
    result.channels_majority, result.dtype_majority = wanted_channels, wanted_dtype
    if seen:
        sizes = np.array([found.size for found in seen.values()])
        result.min_size, result.max_size = _pair(sizes.min(0)), _pair(sizes.max(0))
        result.median_size = _pair(np.median(sizes, axis=0))
        width = np.dtype(wanted_dtype).itemsize * wanted_channels
        result.decoded_bytes = float(sizes.prod(1).mean()) * width
        result.mean, result.std = _statistics(list(seen.values()), wanted_channels, wanted_dtype)


def _widest(dtypes: Counter[str]) -> str:
    """float32 or uint8 as most are; uint16 as soon as some are, because uint8 can become uint16 but not the other way."""
    common = dtypes.most_common(1)[0][0]
    return "uint16" if common == "uint8" and dtypes["uint16"] else common


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _statistics(seen: list[_Seen], channels: int, dtype: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation over an even part of the images that need no conversion."""
    alike = [found for found in seen if found.channels == channels and found.dtype == dtype] or seen
    alike = [alike[i] for i in np.unique(np.linspace(0, len(alike) - 1, STATISTICS_SAMPLE).astype(int))]
    count = sum(found.values for found in alike)
    sums, squares = sum(found.sums for found in alike), sum(found.squares for found in alike)
    mean = np.resize(sums / count, channels)
    std = np.sqrt(np.maximum(np.resize(squares / count, channels) - mean**2, 0))
    std = np.where(std > 1e-6 * np.maximum(1e-6, np.abs(mean)), std, 1.0)  # a constant channel is left as it is
    return tuple(mean.tolist()), tuple(std.tolist())
