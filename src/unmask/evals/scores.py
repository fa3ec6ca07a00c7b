"""Score predictions against the truth: values with 95 % intervals, and differences between feature sets.

An accuracy has a Wilson interval. A difference of accuracies has the interval for paired proportions
(`metrics/intervals.py`), because two feature sets are scored on the same test images and their errors are correlated.
Average precision and R2 have bootstrap intervals over the same resamples of the test images, so their differences are
computed resample by resample. All intervals cover the choice of the test images, not the seed of pre-training or the
choice of training labels.

Letters: m test images, T target columns, R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unmask.errors import UserError
from unmask.evals.labelled_images import Labelling
from unmask.evals.measures import average_precision, by_column, r_squared, resampled
from unmask.evals.predictions import Prediction
from unmask.metrics.intervals import Interval, paired_difference, wilson
from unmask.results import (
    CLASSES,
    CONTROLS,
    MULTILABEL,
    PRETRAINED,
    REGRESSION,
    Difference,
    FeatureScore,
    TargetScore,
)

INTERVALS = {
    CLASSES: "Wilson, over the test images",
    MULTILABEL: "bootstrap, over the test images",
    REGRESSION: "bootstrap, over the test images",
}


@dataclass(frozen=True)
class Scored:
    """A score of one feature set, with the data for computing its difference from the scores of other feature sets.

    right: (m,) bool, whether the predicted class of each test image is correct. resamples: (R,) values of the metric in
    the bootstrap resamples, for metrics other than accuracy.
    """

    score: FeatureScore
    right: np.ndarray | None = None
    resamples: np.ndarray | None = None

    def minus(self, other: Scored) -> tuple[float, float, float]:
        """Return this score minus another on the same test images, with its interval: (value, low, high)."""
        if self.right is not None and other.right is not None:
            return paired_difference(self.right, other.right)
        assert self.resamples is not None, "all feature sets have the same metric"
        assert other.resamples is not None, "all feature sets have the same metric"
        low, high = _percentiles(self.resamples - other.resamples)
        return self.score.value - other.score.value, low, high


def score(prediction: Prediction, test_y: np.ndarray, labelling: Labelling) -> Scored:
    """Score the predictions of one feature set against `test_y`, classes (m,) or values (m, T)."""
    about = {
        "features": prediction.features, "pool": prediction.pool, "total": len(test_y), "fit": prediction.chosen,
        "converged": prediction.converged,
    }  # fmt: skip
    if labelling.task == CLASSES:
        right = prediction.values == test_y
        correct = int(right.sum())
        low, high = wilson(correct, len(test_y))
        return Scored(
            FeatureScore(value=correct / len(test_y), low=low, high=high, correct=correct, **about), right=right
        )
    measure = average_precision if labelling.task == MULTILABEL else r_squared
    columns = by_column(measure, test_y, prediction.values)
    resamples = resampled(measure, test_y, prediction.values)
    low, high = _percentiles(resamples)
    targets = _targets(prediction, test_y, labelling, columns)
    value = float(np.nanmean(columns))
    return Scored(FeatureScore(value=value, low=low, high=high, targets=targets, **about), resamples=resamples)


def _percentiles(resamples: np.ndarray) -> Interval:
    low, high = np.nanpercentile(resamples, [2.5, 97.5])
    return Interval(float(low), float(high))


def _targets(
    prediction: Prediction, test_y: np.ndarray, labelling: Labelling, columns: np.ndarray
) -> tuple[TargetScore, ...]:
    """Return the score of every target column, or None where it is undefined."""
    values = [None if np.isnan(value) else float(value) for value in columns]
    if labelling.task == MULTILABEL:
        return tuple(
            TargetScore(name=name, value=value, positives=int(column.sum()))
            for name, value, column in zip(labelling.names, values, test_y.T, strict=True)
        )
    errors = np.abs(test_y - prediction.values).mean(0)
    return tuple(
        TargetScore(name=name, value=value, mean_absolute_error=float(error))
        for name, value, error in zip(labelling.names, values, errors, strict=True)
    )


def differences(scored: Sequence[Scored], runs: Sequence[str]) -> tuple[Difference, ...]:
    """Compare the run's own features with each control, then with each of the other `runs`.

    With controls, the better pooling of each feature set is compared. The untrained encoder has the same poolings as
    the pre-trained one. Raw pixels have only one pooling, which favours encoders with two a little if scores are near
    chance. With other runs, the mean over patches is compared, which both runs have: choosing the better of two
    poolings on the test images would favour an encoder that has two.
    """
    pairs = []
    for name in CONTROLS:
        if (other := _best(scored, name)) is not None and (own := _best(scored, PRETRAINED)) is not None:
            pairs.append((own, other))
    for name in runs:
        other = next(each for each in scored if each.score.features == name and each.score.pool != "cls")
        own = next(each for each in scored if each.score.features == PRETRAINED and each.score.pool == other.score.pool)
        pairs.append((own, other))
    rows = []
    for own, other in pairs:
        value, low, high = own.minus(other)
        rows.append(
            Difference(
                features=other.score.features, pool=other.score.pool, own_pool=own.score.pool, value=value, low=low,
                high=high,
            )
        )  # fmt: skip
    return tuple(rows)


def _best(scored: Sequence[Scored], features: str) -> Scored | None:
    """Return the score of the best pooling of one feature set; the first one in a tie."""
    return max((each for each in scored if each.score.features == features), key=lambda e: e.score.value, default=None)


def chance_of(train_y: np.ndarray, test_y: np.ndarray, labelling: Labelling) -> float:
    """Return the chance level: the score of a prediction that does not use the images.

    For classes it is `chance_level`, for mean average precision the share of positive test images, averaged over
    labels, and for R2 it is 0, the score of a constant prediction.
    """
    if labelling.task == CLASSES:
        return chance_level(train_y, test_y, len(labelling.names))
    if labelling.task == REGRESSION:
        return 0.0
    return float(test_y.mean(0)[_is_defined(test_y, labelling)].mean())


def chance_level(train_y: np.ndarray, test_y: np.ndarray, num_classes: int) -> float:
    """Return the larger of 1 / `num_classes` and the accuracy of always predicting the most frequent training class."""
    most_frequent = np.bincount(train_y).argmax()
    return max(1 / num_classes, float((test_y == most_frequent).mean()))


def require_defined(test_y: np.ndarray, labelling: Labelling) -> None:
    """Raise UserError if the metric is undefined for every target column on these test images."""
    if not _is_defined(test_y, labelling).any():
        raise UserError(
            f"got {len(test_y)} test images in which {', '.join(labelling.names)} do not vary, so no score is "
            "defined; give other test images with --test, or more images"
        )


def _is_defined(test_y: np.ndarray, labelling: Labelling) -> np.ndarray:
    """Return for each target column whether its metric is defined on these test images, (T,) bool.

    Accuracy is always defined, so the result for classes is [True].
    """
    if labelling.task == CLASSES:
        return np.ones(1, bool)
    return np.asarray(test_y.any(0) if labelling.task == MULTILABEL else np.ptp(test_y, 0) > 0)


def caveats_of(train_y: np.ndarray, test_y: np.ndarray, labelling: Labelling, shared: int) -> tuple[str, ...]:
    """Return caveats about the scores as sentences. shared: number of test images that are also training images."""
    notes = []
    if shared:
        notes.append(
            f"Careful: {shared} of the {len(test_y)} test images are also training images, pixel for pixel, so the "
            "numbers are too good."
        )
    if labelling.task != CLASSES:
        defined = _is_defined(test_y, labelling)
        if missing := [name for name, known in zip(labelling.names, defined, strict=True) if not known]:
            lacking = "have no positive image" if labelling.task == MULTILABEL else "have only one value"
            notes.append(
                f"Targets that {lacking} among the test images are left out of the mean: {', '.join(missing)}."
            )
        return tuple(notes)
    unseen = sorted(set(test_y.tolist()) - set(train_y.tolist()))
    if unseen:
        named = ", ".join(str(labelling.names[label]) for label in unseen[:5])
        count = int(np.isin(test_y, unseen).sum())
        notes.append(f"{count} test images are of classes without any training image ({named}) and count as wrong.")
    return tuple(notes)
