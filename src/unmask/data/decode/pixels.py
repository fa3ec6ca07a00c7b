"""Arrays of pixels."""

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
    """The image with the data set's channels and dtype.

    Gray becomes RGB by repetition, RGB gray by luma, uint8 uint16 by x 257. Anything else raises BadImage: it would
    have to be invented.
    """
    have = image.shape[2]
    if have != channels and {have, channels} != {1, 3}:
        raise BadImage("MISMATCHED_CHANNELS", f"{have} channels, the data set has {channels}")
    if image.dtype != dtype and not (image.dtype == np.uint8 and dtype == "uint16"):
        raise BadImage("MISMATCHED_DTYPE", f"{image.dtype} pixels, the data set has {dtype}")
    if have < channels:
        image = np.repeat(image, 3, axis=2)
    elif have > channels:
        gray = (image.astype(np.float32) @ LUMA)[:, :, None]
        image = gray if image.dtype == np.float32 else gray.round().astype(image.dtype)
    return image if image.dtype == dtype else image.astype(np.uint16) * 257


def check_pieces(parts: Iterator[np.ndarray], found: Header) -> Iterator[np.ndarray]:
    """The pieces, as the header promised them, in the stored orientation."""
    height, width = (found.height, found.width) if found.orientation < 5 else (found.width, found.height)
    rows = 0
    try:
        for part in parts:
            if part.shape[1:] != (width, found.channels) or part.dtype != found.dtype:
                shape = f"{part.shape} {part.dtype}"
                raise BadImage("CORRUPT", f"{found.format}: decoded to {shape}, its header says otherwise")
            rows += len(part)
            yield part
    except BadImage:
        raise
    except (ValueError, OSError) as error:
        raise BadImage("UNSUPPORTED_MODE", f"{found.format}: {error}") from None
    if rows != height:
        raise BadImage("CORRUPT", f"{found.format}: decoded to {rows} rows, its header says otherwise")


def join_pieces(parts: Iterator[np.ndarray], height: int) -> np.ndarray:
    """All rows in one array, filled as they come."""
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
    """uint8 and uint16 stay, bool becomes uint8, all other numbers float32: by type, so that a data set agrees."""
    if dtype.kind not in "biuf":
        raise BadImage("UNSUPPORTED_MODE", f"array of {dtype}; integers or floats are expected")
    return "uint8" if dtype.kind == "b" else dtype.name if dtype.name in ("uint8", "uint16") else "float32"


def as_pixels(values: np.ndarray) -> np.ndarray:
    """Any numeric array (H, W) or (H, W, C) -> (H, W, C) of one of the three dtypes. Integers are exact up to 2^24.

    NaN and infinity stay: they mean that a pixel is absent.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    dtype = dtype_of(values.dtype)
    if values.dtype.kind == "b":
        return np.ascontiguousarray(values).astype(bool).astype(np.uint8) * 255
    with np.errstate(over="ignore"):  # what overflows becomes infinite, which counts as absent (absent.py)
        values = np.ascontiguousarray(values.astype(dtype, copy=False))
    return values
