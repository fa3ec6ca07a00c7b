"""Bytes of one image file -> pixels, strictly: what is damaged raises `BadImage` with a reason code, never half an image.

Read: JPEG (simplejpeg, with scaled decoding), PNG, WebP, TIFF, BMP, GIF (first frames), NumPy .npy. EXIF orientation is
applied. 16-bit stays uint16 and float stays float32: Pillow's own conversion to RGB would turn them white or black.
Alpha is composited on white; palette, CMYK and 1-bit images become RGB or gray. The header is read, and limits checked,
before anything is allocated.

Reason codes: EMPTY NOT_IMAGE FORMAT_NOT_ALLOWED HEADER_BAD TRUNCATED CORRUPT TOO_MANY_PIXELS TOO_LARGE_FILE
EXTREME_ASPECT UNSUPPORTED_MODE MISMATCHED_CHANNELS MISMATCHED_DTYPE; and from the sources PERMISSION VANISHED.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

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

FORMATS = ("PNG", "WEBP", "TIFF", "BMP", "GIF")
MOST_PIXELS = 100_000_000
MOST_BYTES = 200_000_000
MOST_ASPECT = 1000
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class BadImage(ValueError):
    """One image that cannot be used: `code` for machines, `detail` for people."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code, detail)
        self.code, self.detail = code, detail

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"


@dataclass(frozen=True)
class Header:
    """What the first bytes say. Height and width are as displayed, after the EXIF `orientation` (1 to 8) is applied."""

    height: int
    width: int
    channels: int
    dtype: str
    format: str
    orientation: int = 1


def header(data: bytes) -> Header:
    """Size, channels and dtype without decoding. Raises BadImage, also for sizes beyond the limits."""
    if not data:
        raise BadImage("EMPTY", "the file has no bytes")
    if len(data) > MOST_BYTES:
        raise BadImage("TOO_LARGE_FILE", f"{len(data)} bytes, at most {MOST_BYTES} are read")
    if data[:2] == b"\xff\xd8":
        found = _jpeg_header(data)
    elif data[:6] == b"\x93NUMPY":
        found = _npy_header(data)
    else:
        found = _pillow_header(data)
    if found.height * found.width > MOST_PIXELS:
        raise BadImage("TOO_MANY_PIXELS", f"{found.height} x {found.width} pixels, at most {MOST_PIXELS} are decoded")
    if max(found.height, found.width) > MOST_ASPECT * min(found.height, found.width):
        raise BadImage(
            "EXTREME_ASPECT", f"{found.height} x {found.width} pixels: sides differ more than {MOST_ASPECT} times"
        )
    return found


def decode(data: bytes, *, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, C) uint8, uint16 or float32, contiguous.

    at_least: (h, w) in displayed orientation; a JPEG may then be decoded at 1/2, 1/4 or 1/8, the smallest that still has
    that size. The choice depends on nothing but the file and `at_least`. Raises BadImage.
    """
    found = header(data)
    if found.format == "JPEG":
        return _oriented(_jpeg(data, found, at_least), found.orientation)
    if found.format == "NPY":
        return _npy(data)
    if found.format == "PNG" and found.dtype == "uint16" and found.channels > 1:
        return _oriented(_png16(data), found.orientation)
    return _oriented(_pillow(data, found), found.orientation)


def conform(image: np.ndarray, channels: int, dtype: str) -> np.ndarray:
    """The image with the data set's channels and dtype.

    Gray becomes RGB by repetition, RGB gray by luma, uint8 uint16 by x 257. Anything else raises BadImage: it would have
    to be invented.
    """
    have = image.shape[2]
    if have != channels:
        if have == 1 and channels == 3:
            image = np.repeat(image, 3, axis=2)
        elif have == 3 and channels == 1:
            image = (image.astype(np.float32) @ LUMA)[:, :, None]
            image = (
                image
                if dtype == "float32"
                else image.round().astype(np.uint16 if dtype == "uint16" and image.max() > 255 else np.uint8)
            )
        else:
            raise BadImage("MISMATCHED_CHANNELS", f"{have} channels, the data set has {channels}")
    if image.dtype == dtype:
        return image
    if image.dtype == np.uint8 and dtype == "uint16":
        return image.astype(np.uint16) * 257
    raise BadImage("MISMATCHED_DTYPE", f"{image.dtype} pixels, the data set has {dtype}")


# ---------------------------------------------------------------------------------------------------------------- JPEG


def _jpeg_header(data: bytes) -> Header:
    """Walk the markers to the frame header: a few microseconds, where opening a decoder costs a hundred."""
    place, orientation, end = 2, 1, len(data)
    while place + 4 <= end:
        if data[place] != 0xFF:
            raise BadImage("HEADER_BAD", f"no JPEG marker at byte {place}")
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
            if not height or not width or components not in (1, 3, 4):
                raise BadImage("HEADER_BAD", f"a JPEG of {height} x {width} pixels with {components} components")
            if orientation >= 5:
                height, width = width, height
            return Header(height, width, 1 if components == 1 else 3, "uint8", "JPEG", orientation)
        if marker in (0xD9, 0xDA):
            raise BadImage("HEADER_BAD", "a JPEG without a frame header")
        if marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
            orientation = _exif_orientation(data[place + 10 : place + 2 + length])
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


def _jpeg(data: bytes, found: Header, at_least: tuple[int, int] | None) -> np.ndarray:
    height, width = at_least or (0, 0)
    if found.orientation >= 5:
        height, width = width, height
    try:
        return simplejpeg.decode_jpeg(
            data,
            "GRAY" if found.channels == 1 else "RGB",
            min_height=height,
            min_width=width,
            min_factor=1,
            strict=True,
        )
    except (ValueError, MemoryError) as error:
        text = str(error)
        code = "TRUNCATED" if "premature" in text.lower() or "end of" in text.lower() else "CORRUPT"
        raise BadImage(code, f"JPEG: {text}") from None


# ------------------------------------------------------------------------------------------------------- everything else


def _pillow_header(data: bytes) -> Header:
    with _open(data) as image:
        mode, bands = image.mode, len(image.getbands())
        channels, dtype = _shape_of_mode(mode, bands)
        if image.format == "PNG" and data[24:25] == b"\x10":
            channels, dtype = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}[data[25]], "uint16"
        orientation = 1
        if image.format in ("PNG", "WEBP", "TIFF"):
            orientation = int(image.getexif().get(0x0112, 1) or 1)
        width, height = image.size
        if orientation >= 5:
            height, width = width, height
        return Header(height, width, channels, dtype, str(image.format), orientation if 1 <= orientation <= 8 else 1)


def _shape_of_mode(mode: str, bands: int) -> tuple[int, str]:
    if mode.startswith("I;16"):
        return 1, "uint16"
    if mode == "I":
        return 1, "uint16"
    if mode == "F":
        return 1, "float32"
    if mode in ("1", "L", "LA", "La"):
        return 1, "uint8"
    if mode in ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"):
        return 3, "uint8"
    raise BadImage("UNSUPPORTED_MODE", f"pixel mode {mode} with {bands} bands; convert it, or use .npy")


def _open(data: bytes) -> Image.Image:
    if data[:4] in (b"II*\0", b"MM\0*") and (odd := _odd_tiff(data)):
        raise BadImage("UNSUPPORTED_MODE", f"{odd}; convert it to .npy, which takes any number of channels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large image is judged by our own limit
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImage("TOO_MANY_PIXELS", f"far more pixels than the {MOST_PIXELS} that are decoded") from None
    except UnidentifiedImageError:
        raise BadImage(*_what_it_is(data)) from None
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, KeyError, TypeError, OverflowError) as error:
        raise BadImage("HEADER_BAD", f"{type(error).__name__}: {error}") from None


def _what_it_is(data: bytes) -> tuple[str, str]:
    """Why no decoder took it."""
    known = {
        b"\x89PNG": "HEADER_BAD a PNG with a damaged header",
        b"GIF8": "HEADER_BAD a GIF with a damaged header",
        b"BM": "HEADER_BAD a BMP with a damaged header",
        b"II*\0": "HEADER_BAD a TIFF with a damaged header",
        b"MM\0*": "HEADER_BAD a TIFF with a damaged header",
        b"%!PS": "FORMAT_NOT_ALLOWED PostScript",
        b"%PDF": "FORMAT_NOT_ALLOWED PDF",
        b"8BPS": "FORMAT_NOT_ALLOWED Photoshop",
        b"\0\0\1\0": "FORMAT_NOT_ALLOWED an icon",
        b"icns": "FORMAT_NOT_ALLOWED an icon",
        b"\0\0\0\x0cjP": "FORMAT_NOT_ALLOWED JPEG 2000",
    }
    for start, verdict in known.items():
        if data.startswith(start):
            code, _, detail = verdict.partition(" ")
            return code, detail
    if data[4:8] == b"ftyp":
        return "FORMAT_NOT_ALLOWED", "HEIC or AVIF; convert it to JPEG or PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "HEADER_BAD", "a WebP with a damaged header"
    return "NOT_IMAGE", f"the content is no image of a known format (first bytes {data[:8]!r})"


def _odd_tiff(data: bytes) -> str | None:
    """What Pillow would misread: several samples of more than 8 bits, or other than 1, 3 or 4 samples. None when fine."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        samples, bits = 1, 8
        for entry in range(count):
            tag, kind, number = struct.unpack_from(f"{order}HHI", data, start + 2 + 12 * entry)
            place = start + 2 + 12 * entry + 8
            if tag == 258:  # BitsPerSample
                if number * 2 > 4:
                    (place,) = struct.unpack_from(f"{order}I", data, place)
                (bits,) = struct.unpack_from(f"{order}H", data, place)
            if tag == 277 and kind == 3:  # SamplesPerPixel
                (samples,) = struct.unpack_from(f"{order}H", data, place)
    except struct.error:
        return None
    if samples > 1 and bits > 8:
        return f"a TIFF with {samples} samples of {bits} bits a pixel"
    if samples == 2 or samples > 4:
        return f"a TIFF with {samples} samples a pixel"
    return None


def _pillow(data: bytes, found: Header) -> np.ndarray:
    with _open(data) as image:
        try:
            image.load()
        except Image.DecompressionBombError:
            raise BadImage("TOO_MANY_PIXELS", f"more than {MOST_PIXELS} pixels") from None
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, TypeError, zlib.error) as error:
            text = str(error)
            short = any(
                word in text.lower()
                for word in ("truncated", "not enough", "end of file", "broken data", "unexpected end")
            )
            raise BadImage("TRUNCATED" if short else "CORRUPT", f"{found.format}: {text}") from None
        except MemoryError:
            raise BadImage("TOO_MANY_PIXELS", "not enough memory to decode it") from None
        return _pixels(image)


def _pixels(image: Image.Image) -> np.ndarray:
    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        return _number(np.asarray(image))
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        gray = mode in ("L", "LA", "La", "1")
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, "white")
        flat.alpha_composite(rgba)
        image = flat.convert("L" if gray else "RGB")
    elif mode not in ("L", "RGB"):
        image = image.convert("L" if mode == "1" else "RGB")
    pixels = np.asarray(image)
    return np.ascontiguousarray(pixels if pixels.ndim == 3 else pixels[:, :, None])


def _number(values: np.ndarray) -> np.ndarray:
    """Any numeric array (H, W) or (H, W, C) -> one of the three dtypes, without losing a value."""
    if values.ndim == 2:
        values = values[:, :, None]
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    elif values.dtype.kind in "iu" and values.dtype not in (np.uint8, np.uint16):
        low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
        values = values.astype(np.uint16 if low >= 0 and high <= 65535 else np.float32)
    elif values.dtype.kind == "f":
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise BadImage("CORRUPT", "pixels that are NaN or infinite")
    elif values.dtype not in (np.uint8, np.uint16):
        raise BadImage("UNSUPPORTED_MODE", f"array of {values.dtype}; integers or floats are expected")
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    return np.ascontiguousarray(native)


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation: the stored image -> the displayed one."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


# ----------------------------------------------------------------------------------------------------------------- .npy


def _npy_layout(data: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise BadImage("HEADER_BAD", f".npy: {error}") from None
    if dtype.hasobject:
        raise BadImage("UNSUPPORTED_MODE", ".npy with Python objects, which can run code; save plain numbers")
    return shape, dtype, file.tell()


def _npy_header(data: bytes) -> Header:
    shape, dtype, _ = _npy_layout(data)
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadImage("UNSUPPORTED_MODE", f".npy of shape {shape}; (H, W), (H, W, C) or (C, H, W) is expected")
    height, width, channels = _channels_last(shape)
    name = "uint8" if dtype in (np.uint8, np.bool_) else "uint16" if dtype.kind in "iu" else "float32"
    return Header(height, width, channels, name, "NPY")


def _channels_last(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(H, W, C): the channels are last, unless the first axis is smaller than both others."""
    if len(shape) == 2:
        return shape[0], shape[1], 1
    if shape[0] < min(shape[1], shape[2]):
        return shape[1], shape[2], shape[0]
    return shape[0], shape[1], shape[2]


def _npy(data: bytes) -> np.ndarray:
    shape, dtype, start = _npy_layout(data)
    if len(data) - start < int(np.prod(shape)) * dtype.itemsize:
        raise BadImage(
            "TRUNCATED", f".npy has {len(data) - start} bytes, {int(np.prod(shape)) * dtype.itemsize} are needed"
        )
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadImage("CORRUPT", f".npy: {error}") from None
    if values.ndim == 3 and shape[0] < min(shape[1], shape[2]):
        values = values.transpose(1, 2, 0)
    return _number(values)


# ------------------------------------------------------------------------------------------------------ 16-bit colour PNG


def _png16(data: bytes) -> np.ndarray:
    """16-bit RGB, RGBA or gray + alpha PNG, which Pillow would silently cut to 8 bits. Interlaced ones are refused."""
    width, height, _, kind, _, _, interlace = struct.unpack(">IIBBBBB", data[16:29])
    if interlace:
        raise BadImage("UNSUPPORTED_MODE", "an interlaced 16-bit colour PNG; save it without interlacing, or as .npy")
    samples = {2: 3, 4: 2, 6: 4}[kind]
    stream, place = b"", 8
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        if len(body) < length or place + 12 + length > len(data):
            raise BadImage("TRUNCATED", "PNG: the last chunk is cut short")
        if zlib.crc32(name + body) != struct.unpack_from(">I", data, place + 8 + length)[0]:
            raise BadImage("CORRUPT", f"PNG: chunk {name!r} fails its checksum")
        stream += body if name == b"IDAT" else b""
        place += 12 + length
    row_bytes = width * samples * 2
    try:
        raw = zlib.decompressobj().decompress(stream, height * (row_bytes + 1))
    except zlib.error as error:
        raise BadImage("CORRUPT", f"PNG: {error}") from None
    if len(raw) < height * (row_bytes + 1):
        raise BadImage("TRUNCATED", "PNG: rows are missing")
    rows = np.frombuffer(raw, np.uint8).reshape(height, row_bytes + 1)
    pixels = (
        _unfilter(rows[:, 0], rows[:, 1:], samples * 2).view(">u2").reshape(height, width, samples).astype(np.uint16)
    )
    if samples in (2, 4):  # composite on white
        colour, alpha = pixels[:, :, :-1].astype(np.float64), pixels[:, :, -1:] / 65535
        pixels = (colour * alpha + 65535 * (1 - alpha)).round().astype(np.uint16)
    return np.ascontiguousarray(pixels)


def _unfilter(filters: np.ndarray, rows: np.ndarray, step: int) -> np.ndarray:
    """Undo PNG's row filters (PNG specification, section 9); `step` bytes a pixel."""
    out = np.zeros(rows.shape, np.uint8)
    above = np.zeros(rows.shape[1], np.uint8)
    for y, kind in enumerate(filters):
        line = rows[y].copy()
        if kind == 1:
            line = np.add.accumulate(line.reshape(-1, step), 0, dtype=np.uint8).reshape(-1)
        elif kind == 2:
            line += above
        elif kind in (3, 4):
            for x in range(0, len(line), step):
                left = line[x - step : x].astype(int) if x else np.zeros(step, int)
                up = above[x : x + step].astype(int)
                if kind == 3:
                    guess = (left + up) // 2
                else:
                    corner = above[x - step : x].astype(int) if x else np.zeros(step, int)
                    base = left + up - corner
                    near = np.abs(np.stack([base - left, base - up, base - corner]))
                    guess = np.choose(near.argmin(0), [left, up, corner])
                line[x : x + step] += guess.astype(np.uint8)
        elif kind > 4:
            raise BadImage("CORRUPT", f"PNG: row filter {kind} does not exist")
        out[y] = above = line
    return out
