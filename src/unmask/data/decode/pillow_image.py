"""Open and load images with Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import (
    BmpImagePlugin,  # noqa: F401  (importing a plugin registers its format)
    GifImagePlugin,  # noqa: F401
    Image,
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from unmask.data import limits
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.pixels import as_pixels
from unmask.data.decode.unknown_format import unknown_format

FORMATS = ("PNG", "WEBP", "TIFF", "BMP", "GIF")
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")  # modes of Pillow


def open_image(data: bytes) -> Image.Image:
    """Open a file with Pillow without decoding it. Raises BadImage."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        declared = int.from_bytes(data[4:8], "little") + 8
        raise BadImage("TRUNCATED", f"WebP: got {len(data)} bytes; expected {declared}, as declared in its header")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Pillow's size limit, which limits.py replaces
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadImage("TOO_MANY_PIXELS", f"got far too many pixels; expected at most {limits.MAX_PIXELS}") from None
    except UnidentifiedImageError:
        raise BadImage(*unknown_format(data)) from None
    except MemoryError:
        raise BadImage("TOO_MANY_PIXELS", "not enough memory to read its header") from None
    except Exception as error:  # Pillow's plugins raise many exception types for a damaged header
        raise BadImage("HEADER_BAD", f"{type(error).__name__}: {error}") from None


def code_of(text: str) -> str:
    """Return the reason code for a decoder's message."""
    short = ("truncated", "not enough", "end of file", "unexpected end", "failed to read")
    return "TRUNCATED" if any(words in text.lower() for words in short) else "CORRUPT"


def load_image(data: bytes, name: str) -> Image.Image:
    """Decode a file with Pillow. name: the format, for messages. Raises BadImage."""
    with open_image(data) as image:
        return loaded(image, name)


def loaded(image: Image.Image, name: str) -> Image.Image:
    """Decode an image that Pillow has opened. Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
    except Image.DecompressionBombError:
        raise BadImage("TOO_MANY_PIXELS", f"got too many pixels; expected at most {limits.MAX_PIXELS}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise many exception types for a damaged file
        raise BadImage(code_of(str(error)), f"{name}: {error}") from None
    return image


def pillow_pieces(image: Image.Image, alpha: str) -> Iterator[np.ndarray]:
    """Yield the pixels of a decoded image in pieces, because converting all at once takes several times its memory."""
    for box in row_boxes(image.size):
        yield to_array(image.crop(box) if box[3] - box[1] < image.height else image, alpha)


def row_boxes(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield boxes of at most `limits.PIECE_PIXELS` pixels that cover an image of size (width, height) from the top."""
    width, height = size
    rows = max(1, limits.PIECE_PIXELS // width)
    return ((0, top, width, min(height, top + rows)) for top in range(0, height, rows))


def to_array(image: Image.Image, alpha: str) -> np.ndarray:
    """Convert a decoded image, or some of its rows, to an array (H, W, C). alpha: see `Layout.alpha`."""
    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        return as_pixels(np.asarray(image))
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
