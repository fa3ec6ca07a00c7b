"""Compare a data set with its record: names, sizes, times and content digests of its files.

A `DatasetRecord` needs about 60 bytes per file, plus the names. Files whose time of change equals the recorded one are
not read. All other files are compared by content, so that copied, moved or touched files count as unchanged, and
replaced files as changed even if they have the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unmask.data.decode.bad_image import BadImage
from unmask.data.files.npz_file import read_arrays, write_arrays
from unmask.data.files.string_table import StringTable
from unmask.data.scan.scan_cache import COARSEST_CLOCK
from unmask.data.sources.source import Source, content_digest
from unmask.errors import listed

COLUMNS = ("sizes", "changed", "modified", "digests")
LAYOUT = 1


@dataclass(frozen=True)
class DatasetRecord:
    """Names, sizes, times and digests of the files of a data set, one row each; columns as in `Source`.

    sizes, changed, modified: (n,) int64, -1 if unknown. digests: (n,) uint64, 0 if unknown.
    """

    names: StringTable
    sizes: np.ndarray
    changed: np.ndarray
    modified: np.ndarray
    digests: np.ndarray

    def write(self, path: Path) -> None:
        """Write the record to a file. Raises OSError."""
        write_arrays(path, {
            "layout": np.array(LAYOUT), "names": np.frombuffer(self.names.blob, np.uint8), "ends": self.names.ends,
            **{column: getattr(self, column) for column in COLUMNS},
        })  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Differences between a data set and its record; false if there are none.

    changed: (name, how it changed).
    reread: number of files that were read because their times differ.
    unknown: why files could not be compared by content.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[tuple[str, str]] = field(default_factory=list)
    reordered: bool = False
    reread: int = 0
    unknown: str = ""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.reordered or self.unknown)

    def lines(self, count: int = 5) -> str:
        """Return the number of added, removed and changed files with their first names, as part of a sentence."""
        if self.unknown:
            return self.unknown
        kinds = [
            ("changed", [f"{name} ({how})" for name, how in self.changed]),
            ("removed", self.removed),
            ("added", self.added),
        ]
        parts = [f"{len(names)} {kind}: {listed(names, count)}" for kind, names in kinds if names]
        return "; ".join(parts) if parts else "the same files in another order"

    def as_json(self, count: int = 20) -> dict[str, object]:
        """Return the count and the first names for each kind of difference, for the run's record."""
        changed = [{"name": name, "how": how} for name, how in self.changed[:count]]
        return {
            "num_added": len(self.added), "num_removed": len(self.removed), "num_changed": len(self.changed),
            "added": self.added[:count], "removed": self.removed[:count], "changed": changed,
        }  # fmt: skip


def record_of(source: Source) -> DatasetRecord:
    """Return the record of a source, with the digests known so far.

    A file that changed just before it was listed is recorded without a time, because a file system with a coarse clock
    could give its next change the same time.
    """
    unknown = np.full(len(source), -1, np.int64)
    changed = unknown if source.changed is None else source.changed
    long_ago = changed < int(source.opened * 1e9) - COARSEST_CLOCK
    return DatasetRecord(
        names=source.names,
        sizes=source.sizes,
        changed=np.where(long_ago, changed, -1),
        modified=unknown if source.modified is None else source.modified,
        digests=np.zeros(len(source), np.uint64) if source.digests is None else source.digests,
    )


def read_record(path: Path) -> DatasetRecord | None:
    """Read a record, or return None if the file is missing, damaged or of another version."""
    stored = read_arrays(path)
    if stored is None or stored["layout"].item() != LAYOUT:
        return None
    return DatasetRecord(
        StringTable.stored(stored["names"].tobytes(), stored["ends"]), *(stored[column] for column in COLUMNS)
    )


def digest_all(source: Source, progress: Callable[[int], object] = lambda _: None) -> None:
    """Read every file once and set `source.digests`; 0 for files that cannot be read."""
    source.digests = np.zeros(len(source), np.uint64)
    for row in range(len(source)):
        source.digests[row] = _digest(source, row) or 0
        progress(row + 1)


def compare(
    record: DatasetRecord, source: Source, used: np.ndarray, progress: Callable[[int], object] = lambda _: None
) -> Difference:
    """Return how the source differs from its record in names and in the rows `used`, and set `source.digests`.

    Reads the files whose time of change differs. A file without a recorded digest counts as unchanged if its size and
    modification time are unchanged.
    """
    if not record.names.same(source.names):
        return _compare_names(record, source)
    source.digests = record.digests.copy()
    if source.changed is None or source.modified is None:  # embedded images are not in files
        return Difference()
    resized = record.sizes[used] != source.sizes[used]
    changed = [(row, _resized(int(record.sizes[row]), int(source.sizes[row]))) for row in used[resized].tolist()]
    same_time = (record.changed[used] == source.changed[used]) & (record.changed[used] >= 0)
    suspects = used[~resized & ~same_time]
    reread = 0
    for done, row in enumerate(suspects.tolist(), 1):
        progress(done)
        known = int(record.digests[row])
        if not known:
            if record.modified[row] != source.modified[row]:
                changed.append((row, "modified; its content was not recorded"))
            continue
        now, reread = _digest(source, row), reread + 1
        if now != known:
            source.digests[row] = now or 0
            changed.append((row, "content" if now else "can no longer be read"))
    return Difference(changed=[(source.names[row], how) for row, how in sorted(changed)], reread=reread)


def _compare_names(record: DatasetRecord, source: Source) -> Difference:
    """Return which files were added, removed or resized; copy digests to files of the same name, size and time."""
    places = {name: row for row, name in enumerate(record.names)}
    source.digests, changed, added = np.zeros(len(source), np.uint64), [], []
    for row, name in enumerate(source.names):
        old = places.pop(name, None)
        if old is None:
            added.append(name)
        elif record.sizes[old] != source.sizes[row]:
            changed.append((name, _resized(int(record.sizes[old]), int(source.sizes[row]))))
        elif source.changed is not None and source.changed[row] == record.changed[old]:
            source.digests[row] = record.digests[old]
    return Difference(added, list(places), changed, reordered=not (added or places or changed))


def _resized(before: int, now: int) -> str:
    return "missing" if now < 0 else f"size {before} -> {now} bytes" if before >= 0 else "missing before"


def _digest(source: Source, row: int) -> int | None:
    try:
        return content_digest(source.read(row))
    except BadImage:
        return None
