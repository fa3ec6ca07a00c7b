"""Predict the targets of test images with fitted probes, for every feature set and pooling.

An encoder that was trained with hidden tokens can be evaluated under several patch masks; `vote` then combines the
predictions for each test image: the majority of classes, or the mean of scores and quantities.

Letters: n training images, m test images, D width of a feature, T target columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unmask.evals.encoder_views import majority
from unmask.evals.feature_sets import VOTE
from unmask.evals.frozen_features import FeatureTable
from unmask.evals.labelled_images import require_two
from unmask.evals.probe_kind import Fitted, PooledProbe, TokenProbe, TrainingTargets
from unmask.results import CLASSES, RAW_PIXELS


@dataclass(frozen=True)
class Prediction:
    """The predictions of one probe for m test images.

    values: classes (m,), or scores or quantities (m, T). chosen, converged: fields of the fit; see `Fitted`.
    """

    features: str
    pool: str
    values: np.ndarray
    chosen: dict[str, float | None] = field(default_factory=dict)
    converged: bool = True


def predict_pooled(
    probe: PooledProbe,
    train: Mapping[str, FeatureTable],
    test: Mapping[str, FeatureTable],
    targets: TrainingTargets,
) -> list[Prediction]:
    """Fit a probe to every feature set and pooling, and predict the targets of the test images.

    train, test: tables of features by the name of the feature set; all training tables are of the same images, and all
    test tables too. For every patch mask after the first, `test` has one more table; its name is that of the feature
    set plus VOTE plus the number of the mask. Raises UserError for fewer than two classes.
    """
    if targets.task == CLASSES:
        require_two(targets.y)
    predictions = []
    for features in train:
        seen = [test[name] for name in masks_of(test, features)]
        for pool, train_x, test_x in pools(features, train[features], seen):
            fitted = probe.fit(train_x, targets)
            predictions.append(
                vote(features, pool, fitted=fitted, values=fitted.predict(test_x), seen=seen, targets=targets)
            )
    return predictions


def predictions_from_tokens(
    probe: TokenProbe,
    fitted: Mapping[str, Fitted],
    values: Mapping[str, np.ndarray],
    test: Mapping[str, FeatureTable],
    targets: TrainingTargets,
) -> list[Prediction]:
    """Return the predictions of a probe of all tokens.

    fitted: fitted probes by the name of the feature set. values: their outputs by the name of the test table.
    """
    predictions = []
    for features, fit in fitted.items():
        names = masks_of(test, features)
        pool = "pixels" if features == RAW_PIXELS else probe.pool
        both = np.concatenate([values[name] for name in names])
        predictions.append(
            vote(features, pool, fitted=fit, values=both, seen=[test[name] for name in names], targets=targets)
        )
    return predictions


def masks_of(names: Iterable[str], features: str) -> list[str]:
    """Return the names of the test tables of one feature set, one table per patch mask."""
    others = [name for name in names if name.startswith(features + VOTE)]
    return [features, *(name for name in others if name.removeprefix(features + VOTE).isdecimal())]


def vote(
    features: str,
    pool: str,
    fitted: Fitted,
    values: np.ndarray,
    seen: Sequence[FeatureTable],
    targets: TrainingTargets,
) -> Prediction:
    """Combine the predictions under all patch masks: the majority of classes, or the mean of scores and quantities.

    values: the predictions under all masks, concatenated. seen: one table of test images per mask.
    """
    values = values.reshape(len(seen), -1, *values.shape[1:])
    if len(seen) == 1:
        one = values[0]
    elif targets.task == CLASSES:
        one = majority(values, seen[0].index, targets.seed)
    else:
        one = values.mean(0)
    return Prediction(features=features, pool=pool, values=one, chosen=fitted.chosen, converged=fitted.converged)


def pools(
    features: str, train: FeatureTable, seen: Sequence[FeatureTable]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (name of the pooling, training features, test features) for every pooling of this encoder.

    seen: one table of test images per patch mask; the test features of all masks are concatenated.
    """
    tested = np.concatenate([table.mean for table in seen])
    if features == RAW_PIXELS:
        # Pixels are never negative, so without centring their cosine similarity would mostly measure brightness.
        mean = train.mean.mean(0)
        yield "pixels", train.mean - mean, tested - mean
        return
    tokens = [table.cls for table in seen if table.cls is not None]
    if train.cls is not None and len(tokens) == len(seen):
        yield "cls", train.cls, np.concatenate(tokens)
    yield "mean", train.mean, tested


def images_in_both(train: FeatureTable, test: FeatureTable) -> int:
    """Return the number of test images that are identical to a training image in every pixel."""
    return int(np.isin(test.digest, train.digest).sum())
