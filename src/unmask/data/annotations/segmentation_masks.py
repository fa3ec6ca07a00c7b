"""Segmentation masks: for each image, an image of the same size that stores the class of every pixel.

A mask is a gray or palette image, preferably PNG. The numbers stored in a mask are ids; the colours of a palette are
ignored. A mask belongs to the image in the same sub-folder whose name is equal except for the extension. Image and mask
folders are found automatically if they are DATA/images and DATA/labels (or masks, annotations), or DATA =
.../images/train and .../labels/train. If the masks are elsewhere, pass their folder.

`classes.txt`, beside the masks or in the folder above, names ids 0, 1, 2 ..., one per line. Without this file, classes
are named by their number, and other files that commonly name classes (`class_files.py`) are suggested.

Pixels of `ignored` ids are left out of loss and metrics: IGNORED (255) by default, and further ids on request. Classes
are numbered in the order of the ids that are not ignored. Alternatively, `MaskOptions.values` lists the ids that are
classes, which may include 255.

Masks drawn on the stored pixels of images with an EXIF orientation are rotated with them (`orientation.py`).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from unmask.batch import IGNORED
from unmask.data import augment
from unmask.data.annotations import mask_advice
from unmask.data.decode import decode, exif
from unmask.data.decode.bad_image import BadImage
from unmask.data.sources.source import Source
from unmask.errors import listed

UNKNOWN = 254  # class number of ids that are neither a class nor ignored


@dataclass(frozen=True)
class MaskOptions:
    """Settings for reading masks, except for the ignored ids.

    values: the ids that are classes, in the order of the classes, or () for all ids that are not ignored.
    names: a file with the class names, or None for `classes.txt`.
    stored: whether masks refer to the stored pixels of images with an EXIF orientation, or None to detect it.
    """

    values: tuple[int, ...] = ()
    names: Path | None = None
    stored: bool | None = None


@dataclass
class SegmentationMasks:
    """The images of `source` that have a mask, and their masks. Implements `image_reader.Annotations`.

    places: for each row of `source` with a mask, the row of that mask in `masks`.
    pixels, images: number of pixels and of masks with each id; empty if the masks were not read.
    values, stored: as in `MaskOptions`.
    notes: likely mistakes in the masks, with the option that fixes each.
    samples: some masks, subsampled; empty if the masks were not read.
    sizes: (H, W) of all masks; empty if the masks were not read.
    """

    source: Source
    masks: Source
    places: dict[int, int]
    classes: tuple[str, ...] = ()
    ignored: tuple[int, ...] = (IGNORED,)
    pixels: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    values: tuple[int, ...] = ()
    stored: bool = False
    notes: list[str] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rows(self) -> np.ndarray:
        """Rows of images that have a mask, sorted."""
        return np.array(sorted(self.places), np.int64)

    @property
    def without(self) -> list[str]:
        """Names of the images without a mask."""
        return [name for row, name in enumerate(self.source.names) if row not in self.places]

    @property
    def ids(self) -> list[int]:
        """Id of each class, as stored in the mask files."""
        return list(self.values) or first_ids(len(self.classes), self.ignored)

    def read(self, row: int) -> np.ndarray:
        """Return the class of each pixel at full size, (H, W) uint8, IGNORED for ignored pixels. Raises BadImage."""
        name = self.masks.names[self.places[row]]
        try:
            ids = read_ids(self.masks.read_unchanged(self.places[row]))
            found = self._numbers()[self._turned(row, ids)]
        except BadImage as error:
            raise BadImage(error.code, f"its mask {name}: {error.detail}") from None
        if (found == UNKNOWN).any():
            raise BadImage("CORRUPT", f"its mask {name} has ids that are neither classes nor ignored")
        return found

    def _turned(self, row: int, ids: np.ndarray) -> np.ndarray:
        """Apply the EXIF orientation of the image to a mask that refers to the stored pixels."""
        return exif.apply_orientation(ids, decode.header(self.source.read(row)).orientation) if self.stored else ids

    def cut(
        self, row: int, size: tuple[int, int], box: np.ndarray, target: tuple[int, int], flip: bool
    ) -> dict[str, np.ndarray]:
        """Return `maps` of one image, (h, w) int64; see `image_reader.Annotations`."""
        found = self.read(row)
        if found.shape != tuple(size):
            raise BadImage(
                "CORRUPT", f"its mask has {sides(found.shape)} pixels; expected {sides(size)}, like the image"
            )
        return {"maps": augment.cut_map(found, box, target, flip).astype(np.int64)}

    def _numbers(self) -> np.ndarray:
        """Return the class of each possible id, (65536,) uint8."""
        table = np.full(1 << 16, UNKNOWN, np.uint8)
        table[list(self.ignored)] = IGNORED
        table[self.ids] = np.arange(len(self.ids))
        return table

    def lines(self) -> list[str]:
        """Return a summary as text: counts, then one line for each class with its share of all pixels."""
        total = max(1, sum(self.pixels.values()))
        lines = [f"{len(self.places)} images with a mask, {len(self.classes)} classes"]
        if without := self.without:
            lines.append(f"{len(without)} images without a mask are left out: {listed(without)}")
        if left := len(self.masks) - len(set(self.places.values())):
            lines.append(f"{left} masks do not belong to an image")
        if self.unreadable:
            lines.append(
                f"{len(self.unreadable)} masks cannot be read; their images are left out: {listed(self.unreadable)}"
            )
        ignored = ", ".join(f"id {one}" for one in self.ignored if self.pixels[one])
        if ignored:
            share = sum(self.pixels[one] for one in self.ignored) / total
            lines.append(f"{share:.1%} of all pixels are ignored ({ignored})")
        if self.pixels and (
            absent := [n for n, one in zip(self.classes, self.ids, strict=True) if not self.pixels[one]]
        ):
            lines.append(f"{len(absent)} class{'es' * (len(absent) != 1)} without any pixels: {listed(absent)}")
        for name, one in zip(self.classes, self.ids, strict=True):
            lines.append(
                f"  id {one:3d}  {self.pixels[one] / total:6.2%} of pixels, in {self.images[one]} images  {name}"
            )
        return lines + self.notes

    def size_line(self, size: tuple[int, int], patch: int) -> tuple[str, bool]:
        """Describe the detail lost at the model's size (h, w).

        Returns the text, and whether to show it as a warning.
        """
        own = tuple(int(side) for side in np.median(np.array(self.sizes), axis=0))
        found = [self._numbers()[ids] for ids in self.samples]
        return mask_advice.size_line(found, size, (own[0], own[1]), self.classes, patch)


def first_ids(count: int, ignored: Sequence[int]) -> list[int]:
    """Return the lowest `count` ids that are not ignored, which are the ids of classes 0, 1, 2 ..."""
    ids: list[int] = []
    one = 0
    while len(ids) < count:
        if one not in ignored:
            ids.append(one)
        one += 1
    return ids


def sides(shape: Sequence[int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def read_ids(data: bytes, *, thorough: bool = False) -> np.ndarray:
    """Return the numbers stored in a mask (gray levels or palette indices), (H, W) uint8 or uint16. Raises BadImage.

    thorough: also detect damage that Pillow does not detect, which takes twice as long.
    """
    head = decode.header(data)
    if head.format == "JPEG":
        raise BadImage("UNSUPPORTED_MODE", "a JPEG, whose compression changes ids; save masks as PNG")
    if head.format == "NPY":
        raise BadImage("UNSUPPORTED_MODE", "a NumPy array; save masks as PNG")
    if thorough:
        decode.decode(data, found=head)
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise BadImage("CORRUPT", f"it cannot be decoded: {error}") from None
    if values.ndim != 2:
        raise BadImage(
            "UNSUPPORTED_MODE",
            f"a colour image (mode {mode}); expected a gray or palette PNG with one id per pixel: replace each colour "
            "by the id of its class",
        )
    if head.format == "PNG" and data[25] == 0 and data[24] in (2, 4):
        values = values // (255 // (2 ** data[24] - 1))  # undo Pillow's scaling of 2-bit and 4-bit gray to 8 bits
    values = exif.apply_orientation(values, head.orientation)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 1 << 16:
        raise BadImage("UNSUPPORTED_MODE", f"{values.dtype} pixels; expected whole numbers from 0 to 65535")
    return values if values.dtype == np.uint8 else values.astype(np.uint16)
