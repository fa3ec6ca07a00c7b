"""Checks of segmentation masks before training: gray levels instead of ids, void ids, and what an image size loses.

These functions only report; `open_masks.py` rejects masks or adds notes with the option that fixes them.

Letters: H x W pixels of a mask, K classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unmask.batch import IGNORED
from unmask.data.augment import cut_map
from unmask.errors import some

VOID = re.compile(
    r"\b(void|unlabell?ed|ignored?|unknown|undefined|unclassified|don'?t.?care|no.?data|border|out of roi|"
    r"not labell?ed)\b"
)
SAMPLES, LONGEST_SIDE = 32, 1024  # masks that are checked in detail, and their longest side after subsampling
SPARSE, FEWEST_SPARSE = 4, 16  # gray levels if the highest id is at least 16 and 4 times the number of ids
BORDERS = 0.9  # mean share of masks with another class in which a void id borders on it
LEAST_CLASSES = 4  # fewer classes give no evidence
MOST_LEVELS = 16
CEILING = 0.95  # warn of a size with which perfect predictions reach less mean IoU


def thinned(ids: np.ndarray) -> np.ndarray:
    """Subsample a mask to sides of at most LONGEST_SIDE pixels by leaving out rows and columns."""
    step = -(-max(ids.shape) // LONGEST_SIDE)
    return ids[::step, ::step].copy()


def look_like_levels(present: Sequence[int]) -> bool:
    """Return whether ids are few and far apart, like gray levels chosen for display (0, 128, 255)."""
    return (
        2 <= len(present) <= MOST_LEVELS and max(present) >= FEWEST_SPARSE and max(present) + 1 > SPARSE * len(present)
    )


def are_interpolated(pixels: Mapping[int, int]) -> bool:
    """Return whether masks of 0 and 255 were resized or compressed, which creates levels between the two at edges."""
    total = sum(pixels.values())
    return len(pixels) > MOST_LEVELS and pixels.get(0, 0) + pixels.get(255, 0) > 0.8 * total and pixels.get(255, 0) > 0


def likely_void(
    pixels: Mapping[int, int], names: Mapping[int, str], samples: Sequence[np.ndarray], ignored: Sequence[int]
) -> list[str]:
    """Return a note for each id that is probably not a class, with reason and option. names: by id, where known."""
    said = [
        f"id {one} is called {name!r}, which is rarely a class: leave it out of loss and metrics with --ignore {one}"
        for one, name in names.items()
        if one not in ignored and VOID.search(name.lower())
    ]
    there = sorted(one for one in pixels if one not in ignored)
    if said or len(there) < LEAST_CLASSES or there[-1] in names:
        return said
    highest, share = there[-1], borders(samples, there[-1], ignored)
    if share >= BORDERS:
        said.append(
            f"id {highest}, the highest, borders on the other classes nearly wherever they occur ({share:.0%}), as "
            f"void or unlabelled pixels do: if it is no class, give --ignore {highest}"
        )
    return said


def borders(samples: Sequence[np.ndarray], one: int, ignored: Sequence[int]) -> float:
    """Return the share of masks with another id in which `one` borders on it, averaged over the other ids."""
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
    """Return (K,) IoU of perfect predictions at `size` (h, w), scored at the masks' own size; NaN for absent classes.

    samples: masks of class numbers and IGNORED.
    """
    both, either = np.zeros(count), np.zeros(count)
    for found in samples:
        height, width = found.shape
        small = cut_map(found, np.array([0.0, 0, height, width]), size, False)
        large = cut_map(small, np.array([0.0, 0, *size]), (height, width), False)
        judged = (found != IGNORED) & (large != IGNORED)
        true, seen = found[judged].astype(np.int64), large[judged].astype(np.int64)
        hit = np.bincount(true[true == seen], minlength=count)[:count]
        both += hit
        either += np.bincount(true, minlength=count)[:count] + np.bincount(seen, minlength=count)[:count] - hit
    with np.errstate(invalid="ignore"):
        return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def size_line(
    samples: Sequence[np.ndarray], size: tuple[int, int], own: tuple[int, int], classes: Sequence[str], patch: int
) -> tuple[str, bool]:
    """Return (a sentence on what the model's `size` loses for masks of size `own` (H, W), whether that is much)."""
    reach = ceiling(samples, size, len(classes))
    mean = float(np.nanmean(reach)) if np.isfinite(reach).any() else 1.0
    said = f"the model is trained on masks of {size[0]} x {size[1]} pixels; the files have {own[0]} x {own[1]}"
    if mean >= CEILING:
        return said, False
    order = [i for i in np.argsort(reach).tolist() if np.isfinite(reach[i])][:3]
    worst = some(f"{classes[i]} {reach[i]:.0%}" for i in order)
    better = [max(patch, round(side / patch) * patch) for side in own]
    return (
        f"{said}: perfect predictions at that size would reach {mean:.0%} mean IoU in the files ({worst}); --set "
        f"data.size=[{better[0]},{better[1]}] preserves small and thin objects, at more compute"
    ), True
