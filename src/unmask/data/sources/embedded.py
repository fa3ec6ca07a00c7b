"""The embedded image sets: `shapes` (computed) and `digits` (from scikit-learn)."""

from __future__ import annotations

import io
import os

import numpy as np

from unmask.data.sources.source import Opener, Source
from unmask.errors import SourceError

EMBEDDED = ("shapes", "shapes-test", "digits", "digits-test")


class ShapesSource(Source):
    """The embedded set `shapes`, computed when it is opened: row i is image `first` + i."""

    def __init__(self, text: str, first: int, count: int) -> None:
        from unmask.data.sources import shapes

        super().__init__(text, [f"shapes-{first + i:06d}" for i in range(count)], np.zeros(count), location=text)
        self.classes = list(shapes.CLASSES)
        self.pixels, self.labels = shapes.draw(np.arange(first, first + count))

    def read(self, i: int) -> bytes:
        return _as_npy(self.pixels[i])


class DigitsSource(Source):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 gray, uint8; a fifth of each class is the test set."""

    def __init__(self, text: str, *, test: bool) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        order = np.argsort(labels, kind="stable")
        place = np.empty(len(labels), np.int64)  # rank of each image within its class
        for label in range(10):
            place[order[labels[order] == label]] = np.arange((labels == label).sum())
        rows = np.flatnonzero((place % 5 == 4) == test)
        super().__init__(text, [f"digit-{row:04d}" for row in rows], np.zeros(len(rows)), location=text)
        self.pixels = (pixels[rows].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.labels, self.classes = labels[rows].astype(np.int64), [str(digit) for digit in range(10)]

    def read(self, i: int) -> bytes:
        return _as_npy(self.pixels[i])


def _as_npy(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, pixels, allow_pickle=False)
    return file.getvalue()


def open_embedded(text: str) -> Source:
    """Open an embedded set such as `shapes` or `digits-test`, or the first images of a set such as `shapes:5000`."""
    stem, _, count = text.partition(":")
    if count and not (count.isdigit() and int(count) > 0):
        raise SourceError(f"got {text!r}; expected {stem}, or {stem}:N for its first N images")
    if stem.startswith("digits"):
        source: Source = DigitsSource(text, test=stem.endswith("test"))
        if count:
            raise SourceError(f"got {text!r}, but the size of digits cannot be chosen; expected digits or digits-test")
        return source
    from unmask.data.sources import shapes

    whole = shapes.TEST if stem.endswith("test") else shapes.TRAIN
    if count and int(count) > whole:
        raise SourceError(f"got {text!r}; expected at most {whole} images: {stem}:{whole}")
    return ShapesSource(text, shapes.TRAIN if stem.endswith("test") else 0, int(count) if count else whole)


def _is_embedded(text: str) -> bool:
    return text.partition(":")[0] in EMBEDDED and not os.path.exists(text)


OPENER = Opener("shapes or digits", _is_embedded, open_embedded)
