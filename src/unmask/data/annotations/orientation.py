"""Annotations of images that carry an orientation (EXIF): drawn on the image as it is shown, or on its stored pixels.

Images are read as they are shown. Many tools draw boxes and masks on the pixels as stored, and the two differ by a turn
or a mirror. Which it is shows where the turn swaps height and width: the annotation has the one size or the other. An
image that is only turned by 180 degrees or mirrored, or that is square, does not tell; it is treated as the others of
its set that do, or, when none does, as drawn on the image as shown.

Orientation: EXIF's 1 to 8, as in `decode.Header`; 5 to 8 swap height and width.
"""

from __future__ import annotations

from enum import Enum

import numpy as np

from unmask.data.decode.image_header import Header


class DrawnOn(Enum):
    """What an annotation was drawn on."""

    SHOWN = "the image as shown"
    STORED = "the stored pixels"
    UNKNOWN = "either"  # the sizes agree with both, and the image carries an orientation
    NEITHER = "neither"  # the annotation is for another size


def drawn_on(size: tuple[int, int] | None, head: Header, reach: tuple[float, float] = (0, 0)) -> DrawnOn | None:
    """What an annotation for an image of `size` (H, W), or None, was drawn on; None where there is no orientation.

    reach: how far down and to the right its boxes go; it tells where no size is given.
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
    """Boxes (n, 4) as (x1, y1, x2, y2) in stored pixels -> in pixels of the image as shown, of size (H, W)."""
    x1, y1, x2, y2 = boxes.T
    if orientation >= 5:
        x1, y1, x2, y2 = y1, x1, y2, x2
    if orientation in (3, 4, 7, 8):
        y1, y2 = shown[0] - y2, shown[0] - y1
    if orientation in (2, 3, 6, 7):
        x1, x2 = shown[1] - x2, shown[1] - x1
    return np.stack([x1, y1, x2, y2], 1)
