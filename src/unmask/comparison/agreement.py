"""Whether the cells of a table rank as in the paper, and which differences are noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations
from math import sqrt
from typing import Any

from unmask.metrics.intervals import wilson

IN_WORDS = {"linear": "linear probe", "fine_tuned": "fine-tuned"}  # what cells can be compared by
MOST_PAIRS = 8


def t_half_width(values: Sequence[float]) -> float:
    """Half the 95 % t-interval of the mean of two or more values."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / sqrt(len(values))


# ---------------------------------------------------------------------------------------------------------- agreement


def agreement(rows: Sequence[dict[str, Any]], *, published: bool, measure: str = "linear") -> dict[str, Any]:
    """In how many pairs of cells ours differ in the direction of the paper's, and which are noise."""
    if not published:
        return {
            "pairs": 0, "agree": 0, "within_noise": [],
            "sentence": "The published numbers are of models of very different sizes, so no order is compared.",
        }  # fmt: skip
    known = [row for row in rows if row[measure] is not None and row["paper"][measure] is not None]
    agree, against, noise, pairs = [], [], [], 0
    for one, other in combinations(known, 2):
        paper = one["paper"][measure] - other["paper"][measure]
        if paper == 0:
            continue
        pairs += 1
        value, low, high = difference(one[measure], other[measure])
        better, worse = (one, other) if paper > 0 else (other, one)
        named = f"{better['label']} over {worse['label']}"
        if value * paper > 0:
            agree.append(named)
        if low <= 0 <= high:
            noise.append(named)
        elif value * paper < 0:
            against.append(named)
    return {
        "pairs": pairs,
        "agree": len(agree),
        "clear": pairs - len(noise),
        "clear_agree": pairs - len(noise) - len(against),
        "within_noise": noise,
        "against": against,
        "sentence": _agreement_sentence(pairs, len(agree), noise, against, IN_WORDS[measure]),
    }


def _agreement_sentence(pairs: int, agree: int, noise: list[str], against: list[str], measured: str) -> str:
    if not pairs:
        return "No two cells are measured yet."
    said = f"{agree} of {pairs} pairs of cells stand in the paper's order ({measured}). "
    clear = pairs - len(noise)
    if not clear:
        return said + "But every difference lies within the noise: this table shows no order."
    said += f"Of the {clear} whose difference is larger than the noise, {clear - len(against)} do. "
    if against:
        said += f"Clearly against the paper, which has {_listed(against)}. "
    if noise:
        said += f"Within the noise, in the paper's order: {_listed(noise)}."
    return said.strip()


def _listed(pairs: Sequence[str]) -> str:
    more = f"; and {len(pairs) - MOST_PAIRS} more" if len(pairs) > MOST_PAIRS else ""
    return "; ".join(pairs[:MOST_PAIRS]) + more


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    """(one - other, low, high). With two or more seeds in common a t-interval of their differences seed by seed.

    With one it is Newcombe's interval (1998, method 10) for two shares as if on different test images, because which
    images each got right is not kept: on the same images the true one is a little narrower.
    """
    common = sorted(set(one["by_seed"]) & set(other["by_seed"]))
    if len(common) > 1:
        values = [one["by_seed"][seed] - other["by_seed"][seed] for seed in common]
        mean, half = statistics.mean(values), t_half_width(values)
        return mean, mean - half, mean + half
    value = one["mean"] - other["mean"]
    if one["interval"] == other["interval"] == "test images":
        (l1, u1), (l2, u2) = (wilson(score["correct"], score["total"]) for score in (one, other))
    else:  # one of the two lacks its second seed
        (l1, u1), (l2, u2) = ((score["low"], score["high"]) for score in (one, other))
    p1, p2 = one["mean"], other["mean"]
    return value, value - sqrt((p1 - l1) ** 2 + (u2 - p2) ** 2), value + sqrt((u1 - p1) ** 2 + (p2 - l2) ** 2)
