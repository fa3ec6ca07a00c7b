"""The interface that each file format of this folder implements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from unmask.data.decode.image_header import Header
from unmask.data.decode.reading import Reading

ReadHeader = Callable[[bytes, Reading], Header]
Pieces = Callable[[bytes, Header], Iterator[np.ndarray]]
Decode = Callable[[bytes, Header, tuple[int, int] | None, list[str] | None], np.ndarray]


@dataclass(frozen=True)
class FileFormat:
    """One file format, or several that are read by the same functions.

    names: values of `Header.format`.
    starts: first bytes of a file, or () to accept any file.
    read_header: see `decode.header`.
    pieces: yields the stored image in pieces of a few rows, for large images, or None if not supported.
    decode: takes the arguments of `decode.decode` and returns the stored image, or None to join the pieces.
    """

    names: tuple[str, ...]
    starts: tuple[bytes, ...]
    read_header: ReadHeader
    pieces: Pieces | None = None
    decode: Decode | None = None

    def can_read_pieces(self, header: Header) -> bool:
        """Return whether `pieces` can read a file with this header, which for a TIFF means one page."""
        return self.pieces is not None and len(header.pages) <= 1
