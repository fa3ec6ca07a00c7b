"""What fitted probes predict for the test images, for every feature set and pooling.

An encoder that was trained with hidden tokens may see each test image under several patch masks; then the majority of
its predictions counts, or their mean (`vote`).

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
from unmask.evals.probe_kind import Fitted, PooledProbe, TrainingTargets
from unmask.results import CLASSES, RAW_PIXELS

ATTENTION_POOL = "attentive"  # the pooling of probes that are fitted to all tokens


@dataclass(frozen=True)
class Prediction:
    """The predictions of one probe for the m test images: `values` classes (m,), or scores or quantities (m, T).

    chosen, converged: as in `Fitted`.
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
    """Fit a probe to every feature set and pooling, and predict the test images.

    train, test: tables by the names of the feature sets, all of the same images; in `test` also, as NAME + VOTE +
    number, those of the same encoder under further masks. Raises UserError for fewer than two classes.
    """
    if targets.task == CLASSES:
        require_two(targets.y)
    found = []
    for features in train:
        seen = [test[name] for name in masks_of(test, features)]
        for pool, train_x, test_x in pools(features, train[features], seen):
            fitted = probe.fit(train_x, targets)
            found.append(vote(features, pool, fitted, fitted.predict(test_x), seen, targets))
    return found


def predictions_from_tokens(
    fitted: Mapping[str, Fitted],
    values: Mapping[str, np.ndarray],
    test: Mapping[str, FeatureTable],
    targets: TrainingTargets,
) -> list[Prediction]:
    """Return the predictions of probes of all tokens. values: what each predicted, by the names of the test tables."""
    found = []
    for features, probe in fitted.items():
        names = masks_of(test, features)
        pool = "pixels" if features == RAW_PIXELS else ATTENTION_POOL
        both = np.concatenate([values[name] for name in names])
        found.append(vote(features, pool, probe, both, [test[name] for name in names], targets))
    return found


def masks_of(names: Iterable[str], features: str) -> list[str]:
    """Return the names of the test tables of one feature set: one for each mask."""
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
    """Combine the values under all masks, one after another in `values`: the majority of classes, or the mean."""
    values = values.reshape(len(seen), -1, *values.shape[1:])
    if len(seen) == 1:
        one = values[0]
    elif targets.task == CLASSES:
        one = majority(values, seen[0].index, targets.seed)
    else:
        one = values.mean(0)
    return Prediction(features, pool, one, fitted.chosen, fitted.converged)


def pools(
    features: str, train: FeatureTable, seen: Sequence[FeatureTable]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (pool, training features, test features) of every pooling that this encoder has.

    seen: the test images under each mask; their rows come one table after another.
    """
    tested = np.concatenate([table.mean for table in seen])
    if features == RAW_PIXELS:
        # The cosine similarity of pixels, none of them negative, is mostly brightness; without their mean it is fair.
        mean = train.mean.mean(0)
        yield "pixels", train.mean - mean, tested - mean
        return
    tokens = [table.cls for table in seen if table.cls is not None]
    if train.cls is not None and len(tokens) == len(seen):
        yield "cls", train.cls, np.concatenate(tokens)
    yield "mean", train.mean, tested


def images_in_both(train: FeatureTable, test: FeatureTable) -> int:
    """Return how many test images are also training images, pixel for pixel."""
    return int(np.isin(test.digest, train.digest).sum())
