"""Store many short texts, such as the file names of a data set, in one bytes object and an array of end positions.

A list of Python strings needs three to four times the memory, and reference counting copies it page by page into every
forked loader worker. The table can be read like a list of str, but cannot grow.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

CODING = ("utf-8", "surrogatepass")  # encodes any str, including file names that are not valid UTF-8


class StringTable(Sequence[str]):
    """An immutable sequence of texts. A table equals any sequence of the same texts; a slice is a list of str."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        texts = texts if isinstance(texts, list | tuple | StringTable) else list(texts)
        joined = "".join(texts)
        if joined.isascii():
            self.blob, lengths = joined.encode("ascii"), map(len, texts)
        else:
            encoded = [text.encode(*CODING) for text in texts]
            self.blob, lengths = b"".join(encoded), map(len, encoded)
        ends = np.cumsum(np.fromiter(lengths, np.int64, len(texts)))
        self.ends = ends if len(self.blob) >= 1 << 32 else ends.astype(np.uint32)

    @classmethod
    def stored(cls, blob: bytes, ends: np.ndarray) -> StringTable:
        """Create a table from the `blob` and `ends` (n,) of another table."""
        names = cls()
        names.blob, names.ends = blob, ends
        return names

    def same(self, other: StringTable) -> bool:
        """Return whether both tables hold the same texts, without comparing them one by one."""
        return self.blob == other.blob and np.array_equal(self.ends, other.ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = operator.index(index)
        i = i + len(self) if i < 0 else i
        if not 0 <= i < len(self):
            raise IndexError(f"row {index} of {len(self)} names")
        return self.blob[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])].decode(*CODING)

    def __iter__(self) -> Iterator[str]:
        blob, start = self.blob, 0
        for first in range(0, len(self.ends), 4096):  # in chunks, to convert few ends to Python ints at a time
            for end in self.ends[first : first + 4096].tolist():
                yield blob[start:end].decode(*CODING)
                start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, StringTable):
            return self.same(other)
        if not isinstance(other, list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StringTable({self[:5]!r}{f' and {len(self) - 5} more' if len(self) > 5 else ''})"
