"""Label-budget curve: how many labels a probe needs, with the luck of the labels shown.

For each budget of labels per class a probe is fitted to several draws of them, always on the same test images. The
interval of a mean is Student's over the draws; differences between feature sets are taken draw by draw, because each
draw is the same labels for all. Both cover the choice of training labels, not of test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from unmask.evals.probe import Aim, Guess, chance_level
from unmask.evals.statistics import ACCURACY, IN_WORDS, POOLS, PRETRAINED, RANDOM_INIT, RAW_PIXELS
from unmask.metrics.intervals import Difference, t_interval

INTERVAL = "Student's t, over the draws of training labels"


@dataclass(frozen=True)
class Draw:
    """One draw of `shots` training labels per class: the training labels, and what every feature set made of them."""

    shots: int
    train_y: np.ndarray
    guesses: Sequence[Guess]


def budget_curve(
    drawn: Sequence[Draw], test_y: np.ndarray, *, kind: str, aim: Aim, shared: int, runs: Sequence[str] = ()
) -> dict[str, Any]:
    """The object that `evals/curve-*.json` holds: `rows` of feature sets with a point for each budget.

    A point has the mean accuracy, its 95 % limits, and what each draw got (`accuracies`, `correct`). runs: the feature
    sets that are other runs' encoders.
    """
    budgets = sorted({draw.shots for draw in drawn})
    places = {(guess.features, guess.pool): i for i, guess in enumerate(drawn[0].guesses)}
    rows = []
    for (features, pool), place in places.items():
        points = [_point(n, [d.guesses[place] for d in drawn if d.shots == n], test_y) for n in budgets]
        rows.append({"features": features, "pool": pool, "points": points})
    return {
        "kind": kind,
        "task": aim.task,
        "metric": ACCURACY,
        "shots": budgets,
        "draws": len(drawn) // len(budgets),
        "train_images": max(len(draw.train_y) for draw in drawn),
        "test_images": len(test_y),
        "classes": list(aim.names),
        "chance": chance_level(drawn[0].train_y, test_y, len(aim.names)),
        "rows": rows,
        "interval": INTERVAL,
        "shared": shared,
        "verdict": " ".join(_verdict(rows, budgets, runs)),
    }


def _point(shots: int, guesses: Sequence[Guess], test_y: np.ndarray) -> dict[str, Any]:
    correct = [int((guess.values == test_y).sum()) for guess in guesses]
    accuracies = [count / len(test_y) for count in correct]
    low, high = t_interval(accuracies)
    return {
        "shots": shots, "mean": mean(accuracies), "low": max(0.0, low), "high": min(1.0, high),
        "accuracies": accuracies, "correct": correct, "fits": [guess.about for guess in guesses],
    }  # fmt: skip


def _verdict(rows: Sequence[dict[str, Any]], budgets: Sequence[int], runs: Sequence[str]) -> list[str]:
    """Where the pre-trained features are above each control and each other run: one pool for all, which all have."""
    own = next(row for row in rows if row["features"] == PRETRAINED and row["pool"] != "cls")
    curve = ", ".join(f"{point['mean']:.1%} with {point['shots']}" for point in own["points"])
    said = [f"The pre-trained features ({POOLS[own['pool']]}) get {curve} labels per class."]
    others = {row["features"]: row for row in rows if row["features"] != PRETRAINED and row["pool"] != "cls"}
    controls = [name for name in (RAW_PIXELS, RANDOM_INIT) if name in others]
    differences = {name: [_difference(own, row, i) for i in range(len(budgets))] for name, row in others.items()}
    if controls:
        ahead = [n for i, n in enumerate(budgets) if all(differences[name][i].low > 0 for name in controls)]
        words = " and ".join(IN_WORDS[name] for name in controls)
        if ahead:
            said.insert(0, f"Pre-training helps with {_listed(ahead)} labels per class: better there than {words}.")
        else:
            said.insert(0, f"Pre-training is not shown to help at any of these budgets: not clearly above {words}.")
    else:
        said.append("Whether pre-training helped is not known from this: probe again with --controls.")
    for name in [*controls, *runs]:
        steps = [
            f"{100 * value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) with {n}"
            for n, (value, low, high) in zip(budgets, differences[name], strict=True)
        ]
        said.append(f"Points above {IN_WORDS.get(name, name)}: {', '.join(steps)}.")
    return said


def _difference(own: dict[str, Any], other: dict[str, Any], i: int) -> Difference:
    """Mean over draws of one accuracy less the other, with 95 % limits."""
    pairs = zip(own["points"][i]["accuracies"], other["points"][i]["accuracies"], strict=True)
    values = [first - second for first, second in pairs]
    return Difference(mean(values), *t_interval(values))


def _listed(numbers: Sequence[int]) -> str:
    *first, last = (str(number) for number in numbers)
    return f"{', '.join(first)} and {last}" if first else last
