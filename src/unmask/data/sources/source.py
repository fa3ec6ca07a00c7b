"""The base class of all sources: names, sizes, labels, times of change, and the bytes of each row.

Sources do not decode images. Names are relative, '/'-separated, and sorted except for list files, which define the
order. Names are safe to print: control characters and bytes that are not UTF-8 are escaped, and the real paths are
stored separately. Sources can be pickled and forked: each process opens its own file handles, and forked workers share
the memory of the names (`files/string_table.py`).
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from unmask.data.annotations.class_names import are_fractions, class_name, class_order
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.reading import Reading
from unmask.data.files.string_table import StringTable
from unmask.data.sources.class_folders import classes_of
from unmask.errors import listed


@dataclass(frozen=True)
class Opener:
    """Recognises and opens one kind of data.

    what: name of the kind for messages. opens: tests whether DATA is of this kind. open: opens DATA.
    """

    what: str
    opens: Callable[[str], bool]
    open: Callable[[str], Source]


class Source(ABC):
    """A sequence of n image files, one per row.

    name: DATA as given by the user.
    location: DATA that opens the source again from any working directory.
    skipped: number of skipped files by reason or extension.
    changed: (n,) int64, when the content, name or mode of each row's file (or archive) last changed.
    modified: (n,) int64, when the content of each row's file (or archive) was last written.
    Both `changed` and `modified` are in nanoseconds since 1970, -1 if unknown, or None for images not in files.
    digests: (n,) uint64 of `content_digest`, 0 if unknown, or None before a scan or a comparison with a run.
    opened: when listing began, in seconds since 1970.
    class_list: order of the classes as declared by the file, [] if it declares none.
    unlabelled: why a column or folder that looks like labels was not used.
    reading: how the files are decoded.
    data, exclude: arguments of `open_source` that open the source again.
    excluded: number of images left out by each pattern of `exclude`.
    """

    def __init__(
        self, name: str, names: Sequence[str], sizes: Sequence[int] | np.ndarray, *, location: str | None = None
    ) -> None:
        self.name = name
        self.location = location if location is not None else str(Path(name).absolute())
        self.names = names if isinstance(names, StringTable) else StringTable(names)
        self.sizes = np.asarray(sizes, np.int64)
        self.changed: np.ndarray | None = None
        self.modified: np.ndarray | None = None
        self.digests: np.ndarray | None = None
        self.opened = time.time()
        self.reading = Reading()
        self.data: str | tuple[str, ...] = self.location
        self.exclude: tuple[str, ...] = ()
        self.excluded: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.labels: np.ndarray | None = None
        self.unlabelled = ""
        self.classes: list[str] = []
        self.class_list: list[str] = []
        self.split_folders: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, i: int) -> bytes:
        """Return the bytes of row i. Raises BadImage (VANISHED or PERMISSION) if the file cannot be read."""

    def path(self, i: int) -> str | None:
        """Return the path of the file that contains row i, or None for images in memory."""
        return self.location

    def read_unchanged(self, i: int) -> bytes:
        """Return the bytes of row i. Raises BadImage (CHANGED) if the file has changed since the source was opened.

        Checking for changes takes one `stat` call. If the time of change differs from the recorded one, the digests are
        compared. If the digest is unknown, a file with the same modification time counts as unchanged.
        """
        data = self.read(i)
        if self.changed is None or self.modified is None or self.changed[i] < 0:
            return data
        path = self.path(i)
        now = None if path is None else stat_or_none(path)
        if now is None or last_change(now) == self.changed[i]:
            return data
        known = 0 if self.digests is None else int(self.digests[i])
        same = content_digest(data) == known if known else now.st_mtime_ns == self.modified[i]
        if not same:
            raise BadImage("CHANGED", "the content of the file has changed since the data were opened")
        return data

    def fingerprint(self) -> str:
        """Return the SHA-256 of names and sizes, which changes if files are added, removed, renamed or resized."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self.sizes.tolist(), strict=True):
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def summary(self) -> str:
        """Return the number of images and the beginning of the fingerprint, to compare the data of several hosts."""
        return f"{len(self)} images with fingerprint {self.fingerprint()[:16]}"

    def with_reading(self, reading: Reading) -> Self:
        """Return a copy of this source whose files are decoded by `reading`."""
        return self._with(reading=reading)

    def with_digests(self, digests: np.ndarray) -> Self:
        """Return a copy of this source with the digests (n,) uint64 of its files."""
        return self._with(digests=digests)

    def with_labels(self, labels: np.ndarray, classes: Sequence[str]) -> Self:
        """Return a copy of this source with these labels (n,) int64, which are indices of `classes`."""
        return self._with(labels=labels, classes=list(classes))

    def _with(self, **changes: object) -> Self:
        changed = copy.copy(self)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    def label_by_folder(self) -> None:
        """Set labels from folder names; see `class_folders.py`."""
        self.classes, self.labels, self.split_folders = classes_of(self.names)

    def label_by(self, values: Sequence[str]) -> None:
        """Set labels from one text per row. Whole numbers are sorted as numbers; fractions are not used as classes."""
        known = {value: class_name(value) for value in dict.fromkeys(values)}
        if are_fractions(known):
            self.unlabelled = (
                f"its labels are fractions such as {listed(known, 3)}, which are quantities rather than classes; use "
                "them with `unmask probe --targets`, or write classes as text"
            )
            return
        self.classes = class_order(known.values())
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([number[known[value]] for value in values], np.int64)


def content_digest(data: bytes) -> int:
    """Return 64 bits of BLAKE2b of a file's bytes, never 0. Copied, moved or touched files have the same digest."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def printable(path: str) -> str:
    """Return a path with '/' separators that is safe to print: control characters and non-UTF-8 bytes become \\xNN."""
    text = path.replace(os.sep, "/").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def printable_names(paths: StringTable) -> StringTable:
    """Apply `printable` to each path; return `paths` itself if no path changes, which is the usual case."""
    if paths.blob.isascii() and os.sep == "/" and not re.search(rb"[\x00-\x1f\x7f]", paths.blob):
        return paths
    printed = StringTable(printable(path) for path in paths)
    return paths if printed.same(paths) else printed


def last_change(found: os.stat_result) -> int:
    """Return when a file's content, name or mode last changed, in nanoseconds since 1970.

    The result is the later of st_mtime and st_ctime, because programs cannot set back st_ctime (on Windows, the time of
    creation).
    """
    return max(found.st_mtime_ns, found.st_ctime_ns)


def stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
