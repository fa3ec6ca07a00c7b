"""Decode the bytes of one image file, strictly: a damaged file raises `BadImage` with a reason code.

Formats: JPEG (simplejpeg, with scaled decoding), PNG, WebP, TIFF, BMP, GIF (first frames) and NumPy .npy. TIFFs with
several 16-bit or float samples, or any number of bands, need the optional tifffile.

EXIF orientation is applied. 16-bit images stay uint16. Floats and integers of other widths become float32 with their
values unchanged (Pillow's conversion to RGB would clip them). Alpha is composited on white. Palette, CMYK and 1-bit
images become RGB or gray. The header is read, and limits are checked, before memory for the pixels is allocated. The
functions `header` and `decode` always agree on size, channels and dtype.

A .npy with three axes is (H, W, C), or (C, H, W) if its first axis is smaller than both others; where both the
first and the last axis are long, `reading.axes_of` decides.

PNG checksums are verified. WebP, GIF, BMP and TIFF have no checksums, so damage that still decodes is not detected.

JPEGs with extra bytes between segments or before the end marker, or without an end marker, are accepted if all blocks
of the image are present; see `jpeg_repair.py`.

In the scan, a file may use 512 MiB including its own bytes, as estimated from its header (`Header.memory`). A limit of
512 MiB allows 100 megapixels as 8-bit JPEG, PNG, BMP, GIF or TIFF in strips, 53 in 16-bit colour, and about 30 as WebP.
This estimate is for decoding in pieces, as the scan does; the loader also holds the whole decoded image.

Reason codes: EMPTY NOT_IMAGE FORMAT_NOT_ALLOWED HEADER_BAD TRUNCATED CORRUPT TOO_MANY_PIXELS TOO_LARGE_FILE
EXTREME_ASPECT UNSUPPORTED_MODE MISMATCHED_CHANNELS MISMATCHED_DTYPE TIMEOUT; and from the sources PERMISSION VANISHED
CHANGED.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from unmask.data import limits
from unmask.data.decode import jpeg, npy, pillow_formats, png, tiff
from unmask.data.decode.bad_image import BadImage, refuse_large
from unmask.data.decode.exif import apply_orientation
from unmask.data.decode.file_format import FileFormat
from unmask.data.decode.image_header import Header
from unmask.data.decode.pixels import check_pieces, join_pieces, slice_rows
from unmask.data.decode.reading import DEFAULT, Reading

FILE_FORMATS: tuple[FileFormat, ...] = (jpeg.FORMAT, npy.FORMAT, png.FORMAT, tiff.FORMAT, pillow_formats.FORMAT)
"""File formats in the order they are tried; the last accepts any file. A new format needs a module and an entry here.
"""


def header(data: bytes, reading: Reading = DEFAULT) -> Header:
    """Return the size, channels and dtype that `decode` would give under `reading`, without decoding the file.

    Exception: a TIFF is decoded if only its values show whether a band is alpha, and `reading` leaves that open.
    Raises BadImage for a damaged header, and for files above the limits of `limits.py`.
    """
    if not data:
        raise BadImage("EMPTY", "the file has no bytes")
    if len(data) > limits.MAX_FILE_BYTES:
        raise BadImage("TOO_LARGE_FILE", f"got {len(data)} bytes; expected at most {limits.MAX_FILE_BYTES}")
    found = _format_of(data).read_header(data, reading)
    refuse_large(found.height, found.width, found.channels)
    _refuse_costly(found, len(data))
    if max(found.height, found.width) > limits.MAX_ASPECT * min(found.height, found.width):
        raise BadImage(
            "EXTREME_ASPECT",
            f"got {found.height} x {found.width} pixels; expected sides that differ by a factor of at most "
            f"{limits.MAX_ASPECT}",
        )
    return found


def decode(
    data: bytes,
    *,
    at_least: tuple[int, int] | None = None,
    found: Header | None = None,
    reading: Reading = DEFAULT,
    tolerated: list[str] | None = None,
) -> np.ndarray:
    """Return (H, W, C) uint8, uint16 or float32, contiguous.

    at_least: (h, w) in displayed orientation; JPEGs are decoded at the smallest of 1/8, 1/4, 1/2 and full size that is
    not smaller than `at_least`; the choice depends only on the file and `at_least`.
    found: the header of `data`, if it was already read; `reading` is then ignored.
    tolerated: a list to which harmless faults are appended.
    Raises BadImage.
    """
    found = found or header(data, reading)
    try:
        format = _format_named(found.format)
        if format.decode is not None:
            pixels = format.decode(data, found, at_least, tolerated)
        else:
            stored = found.height if found.orientation < 5 else found.width
            pixels = join_pieces(_checked_pieces(format, data, found), stored)
    except MemoryError:
        raise BadImage("TOO_MANY_PIXELS", "not enough memory to decode it") from None
    return apply_orientation(pixels, found.orientation)


def _refuse_costly(found: Header, size: int) -> None:
    """Raise BadImage for a file whose header predicts too much memory or time."""
    needed = found.memory + limits.PIECE_BYTES + size
    if needed > limits.MAX_DECODE_BYTES:
        raise BadImage(
            "TOO_MANY_PIXELS",
            f"{found.height} x {found.width} pixels of this kind need {needed >> 20} MiB to decode; expected at most "
            f"{limits.MAX_DECODE_BYTES >> 20} MiB: shrink the image, or save it with fewer bits or as JPEG",
        )
    if found.scans * found.height * found.width > limits.MAX_SCANNED_PIXELS:
        raise BadImage(
            "TIMEOUT",
            f"a JPEG of {found.scans} scans over {found.height} x {found.width} pixels takes too long to decode; save "
            "it again with fewer scans",
        )


def pieces(data: bytes, found: Header, *, tolerated: list[str] | None = None) -> Iterator[np.ndarray]:
    """Yield the image in pieces of a few rows (h, W, C), as stored: the orientation is not applied.

    Intended for statistics, which need each pixel once: no second array is allocated for a large image. Raises
    BadImage, possibly after some pieces.
    """
    format = _format_named(found.format)
    try:
        if format.can_read_pieces(found) and found.height * found.width > limits.PIECE_PIXELS:
            yield from _checked_pieces(format, data, found)
            return
        height, width = (found.height, found.width) if found.orientation < 5 else (found.width, found.height)
        stored = replace(found, orientation=1, height=height, width=width)
        whole = decode(data, found=stored, tolerated=tolerated)
    except MemoryError:
        raise BadImage("TOO_MANY_PIXELS", "not enough memory to decode it") from None
    yield from slice_rows(whole)


def _format_of(data: bytes) -> FileFormat:
    return next(one for one in FILE_FORMATS if not one.starts or data.startswith(one.starts))


def _format_named(name: str) -> FileFormat:
    return next(one for one in FILE_FORMATS if name in one.names)


def _checked_pieces(format: FileFormat, data: bytes, found: Header) -> Iterator[np.ndarray]:
    assert format.pieces is not None
    return check_pieces(format.pieces(data, found), found)
