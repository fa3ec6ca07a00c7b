"""Compute average precision and R2, also in bootstrap resamples, which give their intervals.

Intervals are percentiles of the bootstrap (Efron 1979, "Bootstrap methods: another look at the jackknife"): the test
images are resampled 1,000 times with replacement. All feature sets share the same resamples, so that they can be
compared resample by resample. The intervals cover only the choice of the test images.

scipy.stats.bootstrap with scikit-learn's metrics returns the same numbers to the last digit (tested), but sorts the
scores again for every resample and is 12 times slower for 2,000 images with ten labels (27 instead of 2.3 seconds per
feature set). Here a resample is a vector of counts, one per image, and scores are sorted once.

Letters: m test images, T target columns, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
SEED = 0
PIECE = 50  # resamples computed at once, to limit the memory of (PIECE, m) float64

Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Maps truth (m,), prediction (m,) and weights (R, m) to the value in every resample (R,), NaN where undefined."""


def average_precision(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the average precision in every resample, as scikit-learn defines it: the sum of (R_i - R_(i-1)) P_i.

    P_i and R_i are precision and recall at the i-th threshold. truth: (m,), 0 or 1. scores: (m,); images with equal
    scores share a threshold. weights: (R, m), how often each resample contains each image. Returns (R,), NaN for a
    resample without a positive image.
    """
    order = np.argsort(-scores, kind="stable")
    truth, scores, weights = truth[order], scores[order], weights[:, order]
    ends = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # the last image of every threshold
    positives = (weights * truth).cumsum(1)[:, ends]  # (R, steps)
    retrieved = weights.cumsum(1)[:, ends]
    precision = np.divide(positives, retrieved, out=np.zeros_like(positives, dtype=np.float64), where=retrieved > 0)
    total = positives[:, -1]
    steps = np.diff(positives, axis=1, prepend=0.0)
    return np.divide((steps * precision).sum(1), total, out=np.full(len(weights), np.nan), where=total > 0)


def r_squared(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return R2 in every resample, (R,): 1 - (squared errors) / (squared distances from the mean).

    R2 is NaN for a resample in which the truth is constant.
    """
    total = weights.sum(1)
    shifted = truth - truth.mean()  # keeps `weights @ shifted**2 - total * mean**2` precise if the mean is large
    mean = weights @ shifted / total
    spread = weights @ shifted**2 - total * mean**2
    left = weights @ (truth - predicted) ** 2
    small = 1e-12 * float((shifted**2).sum())
    return 1 - np.divide(left, spread, out=np.full(len(weights), np.nan), where=spread > small)


def by_column(measure: Measure, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute a measure for every column of `truth` and `predicted` (m, T); return (T,). Every image counts once."""
    once = np.ones((1, len(truth)))
    return np.array([measure(truth[:, t], predicted[:, t], once)[0] for t in range(truth.shape[1])])


def resampled(measure: Measure, truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute a measure in every bootstrap resample; return its mean over the columns, (R,).

    The mean leaves out columns for which the measure is undefined in the resample, and is NaN if it is undefined for
    all. The resamples depend only on m.
    """
    rng = np.random.default_rng(SEED)
    m, means = len(truth), []
    for _ in range(0, RESAMPLES, PIECE):
        weights = np.stack([np.bincount(rng.integers(0, m, m), minlength=m) for _ in range(PIECE)]).astype(np.float64)
        columns = np.stack(
            [measure(truth[:, t], predicted[:, t], weights) for t in range(truth.shape[1])], 1
        )  # (PIECE, T)
        defined = ~np.isnan(columns)
        sums = np.where(defined, columns, 0.0).sum(1)
        means.append(np.divide(sums, defined.sum(1), out=np.full(PIECE, np.nan), where=defined.any(1)))
    return np.concatenate(means)
