"""Random splits of labelled images, as pure functions of the seed and the images' rows.

So a split is the same for every kind of probe, every encoder and for fine-tuning, whichever files cannot be read.
"""

from __future__ import annotations

import numpy as np

from unmask.rng import Stream, words

HELD_OUT = 0.2
HOLD_OUT_FOR_TEST, SHOTS, HOLD_OUT_FOR_C, VOTES = 0, 1, 2, 4  # purposes of a split, each its own epoch of the generator
HOLD_OUT_FOR_LAYER = (3, 5, 6, 7, 8)  # one per round
HOLD_OUT_FOR_RATE = 9
FIRST_DRAW = 1000  # epochs from here on: further random draws of the shots


def hold_out(labels: np.ndarray, rows: np.ndarray, seed: int, purpose: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (fit, held) positions in `labels` (n,): a fifth of each class, at least one image, is held out.

    A class of one image is not split. Chosen by `seed` and the images' `rows` (n,) alone; `purpose` is the epoch of the
    random draw, so different purposes are independent.
    """
    rows = np.asarray(rows, np.int64)
    order = np.asarray(words(seed, Stream.LABELS, np.full_like(rows, purpose), rows, 1))[:, 0]
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        held[members[np.argsort(order[members], kind="stable")][:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
