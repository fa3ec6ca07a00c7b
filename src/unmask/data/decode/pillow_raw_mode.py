"""Unpack a PNG with Pillow under another mode and raw mode than its header asks for.

Pillow cuts 16-bit colour to 8 bits. Its raw modes ;16B and ;16L unpack the first and the second byte of each sample,
so two decodings give all 16 bits. To choose them, `_mode` and `tile` of an opened image are set, as Pillow documents
for its plugins ("Writing your own image plugin"). No other module does, and `works` says whether Pillow still heeds it.
"""

from __future__ import annotations

import base64
import functools
import io

from PIL import Image

PROBE = base64.b64decode(  # one pixel of 16-bit RGB: 0x0102, 0x0304, 0x0506
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABEAIAAADA54+dAAAAD0lEQVR4nGNgZGJmYWUDAAA/ABYhutRUAAAAAElFTkSuQmCC"
)


def set_raw_mode(image: Image.Image, mode: str, raw_mode: str) -> Image.Image:
    """Make an opened PNG that is not yet decoded an image of `mode`, unpacked by `raw_mode`; return it."""
    image._mode = mode
    image.tile = [image.tile[0]._replace(args=raw_mode)]  # type: ignore[attr-defined]
    return image


@functools.cache
def works() -> bool:
    """Whether this Pillow decodes both bytes of a 16-bit sample by its raw modes."""
    try:
        high, low = (
            set_raw_mode(Image.open(io.BytesIO(PROBE), formats=("PNG",)), "RGB", f"RGB;16{part}").getpixel((0, 0))
            for part in "BL"
        )
    except (AttributeError, TypeError, ValueError, OSError):
        return False
    return (high, low) == ((1, 3, 5), (2, 4, 6))
