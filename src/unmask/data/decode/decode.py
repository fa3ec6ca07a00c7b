"""Bytes of one image file -> pixels, strictly: what is damaged raises `BadImage` with a reason code, never half one.

Read: JPEG (simplejpeg, with scaled decoding), PNG, WebP, TIFF, BMP, GIF (first frames), NumPy .npy; TIFF of several
16-bit or float samples, or of any number of bands, with the optional tifffile. EXIF orientation is applied. 16-bit
stays uint16; floats, and integers of any other width, become float32 with their values kept: Pillow's conversion to
RGB would turn them white or black. Alpha is composited on white; palette, CMYK and 1-bit images become RGB or gray. The
header is read, and limits checked, before anything is allocated; `header` and `decode` always agree.

A .npy of three axes is (H, W, C), unless its first axis is smaller than both others: then it is (C, H, W).

PNG is checked against its checksums. WebP, GIF, BMP and TIFF carry none: damage that still decodes is not noticed.

JPEGs with junk between segments, before or for the end marker are accepted where all blocks of the image are there;
see `jpeg_repair.py`.

A file may take 512 MiB in the scan, its own bytes included, by what its header says (`Header.memory`): 100 megapixels
of 8 bits as JPEG, PNG, BMP, GIF or TIFF in strips, 53 of 16-bit colour, about 30 as WebP. Decoding it into one array,
as the loader does, takes the memory of that array too.

Reason codes: EMPTY NOT_IMAGE FORMAT_NOT_ALLOWED HEADER_BAD TRUNCATED CORRUPT TOO_MANY_PIXELS TOO_LARGE_FILE
EXTREME_ASPECT UNSUPPORTED_MODE MISMATCHED_CHANNELS MISMATCHED_DTYPE TIMEOUT; and from the sources PERMISSION VANISHED
CHANGED.
"""

from __future__ import annotations

import io
import logging
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import simplejpeg
from PIL import (
    BmpImagePlugin,  # noqa: F401  (importing a plugin is what registers its format)
    GifImagePlugin,  # noqa: F401
    Image,
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from unmask.data.decode.jpeg_repair import NEXT_MARKER, repaired
from unmask.data.decode.layout import Layout
from unmask.data.decode.reading import DEFAULT, Reading, axes_of, is_alpha
from unmask.data.decode.tiff_pages import MOST_PAGES, Page, TooManyEntries, choose, read_pages, starting_at
from unmask.errors import UserError

FORMATS = ("PNG", "WEBP", "TIFF", "BMP", "GIF")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_START = b"\x89PNG\r\n\x1a\n"
MOST_PIXELS = 100_000_000
MOST_VALUES = 4 * MOST_PIXELS
MOST_BYTES = 200_000_000
MOST_ASPECT = 1000
PACKED = re.compile(rb"unmask\0packed (\d{1,6})x(\d{1,6}) from (\d{1,6})x(\d{1,6})")
LONGEST_NOTE = 64
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # modes of Pillow
MOST_MEMORY = 512 << 20  # bytes, for a file and the decoding of it piece by piece
MOST_PIECES = 24 << 20  # bytes that the conversion of a piece takes
MOST_WORK = 2_000_000_000  # pixels that the scans of a JPEG decode: about ten seconds
FEW = 1 << 16  # pixels that are computed on in float64 at a time
PIECE = 1 << 18  # pixels that are converted at a time: few enough to stay in the cache of a core
NO_LOG = logging.NullHandler()  # without any handler tifffile's remarks on tags would go to the screen
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class BadImage(UserError):
    """One image that cannot be used: `code` for machines, `detail` for people."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


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


def header(data: bytes, reading: Reading = DEFAULT) -> Header:
    """Size, channels and dtype as `reading` wants them, without decoding. Raises BadImage, also beyond the limits.

    Only where nothing but the values tell whether a TIFF's band is alpha, and `reading` does not, the file is decoded.
    """
    if not data:
        raise BadImage("EMPTY", "the file has no bytes")
    if len(data) > MOST_BYTES:
        raise BadImage("TOO_LARGE_FILE", f"{len(data)} bytes, at most {MOST_BYTES} are read")
    if data[:2] == b"\xff\xd8":
        found = _jpeg_header(data)
    elif data[:6] == b"\x93NUMPY":
        found = _npy_header(data, reading)
    elif data.startswith(PNG_START):
        found = _png_header(data, reading)
    elif data.startswith(TIFF_STARTS):
        found = _tiff_header(data, reading)
    else:
        found = _pillow_header(data, reading)
    _refuse_large(found.height, found.width, found.channels)
    _refuse_costly(found, len(data))
    if max(found.height, found.width) > MOST_ASPECT * min(found.height, found.width):
        raise BadImage(
            "EXTREME_ASPECT", f"{found.height} x {found.width} pixels: sides differ more than {MOST_ASPECT} times"
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
    """(H, W, C) uint8, uint16 or float32, contiguous.

    at_least: (h, w) in displayed orientation; a JPEG may then be decoded at 1/2, 1/4 or 1/8, the smallest that still
    has that size. The choice depends on nothing but the file and `at_least`. found: what `header` said of these bytes,
    which `reading` is part of. tolerated: a list to which faults that lost no pixel are added. Raises BadImage.
    """
    found = found or header(data, reading)
    try:
        if found.format == "JPEG":
            pixels = _jpeg(data, found, at_least, tolerated)
        elif found.format == "NPY":
            pixels = _npy(data, found)
        elif found.format == "TIFF":
            pixels = _tiff(data, found)
        else:
            stored = found.height if found.orientation < 5 else found.width
            pixels = _joined(_lazily(data, found), stored)
    except MemoryError:
        raise BadImage("TOO_MANY_PIXELS", "not enough memory to decode it") from None
    return oriented(pixels, found.orientation)


def _refuse_large(height: int, width: int, channels: int) -> None:
    pixels = height * width
    if pixels > MOST_PIXELS:
        raise BadImage("TOO_MANY_PIXELS", f"{height} x {width} pixels, at most {MOST_PIXELS} are decoded")
    if pixels * channels > MOST_VALUES:
        raise BadImage("TOO_MANY_PIXELS", f"{pixels} pixels of {channels} channels, at most {MOST_VALUES} values")


def _refuse_costly(found: Header, size: int) -> None:
    """The limits of one file in bytes and, where the header tells, in time."""
    needed = found.memory + MOST_PIECES + size
    if needed > MOST_MEMORY:
        raise BadImage(
            "TOO_MANY_PIXELS",
            f"{found.height} x {found.width} pixels of this kind take {needed >> 20} MiB to decode, at most "
            f"{MOST_MEMORY >> 20} MiB are used for a file; shrink it, or save it with fewer bits or as JPEG",
        )
    if found.scans * found.height * found.width > MOST_WORK:
        raise BadImage(
            "TIMEOUT",
            f"a JPEG of {found.scans} scans over {found.height} x {found.width} pixels takes too long to decode; save "
            "it anew",
        )


def pieces(data: bytes, found: Header, *, tolerated: list[str] | None = None) -> Iterator[np.ndarray]:
    """The image `decode` would give, in pieces of some rows (h, W, C), as stored: an orientation is not applied.

    For what looks at each pixel once. A large image takes the memory of its decoder, and not that of its pixels again.
    Raises BadImage, perhaps after some pieces.
    """
    lazy = found.format not in ("JPEG", "NPY", "TIFF") or (found.format == "TIFF" and len(found.pages) == 1)
    try:
        if lazy and found.height * found.width > PIECE:
            yield from _lazily(data, found)
            return
        height, width = (found.height, found.width) if found.orientation < 5 else (found.width, found.height)
        stored = replace(found, orientation=1, height=height, width=width)
        whole = decode(data, found=stored, tolerated=tolerated)
    except MemoryError:
        raise BadImage("TOO_MANY_PIXELS", "not enough memory to decode it") from None
    yield from _slices(whole)


def _slices(whole: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, PIECE // whole.shape[1])
    return (whole[top : top + rows] for top in range(0, len(whole), rows))


def _lazily(data: bytes, found: Header) -> Iterator[np.ndarray]:
    if found.format == "PNG":
        parts = _png_pieces(data, found)
    elif found.format == "TIFF":
        parts = _tiff_pieces(data, found)
    else:
        parts = _pillow_pieces(_loaded(data, found.format), found.layout.alpha)
    return _checked(parts, found)


def packed_note(size: tuple[int, int], full_size: tuple[int, int]) -> bytes:
    """What a smaller copy says of its original: its own size, and the full one.

    It stands in a JPEG's comment, in a PNG's text, or behind the values of a .npy.
    Its own, because a program that crops or shrinks the copy once more may carry the note along; then it is not heeded.
    """
    return b"unmask\0packed %dx%d from %dx%d" % (*size, *full_size)


def _packed_from(note: bytes, size: tuple[int, int]) -> tuple[int, int] | None:
    """The size of the original of an image of this `size`, both as displayed, where there is one."""
    found = PACKED.fullmatch(note)
    if found is None or (int(found[1]), int(found[2])) != size:
        return None
    height, width = int(found[3]), int(found[4])
    return (height, width) if size[0] <= height and size[1] <= width and height * width <= MOST_PIXELS else None


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


# ---------------------------------------------------------------------------------------------------------------- JPEG


def _jpeg_header(data: bytes) -> Header:
    """Walk the markers to the frame header: a few microseconds, where opening a decoder costs a hundred."""
    place, orientation, end, note = 2, 1, len(data), b""
    while place + 4 <= end:
        if data[place] != 0xFF or data[place + 1] == 0:
            junk = NEXT_MARKER.search(data, place)
            if place == 2 or junk is None:
                raise BadImage("HEADER_BAD", f"no JPEG marker at byte {place}")
            place = junk.start()
            continue
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker == 0xD8 or marker == 0x01 or 0xD0 <= marker <= 0xD7:
            place += 2
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if place + 10 > end:
                break
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            components = data[place + 9]
            if data[place + 4] != 8:
                raise BadImage(
                    "UNSUPPORTED_MODE", f"a JPEG of {data[place + 4]} bits a sample; convert it to PNG or TIFF"
                )
            if not height or not width or components not in (1, 3, 4):
                raise BadImage("HEADER_BAD", f"a JPEG of {height} x {width} pixels with {components} components")
            if orientation >= 5:
                height, width = width, height
            channels, original = 1 if components == 1 else 3, _packed_from(note, (height, width)) if note else None
            memory, scans = channels * height * width, 1
            if marker == 0xC2 and place + 10 + 3 * components <= end:  # progressive: all coefficients are kept
                sampling = data[place + 11 : place + 10 + 3 * components : 3]
                factors = [(factor >> 4 or 1, factor & 15 or 1) for factor in sampling]
                most = max(across for across, _ in factors) * max(down for _, down in factors)
                memory += 2 * height * width * sum(across * down for across, down in factors) // most
                scans = data.count(b"\xff\xda", place)
            return Header(height, width, channels, "uint8", "JPEG", orientation, original, memory=memory, scans=scans)
        if marker in (0xD9, 0xDA):
            raise BadImage("HEADER_BAD", "a JPEG without a frame header")
        if marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[place + 10 : place + 2 + length])
        elif marker == 0xFE and data[place + 4 : place + 11] == b"unmask\0":
            note = data[place + 4 : place + 2 + length]
        place += 2 + length
    raise BadImage("TRUNCATED", "the JPEG ends before its frame header")


def _exif_orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory; 1 when absent or broken."""
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


def _jpeg(
    data: bytes, found: Header, at_least: tuple[int, int] | None, tolerated: list[str] | None = None
) -> np.ndarray:
    height, width = (found.height, found.width) if found.orientation < 5 else (found.width, found.height)
    if at_least is not None:
        wanted = at_least if found.orientation < 5 else at_least[::-1]
        # Chosen here: the decoder would also take 3/8, 5/8 and 3/4, which cost more than the next larger power of two.
        for part in (8, 4, 2):
            if -(-height // part) >= wanted[0] and -(-width // part) >= wanted[1]:
                height, width = -(-height // part), -(-width // part)
                break
    colours = "GRAY" if found.channels == 1 else "RGB"
    try:
        return simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width, min_factor=1, strict=True)
    except ValueError as error:
        text = str(error)

    def decode_small(candidate: bytes) -> object:
        return simplejpeg.decode_jpeg(candidate, colours, min_height=1, min_width=1, min_factor=1, strict=True)

    mended = repaired(data, decode_small)
    if mended is None:
        code = "TRUNCATED" if "premature end of jpeg" in text.lower() else "CORRUPT"
        raise BadImage(code, f"JPEG: {text}")
    if tolerated is not None:
        tolerated += mended[1]
    return simplejpeg.decode_jpeg(mended[0], colours, min_height=height, min_width=width, min_factor=1, strict=True)


# ----------------------------------------------------------------------------------------------------------------- PNG


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk's content, up to and with IEND. Raises BadImage when the file ends earlier."""
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
    raise BadImage("TRUNCATED", f"PNG: it ends after {len(data)} bytes, within a chunk or before the last one")


def _png_header(data: bytes, reading: Reading) -> Header:
    if len(data) < 33:
        raise BadImage("TRUNCATED", f"PNG: it ends after {len(data)} bytes, before its header does")
    width, height, bits, kind = struct.unpack(">IIBB", data[16:26])
    channels = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}.get(kind)
    bands = {3: 1, 4: 2, 6: 4}.get(kind, channels or 0)
    if data[12:16] != b"IHDR" or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big"):
        raise BadImage("HEADER_BAD", "a PNG with a damaged header")
    if not width or not height or channels is None or bits not in (1, 2, 4, 8, 16):
        raise BadImage("HEADER_BAD", f"a PNG of {height} x {width} pixels, kind {kind}, {bits} bits a sample")
    orientation = 1
    if b"eXIf" in data:
        for name, start, end in _png_chunks(data):
            if name == b"eXIf":
                orientation = _exif_orientation(data[start:end])
    if orientation >= 5:
        height, width = width, height
    note = data[41 : 41 + int.from_bytes(data[33:37], "big")] if data[37:48] == b"tEXtunmask\0" else b""
    dtype = "uint16" if bits == 16 else "uint8"
    alpha = _alpha_use(reading) if kind in (4, 6) else ""
    if not alpha and b"tRNS" in data[33 : data.find(b"IDAT")]:
        alpha = "composited" if reading.alpha in ("auto", "composite") else "dropped"
    layout, channels = Layout(bands, alpha), channels + (alpha == "band")
    each = {0: 1, 3: 1}.get(kind, 4) if bits <= 8 else {0: 2, 4: 4}.get(kind, 8)  # bytes of a pixel in Pillow
    original = _packed_from(note, (height, width))
    memory = each * height * width
    return Header(height, width, channels, dtype, "PNG", orientation, original, layout, memory=memory)


def _alpha_use(reading: Reading) -> str:
    """What becomes of a channel that is certainly alpha."""
    return {"drop": "dropped", "band": "band"}.get(reading.alpha, "composited")


def _png_pieces(data: bytes, found: Header) -> Iterator[np.ndarray]:
    for name, start, end in _png_chunks(data):
        if zlib.crc32(memoryview(data)[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise BadImage("CORRUPT", f"PNG: the chunk {name.decode('latin1')} fails its checksum")
    images = _png_images(data, found)
    width, height = images[0].size
    last = [np.asarray(image.crop((0, max(0, height - 2), width, height))) for image in images]
    if not any(rows.any() for rows in last):  # missing rows of a stream that is sound otherwise are black in Pillow
        _check_rows(data)
    alpha, key = found.layout.alpha, None
    if found.dtype == "uint16" and data[25] in (0, 2) and alpha == "composited":
        key = _transparent(data, found.channels)
    for box in _boxes(images[0].size):
        parts = [image.crop(box) if box[3] - box[1] < height else image for image in images]
        if found.dtype == "uint8":
            yield _piece(parts[0], alpha)
            continue
        pixels = _png16(data[25], [np.asarray(part) for part in parts], alpha)
        yield pixels if key is None else np.where((pixels == key).all(2, keepdims=True), np.uint16(65535), pixels)


def _png_images(data: bytes, found: Header) -> list[Image.Image]:
    """What Pillow makes of a PNG: one image, or for 16-bit colour its high and its low bytes, which are decoded apart.

    Pillow's raw modes ;16B and ;16L take the first and the second byte of each sample. Gray + alpha has no such pair,
    but its pixels are four bytes wide, as those of 8-bit RGBA are.
    """
    kind = data[25]
    if found.dtype == "uint8" or kind == 0:
        return [_loaded(data, "PNG")]
    if kind == 4:
        return [_loaded(data, "PNG", "RGBA", "RGBA")]
    mode = "RGBA" if kind == 6 else "RGB"
    return [_loaded(data, "PNG", mode, f"{mode};16{part}") for part in "BL"]


def _png16(kind: int, parts: list[np.ndarray], alpha: str) -> np.ndarray:
    """Rows of a 16-bit PNG, which Pillow would cut to 8 bits unless it is gray."""
    if kind == 0:
        return _number(parts[0])
    high, low = (parts[0][:, :, 0::2], parts[0][:, :, 1::2]) if kind == 4 else parts
    pixels = high.astype(np.uint16) << 8 | low
    return _without_alpha(pixels, alpha) if kind in (4, 6) else pixels


def _check_rows(data: bytes) -> None:
    """Raises BadImage when the pixel stream holds fewer rows than the header says."""
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
        raise BadImage("TRUNCATED", f"PNG: {have} bytes of pixels, {needed} are needed: rows are missing")


def _transparent(data: bytes, samples: int) -> np.ndarray | None:
    """The colour that a PNG without alpha declares transparent."""
    for name, start, end in _png_chunks(data):
        if name == b"tRNS" and end - start == 2 * samples:
            return np.frombuffer(data, ">u2", samples, start).astype(np.uint16)
    return None


def _without_alpha(pixels: np.ndarray, alpha: str, *, premultiplied: bool = False) -> np.ndarray:
    """(H, W, C + 1) values whose last channel is alpha -> what is made of them, see `Layout.alpha`."""
    if alpha == "band":
        return pixels
    return (
        np.ascontiguousarray(pixels[:, :, :-1])
        if alpha == "dropped"
        else _on_white(pixels, premultiplied=premultiplied)
    )


def _on_white(pixels: np.ndarray, *, premultiplied: bool = False) -> np.ndarray:
    """(H, W, C + 1) integers whose last channel is alpha -> (H, W, C)."""
    top = np.iinfo(pixels.dtype).max
    out = np.empty((*pixels.shape[:2], pixels.shape[2] - 1), pixels.dtype)
    rows = max(1, FEW // pixels.shape[1])
    for start in range(0, len(pixels), rows):  # in float64, which for a whole image would take gigabytes
        part = pixels[start : start + rows]
        colour, alpha = part[:, :, :-1].astype(np.float64), part[:, :, -1:] / top
        mixed = colour * (1 if premultiplied else alpha) + top * (1 - alpha)
        out[start : start + rows] = mixed.round().clip(0, top)
    return out


# ---------------------------------------------------------------------------------------------------------------- TIFF


@dataclass(frozen=True)
class _Tiff:
    """The first directory: what decides who reads it. `kind` is 1 unsigned, 2 signed, 3 float."""

    height: int
    width: int
    samples: int
    bits: int
    kind: int
    photometric: int
    extra: tuple[int, ...]
    orientation: int

    @property
    def alpha(self) -> bool:
        return bool(self.extra) and self.extra[-1] in (1, 2) and self.samples in (2, 4)

    @property
    def premultiplied(self) -> bool:
        return self.alpha and self.extra[-1] == 1

    @property
    def plain(self) -> bool:
        """Whether Pillow reads it as it is; what it would cut to 8 bits or drop bands of goes to tifffile."""
        if self.samples == 1:
            known = ((1, 1), (2, 1), (4, 1), (8, 1), (12, 1), (16, 1), (16, 2), (32, 2), (32, 3))
            return self.photometric in (0, 1, 3) and (self.bits, self.kind) in known
        if (self.bits, self.kind) != (8, 1):
            return False
        if self.samples == 3:
            return self.photometric in (2, 6)
        return (self.samples == 4 and self.photometric == 5) or (self.alpha and self.photometric in (1, 2))


def _tiff_pages(data: bytes, most: int) -> list[Page]:
    try:
        return read_pages(data, most=most)
    except TooManyEntries as error:
        raise BadImage("HEADER_BAD", f"TIFF: {error}") from None
    except (struct.error, OverflowError):
        raise BadImage(
            "TRUNCATED", "TIFF: it has no directory, or one beyond its end: it was not written to the end"
        ) from None


def _tiff_layout(page: Page) -> _Tiff:
    bits, kinds = page.tags.get(258) or (1,), page.tags.get(339) or (1,)
    orientation = page.first(274, 1)
    found = _Tiff(
        height=page.size[0],
        width=page.size[1],
        samples=page.first(277, 1),
        bits=bits[0],
        kind=kinds[0],
        photometric=page.first(262, 1),
        extra=page.tags.get(338, ()),
        orientation=orientation if 1 <= orientation <= 8 else 1,
    )
    if not found.height or not found.width or not found.samples:
        raise BadImage("HEADER_BAD", f"a TIFF of {found.height} x {found.width} pixels with {found.samples} samples")
    if len(set(bits)) > 1 or len(set(kinds)) > 1:
        raise BadImage("UNSUPPORTED_MODE", f"a TIFF whose samples differ in kind (bits {bits}); save it as .npy")
    if not found.plain and (found.photometric > 2 or found.bits not in (8, 16, 32, 64) or found.kind > 3):
        raise BadImage(
            "UNSUPPORTED_MODE",
            f"a TIFF with {found.samples} samples of {found.bits} bits and photometric kind {found.photometric}; "
            "convert it to 8- or 16-bit RGB, or to .npy, which takes any number of channels",
        )
    return found


def _tiff_header(data: bytes, reading: Reading) -> Header:
    pages = _tiff_pages(data, 1 if reading.pages == "samples" else MOST_PAGES)
    chosen = choose(pages, reading)
    tiff = _tiff_layout(chosen.pages[0])
    height, width = (tiff.height, tiff.width) if tiff.orientation < 5 else (tiff.width, tiff.height)
    alpha = ""
    if tiff.alpha:
        _refuse_large(height, width, tiff.samples)  # before any value is looked at
        alpha = _tiff_alpha_use(data, chosen.pages[0], tiff, reading)
    channels = tiff.samples - (alpha in ("composited", "dropped"))
    if tiff.plain and (tiff.photometric == 3 or tiff.photometric == 5):
        channels = 3
    dtype = "float32"
    if tiff.kind == 1 and tiff.bits <= 16:
        dtype = "uint8" if tiff.bits <= 8 else "uint16"
    layout = Layout(tiff.samples, alpha, chosen.count, chosen.use)
    # Pillow turns a TIFF by itself.
    orientation = 1 if tiff.plain and not (alpha == "band" and tiff.premultiplied) else tiff.orientation
    offsets = tuple(page.offset for page in chosen.pages)
    memory = _tiff_memory(tiff, chosen.pages[0], alpha, len(offsets))
    return Header(
        height, width, channels * len(offsets), dtype, "TIFF", orientation, None, layout, offsets, memory=memory
    )


def _tiff_memory(tiff: _Tiff, page: Page, alpha: str, pages: int) -> int:
    """Bytes that decoding takes, strips or tiles included, which are as large as the file likes."""
    pixels = tiff.height * tiff.width
    values = pixels * tiff.samples * -(-tiff.bits // 8)
    if _needs_tifffile(tiff, alpha):
        planar = page.first(284, 1) == 2
        memory = values * 9 // 4 if planar else values * 5 // 4
        memory += 2 * values if alpha in ("composited", "dropped") or tiff.bits not in (8, 16, 32) else 0
    else:
        each = -(-tiff.bits // 8) if tiff.samples == 1 and tiff.photometric != 5 else 4
        rows = min(page.first(278, tiff.height), tiff.height)
        memory = each * pixels + values * rows // tiff.height
    return memory if pages == 1 else memory + 2 * pages * values


def _tiff_alpha_use(data: bytes, page: Page, tiff: _Tiff, reading: Reading) -> str:
    """What becomes of a last sample that is tagged as alpha, which GDAL and others do to any fourth band."""
    if reading.alpha != "auto":
        use = _alpha_use(reading)
    elif tiff.kind == 3 and tiff.photometric < 2:
        use = "band"
    elif reading.tagged != "auto":
        use = {"alpha": "composited", "band": "band"}[reading.tagged]
    elif tiff.kind == 3:
        use = "composited"
    else:
        use = "composited" if is_alpha(_tagged_values(data, page, tiff)) else "band"
    if use == "composited" and not tiff.plain and tiff.kind == 3:
        raise BadImage(
            "UNSUPPORTED_MODE",
            "a float TIFF with alpha, whose white is not known; use --set data.alpha=band or data.alpha=drop",
        )
    return use


def _tagged_values(data: bytes, page: Page, tiff: _Tiff) -> np.ndarray:
    """(H, W) values of the last sample."""
    data = starting_at(data, page.offset)
    if _needs_tifffile(tiff, "band"):
        return _tiff_bands(data, tiff, "band")[:, :, -1]
    image = _loaded(data, "TIFF")
    return _joined((part[:, :, -1:] for part in _plain_tiff_pieces(image, tiff, "band")), image.height)[:, :, 0]


def alpha_values(data: bytes) -> np.ndarray | None:
    """(H, W) values of the last sample of a TIFF that is tagged as alpha and could be either; None for other files."""
    if not data.startswith(TIFF_STARTS):
        return None
    page = choose(_tiff_pages(data, MOST_PAGES), DEFAULT).pages[0]
    tiff = _tiff_layout(page)
    if not tiff.alpha or tiff.kind == 3:
        return None
    _refuse_large(tiff.height, tiff.width, tiff.samples)
    return _tagged_values(data, page, tiff)


def _tiff(data: bytes, found: Header) -> np.ndarray:
    by_offset = {page.offset: page for page in _tiff_pages(data, MOST_PAGES)}
    pages = [by_offset[offset] for offset in found.pages]
    parts = [_tiff_page(data, page, _tiff_layout(page), found.layout.alpha) for page in pages]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, 2)


def _tiff_page(data: bytes, page: Page, tiff: _Tiff, alpha: str) -> np.ndarray:
    data = starting_at(data, page.offset)
    if _needs_tifffile(tiff, alpha):
        return _tiff_bands(data, tiff, alpha)
    image = _loaded(data, "TIFF")
    if image.size not in ((tiff.width, tiff.height), (tiff.height, tiff.width)):
        raise BadImage("CORRUPT", f"TIFF: decoded to {image.size}, its header says otherwise")
    try:
        return _joined(_plain_tiff_pieces(image, tiff, alpha), image.height)
    except BadImage:
        raise
    except (ValueError, OSError) as error:
        raise BadImage("UNSUPPORTED_MODE", f"TIFF: {error}") from None


def _tiff_pieces(data: bytes, found: Header) -> Iterator[np.ndarray]:
    """Of a TIFF of which one page is read."""
    page = next(page for page in _tiff_pages(data, MOST_PAGES) if page.offset == found.pages[0])
    tiff, data = _tiff_layout(page), starting_at(data, page.offset)
    if _needs_tifffile(tiff, found.layout.alpha):
        yield from _slices(_tiff_bands(data, tiff, found.layout.alpha))
    else:
        yield from _plain_tiff_pieces(_loaded(data, "TIFF"), tiff, found.layout.alpha)


def _needs_tifffile(tiff: _Tiff, alpha: str) -> bool:
    return not tiff.plain or (alpha == "band" and tiff.premultiplied)  # Pillow divides by such an alpha


def _plain_tiff_pieces(image: Image.Image, tiff: _Tiff, alpha: str) -> Iterator[np.ndarray]:
    dtype = "uint16" if tiff.kind == 1 and tiff.bits > 8 else "uint8" if tiff.kind == 1 else "float32"
    for part in _pillow_pieces(image, alpha):
        if part.dtype != dtype:
            raise BadImage("CORRUPT", f"TIFF: decoded to {part.dtype}, its header says otherwise")
        # White is zero, which Pillow heeds up to 8 bits only.
        yield np.uint16((1 << tiff.bits) - 1) - part if tiff.photometric == 0 and dtype == "uint16" else part


def _tiff_bands(data: bytes, tiff: _Tiff, alpha: str) -> np.ndarray:
    """The first page of a TIFF that Pillow would cut to 8 bits or take bands from."""
    what = f"a TIFF with {tiff.samples} samples of {tiff.bits} bits a pixel"
    try:
        import tifffile
    except ImportError:
        advice = "pip install 'unmask[tiff]', or convert it to .npy"
        raise BadImage("UNSUPPORTED_MODE", f"{what} needs the package tifffile: {advice}") from None
    logging.getLogger("tifffile").addHandler(NO_LOG)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            values, axes = page.asarray(), page.axes
    except MemoryError:
        raise
    except Exception as error:  # it raises whatever a damaged file makes its parsers meet
        text = str(error)
        if "imagecodecs" in text:
            advice = "pip install imagecodecs, or save it without compression or with deflate"
            raise BadImage(
                "UNSUPPORTED_MODE", f"{what}, compressed in a way that needs imagecodecs: {advice}"
            ) from None
        raise BadImage(_code_of(text), f"TIFF: {text}") from None
    if axes == "SYX":
        values = values.transpose(1, 2, 0)
    shape = values.shape if values.ndim == 3 else (*values.shape, 1)
    if shape != (tiff.height, tiff.width, tiff.samples):
        raise BadImage("UNSUPPORTED_MODE", f"{what} in {tiff.height} x {tiff.width} that decodes to {values.shape}")
    values = _number(values)
    return _without_alpha(values, alpha, premultiplied=tiff.premultiplied) if tiff.alpha else values


# ------------------------------------------------------------------------------------------------- everything else


def _pillow_header(data: bytes, reading: Reading) -> Header:
    with _open(data) as image:
        channels = _channels_of_mode(image.mode)
        orientation, alpha = 1, ""
        if image.format == "WEBP":
            orientation = _exif_orientation(bytes(image.info.get("exif", b"")).removeprefix(b"Exif\0\0"))
        if image.mode in WITH_ALPHA:
            alpha = _alpha_use(reading)
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
        return Header(height, width, channels, "uint8", kind, orientation, None, layout, memory=memory)


def _is_clear_bmp(data: bytes) -> bool:
    """Whether a BMP of 32 bits has an alpha of zeros only, which no program that shows it takes for transparent."""
    (start,) = struct.unpack_from("<I", data, 10)
    return struct.unpack_from("<H", data, 28) == (32,) and not data[start + 3 :: 4].strip(b"\0")


def _channels_of_mode(mode: str) -> int:
    """Without alpha."""
    if mode in ("1", "L", "LA", "La"):
        return 1
    if mode in ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa"):
        return 3
    raise BadImage("UNSUPPORTED_MODE", f"pixel mode {mode}; convert it to PNG, or use .npy")


def _open(data: bytes) -> Image.Image:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        raise BadImage("TRUNCATED", f"WebP: {len(data)} bytes, {int.from_bytes(data[4:8], 'little') + 8} are declared")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large image is judged by our own limit
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImage("TOO_MANY_PIXELS", f"far more pixels than the {MOST_PIXELS} that are decoded") from None
    except UnidentifiedImageError:
        raise BadImage(*_what_it_is(data)) from None
    except MemoryError:
        raise BadImage("TOO_MANY_PIXELS", "not enough memory to read its header") from None
    except Exception as error:  # its plugins raise whatever a damaged header makes them meet
        raise BadImage("HEADER_BAD", f"{type(error).__name__}: {error}") from None


FOREIGN = {
    b"%!PS": "PostScript",
    b"%PDF": "PDF",
    b"8BPS": "Photoshop",
    b"\0\0\1\0": "an icon",
    b"icns": "an icon",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL": "JPEG XL",
    b"\x76\x2f\x31\x01": "OpenEXR",
    b"SIMPLE  =": "FITS",
    b"\x89HDF": "HDF5",
}


def _what_it_is(data: bytes) -> tuple[str, str]:
    """Why no decoder took it."""
    for start, name in FOREIGN.items():
        if data.startswith(start):
            return "FORMAT_NOT_ALLOWED", f"{name}; convert it to PNG"
    if data[4:8] == b"ftyp":
        return "FORMAT_NOT_ALLOWED", "HEIC or AVIF; convert it to JPEG or PNG"
    if data[128:132] == b"DICM":
        return "FORMAT_NOT_ALLOWED", "DICOM; convert it to 16-bit PNG or to .npy"
    text = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return "FORMAT_NOT_ALLOWED", "SVG; draw it to PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "NOT_IMAGE", "the content is a web page, perhaps of a download that failed"
    if text.startswith(b"version https://git-lfs"):
        return "NOT_IMAGE", "the content is a Git LFS pointer; fetch the files with git lfs pull"
    for start, name in {b"GIF8": "GIF", b"BM": "BMP", b"RIFF": "WebP", **dict.fromkeys(TIFF_STARTS, "TIFF")}.items():
        if data.startswith(start) and (start != b"RIFF" or data[8:12] == b"WEBP"):
            return "HEADER_BAD", f"a {name} with a damaged header, or of a kind that is not known"
    return "NOT_IMAGE", f"the content is no image of a known format (first bytes {data[:8]!r})"


def _code_of(text: str) -> str:
    short = ("truncated", "not enough", "end of file", "unexpected end", "failed to read")
    return "TRUNCATED" if any(words in text.lower() for words in short) else "CORRUPT"


def _loaded(data: bytes, name: str, mode: str | None = None, raw: str | None = None) -> Image.Image:
    """Pillow's image, decoded; of a PNG also under another mode and raw mode than its header asks for."""
    with _open(data) as image:
        if mode is not None:
            image._mode = mode
            image.tile = [image.tile[0]._replace(args=raw)]  # type: ignore[attr-defined]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image.load()
        except Image.DecompressionBombError:
            raise BadImage("TOO_MANY_PIXELS", f"more than {MOST_PIXELS} pixels") from None
        except MemoryError:
            raise
        except Exception as error:  # its plugins raise whatever a damaged file makes them meet
            raise BadImage(_code_of(str(error)), f"{name}: {error}") from None
        return image


def _pillow_pieces(image: Image.Image, alpha: str) -> Iterator[np.ndarray]:
    """The pixels of a decoded image, rows by rows: a conversion of all at once would take several times its memory."""
    for box in _boxes(image.size):
        yield _piece(image.crop(box) if box[3] - box[1] < image.height else image, alpha)


def _boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Pillow's boxes of at most `PIECE` pixels that cover an image of (width, height), from top to bottom."""
    width, height = size
    rows = max(1, PIECE // width)
    return ((0, top, width, min(height, top + rows)) for top in range(0, height, rows))


def _checked(parts: Iterator[np.ndarray], found: Header) -> Iterator[np.ndarray]:
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


def _joined(parts: Iterator[np.ndarray], height: int) -> np.ndarray:
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


def _piece(image: Image.Image, alpha: str) -> np.ndarray:
    """(H, W, C) of a decoded image, or of some of its rows; alpha: see `Layout.alpha`."""
    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        return _number(np.asarray(image))
    gray = mode in ("L", "LA", "La", "1")
    if alpha == "band" and mode in WITH_ALPHA:
        image = image.convert("LA" if gray else "RGBA")
    elif alpha in ("dropped", "opaque"):
        image = image.convert("RGBA" if mode in ("La", "RGBa", "PA") else mode).convert("L" if gray else "RGB")
    elif mode in WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, "white")
        flat.alpha_composite(rgba)
        image = flat.convert("L" if gray else "RGB")
    elif mode not in ("L", "RGB"):
        image = image.convert("L" if mode == "1" else "RGB")
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])


def _dtype_of(dtype: np.dtype) -> str:
    """uint8 and uint16 stay, bool becomes uint8, all other numbers float32: by type, so that a data set agrees."""
    if dtype.kind not in "biuf":
        raise BadImage("UNSUPPORTED_MODE", f"array of {dtype}; integers or floats are expected")
    return "uint8" if dtype.kind == "b" else dtype.name if dtype.name in ("uint8", "uint16") else "float32"


def _number(values: np.ndarray) -> np.ndarray:
    """Any numeric array (H, W) or (H, W, C) -> (H, W, C) of one of the three dtypes. Integers are exact up to 2^24.

    NaN and infinity stay: they mean that a pixel is absent.
    """
    if values.ndim == 2:
        values = values[:, :, None]
    dtype = _dtype_of(values.dtype)
    if values.dtype.kind == "b":
        return np.ascontiguousarray(values).astype(bool).astype(np.uint8) * 255
    with np.errstate(over="ignore"):  # what overflows becomes infinite, which counts as absent (absent.py)
        values = np.ascontiguousarray(values.astype(dtype, copy=False))
    return values


def oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation: the stored image (H, W, C), or a mask (H, W), -> the displayed one."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ---------------------------------------------------------------------------------------------------------------- .npy


def _npy_layout(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether Fortran's order, dtype, where the values begin)."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except Exception as error:  # the header is a Python literal, and its parser raises many things
        raise BadImage("HEADER_BAD", f".npy: {str(error) or type(error).__name__}") from None
    if dtype.hasobject:
        raise BadImage("UNSUPPORTED_MODE", ".npy with Python objects, which can run code; save plain numbers")
    return shape, fortran, dtype, file.tell()


def _npy_header(data: bytes, reading: Reading) -> Header:
    shape, _, dtype, start = _npy_layout(data)
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise BadImage("UNSUPPORTED_MODE", f".npy of shape {shape}; (H, W), (H, W, C) or (C, H, W) is expected")
    axes = axes_of(shape, reading) if len(shape) == 3 else ""
    height, width, channels = (shape[1], shape[2], shape[0]) if axes == "CHW" else (*shape, 1)[:3]
    values = math.prod(shape)
    needed = values * dtype.itemsize
    note = data[start + needed :][:LONGEST_NOTE]
    return Header(
        height,
        width,
        channels,
        _dtype_of(dtype),
        "NPY",
        packed_from=_packed_from(note, (height, width)) if note else None,
        layout=Layout(channels, axes=axes),
        memory=0 if len(data) - start < needed else {"uint8": 0, "uint16": 0, "bool": 2}.get(dtype.name, 5) * values,
    )


def npy_shape(data: bytes) -> tuple[int, ...]:
    """The shape that a .npy claims. Raises BadImage for anything else."""
    return _npy_layout(data)[0] if data[:6] == b"\x93NUMPY" else ()


def _npy(data: bytes, found: Header) -> np.ndarray:
    shape, fortran, dtype, start = _npy_layout(data)
    needed = math.prod(shape) * dtype.itemsize
    if len(data) - start < needed:
        raise BadImage("TRUNCATED", f".npy has {len(data) - start} bytes, {needed} are needed")
    values = np.frombuffer(data, dtype, math.prod(shape), start).reshape(shape, order="F" if fortran else "C")
    if found.layout.axes == "CHW":
        values = values.transpose(1, 2, 0)
    return _number(values)
