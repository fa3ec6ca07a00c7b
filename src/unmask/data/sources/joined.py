"""Several sources as one: shards of parquet or tar files in a folder or glob, several DATA, and images left out.

Shards are read in sorted order, each only when one of its images is needed. Their images are named `shard/name`, the
path of the shard without its ending first; that is no class. Labels are those of the shards (a column, a webdataset's
.cls or .json, folders), by the names of the classes. Shards of different columns or classes are refused. A folder of
one tar to a class (`cats.tar`, `dogs.tar`) has the classes of its files' names.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unmask.data.class_names import class_name, class_order
from unmask.data.sources.open_source import SPLITS, TARS, ParquetSource, Source, TarSource, classes_of, printable
from unmask.data.string_table import Names
from unmask.errors import SourceError, some

PARQUET = (".parquet", ".pq")
SHARDS = (*PARQUET, *TARS)


class Joined(Source):
    """The rows of several sources, one after another. prefixes: a folder for the names of each, None for none."""

    def __init__(
        self, name: str, parts: Sequence[Source], prefixes: Sequence[str] | None = None, *, location: str | None = None
    ) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)]).astype(np.int64)
        folders = [f"{folder}/" for folder in prefixes] if prefixes is not None else [""] * len(self.parts)
        names = Names(
            f"{folder}{name}" for folder, part in zip(folders, self.parts, strict=True) for name in part.names
        )
        super().__init__(name, names, np.concatenate([part.sizes for part in self.parts]), location=location)
        if any(part.changed is not None for part in self.parts):
            self.changed = np.concatenate([_or_unknown(part.changed, part) for part in self.parts])
            self.modified = np.concatenate([_or_unknown(part.modified, part) for part in self.parts])
        for part in self.parts:
            self.skipped.update(part.skipped)
        self._join_labels()
        self._share_groups()

    def _join_labels(self) -> None:
        if bare := [part for part in self.parts if part.labels is None]:
            labelled = len(self.parts) - len(bare)
            self.unlabelled = next((part.unlabelled for part in bare if part.unlabelled), "")
            if labelled and not self.unlabelled:
                self.unlabelled = f"{labelled} of its {len(self.parts)} parts have labels, and {bare[0].name} has none"
            self.split_folders = next((part.split_folders for part in bare if part.split_folders), [])
            return
        own = [part.classes for part in self.parts]
        listed = getattr(self.parts[0], "class_list", [])
        together = set().union(*own)
        if all(classes == own[0] for classes in own):
            self.classes = list(own[0])
        elif together <= set(listed):
            self.classes = [name for name in listed if name in together]
        else:
            self.classes = class_order(together)
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.concatenate([
            np.array([number[name] for name in part.classes], np.int64)[part.labels] for part in self.parts
        ])  # fmt: skip

    def _share_groups(self) -> None:
        """Parquet files keep row groups in memory up to a limit, which is one for all of them."""
        groups: dict[Any, Any] = {}
        for part in self.parts:
            if isinstance(part, ParquetSource):
                part.groups = groups

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._share_groups()

    def _at(self, i: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self.starts, i, "right")) - 1
        return self.parts[part], i - int(self.starts[part])

    def path(self, i: int) -> str | None:
        part, row = self._at(i)
        return part.path(row)

    def read(self, i: int) -> bytes:
        part, row = self._at(i)
        return part.read(row)

    def fingerprint(self) -> str:
        return _digest([super().fingerprint(), *(part.fingerprint() for part in self.parts)])


class Selected(Source):
    """Some rows of a source, in its order. by_folder: whether classes are to be found anew in the names that remain."""

    def __init__(self, inner: Source, rows: np.ndarray) -> None:
        self.inner, self.rows = inner, np.asarray(rows, np.int64)
        names = Names([inner.names[row] for row in self.rows.tolist()])
        super().__init__(inner.name, names, inner.sizes[self.rows], location=inner.location)
        self.changed = None if inner.changed is None else inner.changed[self.rows]
        self.modified = None if inner.modified is None else inner.modified[self.rows]
        self.skipped.update(inner.skipped)
        self.unlabelled = inner.unlabelled
        before = classes_of(inner.names)
        if isinstance(inner, Joined):
            by_folder = False
        elif inner.labels is None:
            by_folder = not inner.unlabelled
        else:
            by_folder = before[0] == inner.classes and np.array_equal(before[1], inner.labels)  # type: ignore[arg-type]
        if by_folder:
            self.label_by_folder()
        elif inner.labels is not None:
            there, self.labels = np.unique(inner.labels[self.rows], return_inverse=True)
            self.classes = [inner.classes[label] for label in there.tolist()]

    def path(self, i: int) -> str | None:
        return self.inner.path(int(self.rows[i]))

    def read(self, i: int) -> bytes:
        return self.inner.read(int(self.rows[i]))

    def fingerprint(self) -> str:
        if type(self.inner).fingerprint is Source.fingerprint:
            return super().fingerprint()
        return _digest([super().fingerprint(), self.inner.fingerprint()])


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _or_unknown(times: np.ndarray | None, part: Source) -> np.ndarray:
    return np.full(len(part), -1, np.int64) if times is None else times


# --------------------------------------------------------------------------------------------------------------- shards


def open_shards(name: str, root: str, relative: Sequence[str], *, location: str) -> Source:
    """These files of parquet or tar, relative to `root` ("/" between folders), as one source.

    Raises SourceError for shards of both kinds, of different columns, and of none that holds an image.
    """
    relative = sorted(relative)
    tables = [path for path in relative if path.lower().endswith(PARQUET)]
    if tables and len(tables) < len(relative):
        tar = next(path for path in relative if path not in tables)
        raise SourceError(
            f"{name} holds parquet and tar files ({tables[0]} and {tar}); shards of one kind were expected: give a "
            "glob of one of them, in quotes"
        )
    parts = [(ParquetSource if tables else TarSource)(os.path.join(root, path)) for path in relative]
    if tables:
        _require_alike(name, relative, parts)
    stems = [printable(_stem(path)) for path in relative]
    source = Joined(name, parts, stems, location=location)
    if splits := _splits(relative):
        source.classes, source.labels = [], None
        source.unlabelled = (
            f"its shards are of several splits ({', '.join(splits)}), which are no classes; give the shards of one of "
            "them, as a glob in quotes or a folder"
        )
    elif not tables and not any(part.has_label_files for part in parts if isinstance(part, TarSource)):
        _label_tars(source, stems)
    return source


def _stem(path: str) -> str:
    lower = path.lower()
    return path[: -max(len(ending) for ending in SHARDS if lower.endswith(ending))]


def _require_alike(name: str, relative: Sequence[str], parts: Sequence[Any]) -> None:
    """Raise SourceError where parquet files differ in the columns that are read, or in the names of their classes."""
    for path, part in zip(relative, parts, strict=True):
        for what, first, other in zip(
            ("the image column", "the label column", "the classes"), parts[0].layout, part.layout, strict=True
        ):
            if first != other:
                raise SourceError(
                    f"the parquet files of {name} differ in {what}: {relative[0]} has {_shown(first)}, {path} has "
                    f"{_shown(other)}; give a glob of those that belong together, in quotes"
                )


def _shown(value: Any) -> str:
    return some(value, 4) if isinstance(value, list) and value else str(value or "none")


def _splits(relative: Sequence[str]) -> list[str]:
    """The splits that the names of shards begin with, or folders around them: train-00000-of-00004, test/0.tar."""
    found = set()
    for path in relative:
        words = [*path.split("/")[:-1], re.split(r"[-_.]", posixpath.basename(path))[0]]
        found.add(next((word for word in words if word.lower() in SPLITS), ""))
    return sorted(found) if len(found) > 1 and "" not in found else []  # one split, or shards that are none


def _label_tars(source: Joined, stems: Sequence[str]) -> None:
    """Label by the folders within all tars, or else by the tar an image lies in, where each is called after a class.

    Numbered shards hold anything; a class of numbers (n01440764.tar) shows in the names of its files too.
    """
    source.unlabelled = ""
    source.classes, source.labels, source.split_folders = classes_of([n for part in source.parts for n in part.names])
    if source.labels is not None or source.split_folders:
        return
    bases = [posixpath.basename(stem) for stem in stems]
    if len(set(bases)) < 2 or len(set(bases)) < len(bases):
        return
    numbered = len({re.sub(r"\d+", "", base) for base in bases}) < len(bases)
    if numbered and not all(
        posixpath.basename(part.names[0]).startswith(base) for part, base in zip(source.parts, bases, strict=True)
        if len(part)
    ):  # fmt: skip
        return
    names = [class_name(base) for base in bases]
    source.classes = class_order(names)
    number = {name: i for i, name in enumerate(source.classes)}
    lengths = np.diff(source.starts)
    source.labels = np.repeat(np.array([number[name] for name in names], np.int64), lengths)


# ------------------------------------------------------------------------------------------------------- several DATA


def join(parts: Sequence[Source], texts: Sequence[str]) -> Source:
    """Several DATA as one. Where a name occurs in more than one of them, each gets the name of its DATA as a folder."""
    every = Counter(name for part in parts for name in part.names)
    prefixes = None
    if len(every) < sum(map(len, parts)):
        prefixes, taken = [], Counter[str]()
        for text in texts:
            base = printable(posixpath.basename(text.replace(os.sep, "/").rstrip("/"))) or "data"
            taken[base] += 1
            prefixes.append(base if taken[base] == 1 else f"{base}-{taken[base]}")
    return Joined(f"{some(texts, 3)}", parts, prefixes, location="\n".join(part.location for part in parts))


def exclude(source: Source, patterns: Sequence[str]) -> Source:
    """The source without the images whose name matches one of these patterns; `excluded` counts them by pattern."""
    if not patterns:
        return source
    out = np.zeros(len(source), bool)
    counts: dict[str, int] = {}
    for pattern in patterns:
        matches = matcher(pattern)
        hit = np.fromiter((matches(name) for name in source.names), bool, len(source))
        counts[pattern] = int((hit & ~out).sum())
        out |= hit
    if out.all() and len(source):
        raise SourceError(
            f"--exclude {' '.join(patterns)} leaves none of the {len(source)} images of {source.name}; leave one out"
        )
    left = Selected(source, np.flatnonzero(~out)) if out.any() else source
    left.excluded = counts
    return left


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a pattern matches a '/'-separated name. Case counts; * and ? stop at "/", ** is any number of folders.

    Without "/" it matches a file's or a folder's own name anywhere, otherwise the whole path from its beginning; what
    lies below a folder that matches is matched too. Raises SourceError for brackets without a set of letters.
    """
    parts = pattern.strip("/").split("/")
    anywhere = "/" not in pattern.strip("/")
    text = "".join(
        "(?:[^/]+/)*" if part == "**" else _part(part) + ("/" if place < len(parts) - 1 else "")
        for place, part in enumerate(parts)
    )
    whole = ("(?:^|/)" if anywhere else "^") + text + ("" if parts[-1] == "**" else "(?:/|$)")
    try:
        found = re.compile(whole)
    except re.error:
        raise SourceError(
            f"got the pattern {pattern!r} to exclude, whose brackets hold no set of letters; expected one such as "
            "[0-9] or [!a-c]; write [[] for a bracket in a name"
        ) from None
    return lambda name: found.search(name) is not None


def _part(part: str) -> str:
    """The regular expression of one part of a glob."""
    pieces, place = [], 0
    while place < len(part):
        letter, end = part[place], part.find("]", place + 2)
        if letter == "[" and end > 0:
            inside = re.sub(r"([\[\\&~|])", r"\\\1", part[place + 1 : end])
            pieces.append(f"[{'^' + inside[1:] if inside[0] in '!^' else inside}]")
            place = end
        else:
            pieces.append({"*": "[^/]*", "?": "[^/]"}.get(letter, re.escape(letter)))
        place += 1
    return "".join(pieces)
