"""Settings of decoding: how alpha, several pages and the axes of a .npy are read; and how `auto` decides.

If a single file is not enough to decide, `choose_reading.py` decides once for the data set, from an evenly spaced
sample of its files. The decision is stored in the plan of a run, so that every later command reads images as training
did.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np

from unmask.settings import Settings

AXES_CHANNELS = 16  # An axis of at most this length is assumed to be the channels.
# A channel is alpha if at least half of its values are 0 or opaque, and at least 1 % are opaque.
EDGE_SHARE, OPAQUE_SHARE = 0.5, 0.01


class Reading(Settings):
    """How files are decoded to arrays.

    alpha: whether to composite alpha on white, drop it, or keep it as a band. auto composites, but keeps the band if a
    TIFF's alpha channel contains data.
    pages: which pages of a TIFF to read: the first, all as channels, or all as separate images (samples). auto reads
    the full resolution of a pyramid, pages as channels if ImageJ or OME metadata declares them so, otherwise the first.
    axes: the order of the axes of a .npy with three axes.
    nodata: which pixels are absent (`nodata.py`): for "auto", those with the value that a TIFF declares, and NaN or
    infinity in float images; for a number, also those with that value; for None, no pixels.
    tagged: for alpha=auto, whether a TIFF's band that is tagged as alpha contains alpha or data; auto decides per file.
    """

    alpha: Literal["auto", "composite", "drop", "band"] = "auto"
    pages: Literal["auto", "first", "channels", "samples"] = "auto"
    axes: Literal["auto", "HWC", "CHW", "smallest-first"] = "auto"
    nodata: Literal["auto"] | float | None = "auto"
    tagged: Literal["auto", "alpha", "band"] = "auto"


DEFAULT = Reading()
EARLIER = Reading(alpha="composite", pages="first", axes="smallest-first", nodata=None)
"""How earlier versions, without these settings, read images."""


def is_alpha(values: np.ndarray) -> bool:
    """Return whether the values (H, W) of a channel tagged as alpha look like alpha: mostly transparent or opaque."""
    top = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1.0
    low, high = values.min(), values.max()
    if low == high:
        return bool(high == top or high == 0)
    full = float((values == top).mean())
    return full >= OPAQUE_SHARE and full + float((values == 0).mean()) >= EDGE_SHARE


def axes_of(shape: tuple[int, ...], reading: Reading) -> str:
    """Return the order of axes ("HWC" or "CHW") of an array with this shape."""
    if reading.axes in ("HWC", "CHW"):
        return reading.axes
    first, middle, last = shape
    if reading.axes == "smallest-first":
        return "CHW" if first < min(middle, last) else "HWC"
    if is_ambiguous(shape):  # bands are usually the last axis, unless the other two axes are equal
        return "CHW" if middle == last != first else "HWC"
    return "CHW" if first < min(middle, last) else "HWC"


def is_ambiguous(shape: tuple[int, ...]) -> bool:
    """Return whether both the first and the last axis are too long to recognise the channel axis by its length."""
    return len(shape) == 3 and min(shape[0], shape[-1]) > AXES_CHANNELS


def axes_of_several(shapes: list[tuple[int, ...]]) -> tuple[str, str]:
    """Return the order of axes of a data set, and the reason.

    The channel axis is the one that has the same length in every file.
    """
    first, last = {shape[0] for shape in shapes}, {shape[-1] for shape in shapes}
    if len(first) > 1 and len(last) == 1:
        return "HWC", "the last axis has the same length in all of them"
    if len(last) > 1 and len(first) == 1:
        return "CHW", "the first axis has the same length in all of them"
    votes = Counter(axes_of(shape, DEFAULT) for shape in shapes)
    order = votes.most_common(1)[0][0]
    return order, "a guess: " + (
        "the other two axes have the same length" if order == "CHW" else "bands are usually stored last"
    )
