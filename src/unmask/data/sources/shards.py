"""Parquet or tar shards in a folder or glob, as one source.

Shards are sorted, and each is read only when one of its images is needed. Images are named `shard/name`; the shard is
not a class. Labels are those of the shards (a column, a webdataset's .cls or .json, folders), joined by class name.
Shards of different columns or classes are rejected. A folder with one tar per class (`cats.tar`, `dogs.tar`) has the
classes of its file names.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from unmask.data.annotations.class_names import class_name, class_order
from unmask.data.sources.class_folders import SPLITS, classes_of
from unmask.data.sources.joined import JoinedSource
from unmask.data.sources.parquet_file import ParquetSource
from unmask.data.sources.source import Source, printable
from unmask.data.sources.tar_file import TARS, TarSource
from unmask.errors import SourceError, some

PARQUET = (".parquet", ".pq")
SHARDS = (*PARQUET, *TARS)
SHARD_ENDINGS = (
    ".parquet",
    ".pq",
    ".tar",
    ".gz",
    ".tgz",
    ".bz2",
    ".tbz2",
    ".xz",
    ".txz",
)  # last suffixes, as `skipped` counts them


def open_shard(path: str) -> Source:
    """Open one parquet or tar file."""
    return ParquetSource(path) if path.lower().endswith(PARQUET) else TarSource(path)


def open_shards_below(name: str, root: str, paths: Sequence[str], *, location: str) -> Source:
    """Open parquet or tar files below the folder `root` as one source."""
    relative = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    return open_shards(name, root, relative, location=location)


def open_shards(name: str, root: str, relative: Sequence[str], *, location: str) -> Source:
    """Open parquet or tar files, given relative to `root` with "/" between folders, as one source.

    Raises SourceError for shards of both kinds and for shards of different columns.
    """
    relative = sorted(relative)
    tables = [path for path in relative if path.lower().endswith(PARQUET)]
    if tables and len(tables) < len(relative):
        tar = next(path for path in relative if path not in tables)
        raise SourceError(
            f"{name} holds parquet and tar files ({tables[0]} and {tar}); expected shards of one kind: give a "
            "glob of one of them, in quotes"
        )
    parts = [(ParquetSource if tables else TarSource)(os.path.join(root, path)) for path in relative]
    if tables:
        _require_alike(name, relative, parts)
    stems = [printable(_stem(path)) for path in relative]
    source = JoinedSource(name, parts, stems, location=location)
    if splits := _splits(relative):
        source.classes, source.labels = [], None
        source.unlabelled = (
            f"its shards are of several splits ({', '.join(splits)}), which are not classes; give the shards of one of "
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
                    f"{_shown(other)}; give a glob of shards that match, in quotes"
                )


def _shown(value: Any) -> str:
    return some(value, 4) if isinstance(value, list) and value else str(value or "none")


def _splits(relative: Sequence[str]) -> list[str]:
    """Return the splits that file or folder names of shards begin with: train-00000-of-00004, test/0.tar."""
    found = set()
    for path in relative:
        words = [*path.split("/")[:-1], re.split(r"[-_.]", posixpath.basename(path))[0]]
        found.add(next((word for word in words if word.lower() in SPLITS), ""))
    return sorted(found) if len(found) > 1 and "" not in found else []  # [] for one split or none


def _label_tars(source: JoinedSource, stems: Sequence[str]) -> None:
    """Label by the folders within all tars, or else by the name of each image's tar, if each tar is one class.

    Numbered shards are not classes; where a class name is a number (n01440764.tar), the names of its files contain it.
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
