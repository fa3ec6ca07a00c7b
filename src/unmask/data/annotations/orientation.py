"""Decide whether annotations of images with an EXIF orientation refer to the displayed image or to the stored pixels.

Images are read as displayed, but many tools draw boxes and masks on the pixels as stored. Where the orientation swaps
height and width, the size of the annotation tells which. An image that is only rotated by 180 degrees or mirrored, or
that is square, does not tell; it is treated like the images of its data set that do, or else as displayed.

Orientation: EXIF's 1 to 8, as in `image_header.Header`; 5 to 8 swap height and width.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

from unmask.data.decode.image_header import Header


class DrawnOn(Enum):
    """What the coordinates of an annotation refer to."""

    SHOWN = "the image as shown"
    STORED = "the stored pixels"
    UNKNOWN = "either"  # the sizes agree with both, and the image carries an orientation
    NEITHER = "neither"  # the annotation is for another size


def drawn_on(size: tuple[int, int] | None, head: Header, reach: tuple[float, float] = (0, 0)) -> DrawnOn | None:
    """Return what an annotation of `size` (H, W), or None, refers to; None for an image without orientation.

    reach: largest y and x of its boxes, used where no size is given.
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
    """Convert boxes (n, 4) as (x1, y1, x2, y2) from stored pixels to those of the displayed image of size (H, W)."""
    x1, y1, x2, y2 = boxes.T
    if orientation >= 5:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in (3, 4, 7, 8):
        y1, y2 = shown[0] - y2, shown[0] - y1
    if orientation in (2, 3, 6, 7):
        x1, x2 = shown[1] - x2, shown[1] - x1
    return np.stack([x1, y1, x2, y2], 1)
