"""Label-budget curve: the accuracy of a probe as a function of the number of labels per class.

For each number of labels per class, a probe is fitted to several random draws of training labels and scored on the same
test images. The mean accuracy over the draws has a t-interval (Student). Feature sets are compared draw by draw,
because all of them use the same labels in a draw; the mean difference also has a t-interval. Both intervals cover the
choice of the training labels, not of the test images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np

from unmask.evals.predictions import Prediction
from unmask.metrics.intervals import t_interval
from unmask.results import CONTROLS, PRETRAINED, CurvePoint, CurveRow, Difference

INTERVAL = "Student's t, over the draws of training labels"


@dataclass(frozen=True)
class Draw:
    """One random draw of `shots` training labels per class, with the predictions of all feature sets."""

    shots: int
    train_y: np.ndarray
    predictions: Sequence[Prediction]


def curve_rows(draws: Sequence[Draw], test_y: np.ndarray) -> tuple[CurveRow, ...]:
    """Return the curve of every feature set and pooling, with one point per number of labels."""
    budgets = sorted({draw.shots for draw in draws})
    rows = []
    for place, first in enumerate(draws[0].predictions):
        points = [_point(n, [draw.predictions[place] for draw in draws if draw.shots == n], test_y) for n in budgets]
        rows.append(CurveRow(features=first.features, pool=first.pool, points=tuple(points)))
    return tuple(rows)


def _point(shots: int, predictions: Sequence[Prediction], test_y: np.ndarray) -> CurvePoint:
    correct = [int((prediction.values == test_y).sum()) for prediction in predictions]
    accuracies = [count / len(test_y) for count in correct]
    low, high = t_interval(accuracies)
    return CurvePoint(
        shots=shots,
        mean=mean(accuracies),
        low=max(0.0, low),
        high=min(1.0, high),
        values=tuple(accuracies),
        correct=tuple(correct),
        fits=tuple(prediction.chosen for prediction in predictions),
    )


def curve_differences(rows: Sequence[CurveRow], runs: Sequence[str]) -> tuple[Difference, ...]:
    """Compare the run's own features with each control and each of the other `runs`, at every number of labels.

    The features are the mean over patches, which every encoder has.
    """
    own = next(row for row in rows if row.features == PRETRAINED and row.pool != "cls")
    others = {row.features: row for row in rows if row.features != PRETRAINED and row.pool != "cls"}
    compared = []
    for name in [*(name for name in CONTROLS if name in others), *runs]:
        for mine, theirs in zip(own.points, others[name].points, strict=True):
            values = [first - second for first, second in zip(mine.values, theirs.values, strict=True)]
            low, high = t_interval(values)
            compared.append(
                Difference(
                    features=name, pool=others[name].pool, own_pool=own.pool, value=mean(values), low=low, high=high,
                    shots=mine.shots,
                )
            )  # fmt: skip
    return tuple(compared)
