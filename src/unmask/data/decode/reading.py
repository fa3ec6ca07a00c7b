"""Settings of decoding: how alpha, several pages and the axes of a .npy are read; and how `auto` decides.

What one file cannot show is decided once for a data set (`choose_reading.py`), from an even sample of its files, and
stored in the plan of a run, so that every later command reads images as training did.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np

from unmask.settings import Settings

AXES_CHANNELS = 16  # an axis of at most this length is taken for the channels
EDGE_SHARE, OPAQUE_SHARE = 0.5, 0.01  # of an alpha channel: values that are 0 or full, and those that are full


class Reading(Settings):
    """How files become arrays.

    alpha: composite it on white, drop it, or keep it as a band. auto composites, except the alpha of a TIFF whose
    values are those of a band of data. pages: of a TIFF, the first, or the pages as channels, or each page as an image
    of its own (samples). auto reads the full resolution of a pyramid, pages as channels where ImageJ or OME metadata
    says that they are, and otherwise the first. axes: the order of three axes of a .npy.

    nodata: which pixels are absent (`nodata.py`): "auto" those with the value that a TIFF declares, and NaN or infinity
    in float images; a number, those with that value as well; None, none.

    tagged: what the alpha tag of a TIFF means under alpha=auto; decided from the values of each file, unless settled
    for the data set.
    """

    alpha: Literal["auto", "composite", "drop", "band"] = "auto"
    pages: Literal["auto", "first", "channels", "samples"] = "auto"
    axes: Literal["auto", "HWC", "CHW", "smallest-first"] = "auto"
    nodata: Literal["auto"] | float | None = "auto"
    tagged: Literal["auto", "alpha", "band"] = "auto"


DEFAULT = Reading()
EARLIER = Reading(alpha="composite", pages="first", axes="smallest-first", nodata=None)
"""How versions without these settings read images."""


def is_alpha(values: np.ndarray) -> bool:
    """Return whether (H, W) values of a channel tagged as alpha look like one: mostly transparent or opaque."""
    top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1.0
    low, high = values.min(), values.max()
    if low == high:
        return bool(high == top or high == 0)
    full = float((values == top).mean())
    return full >= OPAQUE_SHARE and full + float((values == 0).mean()) >= EDGE_SHARE


def axes_of(shape: tuple[int, ...], reading: Reading) -> str:
    """Return "HWC" or "CHW" for a shape of three axes."""
    if reading.axes in ("HWC", "CHW"):
        return reading.axes
    first, middle, last = shape
    if reading.axes == "smallest-first":
        return "CHW" if first < min(middle, last) else "HWC"
    if is_ambiguous(shape):  # many bands: usually last, unless the other two axes are equal
        return "CHW" if middle == last != first else "HWC"
    return "CHW" if first < min(middle, last) else "HWC"


def is_ambiguous(shape: tuple[int, ...]) -> bool:
    """Return whether the first and the last axis are too long to tell which is that of the channels."""
    return len(shape) == 3 and min(shape[0], shape[-1]) > AXES_CHANNELS


def axes_of_several(shapes: list[tuple[int, ...]]) -> tuple[str, str]:
    """Return the order of axes of a data set, and the reason: the channel axis has the same length in every file."""
    first, last = {shape[0] for shape in shapes}, {shape[-1] for shape in shapes}
    if len(first) > 1 and len(last) == 1:
        return "HWC", "the last axis is equally long in all of them"
    if len(last) > 1 and len(first) == 1:
        return "CHW", "the first axis is equally long in all of them"
    votes = Counter(axes_of(shape, DEFAULT) for shape in shapes)
    order = votes.most_common(1)[0][0]
    return order, "a guess: " + (
        "the other two axes are equally long" if order == "CHW" else "bands are usually stored last"
    )
