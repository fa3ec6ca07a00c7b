"""Open the parquet or tar shards of a folder or glob as one source.

Shards are sorted, and each is read only when one of its images is needed. Images are named `shard/name`; the shard is
not a class. Labels are read from the shards (a column, a webdataset's .cls or .json, or folders) and joined by class
name. Shards with different columns or classes are rejected. If a folder has one tar per class (`cats.tar`, `dogs.tar`),
the file names are the classes.
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
from unmask.errors import SourceError, listed

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
)  # last extensions of shards, counted in `Source.skipped`


def open_shard(path: str) -> Source:
    """Open one parquet or tar file."""
    return ParquetSource(path) if path.lower().endswith(PARQUET) else TarSource(path)


def open_shards_below(name: str, root: str, paths: Sequence[str], *, location: str) -> Source:
    """Open parquet or tar files below the folder `root` as one source."""
    relative = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    return open_shards(name, root, relative, location=location)


def open_shards(name: str, root: str, relative: Sequence[str], *, location: str) -> Source:
    """Open parquet or tar files as one source. relative: '/'-separated paths relative to `root`.

    Raises SourceError for a mixture of parquet and tar files, and for shards with different columns.
    """
    relative = sorted(relative)
    tables = [path for path in relative if path.lower().endswith(PARQUET)]
    if tables and len(tables) < len(relative):
        tar = next(path for path in relative if path not in tables)
        raise SourceError(
            f"{name} contains parquet and tar files ({tables[0]} and {tar}); expected shards of one kind: use a glob "
            "of one kind, in quotes"
        )
    parts = [(ParquetSource if tables else TarSource)(os.path.join(root, path)) for path in relative]
    if tables:
        _require_alike(name, relative, parts)
    stems = [printable(_stem(path)) for path in relative]
    source = JoinedSource(name, parts, stems, location=location)
    if splits := _splits(relative):
        source.classes, source.labels = [], None
        source.unlabelled = (
            f"its shards belong to several splits ({', '.join(splits)}), which are not classes; use the shards of one "
            "split, as a glob in quotes or a folder"
        )
    elif not tables and not any(part.has_label_files for part in parts if isinstance(part, TarSource)):
        _label_tars(source, stems)
    return source


def _stem(path: str) -> str:
    lower = path.lower()
    return path[: -max(len(ending) for ending in SHARDS if lower.endswith(ending))]


def _require_alike(name: str, relative: Sequence[str], parts: Sequence[Any]) -> None:
    """Raise SourceError if parquet files differ in the columns that are read, or in the names of their classes."""
    for path, part in zip(relative, parts, strict=True):
        for what, first, other in zip(
            ("the image column", "the label column", "the classes"), parts[0].layout, part.layout, strict=True
        ):
            if first != other:
                raise SourceError(
                    f"the parquet files of {name} differ in {what}: {relative[0]} has {_shown(first)}, {path} has "
                    f"{_shown(other)}; use a glob of shards that agree, in quotes"
                )


def _shown(value: Any) -> str:
    return listed(value, 4) if isinstance(value, list) and value else str(value or "none")


def _splits(relative: Sequence[str]) -> list[str]:
    """Return the splits with which shard or folder names begin, such as train-00000-of-00004 or test/0.tar."""
    found = set()
    for path in relative:
        words = [*path.split("/")[:-1], re.split(r"[-_.]", posixpath.basename(path))[0]]
        found.add(next((word for word in words if word.lower() in SPLITS), ""))
    return sorted(found) if len(found) > 1 and "" not in found else []  # returns [] for one split or none


def _label_tars(source: JoinedSource, stems: Sequence[str]) -> None:
    """Set labels from the folders inside the tars, or from the file names of the tars if each tar is one class.

    Numbered shards are not classes, unless the names of the files in each tar start with the name of the tar
    (n01440764.tar).
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
