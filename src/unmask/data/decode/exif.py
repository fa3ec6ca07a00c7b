"""Read and apply the EXIF orientation."""

from __future__ import annotations

import struct

import numpy as np


def exif_orientation(tiff: bytes) -> int:
    """Return the orientation (tag 0x0112 of the first directory); 1 if it is absent or invalid."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == 0x0112 and kind == 3:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation to a stored image (H, W, C) or mask (H, W); return it as displayed."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
