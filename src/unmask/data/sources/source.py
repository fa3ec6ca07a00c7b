"""What every source of images offers: names, sizes, labels, times of change, and the bytes of a row."""

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
    """How one kind of data is recognised by its text and opened; `what` names the kind in messages."""

    what: str
    opens: Callable[[str], bool]
    open: Callable[[str], Source]


class Source(ABC):
    """Rows of images. `name` as typed, `location` what opens it again from anywhere, `skipped` what was passed over.

    `changed` (n,) int64 is when each row's file (or the archive it lies in) last changed in content, name or mode,
    `modified` (n,) int64 when its content was last written, both in nanoseconds since 1970 and -1 where unknown; None
    for images that lie in no file. `digests` (n,) uint64 are those of `content_digest`, 0 where unknown, for whoever
    has read the files (a scan, a run's record); None where nobody has. `opened` is when listing began, in seconds since
    1970. `class_list` is the order of classes that the file declares, [] where it declares none. `reading` is how the
    files are to be decoded. `data` and `exclude` are what `open_source` takes to open it again from anywhere,
    `excluded` how many images each pattern of `exclude` left out.
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
        self.unlabelled = ""  # why not, where something looked like labels
        self.classes: list[str] = []
        self.class_list: list[str] = []
        self.split_folders: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The bytes of row i. Raises BadImage with VANISHED or PERMISSION when the file cannot be read."""

    def path(self, i: int) -> str | None:
        """The file on disk that row i is read from; None where it lies in memory."""
        return self.location

    def read_unchanged(self, i: int) -> bytes:
        """As `read`. Raises BadImage with CHANGED when the content is not what it was when the source was opened.

        Costs one stat. Only where the time of the last change differs is the content compared, by its digest; where
        that is unknown, a file of the same size and modification time counts as unchanged.
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
        """SHA-256 over names and sizes: changes when files are added, removed, renamed or replaced by others."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self.sizes.tolist(), strict=True):
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def label_by_folder(self) -> None:
        """Set labels from folder names; see the module docstring."""
        self.classes, self.labels, self.split_folders = classes_of(self.names)

    def label_by(self, values: Sequence[str]) -> None:
        """Set labels from one text per row; whole numbers are ordered as numbers, and fractions are no classes."""
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
    """64 bits of BLAKE2b of a file's bytes, never 0: tells changed files from copied, moved or touched ones."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def printable(path: str) -> str:
    """A path with '/' separators, safe for JSON and screens: \\xNN stands for control characters and for non-UTF-8."""
    text = path.replace(os.sep, "/").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def printable_names(paths: StringTable) -> StringTable:
    """`printable` of each; the very same object where that changes nothing, as it nearly always does."""
    if paths.blob.isascii() and os.sep == "/" and not re.search(rb"[\x00-\x1f\x7f]", paths.blob):
        return paths
    printed = StringTable(printable(path) for path in paths)
    return paths if printed.same(paths) else printed


def last_change(found: os.stat_result) -> int:
    """When a file's content, name or mode was last changed: nobody can set back the second of these (on Windows, which
    has none, it is when the file was made)."""
    return max(found.st_mtime_ns, found.st_ctime_ns)


def stat_or_none(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
