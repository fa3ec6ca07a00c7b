"""Make Pillow decode a PNG with another mode and raw mode than its header implies.

Pillow truncates 16-bit colour to 8 bits. Pillow's raw modes ;16B and ;16L unpack the first and the second byte of each
sample, so decoding twice gives all 16 bits. To select these raw modes, this module sets `_mode` and `tile` of an opened
image, as Pillow documents for its plugins ("Writing your own image plugin"). `works` checks that the installed Pillow
uses these modes.
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
    """Set `mode` and `raw_mode` of an opened PNG that is not yet decoded, and return it."""
    image._mode = mode
    image.tile = [image.tile[0]._replace(args=raw_mode)]  # type: ignore[attr-defined]
    return image


@functools.cache
def works() -> bool:
    """Return whether the installed Pillow decodes both bytes of 16-bit samples with these raw modes."""
    try:
        high, low = (
            set_raw_mode(Image.open(io.BytesIO(PROBE), formats=("PNG",)), "RGB", f"RGB;16{part}").getpixel((0, 0))
            for part in "BL"
        )
    except (AttributeError, TypeError, ValueError, OSError):
        return False
    return (high, low) == ((1, 3, 5), (2, 4, 6))
