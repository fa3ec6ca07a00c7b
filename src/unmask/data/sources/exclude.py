"""Leave out images whose names match a pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from unmask.data.files.string_table import StringTable
from unmask.data.sources.class_folders import classes_of
from unmask.data.sources.joined import JoinedSource, digest
from unmask.data.sources.source import Source
from unmask.errors import SourceError


class SelectedSource(Source):
    """A subset of the rows of a source, in the same order. Classes are determined from the names of these rows only."""

    def __init__(self, inner: Source, rows: np.ndarray) -> None:
        self.inner, self.rows = inner, np.asarray(rows, np.int64)
        names = StringTable([inner.names[row] for row in self.rows.tolist()])
        super().__init__(inner.name, names, inner.sizes[self.rows], location=inner.location)
        self.changed = None if inner.changed is None else inner.changed[self.rows]
        self.modified = None if inner.modified is None else inner.modified[self.rows]
        self.skipped.update(inner.skipped)
        self.unlabelled = inner.unlabelled
        before = classes_of(inner.names)
        if isinstance(inner, JoinedSource):
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
        return digest([super().fingerprint(), self.inner.fingerprint()])


def exclude_names(source: Source, patterns: Sequence[str]) -> Source:
    """Return the source without the images whose names match a pattern; its `excluded` counts them by pattern."""
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
            f"--exclude {' '.join(patterns)} excludes all {len(source)} images of {source.name}; remove a pattern"
        )
    left = SelectedSource(source, np.flatnonzero(~out)) if out.any() else source
    left.excluded = counts
    return left


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that tests whether a '/'-separated name matches the pattern.

    Matching is case-sensitive. * and ? do not match "/", and ** matches any number of folders. A pattern without "/"
    matches the name of a file or folder at any depth; other patterns match the path from its start. Everything below a
    matching folder matches too. Raises SourceError for brackets without a valid set of letters.
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
            f"got --exclude {pattern!r} with invalid brackets; expected a set of letters such as [0-9] or [!a-c]: "
            "write [[] for a bracket in a name"
        ) from None
    return lambda name: found.search(name) is not None


def _part(part: str) -> str:
    """Return the regular expression for one part of a glob."""
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
