"""The header of an image file, and the note by which a smaller copy records the size of its original."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from unmask.data import limits
from unmask.data.decode.layout import Layout

PACKED = re.compile(rb"unmask\0packed (\d{1,6})x(\d{1,6}) from (\d{1,6})x(\d{1,6})")
LONGEST_NOTE = 64


@dataclass(frozen=True)
class Header:
    """Size, channels and dtype of one file.

    height, width: as displayed, after applying the EXIF `orientation` (1 to 8).
    packed_from: height and width of the original, if this is a smaller copy with a `packed_note`.
    layout: how the file stores the image and how it is read.
    pages: offsets of the TIFF directories that are read.
    memory: peak bytes of `decode.pieces`, without the bytes of the file itself.
    scans: number of scans of a progressive JPEG, each of which takes as long as decoding a sequential one.
    """

    height: int
    width: int
    channels: int
    dtype: str
    format: str
    orientation: int = 1
    packed_from: tuple[int, int] | None = None
    layout: Layout = field(default=Layout(), compare=False)
    pages: tuple[int, ...] = field(default=(), compare=False)
    memory: int = field(default=0, compare=False)
    scans: int = field(default=1, compare=False)

    @property
    def full_size(self) -> tuple[int, int]:
        """Size (H, W) of the original if this is a smaller copy, otherwise of the image itself."""
        return self.packed_from or (self.height, self.width)


def packed_note(size: tuple[int, int], full_size: tuple[int, int]) -> bytes:
    """Encode the size of a smaller copy and the full size of its original, (H, W) each.

    The note is stored as a JPEG comment, as PNG text, or after the values of a .npy. The note includes the copy's own
    size, so that the note is ignored if another program crops or shrinks the copy but keeps the note.
    """
    return b"unmask\0packed %dx%d from %dx%d" % (*size, *full_size)


def original_size(note: bytes, size: tuple[int, int]) -> tuple[int, int] | None:
    """Return the original's size from the note of an image of this `size`, both as displayed, or None."""
    found = PACKED.fullmatch(note)
    if found is None or (int(found[1]), int(found[2])) != size:
        return None
    height, width = int(found[3]), int(found[4])
    return (height, width) if size[0] <= height and size[1] <= width and height * width <= limits.MAX_PIXELS else None
