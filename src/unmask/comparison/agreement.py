"""Whether the cells of a table rank as in the paper, and which differences are within the noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

from unmask.metrics.intervals import Difference, t_interval, wilson
from unmask.results import FeatureScore

SEEDS, TEST_IMAGES = "seeds", "test images"
MEASURES = {"linear": "linear probe", "fine_tuned": "fine-tuned"}  # by what cells are compared
MOST_PAIRS = 8


@dataclass(frozen=True, kw_only=True)
class RunAccuracy:
    """The accuracy of one run on the test images, with its 95% interval over the choice of test images."""

    accuracy: float
    low: float
    high: float
    correct: int | None = None
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class CellScore:
    """The mean accuracy over the seeds of a cell, with its 95% interval.

    interval: SEEDS, a t-interval over two or more seeds, or TEST_IMAGES, that of the only seed. by_seed: the accuracy
    of every measured seed.
    """

    mean: float
    low: float
    high: float
    interval: str
    by_seed: Mapping[str, float]
    correct: int | None = None
    total: int | None = None

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f})"


def cell_score(runs: Sequence[RunAccuracy | None]) -> CellScore | None:
    """Average over seeds; None where nothing has been measured. runs: by seed, None for one that is not measured."""
    known = {str(seed): run for seed, run in enumerate(runs) if run is not None}
    if not known:
        return None
    by_seed = {seed: run.accuracy for seed, run in known.items()}
    if len(known) == 1:
        only = next(iter(known.values()))
        return CellScore(
            mean=only.accuracy, low=only.low, high=only.high, interval=TEST_IMAGES, by_seed=by_seed,
            correct=only.correct, total=only.total,
        )  # fmt: skip
    low, high = t_interval(list(by_seed.values()))
    return CellScore(mean=statistics.mean(by_seed.values()), low=low, high=high, interval=SEEDS, by_seed=by_seed)


def single_run(score: FeatureScore) -> CellScore:
    """Return the score of one run as that of a cell with one seed."""
    low, high = score.value if score.low is None else score.low, score.value if score.high is None else score.high
    return CellScore(
        mean=score.value, low=low, high=high, interval=TEST_IMAGES, by_seed={"0": score.value}, correct=score.correct,
        total=score.total,
    )  # fmt: skip


def difference(one: CellScore, other: CellScore) -> Difference:
    """Subtract the other score from the first, with the 95% interval.

    With two or more seeds in common it is a t-interval of the differences seed by seed. With one it is Newcombe's
    interval (1998, method 10) for two proportions on different test images, because the results do not keep which
    images were correct: on the same images the true interval is a little narrower.
    """
    common = sorted(set(one.by_seed) & set(other.by_seed))
    if len(common) > 1:
        values = [one.by_seed[seed] - other.by_seed[seed] for seed in common]
        return Difference(statistics.mean(values), *t_interval(values))
    (l1, u1), (l2, u2) = _test_interval(one), _test_interval(other)
    p1, p2 = one.mean, other.mean
    low, high = sqrt((p1 - l1) ** 2 + (u2 - p2) ** 2), sqrt((u1 - p1) ** 2 + (p2 - l2) ** 2)
    return Difference(p1 - p2, p1 - p2 - low, p1 - p2 + high)


def _test_interval(score: CellScore) -> tuple[float, float]:
    """Return the Wilson interval of one run's count of correct images; its own interval where there is no count."""
    if score.interval == TEST_IMAGES and score.correct is not None and score.total:
        return wilson(score.correct, score.total)
    return score.low, score.high


@dataclass(frozen=True)
class ComparedCell:
    """A cell whose accuracy here (None before it is measured) and in the paper (percent, None) can be compared."""

    label: str
    score: CellScore | None
    paper: float | None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """In how many pairs of cells the order here is that of the paper.

    clear: pairs whose difference is larger than the noise, and clear_agree those of them in the paper's order.
    within_noise, against: the other pairs, and clear ones in the opposite order, as 'A over B' in the paper's order.
    """

    pairs: int = 0
    agree: int = 0
    clear: int = 0
    clear_agree: int = 0
    within_noise: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    sentence: str


def agreement(cells: Sequence[ComparedCell], measure: str) -> Agreement:
    """Compare the order of every two cells with the paper's. measure: a key of MEASURES."""
    known = [
        (cell.label, cell.score, cell.paper) for cell in cells if cell.score is not None and cell.paper is not None
    ]
    agree, against, noise, pairs = 0, [], [], 0
    for (one, score, paper), (other, other_score, other_paper) in combinations(known, 2):
        if paper == other_paper:
            continue
        pairs += 1
        value, low, high = difference(score, other_score)
        same_order = value * (paper - other_paper) > 0
        agree += same_order
        named = f"{one} over {other}" if paper > other_paper else f"{other} over {one}"
        if low <= 0 <= high:
            noise.append(named)
        elif not same_order:
            against.append(named)
    clear = pairs - len(noise)
    found = Agreement(
        pairs=pairs, agree=agree, clear=clear, clear_agree=clear - len(against), within_noise=tuple(noise),
        against=tuple(against), sentence="",
    )  # fmt: skip
    return Agreement(**{**vars(found), "sentence": _sentence(found, MEASURES[measure])})


def no_agreement() -> Agreement:
    """Return what stands in place of an agreement where the published numbers are of models of different sizes."""
    return Agreement(sentence="The published numbers are of models of very different sizes, so no order is compared.")


def _sentence(found: Agreement, measured: str) -> str:
    if not found.pairs:
        return "No two cells have been measured yet."
    text = f"{found.agree} of {found.pairs} pairs of cells are in the paper's order ({measured}). "
    if not found.clear:
        return text + "But every difference is within the noise: this table shows no order."
    text += f"Of the {found.clear} pairs whose difference is larger than the noise, {found.clear_agree} are. "
    if found.against:
        text += f"Clearly in the opposite order (the paper has {_listed(found.against)}). "
    if found.within_noise:
        text += f"Within the noise, in the paper's order: {_listed(found.within_noise)}."
    return text.strip()


def _listed(pairs: Sequence[str]) -> str:
    more = f"; and {len(pairs) - MOST_PAIRS} more" if len(pairs) > MOST_PAIRS else ""
    return "; ".join(pairs[:MOST_PAIRS]) + more
