"""The base class of all sources: names, sizes, labels, times of change, and the bytes of each row.

A source decodes nothing. Names are stable and sorted (a list keeps its own order), '/'-separated and relative, and safe
to print: control characters and bytes that are not UTF-8 are escaped; the real path is stored separately. Sources can
be pickled and forked: each process opens its own file handles, and the names are one block of bytes
(`files/string_table.py`), so that a million of them cost a forked worker nothing.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unmask.data.annotations.class_names import are_fractions, class_name, class_order
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.reading import Reading
from unmask.data.files.string_table import StringTable
from unmask.data.sources.class_folders import classes_of
from unmask.errors import some


@dataclass(frozen=True)
class Opener:
    """How one kind of data is recognised by the text that names it, and opened; `what` names the kind in messages."""

    what: str
    opens: Callable[[str], bool]
    open: Callable[[str], Source]


class Source(ABC):
    """Rows of images.

    name: DATA as typed. location: opens the source again from any working directory. skipped: counts of files that were
    skipped, by reason or extension. changed: (n,) int64, when each row's file (or its archive) last changed in content,
    name or mode; modified: (n,) int64, when its content was last written; both in nanoseconds since 1970, -1 where
    unknown, None for images that are not in a file. digests: (n,) uint64 of `content_digest`, 0 where unknown; None
    until a scan or the record of a run sets them. opened: when listing began, in seconds since 1970. class_list: the
    order of classes that the file declares, [] without one. unlabelled: why a label-like column or folder gives no
    labels. reading: how the files are decoded. data, exclude: the arguments of `open_source` that open it again.
    excluded: how many images each pattern of `exclude` left out.
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
        """Return the bytes of row i. Raises BadImage with VANISHED or PERMISSION when the file cannot be read."""

    def path(self, i: int) -> str | None:
        """Return the file that row i is read from; None for images in memory."""
        return self.location

    def read_unchanged(self, i: int) -> bytes:
        """Return the bytes of row i. Raises BadImage with CHANGED when they changed since the source was opened.

        Costs one stat. Where the time of the last change differs, the digest is compared; where that is unknown, a file
        of the same modification time counts as unchanged.
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
            raise BadImage("CHANGED", "the file's content has changed since it was listed")
        return data

    def fingerprint(self) -> str:
        """Return the SHA-256 of names and sizes: it changes when files are added, removed, renamed or resized."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self.sizes.tolist(), strict=True):
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def label_by_folder(self) -> None:
        """Set labels from folder names; see `class_folders.py`."""
        self.classes, self.labels, self.split_folders = classes_of(self.names)

    def label_by(self, values: Sequence[str]) -> None:
        """Set labels from one text per row. Whole numbers are ordered as numbers; fractions are not classes."""
        known = {value: class_name(value) for value in dict.fromkeys(values)}
        if are_fractions(known):
            self.unlabelled = (
                f"its labels are fractions such as {some(known, 3)}, quantities rather than classes: give them to "
                "`unmask probe --targets`, or write classes as text"
            )
            return
        self.classes = class_order(known.values())
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([number[known[value]] for value in values], np.int64)


def content_digest(data: bytes) -> int:
    """Return 64 bits of BLAKE2b of a file's bytes, never 0: equal for copied, moved or touched files."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def printable(path: str) -> str:
    """Return a path with '/' separators, safe for JSON and terminals: control characters and non-UTF-8 become \\xNN."""
    text = path.replace(os.sep, "/").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def printable_names(paths: StringTable) -> StringTable:
    """Apply `printable` to each path; returns `paths` itself where nothing changes, which is the usual case."""
    if paths.blob.isascii() and os.sep == "/" and not re.search(rb"[\x00-\x1f\x7f]", paths.blob):
        return paths
    printed = StringTable(printable(path) for path in paths)
    return paths if printed.same(paths) else printed


def last_change(found: os.stat_result) -> int:
    """Return when a file's content, name or mode last changed, in nanoseconds since 1970.

    Includes st_ctime, which programs cannot set back (on Windows it is the time of creation).
    """
    return max(found.st_mtime_ns, found.st_ctime_ns)


def stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
