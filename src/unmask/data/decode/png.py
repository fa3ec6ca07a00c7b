"""Read PNG with Pillow, including 16-bit colour, and verify checksums and the number of rows."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from unmask.data.decode import pillow_raw_mode
from unmask.data.decode.alpha import alpha_use, without_alpha
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.exif import exif_orientation
from unmask.data.decode.file_format import FileFormat
from unmask.data.decode.image_header import Header, original_size
from unmask.data.decode.layout import Layout
from unmask.data.decode.pillow_image import load_image, loaded, open_image, row_boxes, to_array
from unmask.data.decode.pixels import as_pixels
from unmask.data.decode.reading import Reading

GRAY, RGB, GRAY_ALPHA, RGB_ALPHA = 0, 2, 4, 6  # colour types in the PNG header
PNG_START = b"\x89PNG\r\n\x1a\n"


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start, end) of each chunk's content up to and including IEND. Raises BadImage if IEND is missing."""
    place = len(PNG_START)
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        start, end = place + 8, place + 8 + length
        if end + 4 > len(data):
            break
        yield data[place + 4 : place + 8], start, end
        if data[place + 4 : place + 8] == b"IEND":
            return
        place = end + 4
    raise BadImage("TRUNCATED", f"PNG: the file ends after {len(data)} bytes, before its last chunk is complete")


def read_header(data: bytes, reading: Reading) -> Header:
    if len(data) < 33:
        raise BadImage("TRUNCATED", f"PNG: the file ends after {len(data)} bytes, before its header is complete")
    width, height, bits, kind = struct.unpack(">IIBB", data[16:26])
    channels = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}.get(kind)
    bands = {3: 1, 4: 2, 6: 4}.get(kind, channels or 0)
    if data[12:16] != b"IHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        raise BadImage("HEADER_BAD", "a PNG with a damaged header")
    if not width or not height or channels is None or bits not in (1, 2, 4, 8, 16):
        raise BadImage(
            "HEADER_BAD",
            f"a PNG with the invalid header {height} x {width} pixels, kind {kind}, {bits} bits per sample",
        )
    orientation = 1
    if b"eXIf" in data:
        for name, start, end in _png_chunks(data):
            if name == b"eXIf":
                orientation = exif_orientation(data[start:end])
    if orientation >= 5:
        height, width = width, height
    note = data[41 : 41 + int.from_bytes(data[33:37], "big")] if data[37:48] == b"tEXtunmask\0" else b""
    dtype = "uint16" if bits == 16 else "uint8"
    alpha = alpha_use(reading) if kind in (4, 6) else ""
    if not alpha and b"tRNS" in data[33 : data.find(b"IDAT")]:
        alpha = "composited" if reading.alpha in ("auto", "composite") else "dropped"
    layout, channels = Layout(bands, alpha), channels + (alpha == "band")
    each = {0: 1, 3: 1}.get(kind, 4) if bits <= 8 else {0: 2, 4: 4}.get(kind, 8)  # bytes per pixel in Pillow
    original = original_size(note, (height, width))
    memory = each * height * width
    return Header(
        height=height,
        width=width,
        channels=channels,
        dtype=dtype,
        format="PNG",
        orientation=orientation,
        packed_from=original,
        layout=layout,
        memory=memory,
    )


def read_pieces(data: bytes, found: Header) -> Iterator[np.ndarray]:
    """Yield the stored image in pieces of a few rows. Raises BadImage for a failed checksum or missing rows."""
    for name, start, end in _png_chunks(data):
        if zlib.crc32(memoryview(data)[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BadImage("CORRUPT", f"PNG: the chunk {name.decode('latin1')} fails its checksum")
    kind, alpha = data[25], found.layout.alpha
    if found.dtype == "uint16" and kind != GRAY and not pillow_raw_mode.works():
        yield _by_imagecodecs(data, alpha)
        return
    images = _images(data, found)
    width, height = images[0].size
    last = [np.asarray(image.crop((0, max(0, height - 2), width, height))) for image in images]
    if not any(rows.any() for rows in last):  # Pillow leaves missing rows black and reports no error
        _check_rows(data)
    for box in row_boxes(images[0].size):
        parts = [image.crop(box) if box[3] - box[1] < height else image for image in images]
        if found.dtype == "uint8":
            yield to_array(parts[0], alpha)
        else:
            yield _without_transparency(data, _join_bytes(kind, [np.asarray(part) for part in parts]), alpha)


def _images(data: bytes, found: Header) -> list[Image.Image]:
    """Decode with Pillow; return one image, or for 16-bit colour two: the high and the low bytes of the samples.

    16-bit gray with alpha has no raw modes, but its pixels have four bytes, so it is decoded as 8-bit RGBA.
    """
    kind = data[25]
    if found.dtype == "uint8" or kind == GRAY:
        return [load_image(data, "PNG")]
    mode = "RGB" if kind == RGB else "RGBA"
    raw_modes = ["RGBA"] if kind == GRAY_ALPHA else [f"{mode};16{part}" for part in "BL"]
    return [loaded(pillow_raw_mode.set_raw_mode(open_image(data), mode, raw), "PNG") for raw in raw_modes]


def _join_bytes(kind: int, parts: list[np.ndarray]) -> np.ndarray:
    """Join the high and low bytes of 16-bit samples, each (h, W) or (h, W, channels), to (h, W, channels) uint16."""
    if kind == GRAY:
        return as_pixels(parts[0])
    high, low = (parts[0][:, :, 0::2], parts[0][:, :, 1::2]) if kind == GRAY_ALPHA else parts
    return high.astype(np.uint16) << 8 | low


def _without_transparency(data: bytes, pixels: np.ndarray, alpha: str) -> np.ndarray:
    """Apply `Layout.alpha` to 16-bit pixels with an alpha channel or a transparent colour."""
    kind = data[25]
    if kind in (GRAY_ALPHA, RGB_ALPHA):
        return without_alpha(pixels, alpha)
    colour = _transparent(data, pixels.shape[2]) if alpha == "composited" else None
    if colour is None:
        return pixels
    return np.where((pixels == colour).all(2, keepdims=True), np.uint16(65535), pixels)


def _by_imagecodecs(data: bytes, alpha: str) -> np.ndarray:
    """Decode 16-bit colour with imagecodecs, if Pillow lacks the raw modes.

    Raises BadImage for a damaged file, and if imagecodecs is not installed.
    """
    try:
        import imagecodecs  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadImage(
            "UNSUPPORTED_MODE",
            "16-bit colour PNG, which the installed Pillow cuts to 8 bits; pip install 'unmask[tiff]'",
        ) from None
    try:
        pixels = imagecodecs.png_decode(data)
    except (ValueError, RuntimeError) as error:
        raise BadImage("CORRUPT", f"PNG: {error}") from None
    return _without_transparency(data, pixels, alpha)


def _check_rows(data: bytes) -> None:
    """Raise BadImage if the pixel stream has fewer rows than the header declares."""
    width, height, bits, kind, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    depth = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    needed = 0
    for left, top, across, down in passes if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        needed += max(0, rows) * (1 + -(-columns * depth // 8)) if columns > 0 else 0
    inflate, have = zlib.decompressobj(), 0
    for name, start, end in _png_chunks(data):
        left_over = data[start:end] if name == b"IDAT" else b""
        while left_over and have < needed:
            have += len(inflate.decompress(left_over, 1 << 20))
            left_over = inflate.unconsumed_tail
    if have < needed:
        raise BadImage("TRUNCATED", f"PNG: got {have} bytes of pixels; expected {needed}")


def _transparent(data: bytes, samples: int) -> np.ndarray | None:
    """Return the colour that a PNG without alpha declares transparent, or None."""
    for name, start, end in _png_chunks(data):
        if name == b"tRNS" and end - start == 2 * samples:
            return np.frombuffer(data, ">u2", samples, start).astype(np.uint16)
    return None


FORMAT = FileFormat(("PNG",), (PNG_START,), read_header, pieces=read_pieces)
