"""The annotated boxes of one image, for any file format."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unmask.errors import UserError

FRACTIONS = 0.5  # a file is rejected if at least this share of its boxes is given as fractions
LONGEST_SHOWN = 60


class BoxError(UserError):
    """Raised for box annotations that cannot be used."""


class Objects(NamedTuple):
    """The annotation of one image: its size (H, W) or None, boxes (n, 4) float64, and n class names.

    aside: (n,) bool, True for crowds and difficult objects, used neither for training nor for evaluation.
    """

    size: tuple[int, int] | None
    boxes: np.ndarray
    names: list[str]
    aside: np.ndarray


class Found(NamedTuple):
    """The objects of one image, collected while its annotation is read."""

    boxes: list[tuple[float, float, float, float]]
    names: list[str]
    aside: list[bool]

    def objects(self, size: tuple[int, int] | None) -> Objects:
        return Objects(size, _array(self.boxes), self.names, np.array(self.aside, bool))


def shown(value: object) -> str:
    """Return the repr of a value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def refuse_fractions(objects: dict[str, Objects], where: Path, *, first: int = 0) -> None:
    """Raise BoxError if boxes are fractions of the image's sides, as in YOLO's files, instead of pixels.

    first: 0 or 1, the number of the first pixel in the file format; the reader has subtracted it from x1 and y1.
    """
    boxes = np.concatenate([np.zeros((0, 4)), *(one.boxes for one in objects.values())])
    boxes[:, :2] += first
    sides = boxes[:, 2:] - boxes[:, :2]
    small = (boxes[:, :2] <= 1).all(1) & (sides <= 1.0 + 1e-6).all(1) & (sides > 0).all(1)
    broken = small & (boxes != boxes.round()).any(1)
    if not len(boxes) or small.mean() < FRACTIONS or not broken.any():
        return
    name = next(key for key, one in objects.items() if len(one.boxes) and (one.boxes[:, :2] + first <= 1).all(1).any())
    raise BoxError(
        f"{int(small.sum())} of {len(boxes)} boxes of {where} are fractions of their image's sides, for example in "
        f"{name}; expected pixels: multiply x and width by the image's width, y and height by its height (YOLO's "
        "x and y are the middle of the box: subtract half of its width and height)"
    )


def four(values: Any, where: str) -> tuple[float, float, float, float]:
    try:
        a, b, c, d = map(float, values)
    except (TypeError, ValueError, OverflowError):
        a = b = c = d = math.nan
    if not all(map(math.isfinite, (a, b, c, d))) or isinstance(values, str | dict):
        raise BoxError(f"{where} has the box {shown(values)}; expected four numbers")
    return a, b, c, d


def size_or_none(height: Any, width: Any) -> tuple[int, int] | None:
    """Return the size (H, W), or None if it is missing or, as in the files of some tools, zero."""
    try:
        size = int(height), int(width)
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _array(boxes: Iterable[tuple[float, float, float, float]]) -> np.ndarray:
    return np.array(list(boxes), np.float64).reshape(-1, 4)


def corners_written_as_sizes(objects: Iterable[tuple[Objects, tuple[int, int]]]) -> float:
    """Return the share of out-of-image boxes that would fit if COCO's four numbers were x1, y1, x2, y2."""
    leave = fit = 0
    for one, (height, width) in objects:
        x, y, right, bottom = one.boxes.T
        outside = (right > width + 1) | (bottom > height + 1)
        x2, y2 = right - x, bottom - y
        leave += int(outside.sum())
        fit += int((outside & (x2 > x) & (y2 > y) & (x2 <= width + 1) & (y2 <= height + 1)).sum())
    return fit / leave if leave else 0.0
