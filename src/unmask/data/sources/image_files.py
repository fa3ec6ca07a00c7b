"""Image files on disk."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unmask.data import limits
from unmask.data.decode.bad_image import BadImage
from unmask.data.files.string_table import StringTable
from unmask.data.sources.source import Opener, Source, last_change, printable_names, stat_or_none
from unmask.errors import SourceError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".npy")


class FilesSource(Source):
    """Files on disk: row i is the file root/relative[i]. changed, modified: (n,), see `Source`."""

    def __init__(
        self,
        name: str,
        root: str,
        relative: Sequence[str],
        sizes: Sequence[int] | np.ndarray,
        changed: Sequence[int] | np.ndarray,
        modified: Sequence[int] | np.ndarray,
        *,
        location: str | None = None,
    ) -> None:
        self.root = root
        self.relative = relative if isinstance(relative, StringTable) else StringTable(relative)
        super().__init__(name, printable_names(self.relative), sizes, location=location)
        self.changed, self.modified = np.array(changed, np.int64), np.array(modified, np.int64)

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.relative[i])

    def read(self, i: int) -> bytes:
        path = self.path(i)
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would block
                raise BadImage("NOT_IMAGE", "it is a folder, a pipe or a device, not a regular file")
            if found.st_size > limits.MAX_FILE_BYTES:
                raise BadImage("TOO_LARGE_FILE", f"got {found.st_size} bytes; expected at most {limits.MAX_FILE_BYTES}")
            with open(path, "rb") as file:
                return file.read(found.st_size)  # limit the size in case the file is growing
        except PermissionError:
            raise BadImage("PERMISSION", "no permission to read the file; check its owner and mode") from None
        except OSError as error:
            raise BadImage("VANISHED", f"the file cannot be read: {error.strerror}") from None


class Listing:
    """A growing list of files: paths, and arrays of sizes and times."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes, self.changed, self.modified = array("q"), array("q"), array("q")

    def add(self, path: str, found: os.stat_result | None) -> None:
        self.paths.append(path)
        # Missing files stay listed; reading one raises BadImage.
        self.sizes.append(-1 if found is None else found.st_size)
        self.changed.append(-1 if found is None else last_change(found))
        self.modified.append(-1 if found is None else found.st_mtime_ns)

    def files(self, name: str, root: str, *, ordered: bool, location: str | None = None) -> FilesSource:
        """Return all files as a source; in the order added if `ordered`, else sorted by the bytes of their paths."""
        order = np.arange(len(self.paths))
        if not ordered:
            plain = all(map(str.isascii, self.paths))  # ASCII text sorts in the same order as its bytes
            keys = self.paths if plain else [os.fsencode(path) for path in self.paths]
            order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        paths = StringTable([self.paths[i] for i in order.tolist()])
        columns = (np.array(column, np.int64)[order] for column in (self.sizes, self.changed, self.modified))
        return FilesSource(name, root, paths, *columns, location=location)


def absolute_files(text: str, paths: Sequence[str], *, location: str | None = None) -> FilesSource:
    """Return a source of files in any folders; names are relative to their longest common folder."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute]) if absolute else os.getcwd()
    listing = Listing()
    for path in absolute:
        listing.add(os.path.relpath(path, root), stat_or_none(path))
    return listing.files(text, root, ordered=True, location=location)


def open_files(paths: Sequence[str | Path]) -> FilesSource:
    """Return a source of exactly these files, in this order. Raises SourceError if a file is missing."""
    for path in paths:
        if not os.path.isfile(path):
            raise SourceError(f"{path} is not a file; expected image files")
    texts = [str(path) for path in paths]
    name = texts[0] if len(texts) == 1 else f"{len(texts)} files"
    return absolute_files(name, texts, location=os.path.abspath(texts[0]))


OPENER = Opener("an image file", lambda text: text.lower().endswith(EXTENSIONS), lambda text: open_files([text]))
