"""Compare the order of the cells of a table by accuracy with their order in the paper."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

from unmask.metrics.intervals import Difference, t_interval, wilson
from unmask.results import FeatureScore

SEEDS, TEST_IMAGES = "seeds", "test images"
MEASURES = {
    "linear": "linear probe",
    "fine_tuned": "fine-tuned",
}  # accuracies by which cells are compared
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

    interval: SEEDS for a t-interval over two or more seeds, or TEST_IMAGES for the interval of a single run over its
    test images. by_seed: the accuracy of every measured seed.
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
    """Average the accuracy of a cell over its measured seeds, or return None if no seed is measured.

    runs: the accuracy of the run with every seed, None before it is measured.
    """
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
    """Return the score of one run as the score of a cell with one seed."""
    low, high = score.value if score.low is None else score.low, score.value if score.high is None else score.high
    return CellScore(
        mean=score.value, low=low, high=high, interval=TEST_IMAGES, by_seed={"0": score.value}, correct=score.correct,
        total=score.total,
    )  # fmt: skip


def difference(one: CellScore, other: CellScore) -> Difference:
    """Return the difference of two scores (the first minus the second) with its 95% interval.

    If both cells were trained with the same two or more seeds, the interval is a t-interval of the differences per
    seed. Otherwise it is Newcombe's interval (1998, method 10) for proportions on two independent sets of test images,
    because the results do not store which images were classified correctly. Because both cells are tested on the same
    images, the true interval is a little narrower.
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
    """Return the Wilson interval for a single run with a stored count of correct images, else the stored interval."""
    if score.interval == TEST_IMAGES and score.correct is not None and score.total:
        return wilson(score.correct, score.total)
    return score.low, score.high


@dataclass(frozen=True)
class ComparedCell:
    """A cell, its measured accuracy (or None) and its published accuracy (percent, or None if unpublished)."""

    label: str
    score: CellScore | None
    paper: float | None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How many pairs of cells are ranked as in the paper.

    pairs: number of pairs. agree: number of pairs in the paper's order. clear: number of pairs whose difference is
    larger than the noise. clear_agree: number of clear pairs in the paper's order. within_noise: pairs whose difference
    is within the noise, as 'A over B' in the paper's order. against: clear pairs in the opposite order, also written in
    the paper's order. sentence: these counts and pairs in words.
    """

    pairs: int = 0
    agree: int = 0
    clear: int = 0
    clear_agree: int = 0
    within_noise: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    sentence: str


def agreement(cells: Sequence[ComparedCell], measure: str) -> Agreement:
    """Compare the order of every pair of cells with the paper's. measure: key of the accuracy in MEASURES."""
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
    counts = Agreement(
        pairs=pairs, agree=agree, clear=clear, clear_agree=clear - len(against), within_noise=tuple(noise),
        against=tuple(against), sentence="",
    )  # fmt: skip
    return Agreement(**{**vars(counts), "sentence": _sentence(counts, MEASURES[measure])})


def no_agreement() -> Agreement:
    """Return an agreement without counts, for a table whose published numbers belong to models of different sizes."""
    return Agreement(
        sentence="The published numbers belong to models of very different sizes, so the order is not compared."
    )


def _sentence(counts: Agreement, measured: str) -> str:
    if not counts.pairs:
        return "No two cells have been measured yet."
    text = f"{counts.agree} of {counts.pairs} pairs of cells are in the paper's order ({measured}). "
    if not counts.clear:
        return text + "But every difference is within the noise, so this table does not rank the cells."
    text += (
        f"Of the {counts.clear} pairs whose difference is larger than the noise, {counts.clear_agree} are in the "
        "paper's order. "
    )
    if counts.against:
        text += f"Clearly in the opposite order (the paper ranks {_listed(counts.against)}). "
    if counts.within_noise:
        text += f"Within the noise, in the paper's order: {_listed(counts.within_noise)}."
    return text.strip()


def _listed(pairs: Sequence[str]) -> str:
    more = f"; and {len(pairs) - MOST_PAIRS} more" if len(pairs) > MOST_PAIRS else ""
    return "; ".join(pairs[:MOST_PAIRS]) + more
