"""The header of an image file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from unmask.data import limits
from unmask.data.decode.layout import Layout

PACKED = re.compile(rb"unmask\0packed (\d{1,6})x(\d{1,6}) from (\d{1,6})x(\d{1,6})")
LONGEST_NOTE = 64


@dataclass(frozen=True)
class Header:
    """What the first bytes say. Height and width are as displayed, after the EXIF `orientation` (1 to 8) is applied.

    packed_from: height and width of the original, if this is a smaller copy of it that says so (`packed_note`).
    layout: how the file stores this, and what decoding makes of it. pages: of a TIFF, where the directories begin that
    are read. memory: bytes that `pieces` needs at its peak, beside the file's own. scans: of a progressive JPEG, each
    of which takes as long as a decoding.
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
        """(H, W) of the original that this is a smaller copy of, or its own."""
        return self.packed_from or (self.height, self.width)


def packed_note(size: tuple[int, int], full_size: tuple[int, int]) -> bytes:
    """What a smaller copy says of its original: its own size, and the full one.

    It stands in a JPEG's comment, in a PNG's text, or behind the values of a .npy.
    Its own, because a program that crops or shrinks the copy once more may carry the note along; then it is not heeded.
    """
    return b"unmask\0packed %dx%d from %dx%d" % (*size, *full_size)


def original_size(note: bytes, size: tuple[int, int]) -> tuple[int, int] | None:
    """The size of the original of an image of this `size`, both as displayed, where there is one."""
    found = PACKED.fullmatch(note)
    if found is None or (int(found[1]), int(found[2])) != size:
        return None
    height, width = int(found[3]), int(found[4])
    return (height, width) if size[0] <= height and size[1] <= width and height * width <= limits.MAX_PIXELS else None
