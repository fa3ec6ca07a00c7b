"""95 % confidence intervals of proportions, of their differences and of means.

Proportions use the Wilson score interval (Wilson 1927, "Probable inference, the law of succession, and statistical
inference"); differences of two proportions on the same images use the interval for paired proportions of Newcombe 1998,
"Improved confidence intervals for the difference between binomial proportions based on paired data", Statistics in
Medicine 17:2635-2650, method 10. All intervals account for the choice of test images, not for the seed of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """95 % limits."""

    low: float
    high: float


class Difference(NamedTuple):
    """A value with its 95 % limits."""

    value: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % Student interval of the mean of n >= 2 values: mean +- t_(n-1) s / sqrt(n)."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return Interval(mean(values) - half, mean(values) + half)


def wilson(correct: int, total: int) -> Interval:
    """Return the 95 % Wilson score interval of a proportion. Raises ValueError for impossible counts."""
    from scipy.stats import binomtest

    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"got {correct} correct of {total}; expected a count between 0 and a positive total")
    limits = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(float(limits.low), float(limits.high))


def paired_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Return the accuracy of `first` minus that of `second`, with 95 % limits. first, second: (m,) bool, which of the
    same m images were answered correctly.

    The formula: `a` images are correct in both, b only in the first, c only in the second, d in neither; p1, p2 are the
    two accuracies and (l1, u1), (l2, u2) their Wilson limits. The lower limit is (p1 - p2) - sqrt(x^2 - 2 phi x y +
    y^2) with x = p1 - l1, y = u2 - p2; the upper limit is (p1 - p2) + the same root with x = u1 - p1, y = p2 - l2. phi
    is the correlation (ad - bc) / sqrt((a+b)(c+d)(a+c)(b+d)); a positive numerator is reduced by m/2, but not below 0.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape:
        raise ValueError(f"got {len(first)} and {len(second)} answers; expected equally many, for the same test images")
    m = len(first)
    a, b = int((first & second).sum()), int((first & ~second).sum())
    c, d = int((~first & second).sum()), int((~first & ~second).sum())
    (l1, u1), (l2, u2) = wilson(a + b, m), wilson(a + c, m)
    p1, p2 = (a + b) / m, (a + c) / m
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    together = a * d - b * c
    if together > 0:
        together = max(together - m / 2, 0)
    phi = together / sqrt(margins) if margins else 0.0

    def reach(x: float, y: float) -> float:
        return sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    value = p1 - p2
    return Difference(value, value - reach(p1 - l1, u2 - p2), value + reach(u1 - p1, p2 - l2))
