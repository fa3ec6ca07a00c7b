"""Read TIFF with Pillow, or with the optional tifffile if Pillow would reduce values to 8 bits or drop bands."""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from unmask.data.decode.alpha import alpha_use, without_alpha
from unmask.data.decode.bad_image import BadImage, refuse_large
from unmask.data.decode.file_format import FileFormat
from unmask.data.decode.image_header import Header
from unmask.data.decode.layout import Layout
from unmask.data.decode.pillow_image import code_of, load_image, pillow_pieces
from unmask.data.decode.pixels import as_pixels, join_pieces, slice_rows
from unmask.data.decode.reading import DEFAULT, Reading, is_alpha
from unmask.data.decode.tiff_pages import MOST_PAGES, TIFF_STARTS, Page, TooManyEntries, choose, read_pages, starting_at

NO_LOG = logging.NullHandler()  # without a handler, tifffile's warnings about tags are printed to stderr


@dataclass(frozen=True)
class _Tiff:
    """Tags of one page, which decide whether Pillow or tifffile reads it.

    kind: sample format; 1 for unsigned integers, 2 for signed integers, 3 for floats.
    """

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
        """Whether Pillow reads all values unchanged."""
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
            "TRUNCATED", "TIFF: its directory is missing or past the end of the file, so the file is incomplete"
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
        raise BadImage("UNSUPPORTED_MODE", f"a TIFF with samples of different types (bits {bits}); save it as .npy")
    if not found.plain and (found.photometric > 2 or found.bits not in (8, 16, 32, 64) or found.kind > 3):
        raise BadImage(
            "UNSUPPORTED_MODE",
            f"a TIFF with {found.samples} samples of {found.bits} bits and photometric kind {found.photometric}; "
            "convert it to 8- or 16-bit RGB, or to .npy, which stores any number of channels",
        )
    return found


def read_header(data: bytes, reading: Reading) -> Header:
    pages = _tiff_pages(data, 1 if reading.pages == "samples" else MOST_PAGES)
    chosen = choose(pages, reading)
    tiff = _tiff_layout(chosen.pages[0])
    height, width = (tiff.height, tiff.width) if tiff.orientation < 5 else (tiff.width, tiff.height)
    alpha = ""
    if tiff.alpha:
        refuse_large(height, width, tiff.samples)  # because the next line may decode the page
        alpha = _tiff_alpha_use(data, chosen.pages[0], tiff, reading)
    channels = tiff.samples - (alpha in ("composited", "dropped"))
    if tiff.plain and (tiff.photometric == 3 or tiff.photometric == 5):
        channels = 3
    dtype = "float32"
    if tiff.kind == 1 and tiff.bits <= 16:
        dtype = "uint8" if tiff.bits <= 8 else "uint16"
    layout = Layout(tiff.samples, alpha, chosen.count, chosen.use)
    # Pillow applies the orientation of a TIFF itself.
    orientation = 1 if tiff.plain and not (alpha == "band" and tiff.premultiplied) else tiff.orientation
    offsets = tuple(page.offset for page in chosen.pages)
    memory = _tiff_memory(tiff, chosen.pages[0], alpha, len(offsets))
    return Header(
        height=height,
        width=width,
        channels=channels * len(offsets),
        dtype=dtype,
        format="TIFF",
        orientation=orientation,
        packed_from=None,
        layout=layout,
        pages=offsets,
        memory=memory,
    )


def _tiff_memory(tiff: _Tiff, page: Page, alpha: str, pages: int) -> int:
    """Return the peak memory of decoding in bytes, including strips or tiles, which may have any size."""
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
    """Return the `Layout.alpha` of a TIFF whose last sample is tagged as alpha.

    The sample may still be data, because GDAL and others tag any fourth band as alpha.
    """
    if reading.alpha != "auto":
        use = alpha_use(reading)
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
            "a float TIFF with alpha, for which white is undefined; set data.alpha=band or data.alpha=drop",
        )
    return use


def _tagged_values(data: bytes, page: Page, tiff: _Tiff) -> np.ndarray:
    """Return the values (H, W) of the last sample, which is tagged as alpha."""
    data = starting_at(data, page.offset)
    if _needs_tifffile(tiff, "band"):
        return _tiff_bands(data, tiff, "band")[:, :, -1]
    image = load_image(data, "TIFF")
    return join_pieces((part[:, :, -1:] for part in _plain_tiff_pieces(image, tiff, "band")), image.height)[:, :, 0]


def alpha_values(data: bytes) -> np.ndarray | None:
    """Return the last sample (H, W) of a TIFF that is tagged as alpha but may be data, or None for other files."""
    if not data.startswith(TIFF_STARTS):
        return None
    page = choose(_tiff_pages(data, MOST_PAGES), DEFAULT).pages[0]
    tiff = _tiff_layout(page)
    if not tiff.alpha or tiff.kind == 3:
        return None
    refuse_large(tiff.height, tiff.width, tiff.samples)
    return _tagged_values(data, page, tiff)


def decode(
    data: bytes, found: Header, at_least: tuple[int, int] | None = None, tolerated: list[str] | None = None
) -> np.ndarray:
    by_offset = {page.offset: page for page in _tiff_pages(data, MOST_PAGES)}
    pages = [by_offset[offset] for offset in found.pages]
    parts = [_tiff_page(data, page, _tiff_layout(page), found.layout.alpha) for page in pages]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, 2)


def _tiff_page(data: bytes, page: Page, tiff: _Tiff, alpha: str) -> np.ndarray:
    data = starting_at(data, page.offset)
    if _needs_tifffile(tiff, alpha):
        return _tiff_bands(data, tiff, alpha)
    image = load_image(data, "TIFF")
    if image.size not in ((tiff.width, tiff.height), (tiff.height, tiff.width)):
        raise BadImage("CORRUPT", f"TIFF: decoded to {image.size}, unlike its header")
    try:
        return join_pieces(_plain_tiff_pieces(image, tiff, alpha), image.height)
    except BadImage:
        raise
    except (ValueError, OSError) as error:
        raise BadImage("UNSUPPORTED_MODE", f"TIFF: {error}") from None


def read_pieces(data: bytes, found: Header) -> Iterator[np.ndarray]:
    """Yield the pieces of a TIFF if only one page is read."""
    page = next(page for page in _tiff_pages(data, MOST_PAGES) if page.offset == found.pages[0])
    tiff, data = _tiff_layout(page), starting_at(data, page.offset)
    if _needs_tifffile(tiff, found.layout.alpha):
        yield from slice_rows(_tiff_bands(data, tiff, found.layout.alpha))
    else:
        yield from _plain_tiff_pieces(load_image(data, "TIFF"), tiff, found.layout.alpha)


def _needs_tifffile(tiff: _Tiff, alpha: str) -> bool:
    return not tiff.plain or (alpha == "band" and tiff.premultiplied)  # Pillow would divide colours by alpha


def _plain_tiff_pieces(image: Image.Image, tiff: _Tiff, alpha: str) -> Iterator[np.ndarray]:
    dtype = "uint16" if tiff.kind == 1 and tiff.bits > 8 else "uint8" if tiff.kind == 1 else "float32"
    for part in pillow_pieces(image, alpha):
        if part.dtype != dtype:
            raise BadImage("CORRUPT", f"TIFF: decoded to {part.dtype}, unlike its header")
        # Photometric 0 means that zero is white; Pillow inverts only up to 8 bits.
        yield np.uint16((1 << tiff.bits) - 1) - part if tiff.photometric == 0 and dtype == "uint16" else part


def _tiff_bands(data: bytes, tiff: _Tiff, alpha: str) -> np.ndarray:
    """Decode the first page with tifffile."""
    what = f"a TIFF with {tiff.samples} samples of {tiff.bits} bits per pixel"
    try:
        import tifffile
    except ImportError:
        advice = "pip install 'unmask[tiff]', or convert it to .npy"
        raise BadImage("UNSUPPORTED_MODE", f"{what} needs the package tifffile; {advice}") from None
    logging.getLogger("tifffile").addHandler(NO_LOG)
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            values, axes = page.asarray(), page.axes
    except MemoryError:
        raise
    except Exception as error:  # tifffile raises many exception types for a damaged file
        text = str(error)
        if "imagecodecs" in text:
            advice = "pip install imagecodecs, or save it without compression or with deflate"
            raise BadImage("UNSUPPORTED_MODE", f"{what}, whose compression needs imagecodecs; {advice}") from None
        raise BadImage(code_of(text), f"TIFF: {text}") from None
    if axes == "SYX":
        values = values.transpose(1, 2, 0)
    shape = values.shape if values.ndim == 3 else (*values.shape, 1)
    if shape != (tiff.height, tiff.width, tiff.samples):
        raise BadImage(
            "UNSUPPORTED_MODE",
            f"{what}, decoded to {values.shape}; expected {(tiff.height, tiff.width, tiff.samples)}: save it as .npy",
        )
    values = as_pixels(values)
    return without_alpha(values, alpha, premultiplied=tiff.premultiplied) if tiff.alpha else values


FORMAT = FileFormat(("TIFF",), TIFF_STARTS, read_header, pieces=read_pieces, decode=decode)
