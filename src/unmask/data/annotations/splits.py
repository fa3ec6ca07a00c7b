"""Random splits of labelled images, as pure functions of the seed and the images' rows.

All probes, encoders and fine-tuning runs therefore use the same split, even if some files cannot be read.
"""

from __future__ import annotations

import numpy as np

from unmask.rng import Stream, words

HELD_OUT = 0.2
# Purposes of a split; each uses its own epoch of the random generator.
HOLD_OUT_FOR_TEST, SHOTS, HOLD_OUT_FOR_C, VOTES = 0, 1, 2, 4
HOLD_OUT_FOR_LAYER = (3, 5, 6, 7, 8)  # One per round.
HOLD_OUT_FOR_RATE = 9
FIRST_DRAW = 1000  # generator epochs from this number on are for repeated draws of the labels (shots)


def hold_out(labels: np.ndarray, rows: np.ndarray, seed: int, purpose: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (fit, held) positions in `labels` (n,): a fifth of each class, at least one image, is held out.

    A class with a single image is not split. The split depends only on `seed`, `purpose` and the images' `rows` (n,);
    splits for different purposes are independent.
    """
    rows = np.asarray(rows, np.int64)
    order = np.asarray(words(seed, Stream.LABELS, np.full_like(rows, purpose), rows, 1))[:, 0]
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        held[members[np.argsort(order[members], kind="stable")][:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
