"""Valid and damaged image files of every kind, generated in memory, so that the repository has no binary files."""

from __future__ import annotations

import io
import struct
import zlib
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from unmask.data.sources.source import Source


def smooth(height: int = 48, width: int = 64, channels: int = 3, *, top: int = 255) -> np.ndarray:
    """Return (H, W, C) ramps that differ by axis and channel, so that rotations and swaps are detected."""
    y, x = np.mgrid[0:height, 0:width]
    bands = [(y / height * (1 + c) + x / width * (channels - c)) / (1 + channels) for c in range(channels)]
    return (np.stack(bands, -1) * top).astype(np.uint8 if top <= 255 else np.uint16)


def noisy(height: int = 48, width: int = 64, channels: int = 3, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (height, width, channels), dtype, endpoint=True)


def file_of(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    """Return the image as a file written by Pillow."""
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    file = io.BytesIO()
    pixels.save(file, kind, **options)
    return file.getvalue()


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def npy_with_header(text: str, body: bytes = b"") -> bytes:
    head = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + body


def tiff(values: np.ndarray, **options: Any) -> bytes:
    """Return a TIFF written by tifffile, with any number of samples and any dtype."""
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    width: int,
    height: int,
    bits: int,
    kind: int,
    rows: bytes,
    *,
    before: bytes = b"",
    interlace: int = 0,
) -> bytes:
    """Build a PNG by hand, for 16-bit colour, filters and wrong sizes."""
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlace)
    body = before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


def png16(values: np.ndarray, *, filters: bool = False, before: bytes = b"") -> bytes:
    """Return a 16-bit PNG of (H, W, C) uint16, C 1 to 4. filters: use PNG's five row filters in turn."""
    height, width, samples = values.shape
    step = 2 * samples
    raw = values.astype(">u2").view(np.uint8).reshape(height, width * step).astype(int)
    rows = b""
    for y in range(height):
        kind = y % 5 if filters else 0
        up = raw[y - 1] if y else np.zeros_like(raw[y])
        left = np.concatenate([np.zeros(step, int), raw[y][:-step]])
        corner = np.concatenate([np.zeros(step, int), up[:-step]])
        near = np.abs(np.stack([up - corner, left - corner, left + up - 2 * corner]))
        guess = [0 * up, left, up, (left + up) // 2, np.choose(near.argmin(0), [left, up, corner])][kind]
        rows += bytes([kind]) + ((raw[y] - guess) % 256).astype(np.uint8).tobytes()
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[samples], rows, before=before)


def jpeg_claiming(height: int, width: int) -> bytes:
    """Return a JPEG of 64 x 64 pixels with another size in the header."""
    data = bytearray(file_of(smooth(64, 64), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def damaged(data: bytes, place: float = 0.5, count: int = 1) -> bytes:
    """Invert `count` bytes, starting at `place` (a share of the file)."""
    start = int(len(data) * place)
    return data[:start] + bytes(255 - byte for byte in data[start : start + count]) + data[start + count :]


class Bomb:
    """Object that creates a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, ("/tmp/unmask-was-unpickled",)


def bad_files() -> dict[str, tuple[bytes, str]]:
    """Return {name: (content, expected reason code)}."""
    jpeg, rgb_png = file_of(noisy(), "JPEG", quality=90), file_of(noisy(), "PNG")
    webp, gif, bmp = file_of(noisy(), "WEBP"), file_of(noisy(), "GIF"), file_of(noisy(), "BMP")
    tif, array = file_of(noisy(), "TIFF"), npy(noisy())
    deflated = file_of(noisy(), "TIFF", compression="tiff_adobe_deflate")
    twelve = bytearray(jpeg)
    twelve[jpeg.index(b"\xff\xc0") + 4] = 12
    row = b"\0" + b"\x80" * 90
    return {
        "zero.jpg": (b"", "EMPTY"),
        "zeros.jpg": (b"\0" * 5000, "NOT_IMAGE"),
        "one-byte.png": (b"\x89", "NOT_IMAGE"),
        "text.jpg": (b"not an image at all\n" * 20, "NOT_IMAGE"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "NOT_IMAGE"),
        "lfs.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "NOT_IMAGE"),
        "soi-only.jpg": (b"\xff\xd8", "TRUNCATED"),
        "no-frame.jpg": (b"\xff\xd8\xff\xd9\0\0\0\0", "HEADER_BAD"),
        "no-marker.jpg": (b"\xff\xd8 hello, world", "HEADER_BAD"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "TRUNCATED"),
        "last-two.jpg": (jpeg[:-2], "TRUNCATED"),
        "in-header.jpg": (jpeg[:100], "TRUNCATED"),
        "mid-stream.jpg": (damaged(file_of(noisy(400, 400), "JPEG"), 0.5, 40), "CORRUPT"),
        "twelve-bit.jpg": (bytes(twelve), "UNSUPPORTED_MODE"),
        "zero-size.jpg": (jpeg_claiming(0, 64), "HEADER_BAD"),
        "bomb.jpg": (jpeg_claiming(65500, 65500), "TOO_MANY_PIXELS"),
        "flipped.png": (damaged(rgb_png), "CORRUPT"),
        "flipped-stored.png": (damaged(file_of(noisy(), "PNG", compress_level=0)), "CORRUPT"),
        "half.png": (rgb_png[: len(rgb_png) // 2], "TRUNCATED"),
        "last-two.png": (rgb_png[:-2], "TRUNCATED"),
        "no-end.png": (rgb_png[:-12], "TRUNCATED"),
        "in-header.png": (rgb_png[:20], "TRUNCATED"),
        "bad-header.png": (damaged(rgb_png, 18 / len(rgb_png)), "HEADER_BAD"),
        "no-size.png": (png(0, 10, 8, 2, b""), "HEADER_BAD"),
        "bomb.png": (png(30000, 30000, 8, 2, b"\0" * 1000), "TOO_MANY_PIXELS"),
        "bomb-11000.png": (png(11000, 11000, 8, 2, b"\0" * 1000), "TOO_MANY_PIXELS"),
        "few-rows.png": (png(30, 40, 8, 2, row * 9), "TRUNCATED"),
        "few-rows-16.png": (png(15, 40, 16, 2, row * 9), "TRUNCATED"),
        "few-rows-interlaced.png": (png(30, 40, 8, 2, b"\0" * 800, interlace=1), "TRUNCATED"),
        "few-rows-palette.png": (
            png(90, 40, 8, 3, b"\0" * 9 + b"\1" * 82, before=chunk(b"PLTE", b"\xff" * 6)),
            "TRUNCATED",
        ),
        "filter-9.png": (png(30, 2, 8, 2, b"\x09" + row[1:] + row), "CORRUPT"),
        "no-rows.png": (b"".join([rgb_png[:33], chunk(b"IEND", b"")]), "CORRUPT"),
        "flipped-16.png": (damaged(png16(noisy(dtype=np.uint16))), "CORRUPT"),
        "extreme.png": (file_of(np.zeros((1, 1001, 3), np.uint8), "PNG"), "EXTREME_ASPECT"),
        "extreme.jpg": (file_of(np.zeros((2001, 2, 3), np.uint8), "JPEG"), "EXTREME_ASPECT"),
        "half.webp": (webp[: len(webp) // 2], "TRUNCATED"),
        "header.webp": (webp[:12] + b"\0" * (len(webp) - 12), "HEADER_BAD"),
        "half.gif": (gif[: len(gif) // 2], "TRUNCATED"),
        "header.gif": (b"GIF89a", "HEADER_BAD"),
        "half.bmp": (bmp[: len(bmp) // 2], "TRUNCATED"),
        "header.bmp": (b"BM" + b"\xff" * 60, "HEADER_BAD"),
        "half.tif": (tif[: len(tif) // 2], "TRUNCATED"),
        "header.tif": (b"II*\0\x08\0\0\0\0\0", "HEADER_BAD"),
        "damaged.tif": (damaged(deflated, 0.5, 30), "CORRUPT"),
        "complex.tif": (tiff(noisy()[:, :, 0].astype(np.complex64)), "UNSUPPORTED_MODE"),
        "cmyk-16.tif": (tiff(noisy(channels=4, dtype=np.uint16), photometric="separated"), "UNSUPPORTED_MODE"),
        "float-alpha.tif": (
            tiff(noisy(channels=4).astype(np.float32), photometric="rgb", extrasamples=["unassalpha"]),
            "UNSUPPORTED_MODE",
        ),
        "half-bands.tif": (
            tiff(noisy(channels=5), photometric="minisblack", planarconfig="contig")[:-3000],
            "TRUNCATED",
        ),
        "half.npy": (array[: len(array) // 2], "TRUNCATED"),
        "header.npy": (array[:30], "HEADER_BAD"),
        "magic.npy": (b"\x93NUMPY\x09\x09" + array[8:], "HEADER_BAD"),
        "brackets.npy": (npy_with_header("(" * 500), "HEADER_BAD"),
        "object.npy": (npy(np.array([[Bomb()]], object), allow_pickle=True), "UNSUPPORTED_MODE"),
        "pickle.npy": (b"\x80\x04cos\nmkdir\n(X\x00\x00\x00\x00tR.", "NOT_IMAGE"),
        "complex.npy": (npy(np.ones((4, 4), complex)), "UNSUPPORTED_MODE"),
        "text.npy": (npy(np.full((4, 4), "a")), "UNSUPPORTED_MODE"),
        "flat.npy": (npy(np.ones(9)), "UNSUPPORTED_MODE"),
        "stack.npy": (npy(np.ones((2, 3, 4, 5))), "UNSUPPORTED_MODE"),
        "none.npy": (npy(np.ones((0, 5))), "UNSUPPORTED_MODE"),
        "lying.npy": (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (9, 9, 4611686018427387904), }"),
            "TOO_MANY_PIXELS",
        ),
        "lying-less.npy": (
            npy_with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (9000, 9000), }", b"\0" * 50),
            "TRUNCATED",
        ),
        "negative.npy": (
            npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-9, -9), }", b"\0" * 81),
            "UNSUPPORTED_MODE",
        ),
        "phone.jpg": (b"\0\0\0\x18ftypheic" + b"\0" * 200, "FORMAT_NOT_ALLOWED"),
        "photoshop.tif": (b"8BPS\0\x01" + b"\0" * 200, "FORMAT_NOT_ALLOWED"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n" + b" " * 200, "FORMAT_NOT_ALLOWED"),
        "drawing.png": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "FORMAT_NOT_ALLOWED"),
        "bare-drawing.png": (b"<svg width='9' height='9'/>", "FORMAT_NOT_ALLOWED"),
        "document.jpg": (b"%PDF-1.7\n" + b" " * 200, "FORMAT_NOT_ALLOWED"),
        "icon.png": (file_of(noisy(32, 32), "ICO"), "FORMAT_NOT_ALLOWED"),
        "scan.png": (b"\0" * 128 + b"DICM" + b"\0" * 100, "FORMAT_NOT_ALLOWED"),
    }


class Memory(Source):
    """Source of image files in memory."""

    def __init__(self, files):
        super().__init__("memory", list(files), [len(data) for data in files.values()])
        self.files = list(files.values())

    def read(self, i):
        return self.files[i]


def photographs() -> list[bytes]:
    """Return JPEGs of the two photographs in scikit-learn, unchanged and re-encoded with other options."""
    found = []
    for name in ("china.jpg", "flower.jpg"):
        data = files("sklearn.datasets").joinpath("images", name).read_bytes()
        image = Image.open(io.BytesIO(data))
        found.append(data)
        for options in (
            {"quality": 30, "subsampling": 2}, {"quality": 95, "subsampling": 0}, {"quality": 75, "subsampling": 1},
            {"quality": 85, "progressive": True}, {"quality": 90, "restart_marker_blocks": 3},
        ):  # fmt: skip
            found.append(file_of(image, "JPEG", **options))
        found.append(file_of(image.convert("L"), "JPEG", quality=90))
        found.append(file_of(image.crop((100, 50, 361, 304)), "JPEG", quality=80))
    return found
