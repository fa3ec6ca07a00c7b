"""The scan cache: records of readable files as columns of numbers, stored between commands.

A scan decodes every file, which takes most of the time before the first training step on a large folder. The results of
a scan are stored in a cache folder (never among the images), and later scans decode only files that are new, or whose
size or time of change differs. If the cache is damaged, from another version, or not writable, the files are scanned
again. Unreadable files are not cached, because the cause may be outside the file (a mount, a permission, memory).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np

from unmask.data.decode import decode
from unmask.data.decode.layout import Layout
from unmask.data.files.npz_file import read_arrays, write_arrays
from unmask.data.files.string_table import StringTable
from unmask.data.sources.source import Source

LAYOUT = 3
WORD = np.dtype("S8")
WORTH_KEEPING = 2.0  # Scan results that took more seconds of work than this are stored.
COARSEST_CLOCK = 2_000_000_000
"""Nanoseconds within which a file system with a coarse clock may give two changes the same time."""
COLUMNS = ("sizes", "channels", "dtypes", "formats", "layouts", "valid", "sums", "squares", "digests")
DECODERS = ("numpy", "pillow", "simplejpeg", "tifffile")


@dataclass(frozen=True)
class FileRecord:
    """Scan result of one readable file.

    valid: number of pixels that are not absent. sums, squares: (C,), sums over these pixels of the values and of their
    squares. digest: see `source.content_digest`.
    """

    size: tuple[int, int]
    channels: int
    dtype: str
    format: str
    layout: Layout
    valid: int
    sums: np.ndarray
    squares: np.ndarray
    digest: int


@dataclass(frozen=True)
class FileRecords:
    """Records of n readable files, sorted by row; about 90 bytes per colour image.

    rows: (n,) int64, rows of the source.
    sizes: (n, 2) int32.
    channels: (n,) int32.
    dtypes, formats: (n,) ASCII words of at most 8 letters.
    layouts: (n,) int64, see `layout.Layout.code`.
    valid: (n,) int64, number of pixels that are not absent.
    sums, squares: (sum of channels,) float64, the channels of all files one after another.
    digests: (n,) uint64, see `source.content_digest`.
    """

    rows: np.ndarray
    sizes: np.ndarray
    channels: np.ndarray
    dtypes: np.ndarray
    formats: np.ndarray
    layouts: np.ndarray
    valid: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def starts(self) -> np.ndarray:
        """Position of each file's first channel in `sums` and `squares`, (n,) int64."""
        return np.cumsum(self.channels, dtype=np.int64) - self.channels

    def at(self, places: np.ndarray) -> FileRecords:
        """Return the records at these positions, in this order."""
        channels = self.channels[places].astype(np.int64)
        within = np.arange(channels.sum()) - np.repeat(np.cumsum(channels) - channels, channels)
        inside = np.repeat(self.starts[places], channels) + within
        return FileRecords(
            rows=self.rows[places],
            sizes=self.sizes[places],
            channels=self.channels[places],
            dtypes=self.dtypes[places],
            formats=self.formats[places],
            layouts=self.layouts[places],
            valid=self.valid[places],
            sums=self.sums[inside],
            squares=self.squares[inside],
            digests=self.digests[places],
        )

    def with_rows(self, rows: np.ndarray) -> FileRecords:
        """Return the same records, assigned to these rows of a source."""
        return replace(self, rows=rows)


def joined(several: Iterable[FileRecords]) -> FileRecords:
    """Return all records, sorted by row."""
    columns = zip(*(vars(records).values() for records in several), strict=True)
    both = FileRecords(*(np.concatenate(column) for column in columns))
    return both if (np.diff(both.rows) > 0).all() else both.at(np.argsort(both.rows, kind="stable"))


class FileRecordsBuilder:
    """Collects the records of single files into columns."""

    def __init__(self) -> None:
        self.rows, self.sizes, self.channels = array("q"), array("i"), array("i")
        self.dtypes, self.formats, self.layouts, self.valid = array("B"), array("B"), array("q"), array("q")
        self.sums, self.squares, self.digests = array("d"), array("d"), array("Q")
        self.words: list[str] = []

    def add(self, row: int, record: FileRecord) -> None:
        self.rows.append(row)
        self.sizes.extend(record.size)
        self.channels.append(record.channels)
        self.dtypes.append(self._code(record.dtype))
        self.formats.append(self._code(record.format))
        self.layouts.append(record.layout.code)
        self.valid.append(record.valid)
        self.sums.extend(record.sums.tolist())
        self.squares.extend(record.squares.tolist())
        self.digests.append(record.digest)

    def _code(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def build(self) -> FileRecords:
        words = np.array(self.words or [""], WORD)
        return FileRecords(
            rows=np.array(self.rows, np.int64),
            sizes=np.array(self.sizes, np.int32).reshape(-1, 2),
            channels=np.array(self.channels, np.int32),
            dtypes=words[np.array(self.dtypes, np.uint8)],
            formats=words[np.array(self.formats, np.uint8)],
            layouts=np.array(self.layouts, np.int64),
            valid=np.array(self.valid, np.int64),
            sums=np.array(self.sums),
            squares=np.array(self.squares),
            digests=np.array(self.digests, np.uint64),
        )


def cache_folder() -> Path | None:
    """Return $UNMASK_CACHE, or `unmask` in the user's cache folder, or None if UNMASK_CACHE=off."""
    setting = os.environ.get("UNMASK_CACHE")
    if setting:
        return None if setting.lower() == "off" else Path(setting)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"
    except RuntimeError:  # a user without a home folder
        return None


def cache_file(source: Source) -> Path | None:
    """Return the cache file of a source, or None for embedded images and if the cache is off."""
    folder = cache_folder()
    if folder is None or source.changed is None:
        return None
    what = f"{source.location}\0{source.reading.model_dump_json()}"
    place = hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()
    return folder / f"scan-{place[:32]}.arrays"


def load_records(source: Source) -> FileRecords | None:
    """Return the stored records of files that have not changed, or None if there are none."""
    file = cache_file(source)
    stored = None if file is None else read_arrays(file)
    if stored is None or source.changed is None or stored["about"].item() != _about():
        return None
    names = StringTable.stored(stored["names"].tobytes(), stored["ends"])
    kept = FileRecords(np.arange(len(names)), *(stored[name] for name in COLUMNS))
    sizes, changed = stored["bytes"], stored["changed"]
    place = _places(names, source.names)  # position of each row among the stored records, or -1
    rows = np.flatnonzero((place >= 0) & (sizes[place] == source.sizes) & (changed[place] == source.changed))
    return kept.at(place[rows]).with_rows(rows) if len(rows) else None


def store_records(source: Source, records: FileRecords, began: float) -> str:
    """Store all known records of a source; return why they could not be stored, "" on success.

    began: when the scan began, in seconds since 1970. Files that changed after `began`, or less than COARSEST_CLOCK
    nanoseconds before it, are not stored.
    """
    file = cache_file(source)
    if file is None or source.changed is None:
        return ""  # nothing to store
    changed = source.changed[records.rows]
    long_ago = np.flatnonzero((changed >= 0) & (changed < int(began * 1e9) - COARSEST_CLOCK))
    if not len(long_ago):
        with suppress(OSError):  # delete the stored records, which are outdated
            file.unlink()
        return "the files were written only a moment ago"
    records, changed = records.at(long_ago), changed[long_ago]
    names = (
        source.names if len(records) == len(source) else StringTable(source.names[row] for row in records.rows.tolist())
    )
    arrays = {name: getattr(records, name) for name in COLUMNS} | {
        "about": np.array(_about()),
        "names": np.frombuffer(names.blob, np.uint8),
        "ends": names.ends,
        "bytes": source.sizes[records.rows],
        "changed": changed,
    }
    try:
        write_arrays(file, arrays)
    except (OSError, MemoryError) as error:  # not fatal: the next scan decodes the files again
        reason = error.strerror if isinstance(error, OSError) else "not enough memory"
        return f"cannot write to {file.parent} ({reason}); set UNMASK_CACHE to another folder"
    return ""


def is_worth_storing(began: float) -> bool:
    """Return whether the work since `began` (seconds since 1970) took long enough for its results to be stored."""
    return time.time() - began > WORTH_KEEPING


def _places(known: StringTable, names: StringTable) -> np.ndarray:
    """Return the position (n,) of each of `names` in `known`; -1 for missing and repeated names."""
    if known.same(names):
        return np.arange(len(names))
    places: dict[str, int] = {}
    for place, name in enumerate(known):
        places[name] = -1 if name in places else place
    return np.fromiter((places.get(name, -1) for name in names), np.int64, len(names))


def decoder_versions() -> dict[str, str]:
    """Return the versions of the installed packages that decode pixels."""
    versions = {}
    for package in DECODERS:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _about() -> str:
    """Return the decoder versions and a digest of the code in decode/, both of which the cached records depend on."""
    versions = decoder_versions()
    modules = sorted(Path(decode.__file__ or "").parent.glob("*.py"))
    how = hashlib.sha256(b"".join(module.read_bytes() for module in modules)).hexdigest()
    return json.dumps({"layout": LAYOUT, "versions": versions, "how": how}, sort_keys=True)
