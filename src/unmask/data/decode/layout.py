"""How a file stores its image and how it is read: bands, alpha, pages, order of axes, tolerated faults.

A `Layout` is encoded as one integer for each file in the scan cache. This lets a scan report composited alpha, skipped
pages and guessed axes without decoding the files again.
"""

from __future__ import annotations

from dataclasses import dataclass

ALPHA = ("", "composited", "dropped", "band", "opaque")
PAGES = ("", "first", "largest", "channels", "samples")
AXES = ("", "HWC", "CHW", "HWC guessed", "CHW guessed")
TOLERATED = ("extraneous bytes between segments", "extraneous bytes before the end marker", "no end marker")
MOST = (1 << 16) - 1


@dataclass(frozen=True)
class Layout:
    """Layout of one file.

    bands: samples per pixel as stored, including alpha; 0 if not recorded.
    alpha: how the alpha channel is read, or "" without an alpha channel.
    pages: number of images in the file, without copies of lower resolution.
    page_use: which of several pages are read.
    axes: the order of the axes of a .npy with three axes.
    tolerated: faults that do not affect any pixel.
    """

    bands: int = 0
    alpha: str = ""
    pages: int = 1
    page_use: str = ""
    axes: str = ""
    tolerated: tuple[str, ...] = ()

    @property
    def code(self) -> int:
        """The layout as one integer; see `from_code`."""
        faults = sum(1 << TOLERATED.index(fault) for fault in self.tolerated)
        code = min(self.bands, MOST) | min(self.pages, MOST) << 16
        return (
            code
            | ALPHA.index(self.alpha) << 32
            | PAGES.index(self.page_use) << 36
            | (AXES.index(self.axes) << 40 | faults << 44)
        )

    @classmethod
    def from_code(cls, code: int) -> Layout:
        """Return the layout encoded in `code`."""
        return cls(
            bands=code & MOST,
            pages=code >> 16 & MOST,
            alpha=ALPHA[code >> 32 & 15],
            page_use=PAGES[code >> 36 & 15],
            axes=AXES[code >> 40 & 15],
            tolerated=tuple(fault for bit, fault in enumerate(TOLERATED) if code >> 44 & 1 << bit),
        )
