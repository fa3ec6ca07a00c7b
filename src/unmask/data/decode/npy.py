"""Read NumPy .npy files of plain numbers."""

from __future__ import annotations

import io
import math

import numpy as np

from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.file_format import FileFormat
from unmask.data.decode.image_header import LONGEST_NOTE, Header, original_size
from unmask.data.decode.layout import Layout
from unmask.data.decode.pixels import as_pixels, dtype_of
from unmask.data.decode.reading import Reading, axes_of


def _npy_layout(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Parse the header; return the shape, True for Fortran order, the dtype, and the offset of the values."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is a Python literal, whose parser raises many exception types
        raise BadImage("HEADER_BAD", f".npy: {str(error) or type(error).__name__}") from None
    if dtype.hasobject:
        raise BadImage("UNSUPPORTED_MODE", ".npy with Python objects, which can run code; save plain numbers")
    return shape, fortran, dtype, file.tell()


NPY_START = b"\x93NUMPY"


def read_header(data: bytes, reading: Reading) -> Header:
    shape, _, dtype, start = _npy_layout(data)
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage("UNSUPPORTED_MODE", f"got a .npy of shape {shape}; expected (H, W), (H, W, C) or (C, H, W)")
    axes = axes_of(shape, reading) if len(shape) == 3 else ""
    height, width, channels = (shape[1], shape[2], shape[0]) if axes == "CHW" else (*shape, 1)[:3]
    values = math.prod(shape)
    needed = values * dtype.itemsize
    note = data[start + needed :][:LONGEST_NOTE]
    return Header(
        height=height,
        width=width,
        channels=channels,
        dtype=dtype_of(dtype),
        format="NPY",
        packed_from=original_size(note, (height, width)) if note else None,
        layout=Layout(channels, axes=axes),
        memory=0 if len(data) - start < needed else {"uint8": 0, "uint16": 0, "bool": 2}.get(dtype.name, 5) * values,
    )


def npy_shape(data: bytes) -> tuple[int, ...]:
    """Return the shape that a .npy declares, or () for other files. Raises BadImage for a damaged header."""
    return _npy_layout(data)[0] if data[:6] == NPY_START else ()


def decode(
    data: bytes, found: Header, at_least: tuple[int, int] | None = None, tolerated: list[str] | None = None
) -> np.ndarray:
    shape, fortran, dtype, start = _npy_layout(data)
    needed = math.prod(shape) * dtype.itemsize
    if len(data) - start < needed:
        raise BadImage("TRUNCATED", f"got a .npy with {len(data) - start} bytes of values; expected {needed}")
    values = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape, order="F" if fortran else "C")
    if found.layout.axes == "CHW":
        values = values.transpose(1, 2, 0)
    return as_pixels(values)


FORMAT = FileFormat(("NPY",), (NPY_START,), read_header, decode=decode)
