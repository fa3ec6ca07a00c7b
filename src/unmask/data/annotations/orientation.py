"""Decide whether annotations of images with an EXIF orientation refer to the displayed image or to the stored pixels.

Images are read as displayed, but many tools draw boxes and masks on the stored pixels. If the orientation swaps height
and width, the image size stated by the annotation shows to which of the two it refers. For square images, and images
that are mirrored or rotated by 180 degrees, the stored and the displayed image have the same size. Annotations of these
images are treated like those of the other images, or as referring to the displayed image if all are of this kind.

The orientation is EXIF's 1 to 8, as in `image_header.Header`; 5 to 8 swap height and width.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

from unmask.data.decode.image_header import Header


class DrawnOn(Enum):
    """The image to which the coordinates of an annotation refer."""

    SHOWN = "the image as shown"
    STORED = "the stored pixels"
    UNKNOWN = "either"  # The annotation's size agrees with both the displayed and the stored image.
    NEITHER = "neither"  # The annotation's size agrees with neither image.


def drawn_on(size: tuple[int, int] | None, head: Header, reach: tuple[float, float] = (0, 0)) -> DrawnOn | None:
    """Return whether an annotation refers to the displayed or the stored pixels; None for images without orientation.

    size: (H, W) of the annotated image according to the annotation, or None. reach: largest (y, x) of its boxes, used
    if `size` is None.
    """
    shown = head.full_size
    if head.orientation == 1:
        return None if size in (None, shown) else DrawnOn.NEITHER
    stored = shown[::-1] if head.orientation >= 5 else shown
    if stored == shown:
        return DrawnOn.UNKNOWN if size in (None, shown) else DrawnOn.NEITHER
    if size is not None:
        return DrawnOn.SHOWN if size == shown else DrawnOn.STORED if size == stored else DrawnOn.NEITHER
    inside_shown, inside_stored = (
        reach[0] <= side[0] + 1 and reach[1] <= side[1] + 1 for side in (shown, stored)
    )  # fmt: skip
    if inside_shown == inside_stored:
        return DrawnOn.UNKNOWN
    return DrawnOn.SHOWN if inside_shown else DrawnOn.STORED


def turned_boxes(boxes: np.ndarray, orientation: int, shown: tuple[int, int]) -> np.ndarray:
    """Convert boxes (n, 4) as (x1, y1, x2, y2) from stored pixels to pixels of the displayed image.

    shown: size (H, W) of the displayed image.
    """
    x1, y1, x2, y2 = boxes.T
    if orientation >= 5:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in (3, 4, 7, 8):
        y1, y2 = shown[0] - y2, shown[0] - y1
    if orientation in (2, 3, 6, 7):
        x1, x2 = shown[1] - x2, shown[1] - x1
    return np.stack([x1, y1, x2, y2], 1)
