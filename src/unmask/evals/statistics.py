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

import numpy as np

from unmask.metrics.intervals import Difference, Interval, paired_difference, wilson

PRETRAINED, RANDOM_INIT, RAW_PIXELS = "pre-trained", "random init", "raw pixels"
IN_WORDS = {RAW_PIXELS: "raw pixels", RANDOM_INIT: "the same encoder untrained"}
PROBES = {"knn": "kNN", "linear": "a linear probe", "attentive": "an attentive probe"}
POOLS = {"cls": "class token", "mean": "mean over patches", "pixels": "pixels", "attentive": "attention over tokens"}
ACCURACY, MEAN_AP, R2 = "accuracy", "mean average precision", "R2"


@dataclass(frozen=True)
class Answers:
    """Which test images one feature set got right: `right` (m,) bool. `features` and `pool` say which set it is."""

    features: str
    pool: str
    right: np.ndarray

    metric = ACCURACY

    @property
    def correct(self) -> int:
        return int(self.right.sum())

    @property
    def accuracy(self) -> float:
        return self.correct / len(self.right)

    @property
    def interval(self) -> Interval:
        return wilson(self.correct, len(self.right))

    @property
    def value(self) -> float:
        return self.accuracy

    @property
    def total(self) -> int:
        return len(self.right)

    def minus(self, other: Answers | Sampled) -> Difference:
        """How much better than another feature set on the same test images, with 95 % limits."""
        assert isinstance(other, Answers), "one measure for all"
        return paired_difference(self.right, other.right)

    def said(self, chance: float) -> str:
        return (
            f"gets {self.accuracy:.1%} of {self.total} test images right (95% interval {_span(self.interval)}; chance "
            f"{chance:.1%})"
        )


@dataclass(frozen=True)
class Sampled:
    """A measure that is no share of right answers: its `value` on `total` test images and under bootstrap draws (R,).

    metric: MEAN_AP or R2. The draws are the same for every feature set, so differences are taken draw by draw.
    """

    features: str
    pool: str
    metric: str
    value: float
    draws: np.ndarray
    total: int

    @property
    def interval(self) -> Interval:
        return _percentiles(self.draws)

    def minus(self, other: Answers | Sampled) -> Difference:
        """How much better than another feature set on the same test images, with 95 % limits."""
        assert isinstance(other, Sampled), "one measure for all"
        return Difference(self.value - other.value, *_percentiles(self.draws - other.draws))

    def said(self, chance: float) -> str:
        low, high = self.interval
        article, nothing = ("a", "chance") if self.metric == MEAN_AP else ("an", "a constant guess")
        return (
            f"reaches {article} {self.metric} of {self.value:.3f} on {self.total} test images "
            f"(95% interval {low:.3f} to {high:.3f}; {nothing} {chance:.3f})"
        )


Score = Answers | Sampled


def _percentiles(draws: np.ndarray) -> Interval:
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(float(low), float(high))


def show(value: float, metric: str) -> str:
    """'61.0%' for an accuracy, '0.412' for the others."""
    return f"{value:.1%}" if metric == ACCURACY else f"{value:.3f}"


def best_of(answers: Sequence[Score], features: str) -> Score | None:
    """The best pool of one feature set; the first one of equals."""
    return max((a for a in answers if a.features == features), key=lambda a: a.value, default=None)


def verdict(answers: Sequence[Score], *, kind: str, chance: float) -> str:
    """Plain sentences: does pre-training help, by how many points, and could that be noise?

    Each feature set speaks through its better pool (class token or mean over patches) on these test images. The
    untrained encoder has the same choice as the pre-trained one, raw pixels have none: near chance that favours the
    encoders a little. chance: what the best answer without looking would score.
    """
    trained = best_of(answers, PRETRAINED)
    if trained is None:
        raise ValueError("no answers of the pre-trained features came; a verdict is about them")
    controls = [c for name in (RAW_PIXELS, RANDOM_INIT) if (c := best_of(answers, name)) is not None]
    probe = PROBES.get(kind, kind)
    score = f"{probe} on the pre-trained features ({POOLS.get(trained.pool, trained.pool)}) {trained.said(chance)}"
    if not controls:
        unclear = "" if trained.interval.low > chance else ", which cannot be told from chance"
        advice = "Whether pre-training helped is not known from this: probe again with --controls."
        return f"{_upper(score)}{unclear}. {advice}"
    if all(a.interval.low <= chance for a in [trained, *controls]):
        others = " and ".join(f"{IN_WORDS[c.features]} {show(c.value, c.metric)}" for c in controls)
        return (
            f"No verdict: everything is near chance level. {_upper(score)}, {others}. Either the labels are not "
            "visible in such images, or there are too few of them."
        )
    differences = [trained.minus(control) for control in controls]
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


def beside(answers: Sequence[Score], runs: Sequence[str]) -> list[str]:
    """A sentence for each other run: by how much this one is better or worse than it, on the same test images.

    One pool for both, which every encoder has (not the class token): the better of two, chosen on the test images,
    would favour the encoder that has two.
    """
    said = []
    for run in runs:
        other = next(a for a in answers if a.features == run and a.pool != "cls")
        own = next(a for a in answers if a.features == PRETRAINED and a.pool == other.pool)
        said.append(
            f"Beside {run} ({POOLS[other.pool]} of both), {show(own.value, own.metric)}: "
            f"{_clause(other, own.minus(other))}."
        )
    return said


def _clause(control: Score, difference: Difference) -> str:
    name = f"{IN_WORDS.get(control.features, control.features)} ({show(control.value, control.metric)})"
    scale, digits, unit = (100, 1, " points") if control.metric == ACCURACY else (1, 3, "")
    points, low, high = (scale * value for value in difference)
    span = f"95% interval {low:+.{digits}f} to {high:+.{digits}f}"
    if difference.low > 0:
        return f"{points:.{digits}f}{unit} more than {name}, {span}"
    if difference.high < 0:
        return f"{-points:.{digits}f}{unit} {'fewer' if unit else 'less'} than {name}, {span}"
    return f"no clear difference from {name}: {points:+.{digits}f}{unit}, {span}"


def _span(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {interval.high:.1%}"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:] if not text.startswith("kNN") else text
