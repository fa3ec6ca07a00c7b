"""Read WebP, BMP and GIF (first frames) with Pillow, and reject other formats with an error that names the format."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from unmask.data.decode.alpha import alpha_use
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.exif import exif_orientation
from unmask.data.decode.file_format import FileFormat
from unmask.data.decode.image_header import Header
from unmask.data.decode.layout import Layout
from unmask.data.decode.pillow_image import WITH_ALPHA, load_image, open_image, pillow_pieces
from unmask.data.decode.reading import Reading


def read_header(data: bytes, reading: Reading) -> Header:
    with open_image(data) as image:
        channels = _channels_of_mode(image.mode)
        orientation, alpha = 1, ""
        if image.format == "WEBP":
            orientation = exif_orientation(bytes(image.info.get("exif", b"")).removeprefix(b"Exif\0\0"))
        if image.mode in WITH_ALPHA:
            alpha = alpha_use(reading)
            if alpha == "composited" and image.format == "BMP" and image.mode == "RGBA" and _is_clear_bmp(data):
                alpha = "opaque"
        elif "transparency" in image.info:
            alpha = "composited" if reading.alpha in ("auto", "composite") else "dropped"
        width, height = image.size
        if orientation >= 5:
            height, width = width, height
        layout = Layout(len(image.getbands()), alpha)
        channels += alpha == "band"
        each = 16 if image.format == "WEBP" else 1 if image.mode in ("1", "L", "P") else 4
        kind, memory = str(image.format), each * height * width
        return Header(
            height=height,
            width=width,
            channels=channels,
            dtype="uint8",
            format=kind,
            orientation=orientation,
            packed_from=None,
            layout=layout,
            memory=memory,
        )


def _is_clear_bmp(data: bytes) -> bool:
    """Return whether all alpha values of a 32-bit BMP are 0, in which case viewers ignore them."""
    (start,) = struct.unpack_from("<I", data, 10)
    return struct.unpack_from("<H", data, 28) == (32,) and not data[start + 3 :: 4].strip(b"\0")


def _channels_of_mode(mode: str) -> int:
    """Return the number of channels without alpha."""
    if mode in ("1", "L", "LA", "La"):
        return 1
    if mode in ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa"):
        return 3
    raise BadImage("UNSUPPORTED_MODE", f"got the pixel mode {mode}; convert it to PNG, or use .npy")


def read_pieces(data: bytes, found: Header) -> Iterator[np.ndarray]:
    """Yield the stored image in pieces of a few rows."""
    return pillow_pieces(load_image(data, found.format), found.layout.alpha)


FORMAT = FileFormat(("WEBP", "BMP", "GIF"), (), read_header, pieces=read_pieces)
