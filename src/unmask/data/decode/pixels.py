"""Convert the dtype and channels of decoded arrays, and join the pieces of an image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from unmask.data import limits
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.image_header import Header

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def slice_rows(whole: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, limits.PIECE_PIXELS // whole.shape[1])
    return (whole[top : top + rows] for top in range(0, len(whole), rows))


def conform(image: np.ndarray, channels: int, dtype: str) -> np.ndarray:
    """Convert an image (H, W, C) to the channels and dtype of the data set.

    Gray is repeated to give RGB, RGB is converted to luma to give gray, and uint8 is multiplied by 257 to give uint16.
    Raises BadImage for any other conversion.
    """
    have = image.shape[2]
    if have != channels and {have, channels} != {1, 3}:
        raise BadImage("MISMATCHED_CHANNELS", f"got {have} channels; expected {channels}, as in the data set")
    if image.dtype != dtype and not (image.dtype == np.uint8 and dtype == "uint16"):
        raise BadImage("MISMATCHED_DTYPE", f"got {image.dtype} pixels; expected {dtype}, as in the data set")
    if have < channels:
        image = np.repeat(image, 3, axis=2)
    elif have > channels:
        gray = (image.astype(np.float32) @ LUMA)[:, :, None]
        image = gray if image.dtype == np.float32 else gray.round().astype(image.dtype)
    return image if image.dtype == dtype else image.astype(np.uint16) * 257


def check_pieces(parts: Iterator[np.ndarray], found: Header) -> Iterator[np.ndarray]:
    """Yield the pieces of a stored image. Raises BadImage if the pieces do not match the header."""
    height, width = (found.height, found.width) if found.orientation < 5 else (found.width, found.height)
    rows = 0
    try:
        for part in parts:
            if part.shape[1:] != (width, found.channels) or part.dtype != found.dtype:
                shape = f"{part.shape} {part.dtype}"
                raise BadImage("CORRUPT", f"{found.format}: decoded to {shape}, unlike its header")
            rows += len(part)
            yield part
    except BadImage:
        raise
    except (ValueError, OSError) as error:
        raise BadImage("UNSUPPORTED_MODE", f"{found.format}: {error}") from None
    if rows != height:
        raise BadImage("CORRUPT", f"{found.format}: decoded to {rows} rows, unlike its header")


def join_pieces(parts: Iterator[np.ndarray], height: int) -> np.ndarray:
    """Copy the pieces into one array of `height` rows."""
    first = next(parts)
    if len(first) == height:
        return first
    out = np.empty((height, *first.shape[1:]), first.dtype)
    out[: len(first)] = first
    row = len(first)
    for part in parts:
        out[row : row + len(part)] = part
        row += len(part)
    return out


def dtype_of(dtype: np.dtype) -> str:
    """Return the dtype of decoded pixels: uint8 for bool, unchanged for uint8 and uint16, float32 for other numbers.

    The result depends only on the dtype, not on the values, so that all files of a data set agree.
    """
    if dtype.kind not in "biuf":
        raise BadImage("UNSUPPORTED_MODE", f"got an array of {dtype}; expected integers or floats")
    return "uint8" if dtype.kind == "b" else dtype.name if dtype.name in ("uint8", "uint16") else "float32"


def as_pixels(values: np.ndarray) -> np.ndarray:
    """Convert a numeric array (H, W) or (H, W, C) to (H, W, C) uint8, uint16 or float32.

    Integers up to 2^24 are converted exactly. NaN and infinity are preserved, because they mark absent pixels.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    dtype = dtype_of(values.dtype)
    if values.dtype.kind == "b":
        return np.ascontiguousarray(values).astype(bool).astype(np.uint8) * 255
    with np.errstate(over="ignore"):  # overflow gives infinity, which marks an absent pixel (nodata.py)
        values = np.ascontiguousarray(values.astype(dtype, copy=False))
    return values
