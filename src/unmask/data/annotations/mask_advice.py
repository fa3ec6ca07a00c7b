"""What segmentation masks look like before anything is learned from them: gray levels, void ids, and what a size costs.

Nothing is decided here: what looks wrong is refused or proposed with the option that settles it.

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
SAMPLES, LONGEST_SIDE = 32, 1024  # masks that are looked at closer, and the side they are thinned out to
SPARSE, FEWEST_SPARSE = 4, 16  # ids up to so many times their number, and so high, are levels of gray rather than ids
BORDERS = 0.9  # share of the masks with another class in which an id borders on it, averaged, that void has
LEAST_CLASSES = 4  # below which borders tell nothing
MOST_LEVELS = 16
CEILING = 0.95  # mean IoU of a perfect answer below which a size is warned of


def thinned(ids: np.ndarray) -> np.ndarray:
    """A mask with sides of at most LONGEST_SIDE pixels, by leaving out rows and columns."""
    step = -(-max(ids.shape) // LONGEST_SIDE)
    return ids[::step, ::step].copy()


def look_like_levels(present: Sequence[int]) -> bool:
    """Whether ids are few and far apart, as levels of gray that were made to be seen (0, 128, 255) are."""
    return (
        2 <= len(present) <= MOST_LEVELS and max(present) >= FEWEST_SPARSE and max(present) + 1 > SPARSE * len(present)
    )


def are_interpolated(pixels: Mapping[int, int]) -> bool:
    """Whether masks of 0 and 255 were resized or compressed, which puts every level between the two at their edges."""
    total = sum(pixels.values())
    return len(pixels) > MOST_LEVELS and pixels.get(0, 0) + pixels.get(255, 0) > 0.8 * total and pixels.get(255, 0) > 0


def likely_void(
    pixels: Mapping[int, int], names: Mapping[int, str], samples: Sequence[np.ndarray], ignored: Sequence[int]
) -> list[str]:
    """Ids that are probably no class, each with the reason and the option, in words. names: by id, where known."""
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
    """Over the other ids, the mean share of the masks holding one in which `one` borders on it."""
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
    """(K,) IoU that a perfect answer at `size` (h, w) reaches at the masks' own; NaN for classes that are not there.

    samples: masks as classes, IGNORED where none is judged.
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
    """(what the size the model sees means for masks of their own (H, W), whether it costs much)."""
    reach = ceiling(samples, size, len(classes))
    mean = float(np.nanmean(reach)) if np.isfinite(reach).any() else 1.0
    said = f"masks are learned at {size[0]} x {size[1]} pixels, and the files have {own[0]} x {own[1]}"
    if mean >= CEILING:
        return said, False
    order = [i for i in np.argsort(reach).tolist() if np.isfinite(reach[i])][:3]
    worst = some(f"{classes[i]} {reach[i]:.0%}" for i in order)
    better = [max(patch, round(side / patch) * patch) for side in own]
    return (
        f"{said}: a perfect answer at that size would reach {mean:.0%} mean IoU in the files ({worst}); --set "
        f"data.size=[{better[0]},{better[1]}] keeps small and thin objects, at more compute"
    ), True
