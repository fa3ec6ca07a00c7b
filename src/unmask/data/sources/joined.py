"""Join several sources into one, with the union of their classes."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from unmask.data.annotations.class_names import class_order
from unmask.data.files.string_table import StringTable
from unmask.data.sources.parquet_file import ParquetSource
from unmask.data.sources.source import Source, printable
from unmask.errors import listed


class JoinedSource(Source):
    """The rows of several sources, one source after another.

    prefixes: a folder name for each source, put before its names, or None to leave names unchanged.
    """

    def __init__(
        self, name: str, parts: Sequence[Source], prefixes: Sequence[str] | None = None, *, location: str | None = None
    ) -> None:
        self.parts = list(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)]).astype(np.int64)
        folders = [f"{folder}/" for folder in prefixes] if prefixes is not None else [""] * len(self.parts)
        names = StringTable(
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
                self.unlabelled = (
                    f"{labelled} of its {len(self.parts)} parts have labels, but {bare[0].name} has no labels"
                )
            self.split_folders = next((part.split_folders for part in bare if part.split_folders), [])
            return
        own = [part.classes for part in self.parts]
        listed = self.parts[0].class_list
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
        """Let all parquet files share one cache of row groups, so that its limit applies to all of them together."""
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
        return digest([super().fingerprint(), *(part.fingerprint() for part in self.parts)])


def digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _or_unknown(times: np.ndarray | None, part: Source) -> np.ndarray:
    return np.full(len(part), -1, np.int64) if times is None else times


def join(parts: Sequence[Source], texts: Sequence[str]) -> Source:
    """Join several sources. texts: DATA as given by the user, one for each source.

    If a name occurs in more than one source, all names are prefixed with the name of their DATA as a folder.
    """
    every = Counter(name for part in parts for name in part.names)
    prefixes = None
    if len(every) < sum(map(len, parts)):
        prefixes, taken = [], Counter[str]()
        for text in texts:
            base = printable(posixpath.basename(text.replace(os.sep, "/").rstrip("/"))) or "data"
            taken[base] += 1
            prefixes.append(base if taken[base] == 1 else f"{base}-{taken[base]}")
    return JoinedSource(f"{listed(texts, 3)}", parts, prefixes, location="\n".join(part.location for part in parts))
