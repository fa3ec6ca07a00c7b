"""Find and fill absent pixels, for which an image has no data.

A GeoTIFF declares the value of such pixels in a tag (GDAL_NODATA, for example -9999, -32768 or 65535). In float images,
NaN and infinity also mark absent pixels. Absent pixels would distort the loss and the stored mean and standard
deviation, so they are left out of all three. In the images, absent pixels are replaced by the data set's mean, which is
0 after normalisation.

A float pixel is absent if any of its channels is absent. An integer pixel is absent only if all channels have the
declared value, because 0 or 255 in one channel is an ordinary colour.

Notation: H x W pixels, C channels.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal

import numpy as np

from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.tiff_pages import TIFF_STARTS, read_pages

Nodata = Literal["auto"] | float | None
"""Setting for which pixels are absent. "auto": NaN, infinity, and the value that the file declares. A number
additionally marks pixels with that value as absent. None: no pixels."""

PALETTE = 3  # TIFF's photometric interpretation


def declared(data: bytes) -> float | None:
    """Return the value of absent pixels declared by a TIFF's GDAL_NODATA tag, or None without such a tag.

    Returns None for palette images, and for values that are not numbers.
    """
    if not data.startswith(TIFF_STARTS):
        return None
    try:
        page = read_pages(data, most=1)[0]
        return None if page.first(262, 1) == PALETTE else float(page.nodata.split(b"\0")[0])
    except (struct.error, OverflowError, ValueError):  # damaged directory, no tag, or text that is not a number
        return None


def valid_pixels(pixels: np.ndarray, nodata: Nodata, declared: float | None) -> np.ndarray | None:
    """Return (H, W) bool for decoded pixels (H, W, C), False for absent pixels, or None if no pixel is absent.

    declared: the value of absent pixels that the file declares.
    Raises BadImage for NaN or infinity if `nodata` is None.
    """
    is_float = pixels.dtype == np.float32
    absent = ~np.isfinite(pixels) if is_float else None
    if absent is not None and not absent.any():
        absent = None
    if nodata is None:
        if absent is not None:
            raise BadImage(
                "CORRUPT",
                "got NaN, infinity or values too large for float32; set data.nodata=auto to treat these as absent",
            )
        return None
    for value in {declared, None if nodata == "auto" else nodata} - {None}:
        assert isinstance(value, float | int)
        same = _equal(pixels, float(value))
        if same is not None:
            absent = same if absent is None else absent | same
    if absent is None:
        return None
    missing: np.ndarray = np.any(absent, axis=2) if is_float else np.all(absent, axis=2)
    return np.logical_not(missing) if missing.any() else None


def _equal(pixels: np.ndarray, value: float) -> np.ndarray | None:
    """Return a map of the pixels that equal `value`, compared in their own dtype, or None if there are none."""
    if pixels.dtype != np.float32:
        if not value.is_integer() or not 0 <= value <= np.iinfo(pixels.dtype).max:
            return None
    elif not np.isfinite(value):
        return None
    with np.errstate(over="ignore"):
        same = pixels == pixels.dtype.type(value)
    return same if same.any() else None


def fill_values(mean: Sequence[float], dtype: str) -> np.ndarray:
    """Return the value of absent pixels (C,): the data set's mean, converted to the dtype of the images."""
    values = np.array(mean)
    return (values if dtype == "float32" else values.round().clip(0, np.iinfo(dtype).max)).astype(dtype)


def filled(pixels: np.ndarray, valid: np.ndarray, fill: np.ndarray | int = 0) -> np.ndarray:
    """Return a copy of the pixels (H, W, C) with absent ones replaced by `fill` (C,)."""
    return np.where(valid[:, :, None], pixels, np.asarray(fill, pixels.dtype))
