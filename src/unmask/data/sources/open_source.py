"""Where images come from: a folder tree, list file, glob, tar, zip, parquet, single files, or an embedded set.

A `Source` gives names, sizes, labels and the bytes of row i; it decodes nothing. Names are stable and sorted (a list
keeps its own order), '/'-separated and relative, and safe to print: control characters, and bytes that are no text, are
escaped. The real path is kept apart. Sources can be pickled and forked: a file handle is opened by the process that
uses it, and names are one block of bytes (`names.py`), so a million of them cost a forked worker nothing. A zip costs
it about 550 bytes a member, because Python's zipfile keeps a directory of its own.

Class labels are the names of the first folder level that has more than one sub-folder, when every image lies in one of
them; folders that are called train, val or test are splits, not classes.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import hashlib
import io
import lzma
import os
import re
import stat
import struct
import tarfile
import time
import zipfile
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unmask.data.class_names import are_fractions, class_name, class_order
from unmask.data.decode.decode import MOST_BYTES, BadImage
from unmask.data.decode.reading import Reading
from unmask.data.sources.list_file import read_list
from unmask.data.sources.parquet_columns import (
    LABELS,
    NAMES,
    class_label_names,
    image_bytes,
    image_column,
    is_text,
    parquet_labels,
)
from unmask.data.sources.system_folders import is_hidden, is_system
from unmask.data.sources.tar_index import Member, TarIndex, webdataset_labels
from unmask.data.string_table import Names
from unmask.errors import SourceError, some

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".npy")
LISTS = (".txt", ".lst", ".csv", ".tsv")
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
EMBEDDED = ("shapes", "shapes-test", "digits", "digits-test")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}
MOST_UNPACKED = 2 << 30
MOST_FILES = 1_000
SHARD_ENDINGS = (".parquet", ".pq", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")  # as they are counted
WINDOWS = (0, 6, 10, 11, 14)  # FAT, HPFS, NTFS by two numbers, VFAT: the systems a zip member may say it was made on
WHAT_DATA_IS = "a folder, a list file (.txt, .csv), a glob, a .tar, .zip or .parquet file, or shapes or digits"


class Source(ABC):
    """Rows of images. `name` as typed, `location` what opens it again from anywhere, `skipped` what was passed over.

    `changed` (n,) int64 is when each row's file (or the archive it lies in) last changed in content, name or mode,
    `modified` (n,) int64 when its content was last written, both in nanoseconds since 1970 and -1 where unknown; None
    for images that lie in no file. `digests` (n,) uint64 are those of `content_digest`, 0 where unknown, for whoever
    has read the files (a scan, a run's record); None where nobody has. `opened` is when listing
    began, in seconds since 1970. `reading` is how the files are to be decoded. `data` and `exclude` are what
    `open_source` takes to open it again from anywhere, `excluded` how many images each pattern of `exclude` left out.
    """

    def __init__(
        self, name: str, names: Sequence[str], sizes: Sequence[int] | np.ndarray, *, location: str | None = None
    ) -> None:
        self.name = name
        self.location = location if location is not None else str(Path(name).absolute())
        self.names = names if isinstance(names, Names) else Names(names)
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
        now = None if path is None else _stat(path)
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


def classes_of(names: Sequence[str]) -> tuple[list[str], np.ndarray | None, list[str]]:
    """(classes, labels or None, split folders found instead of classes) from '/'-separated names."""
    place: dict[str, int] = {}  # of each folder: many names lie in few
    where = np.fromiter((place.setdefault(name.rpartition("/")[0], len(place)) for name in names), np.int64, len(names))
    folders = [folder.split("/") if folder else [] for folder in place]
    depth = min((len(parts) for parts in folders), default=0)
    for level in range(depth):
        here = sorted({parts[level] for parts in folders})
        if len(here) > 1:
            if {name.lower() for name in here} <= SPLITS:
                return [], None, here
            known = {name: class_name(name) for name in here}  # two spellings of one name are one class
            classes = sorted(set(known.values()))
            if len(classes) < 2:
                continue
            number = {name: i for i, name in enumerate(classes)}
            return classes, np.array([number[known[parts[level]]] for parts in folders], np.int64)[where], []
    return [], None, []


def require_labels(source: Source, known: Sequence[str] = ()) -> Source:
    """The source, if it has labels. Raises SourceError that says why not, and how to give some.

    known: the classes of other images, of which these may have a single one.
    """
    folders = (
        {name.partition("/")[0] if "/" in name else "" for name in source.names} if source.labels is None else set()
    )
    if len(folders) == 1 and folders <= set(known):
        source.classes, source.labels = sorted(folders), np.zeros(len(source), np.int64)
    if source.labels is None:
        if source.unlabelled:
            raise SourceError(f"{source.name} has no class labels: {source.unlabelled}")
        if source.split_folders:
            raise SourceError(
                f"{source.name} holds {', '.join(source.split_folders)}, which are splits, not classes; point at "
                f"one of them, for example {source.name.rstrip('/')}/{source.split_folders[-1]}"
            )
        why = ""
        if len(folders) > 1 and "" in folders:
            stray = [name for name in source.names if "/" not in name]
            why = f": {len(stray)} of its images lie beside the sub-folders ({some(stray, 3)})"
        elif len(folders) == 1 and "" not in folders:
            why = f": all its images lie in one sub-folder, {folders.pop()}"
        raise SourceError(
            f"{source.name} has no class labels{why}; they come from sub-folder names: put the images of each class "
            "into a folder of its own (at least two classes)"
        )
    return source


def open_source(data: str | Path | Sequence[str | Path], exclude: Sequence[str] = ()) -> Source:
    """Open DATA, whatever it is, or several of them as one.

    exclude: patterns of names to leave out, see `joined.matcher`. Raises SourceError when it is nothing we know, is
    empty, or holds no image.
    """
    from unmask.data.sources import joined

    texts = [str(data)] if isinstance(data, str | Path) else [str(one) for one in data]
    if not texts:
        raise SourceError(f"got no DATA; expected {WHAT_DATA_IS}")
    began = time.time()
    if len(texts) > 1 and all(text.lower().endswith(EXTENSIONS) and os.path.isfile(text) for text in texts):
        if len(texts) > MOST_FILES:
            raise SourceError(
                f"got {len(texts)} image files; at most {MOST_FILES} can be named one by one: put the glob in quotes"
            )
        parts: list[Source] = [open_files(texts)]
        places = tuple(os.path.abspath(text) for text in texts)
    else:
        parts = [_open_one(text) for text in texts]
        places = tuple(part.location for part in parts)
    left = [joined.exclude(part, exclude) for part in parts]
    source = left[0] if len(left) == 1 else joined.join(left, texts)
    source.opened, source.exclude = began, tuple(exclude)
    source.data = places[0] if len(places) == 1 else places
    source.excluded = {pattern: sum(part.excluded.get(pattern, 0) for part in left) for pattern in exclude}
    return source


def _open_one(text: str) -> Source:
    stem, _, count = text.partition(":")
    path = Path(text)
    exists = os.path.exists(text)  # unlike Path.exists, no error for a name that is too long or a closed folder
    if not exists and stem in EMBEDDED:
        return _embedded(text, stem, count)
    source: Source
    if not exists and glob.has_magic(text):
        source = _from_glob(text)
    elif not exists:
        raise SourceError(f"{text} does not exist; {WHAT_DATA_IS} was expected{_near(text, stem)}")
    elif path.is_dir():
        source = _from_tree(text)
    elif not stat.S_ISREG(path.stat().st_mode):
        raise SourceError(f"{text} is neither a file nor a folder; {WHAT_DATA_IS} was expected")
    else:
        source = _from_file(text)
    if not len(source):
        seen = ", ".join(f"{number} {kind or 'without extension'}" for kind, number in source.skipped.most_common(5))
        raise SourceError(
            f"{text} holds no image{f' (but {seen})' if seen else ': it is empty'}; known are {' '.join(EXTENSIONS)}"
        )
    return source


def _near(text: str, stem: str) -> str:
    folder = os.path.dirname(text)
    try:
        beside = [os.path.join(folder, name) for name in os.listdir(folder or ".")]
    except (OSError, ValueError):
        beside = []
    close = difflib.get_close_matches(text, beside, 1, 0.7) + difflib.get_close_matches(stem, EMBEDDED, 1, 0.7)
    return f"; did you mean {' or '.join(close[:2])}?" if close else ""


def _from_file(text: str) -> Source:
    lower = text.lower()
    if lower.endswith(TARS):
        return TarSource(text)
    if lower.endswith(".zip"):
        return ZipSource(text)
    if lower.endswith((".parquet", ".pq")):
        return ParquetSource(text)
    if lower.endswith(LISTS):
        return _from_list(text)
    if lower.endswith(EXTENSIONS):
        return open_files([text])
    raise SourceError(f"{text} is a file of no known kind; {WHAT_DATA_IS} was expected")


# ---------------------------------------------------------------------------------------------------------- plain files


class Files(Source):
    """Files on disk: row i is the file root/relative[i]. `changed` and `modified` as in `Source`, by row."""

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
        self.relative = relative if isinstance(relative, Names) else Names(relative)
        super().__init__(name, _printed(self.relative), sizes, location=location)
        self.changed, self.modified = np.array(changed, np.int64), np.array(modified, np.int64)

    def path(self, i: int) -> str:
        return os.path.join(self.root, self.relative[i])

    def read(self, i: int) -> bytes:
        path = self.path(i)
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
                raise BadImage("NOT_IMAGE", "it is a folder, a pipe or a device, not a regular file")
            if found.st_size > MOST_BYTES:
                raise BadImage("TOO_LARGE_FILE", f"{found.st_size} bytes, at most {MOST_BYTES} are read")
            with open(path, "rb") as file:
                return file.read(found.st_size)  # no more, should it be growing
        except PermissionError:
            raise BadImage("PERMISSION", "the file may not be read; check its owner and mode") from None
        except OSError as error:
            raise BadImage("VANISHED", f"the file cannot be read: {error.strerror}") from None


def printable(path: str) -> str:
    """A path with '/' separators, safe for JSON and screens: \\xNN stands for control characters and for non-UTF-8."""
    text = path.replace(os.sep, "/").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _printed(paths: Names) -> Names:
    """`printable` of each; the very same object where that changes nothing, as it nearly always does."""
    if paths.blob.isascii() and os.sep == "/" and not re.search(rb"[\x00-\x1f\x7f]", paths.blob):
        return paths
    printed = Names(printable(path) for path in paths)
    return paths if printed.same(paths) else printed


def last_change(found: os.stat_result) -> int:
    """When a file's content, name or mode was last changed: nobody can set back the second of these (on Windows, which
    has none, it is when the file was made)."""
    return max(found.st_mtime_ns, found.st_ctime_ns)


class _Listing:
    """Files as they are found: a list of paths and two arrays of plain numbers."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.sizes, self.changed, self.modified = array("q"), array("q"), array("q")

    def add(self, path: str, found: os.stat_result | None) -> None:
        self.paths.append(path)
        self.sizes.append(-1 if found is None else found.st_size)  # kept as a row: reading it will say what is wrong
        self.changed.append(-1 if found is None else last_change(found))
        self.modified.append(-1 if found is None else found.st_mtime_ns)

    def files(self, name: str, root: str, *, ordered: bool, location: str | None = None) -> Files:
        """All of them as a source: as they came when `ordered`, otherwise sorted by the bytes of their paths."""
        order = np.arange(len(self.paths))
        if not ordered:
            plain = all(map(str.isascii, self.paths))  # then text sorts as its bytes do
            keys = self.paths if plain else [os.fsencode(path) for path in self.paths]
            order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
        paths = Names([self.paths[i] for i in order.tolist()])
        columns = (np.array(column, np.int64)[order] for column in (self.sizes, self.changed, self.modified))
        return Files(name, root, paths, *columns, location=location)


def _from_tree(text: str) -> Source:
    skipped: Counter[str] = Counter()
    listing = _Listing()
    _walk(text, listing, skipped)
    if not listing.paths and any(skipped[ending] for ending in SHARD_ENDINGS) and (shards := _shards_below(text)):
        return _from_shards(text, os.path.abspath(text), shards, location=os.path.abspath(text))
    source = listing.files(text, os.path.abspath(text), ordered=False)
    source.skipped = skipped
    source.label_by_folder()
    return source


def _shards_below(root: str) -> list[str]:
    """Paths of the parquet and tar files in a folder, relative to it; hidden and system folders are passed over."""
    from unmask.data.sources.joined import SHARDS

    found = []
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not is_hidden(name) and not is_system(name))
        found += [os.path.join(folder, name) for name in files if name.lower().endswith(SHARDS) and not is_hidden(name)]
    return found


def _from_shards(text: str, root: str, paths: Sequence[str], *, location: str) -> Source:
    from unmask.data.sources.joined import open_shards

    relative = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    return open_shards(text, root, relative, location=location)


def _walk(root: str, listing: _Listing, skipped: Counter[str], wanted: Callable[[str], bool] | None = None) -> None:
    """Add every image file whose relative path is `wanted`.

    Each folder once, so a loop of links ends; a folder is taken by its shallowest path; run folders are passed over.
    Nothing but stat is called.
    """
    seen: set[tuple[int, int]] = set()
    level = [""]
    while level:
        level = [path for folder in level for path in _list_folder(root, folder, seen, listing, skipped, wanted)]


def _list_folder(
    root: str,
    folder: str,
    seen: set[tuple[int, int]],
    listing: _Listing,
    skipped: Counter[str],
    wanted: Callable[[str], bool] | None,
) -> list[str]:
    """Add the images of one folder; returns its sub-folders, links last."""
    try:
        here = os.stat(os.path.join(root, folder))
        if (here.st_dev, here.st_ino) in seen:
            skipped["folder seen before"] += 1
            return []
        seen.add((here.st_dev, here.st_ino))
        with os.scandir(os.path.join(root, folder)) as entries:
            found = [entry for entry in entries if not _hidden(entry.name, skipped)]
        if {"config.json", "plan.json"} <= {entry.name for entry in found}:
            skipped["run folder"] += 1  # its pictures are no data, and a run made here could not go on
            return []
    except PermissionError:
        skipped["folder without permission"] += 1
        return []
    except OSError:
        skipped["folder that cannot be read"] += 1
        return []
    below: list[os.DirEntry[str]] = []
    for entry in found:
        path = f"{folder}{os.sep}{entry.name}" if folder else entry.name
        try:
            if entry.is_dir():
                below.append(entry)
            elif wanted is not None and not wanted(path.replace(os.sep, "/")):
                continue
            elif not entry.name.lower().endswith(EXTENSIONS):
                skipped[os.path.splitext(entry.name)[1].lower()] += 1
            elif entry.is_file():
                listing.add(path, entry.stat())
            elif entry.is_symlink() and not os.path.exists(entry.path):
                skipped["broken link"] += 1
            else:
                skipped["not a regular file"] += 1
        except OSError:
            skipped["broken link"] += 1
    below.sort(key=lambda entry: (entry.is_symlink(), os.fsencode(entry.name)))
    return [os.path.join(folder, entry.name) for entry in below]


def _hidden(name: str, skipped: Counter[str]) -> bool:
    """Whether to skip a file or folder by its name; folders of a system or tool are counted."""
    if is_system(name):
        skipped[f"system folder {name}"] += 1
    return is_hidden(name)


def _from_glob(text: str) -> Source:
    skipped: Counter[str] = Counter()
    parts = text.replace(os.sep, "/").split("/")
    if "**" in parts:  # not by glob: it follows links in circles
        plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root = "/".join(parts[:plain]) + ("/" if plain else "")

        def wanted(path: str) -> bool:
            return _matches(path.split("/"), parts[plain:])

        listing = _Listing()
        _walk(root or ".", listing, skipped, wanted)
        found = [os.path.join(root, path) for path in listing.paths]
    else:
        found = []
        for path in glob.iglob(text):
            if _in_system_folder(path, parts, skipped):
                continue
            if path.lower().endswith(EXTENSIONS) and os.path.isfile(path):
                found.append(path)
            elif os.path.isfile(path):
                skipped[os.path.splitext(path)[1].lower()] += 1
    location = text if os.path.isabs(text) else os.path.join(glob.escape(os.getcwd()), text)
    if not found and any(skipped[ending] for ending in SHARD_ENDINGS):
        paths = [os.path.abspath(path) for path in glob.glob(text, recursive=True)]
        shards = [path for path in paths if path.lower().endswith((".parquet", ".pq", *TARS)) and os.path.isfile(path)]
        if len(shards) == 1:
            source = _from_file(shards[0])
            source.name, source.location = text, location
            return source
        if shards:
            return _from_shards(
                text, os.path.commonpath([os.path.dirname(path) for path in shards]), shards, location=location
            )
    if not found and not skipped:
        raise SourceError(f"{text} matches no file; put the pattern in quotes, and use ** for any depth")
    source = _absolute_files(text, sorted(found, key=os.fsencode), location=location)
    source.skipped = skipped
    source.label_by_folder()
    return source


def _in_system_folder(path: str, parts: Sequence[str], skipped: Counter[str]) -> bool:
    """Whether a wildcard of the glob, and not a name in it, led into a folder of a system or tool."""
    names = path.replace(os.sep, "/").split("/")
    wild = (name for name, part in zip(names, parts, strict=False) if glob.has_magic(part))
    return any(_hidden(name, skipped) for name in wild if is_system(name))


def _matches(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob, in which ** is any number of folders."""
    if not parts or list(parts) == ["**"]:
        return bool(parts) or not names
    if parts[0] == "**":
        return any(_matches(names[i:], parts[1:]) for i in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def _absolute_files(text: str, paths: Sequence[str], *, location: str | None = None) -> Files:
    """Files anywhere; names are relative to their longest common folder."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute]) if absolute else os.getcwd()
    listing = _Listing()
    for path in absolute:
        listing.add(os.path.relpath(path, root), _stat(path))
    return listing.files(text, root, ordered=True, location=location)


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def open_files(paths: Sequence[str | Path]) -> Files:
    """Exactly these files, in this order. Raises SourceError when one is missing."""
    for path in paths:
        if not os.path.isfile(path):
            raise SourceError(f"{path} is not a file; image files were expected")
    texts = [str(path) for path in paths]
    name = texts[0] if len(texts) == 1 else f"{len(texts)} files"
    return _absolute_files(name, texts, location=os.path.abspath(texts[0]))


def _from_list(text: str) -> Files:
    """The images of a list file, in its order; see `list_file.py`."""
    folder = os.path.dirname(os.path.abspath(text))
    try:
        entries = read_list(text, EXTENSIONS)
    except OSError as error:
        raise SourceError(f"the list {text} cannot be read: {error.strerror}") from None
    paths = [os.path.join(folder, entry.path) for entry in entries]
    if paths and all(_stat(path) is None for path in paths):
        raise SourceError(
            f"none of the {len(paths)} files listed in {text} exists, the first is {paths[0]}; paths are read "
            f"relative to {folder}"
        )
    source = _absolute_files(text, paths)
    labels = [entry.label for entry in entries]
    labelled = [label for label in labels if label is not None]
    if not labelled:
        source.label_by_folder()
    elif len(labelled) == len(labels):
        source.label_by(labelled)
    else:
        missing = labels.index(None)
        raise SourceError(
            f"{len(labelled)} of {len(labels)} lines of {text} give a label, and others do not, for example "
            f"{source.names[missing]} in line {entries[missing].line}; give every line a label, or none"
        )
    return source


# ------------------------------------------------------------------------------------------------------------- archives


def _has_image_name(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _is_kept(name: str) -> bool:
    """Whether a member of a compressed tar may be needed: an image, or a label of a webdataset."""
    return name.lower().endswith((*EXTENSIONS, ".cls", ".json"))


def _wanted(name: str, size: int, skipped: Counter[str]) -> bool:
    """Whether an archive member is an image we read; nothing is ever unpacked to disk."""
    parts = name.split("/")
    if ".." in parts:
        skipped["path that leaves the archive"] += 1
        return False
    if any(_hidden(part, skipped) for part in parts if part != "."):  # ./a.jpg is what tar makes of a.jpg in a folder
        return False
    if not name.lower().endswith(EXTENSIONS):
        skipped[os.path.splitext(name)[1].lower()] += 1
        return False
    if size > MOST_BYTES:
        skipped["member too large"] += 1
        return False
    return True


class TarSource(Source):
    """A tar file. Plain: an index of offsets is made once. Compressed: read into memory once, up to 2 GiB.

    Labels are those of a webdataset (`000123.cls` or `000123.json` beside `000123.jpg`), or else the folders' names.
    """

    def __init__(self, text: str) -> None:
        compressed = _is_compressed(text)
        index = TarIndex(_is_kept if compressed else None, MOST_UNPACKED)
        try:
            with tarfile.open(text) as archive:
                index.read(archive, _has_image_name)
        except SourceError:
            raise
        except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            if not index.images:
                why = str(error).splitlines()[0]
                raise SourceError(f"{text} cannot be read as a tar file: {why}") from None
            raise SourceError(
                f"{text} is damaged or cut short behind its {index.images} first images, the last of them "
                f"{printable(index.last)}; copy it again, or unpack what is there and give the folder"
            ) from None
        skipped, members = index.skipped, index.members
        names = sorted(name for name, member in members.items() if _wanted(name, member.size, skipped))
        images = [members[name] for name in names]
        super().__init__(text, [printable(name) for name in names], [member.size for member in images])
        self.skipped = skipped
        self.changed, self.modified = _times_of_archive(text, len(images))
        self.offsets = np.array([member.offset for member in images], np.int64)
        self.contents = [member.content or b"" for member in images] if compressed else None
        self._label(names, members)

    def _label(self, names: list[str], members: dict[str, Member]) -> None:
        with open(self.location, "rb") as file:

            def content(member: Member) -> bytes:
                if member.content is not None:
                    return member.content
                file.seek(member.offset)
                return file.read(member.size)

            labels, self.unlabelled, ending = webdataset_labels(names, members, content)
        self.has_label_files = bool(ending)
        if ending:
            del self.skipped[ending]  # they were read
        if labels is not None:
            self.label_by(labels)
        elif not self.unlabelled:
            self.label_by_folder()

    def path(self, i: int) -> str | None:
        return self.location if self.contents is None else None

    def read(self, i: int) -> bytes:
        if self.contents is not None:
            return self.contents[i]
        try:
            with open(self.location, "rb") as file:
                file.seek(int(self.offsets[i]))
                return file.read(int(self.sizes[i]))
        except OSError as error:
            raise BadImage("VANISHED", f"the archive cannot be read any more: {error.strerror}") from None


def _times_of_archive(path: str, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """`Source.changed` and `Source.modified` of the members: those of their archive."""
    found = _stat(path)
    times = (-1, -1) if found is None else (last_change(found), found.st_mtime_ns)
    return np.full(rows, times[0], np.int64), np.full(rows, times[1], np.int64)


def _is_compressed(path: str) -> bool:
    """By its first bytes: what is called .tar may be compressed all the same."""
    try:
        with open(path, "rb") as file:
            return file.read(8).startswith(COMPRESSED)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A member's path. Some tools of Windows separate folders by backslashes, as unzip knows too; elsewhere a backslash
    is a letter like others."""
    if info.create_system in WINDOWS and "/" not in info.filename:
        return info.filename.replace("\\", "/")
    return info.filename


class ZipSource(Source):
    """A zip file; members are read one at a time, checked against their CRC."""

    def __init__(self, text: str) -> None:
        skipped: Counter[str] = Counter()
        members: dict[str, tuple[str, int]] = {}  # own name and size; the last of a name is what reading gives
        try:
            with zipfile.ZipFile(text) as archive:
                for info in archive.infolist():
                    name = _zip_name(info)
                    if name.endswith("/"):
                        continue
                    if (info.external_attr >> 28) not in (0, 8):  # a link
                        skipped["not a regular file"] += 1
                    elif _wanted(name, info.file_size, skipped):
                        if name in members:
                            skipped["replaced by a later member of the same name"] += 1
                        members[name] = info.filename, info.file_size
        # NotImplementedError is zipfile's word for a version of the format that it does not know.
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
            raise SourceError(f"{text} cannot be read as a zip file: {error}") from None
        ordered = sorted(members)
        names, self.members = Names(ordered), Names([members[name][0] for name in ordered])
        self.members = names if names.same(self.members) else self.members
        super().__init__(text, _printed(names), [members[name][1] for name in ordered])
        self.changed, self.modified = _times_of_archive(text, len(members))
        self.skipped = skipped
        self.label_by_folder()
        self._open: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def read(self, i: int) -> bytes:
        try:
            if self._open is None or self._open[0] != os.getpid():  # one handle a process
                self._open = os.getpid(), zipfile.ZipFile(self.location)
            archive = self._open[1]
            if archive.getinfo(self.members[i]).flag_bits & 1:
                raise BadImage("PERMISSION", "the zip member is encrypted; unpack the archive with its password")
            with archive.open(self.members[i]) as file:
                return file.read(MOST_BYTES + 1)
        except NotImplementedError as error:  # zipfile's word for a compression it does not know
            raise BadImage("FORMAT_NOT_ALLOWED", f"zip member: {error}") from None
        except (KeyError, FileNotFoundError, PermissionError) as error:
            raise BadImage("VANISHED", f"the archive cannot be read any more: {error}") from None
        except EOFError:
            raise BadImage("TRUNCATED", "the zip member ends early") from None
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, BadImage):
                raise
            raise BadImage("CORRUPT", f"zip member: {error}") from None


class ParquetSource(Source):
    """A parquet file with a column of image bytes (or {bytes, path} structs), and perhaps a label column."""

    def __init__(self, text: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(text) as file:
                schema = file.schema_arrow
                self.column = image_column(schema, text)
                self.struct = pa.types.is_struct(schema.field(self.column).type)
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                _refuse_large_groups(file, self.column, text)
                names = _parquet_names(file, schema, self.column, self.struct)
                label = next((name for name in LABELS if name in schema.names), None)
                self.class_list = [] if label is None else [class_name(n) for n in class_label_names(schema, label)]
                self.layout = (self.column, label, self.class_list)
                labels = parquet_labels(file, schema, text)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{text} cannot be read as a parquet file: {error}") from None
        self.starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        super().__init__(text, names, np.zeros(len(names), np.int64))
        self.changed, self.modified = _times_of_archive(text, len(names))
        self.digest = hashlib.sha256(str((os.path.getsize(text), rows)).encode()).hexdigest()
        self.classes, self.labels, self.unlabelled = labels.classes, labels.numbers, labels.why
        self.groups: dict[tuple[str, int], Any] = {}  # row groups in memory, the one used last at the end

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"groups": {}}

    def fingerprint(self) -> str:
        return hashlib.sha256((super().fingerprint() + self.digest).encode()).hexdigest()

    def read(self, i: int) -> bytes:
        group = int(np.searchsorted(self.starts, i, "right")) - 1
        # Rows are drawn at random, and only whole groups can be read: without keeping them every image would cost one.
        held, key = self.groups, (self.location, group)
        column = held.pop(key) if key in held else self._read_group(group)
        held[key] = column
        while len(held) > 1 and sum(one.nbytes for one in held.values()) > MOST_UNPACKED:
            del held[next(iter(held))]
        value = image_bytes(column[i - int(self.starts[group])])
        if not value:
            raise BadImage("EMPTY", "the row has no image bytes")
        return value

    def _read_group(self, group: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.location) as file:
                return file.read_row_group(group, [self.column], use_threads=False).column(self.column)
        except (FileNotFoundError, PermissionError) as error:
            raise BadImage("VANISHED", f"the file cannot be read any more: {error.strerror}") from None
        except (pa.ArrowException, OSError, IndexError) as error:
            raise BadImage("CORRUPT", f"row group {group} cannot be read: {error}") from None


def _refuse_large_groups(file: Any, column: str, text: str) -> None:
    """Raises SourceError for row groups, which are read whole, of more bytes than may be held, by the file's count."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = (group.column(index) for index in range(group.num_columns))
        size = sum(
            chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] == column
        )
        if size > MOST_UNPACKED:
            raise SourceError(
                f"{text}: row group {number} holds {size / 2**30:.1f} GiB of images in {group.num_rows} rows, at most "
                f"{MOST_UNPACKED / 2**30:.3g} GiB are read at once; write it with smaller groups, for example "
                'pyarrow.parquet.write_table(table, "smaller.parquet", row_group_size=1000)'
            )


def _parquet_names(file: Any, schema: Any, column: str, struct: bool) -> list[str]:
    for name in NAMES:
        if name in schema.names and name != column and is_text(schema.field(name).type):
            return [printable(str(value)) for value in file.read([name]).column(name).to_pylist()]
    if struct and "path" in [field.name for field in schema.field(column).type]:
        paths = [(value or {}).get("path") for value in file.read([f"{column}.path"]).column(column).to_pylist()]
        if all(paths):
            return [printable(str(path)) for path in paths]
    return [f"row-{row:08d}" for row in range(file.metadata.num_rows)]


# ------------------------------------------------------------------------------------------------------------- embedded


class Drawn(Source):
    """Images that are computed, not stored: row i is index first + i of the embedded set `shapes`."""

    def __init__(self, text: str, first: int, count: int) -> None:
        from unmask.data import shapes

        super().__init__(text, [f"shapes-{first + i:06d}" for i in range(count)], np.zeros(count), location=text)
        self.classes = list(shapes.CLASSES)
        self.pixels, self.labels = shapes.draw(np.arange(first, first + count))

    def read(self, i: int) -> bytes:
        return _as_npy(self.pixels[i])


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 gray, as uint8; a fifth of each class is the test part."""

    def __init__(self, text: str, *, test: bool) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.argsort(labels, kind="stable")
        place = np.empty(len(labels), np.int64)  # of each image within its class
        for label in range(10):
            place[order[labels[order] == label]] = np.arange((labels == label).sum())
        rows = np.flatnonzero((place % 5 == 4) == test)
        super().__init__(text, [f"digit-{row:04d}" for row in rows], np.zeros(len(rows)), location=text)
        self.pixels = (pixels[rows].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.labels, self.classes = labels[rows].astype(np.int64), [str(digit) for digit in range(10)]

    def read(self, i: int) -> bytes:
        return _as_npy(self.pixels[i])


def _as_npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels, allow_pickle=False)
    return file.getvalue()


def _embedded(text: str, stem: str, count: str) -> Source:
    """`shapes`, `digits-test`, or with the first so many only: `shapes:5000`."""
    if count and not (count.isdigit() and int(count) > 0):
        raise SourceError(f"{text!r} came; {stem} or {stem}:N with a number of images N was expected")
    if stem.startswith("digits"):
        source: Source = Digits(text, test=stem.endswith("test"))
        if count:
            raise SourceError(f"{text!r} came; digits has no part of its own size, use digits or digits-test")
        return source
    from unmask.data import shapes

    whole = shapes.TEST if stem.endswith("test") else shapes.TRAIN
    if count and int(count) > whole:
        raise SourceError(f"{text!r} came; {stem} has {whole} images")
    return Drawn(text, shapes.TRAIN if stem.endswith("test") else 0, int(count) if count else whole)
