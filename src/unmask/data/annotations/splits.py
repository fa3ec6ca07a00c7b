"""Which labelled images are held out, and what else is drawn of labels: by the seed and the images' rows alone.

So that a split is the same for every kind of probe, every encoder, and a fine-tuning, whichever files are broken.
"""

from __future__ import annotations

import numpy as np

from unmask.rng import Stream, words

HELD_OUT = 0.2
HOLD_OUT_FOR_TEST, SHOTS, HOLD_OUT_FOR_C, VOTES = 0, 1, 2, 4  # what labels are drawn for; each its own epoch
HOLD_OUT_FOR_LAYER = (3, 5, 6, 7, 8)  # one for every round
HOLD_OUT_FOR_RATE = 9
FIRST_DRAW = 1000  # from here on: further draws of the shots


def hold_out(labels: np.ndarray, rows: np.ndarray, seed: int, purpose: int) -> tuple[np.ndarray, np.ndarray]:
    """(fit, held) positions in `labels` (n,): a fifth of every class, at least one image, is held out; of a class of
    one, none.

    Chosen by `seed` and the images' `rows` (n,) alone; `purpose` is the epoch of the draw, so no two choices agree.
    """
    rows = np.asarray(rows, np.int64)
    order = np.asarray(words(seed, Stream.LABELS, np.full_like(rows, purpose), rows, 1))[:, 0]
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        held[members[np.argsort(order[members], kind="stable")][:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
