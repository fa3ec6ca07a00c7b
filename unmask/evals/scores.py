"""Numbers with their uncertainty, and what they mean in plain words.

Accuracy carries a Wilson score interval (Wilson 1927, "Probable inference, the law of succession, and statistical
inference"). Two feature sets are compared on the same test images, where right and wrong answers go together, so their
difference carries the interval for paired proportions of Newcombe 1998, "Improved confidence intervals for the
difference between binomial proportions based on paired data", Statistics in Medicine 17:2635-2650, method 10. Both
cover what the choice of test images alone could change; not another seed of the pre-training, nor another choice of
training labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution

PRETRAINED, RANDOM_INIT, RAW_PIXELS = "pre-trained", "random init", "raw pixels"
IN_WORDS = {RAW_PIXELS: "raw pixels", RANDOM_INIT: "the same encoder untrained"}
POOLS = {"cls": "class token", "mean": "mean over patches", "pixels": "pixels"}


class Interval(NamedTuple):
    """95 % limits."""

    low: float
    high: float


class Difference(NamedTuple):
    """`value` with its 95 % limits."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Answers:
    """Which test images one feature set got right: `right` (m,) bool. `features` and `pool` say which set it is."""

    features: str
    pool: str
    right: np.ndarray

    @property
    def correct(self) -> int:
        return int(self.right.sum())

    @property
    def accuracy(self) -> float:
        return self.correct / len(self.right)

    @property
    def interval(self) -> Interval:
        return wilson(self.correct, len(self.right))


def wilson(correct: int, total: int) -> Interval:
    """95 % Wilson score interval of a proportion: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"{correct} correct of {total} came; a count between 0 and a positive total was expected")
    p, z2 = correct / total, Z95**2 / total
    center, half = p + z2 / 2, Z95 * sqrt(p * (1 - p) / total + z2 / (4 * total))
    return Interval(
        0.0 if correct == 0 else (center - half) / (1 + z2),  # exact at the ends, where rounding would show
        1.0 if correct == total else (center + half) / (1 + z2),
    )


def paired_difference(first: np.ndarray, second: np.ndarray) -> Difference:
    """Share right in `first` minus share right in `second`, both (m,) bool on the same test images, with 95 % limits.

    With a images right in both, b only in the first, c only in the second, d in neither, p1, p2 the two shares and
    (l1, u1), (l2, u2) their Wilson limits, the limits are (p1 - p2) - sqrt(x^2 - 2 phi x y + y^2) with x = p1 - l1,
    y = u2 - p2, and (p1 - p2) + the same with x = u1 - p1, y = p2 - l2. phi is the correlation of the two,
    (ad - bc) / sqrt((a+b)(c+d)(a+c)(b+d)), its numerator lowered by m/2, but not below 0, where it is positive.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} answers came; both must be on the same test images")
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


def best_of(answers: Sequence[Answers], features: str) -> Answers | None:
    """The most accurate pool of one feature set; the first one of equals."""
    return max((a for a in answers if a.features == features), key=lambda a: a.accuracy, default=None)


def verdict(answers: Sequence[Answers], *, kind: str, chance: float) -> str:
    """Plain sentences: does pre-training help, by how many points, and could that be noise?

    Each feature set speaks through its better pool (class token or mean over patches) on these test images. The
    untrained encoder has the same choice as the pre-trained one, raw pixels have none: near chance that favours the
    encoders a little. chance: what the best answer without looking would score.
    """
    trained = best_of(answers, PRETRAINED)
    if trained is None:
        raise ValueError("no answers of the pre-trained features came; a verdict is about them")
    controls = [c for name in (RAW_PIXELS, RANDOM_INIT) if (c := best_of(answers, name)) is not None]
    probe = {"knn": "kNN", "linear": "a linear probe"}.get(kind, kind)
    score = (
        f"{probe} on the pre-trained features ({POOLS.get(trained.pool, trained.pool)}) gets {trained.accuracy:.1%} of "
        f"{len(trained.right)} test images right (95% interval {_span(trained.interval)}; chance {chance:.1%})"
    )
    if not controls:
        unclear = "" if trained.interval.low > chance else ", which cannot be told from chance"
        advice = "Whether pre-training helped is not known from this: probe again with --controls."
        return f"{_upper(score)}{unclear}. {advice}"
    if all(a.interval.low <= chance for a in [trained, *controls]):
        others = " and ".join(f"{IN_WORDS[c.features]} {c.accuracy:.1%}" for c in controls)
        return (
            f"No verdict: everything is near chance level. {_upper(score)}, {others}. Either the labels are not "
            "visible in such images, or there are too few of them."
        )
    differences = [paired_difference(trained.right, control.right) for control in controls]
    clauses = [_clause(control, difference) for control, difference in zip(controls, differences, strict=True)]
    if all(d.low > 0 for d in differences):
        lead = "Pre-training helps."
        if len(controls) < 2:
            lead = f"Better than {IN_WORDS[controls[0].features]}."
    elif any(d.high < 0 for d in differences):
        lead = "Pre-training does not help here."
    elif any(d.low > 0 for d in differences):
        lead = "Pre-training is not shown to help: it beats one control, not both."
    else:
        lead = "Pre-training is not shown to help: the differences lie within the noise."
    return f"{lead} {_upper(score)}: {'; '.join(clauses)}."


def _clause(control: Answers, difference: Difference) -> str:
    name = f"{IN_WORDS[control.features]} ({control.accuracy:.1%})"
    points, low, high = (100 * value for value in difference)
    span = f"95% interval {low:+.1f} to {high:+.1f}"
    if difference.low > 0:
        return f"{points:.1f} points more than {name}, {span}"
    if difference.high < 0:
        return f"{-points:.1f} points fewer than {name}, {span}"
    return f"no clear difference from {name}: {points:+.1f} points, {span}"


def _span(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {interval.high:.1%}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:] if not text.startswith("kNN") else text
