"""Check segmentation masks before training: gray levels instead of ids, void ids, and detail lost to the image size.

The functions of this module only report; `open_masks.py` rejects masks or adds notes with the option that fixes them.

Notation: H x W pixels of a mask, K classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unmask.batch import IGNORED
from unmask.data.augment import cut_map
from unmask.errors import listed

VOID = re.compile(
    r"\b(void|unlabell?ed|ignored?|unknown|undefined|unclassified|don'?t.?care|no.?data|border|out of roi|"
    r"not labell?ed)\b"
)
SAMPLES, LONGEST_SIDE = 32, 1024  # Number of masks checked in detail, and their longest side after subsampling.
# Ids are gray levels if the highest id is at least 16 and at least 4 times the number of ids.
SPARSE, FEWEST_SPARSE = 4, 16
BORDERS = 0.9  # An id is probably void if `borders` returns at least this share.
LEAST_CLASSES = 4  # With fewer classes, borders do not show which id is void.
MOST_LEVELS = 16
CEILING = 0.95  # warn about image sizes at which perfect predictions have a mean IoU below this


def thinned(ids: np.ndarray) -> np.ndarray:
    """Subsample a mask to sides of at most LONGEST_SIDE pixels by leaving out rows and columns."""
    step = -(-max(ids.shape) // LONGEST_SIDE)
    return ids[::step, ::step].copy()


def look_like_levels(present: Sequence[int]) -> bool:
    """Return whether the ids are few and far apart, like gray levels chosen for display (0, 128, 255)."""
    return (
        2 <= len(present) <= MOST_LEVELS and max(present) >= FEWEST_SPARSE and max(present) + 1 > SPARSE * len(present)
    )


def are_interpolated(pixels: Mapping[int, int]) -> bool:
    """Return whether masks of 0 and 255 were resized or compressed, which adds gray levels in between at edges."""
    total = sum(pixels.values())
    return len(pixels) > MOST_LEVELS and pixels.get(0, 0) + pixels.get(255, 0) > 0.8 * total and pixels.get(255, 0) > 0


def likely_void(
    pixels: Mapping[int, int], names: Mapping[int, str], samples: Sequence[np.ndarray], ignored: Sequence[int]
) -> list[str]:
    """Return a note, with the reason and the option to set, for each id that is probably not a class.

    names: known names by id.
    """
    notes = [
        f"id {one} is named {name!r}, which is rarely a class; exclude it from loss and metrics with --ignore {one}"
        for one, name in names.items()
        if one not in ignored and VOID.search(name.lower())
    ]
    there = sorted(one for one in pixels if one not in ignored)
    if notes or len(there) < LEAST_CLASSES or there[-1] in names:
        return notes
    highest, share = there[-1], borders(samples, there[-1], ignored)
    if share >= BORDERS:
        notes.append(
            f"the highest id, {highest}, borders on the other classes in {share:.0%} of the masks that contain them, "
            f"which is typical of void or unlabelled pixels; if it is not a class, set --ignore {highest}"
        )
    return notes


def borders(samples: Sequence[np.ndarray], one: int, ignored: Sequence[int]) -> float:
    """Return how often the id `one` borders on another id, averaged over the other ids.

    For each other id, only the masks that contain it are counted.
    """
    beside: Counter[int] = Counter()
    there: Counter[int] = Counter()
    for ids in samples:
        there.update(np.unique(ids).tolist())
        found: set[int] = set()
        for a, b in ((ids[:, 1:], ids[:, :-1]), (ids[1:], ids[:-1])):
            for mine, other in ((a, b), (b, a)):
                found.update(np.unique(other[mine == one]).tolist())
        beside.update(found)
    others = [other for other in there if other != one and other not in ignored]
    return float(np.mean([beside[other] / there[other] for other in others])) if others else 0.0


def ceiling(samples: Sequence[np.ndarray], size: tuple[int, int], count: int) -> np.ndarray:
    """Return the IoU (K,) of perfect predictions at `size` (h, w), evaluated at the size of the masks.

    samples: masks of class numbers and IGNORED. The IoU of a class that occurs in no mask is NaN.
    """
    both, either = np.zeros(count), np.zeros(count)
    for found in samples:
        height, width = found.shape
        small = cut_map(found, np.array([0.0, 0, height, width]), size, False)
        large = cut_map(small, np.array([0.0, 0, *size]), (height, width), False)
        labelled = (found != IGNORED) & (large != IGNORED)
        true, seen = found[labelled].astype(np.int64), large[labelled].astype(np.int64)
        hit = np.bincount(true[true == seen], minlength=count)[:count]
        both += hit
        either += np.bincount(true, minlength=count)[:count] + np.bincount(seen, minlength=count)[:count] - hit
    with np.errstate(invalid="ignore"):
        return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def size_line(
    samples: Sequence[np.ndarray], size: tuple[int, int], own: tuple[int, int], classes: Sequence[str], patch: int
) -> tuple[str, bool]:
    """Describe the detail that training at `size` (h, w) loses in masks of size `own` (H, W).

    Returns the text, and whether to show it as a warning.
    """
    reach = ceiling(samples, size, len(classes))
    mean = float(np.nanmean(reach)) if np.isfinite(reach).any() else 1.0
    text = f"the model is trained on masks of {size[0]} x {size[1]} pixels; the mask files have {own[0]} x {own[1]}"
    if mean >= CEILING:
        return text, False
    order = [i for i in np.argsort(reach).tolist() if np.isfinite(reach[i])][:3]
    worst = listed(f"{classes[i]} {reach[i]:.0%}" for i in order)
    better = [max(patch, round(side / patch) * patch) for side in own]
    return (
        f"{text}: perfect predictions at the model's size would reach {mean:.0%} mean IoU on the files ({worst}); "
        f"--set data.size=[{better[0]},{better[1]}] preserves small and thin objects but needs more compute"
    ), True
