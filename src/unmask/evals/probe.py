"""The evaluator: features of labelled images, and how good they are beside controls.

Gets the tables that `collect.py` made, asks `knn.py` or `linear.py`, judges with `scores.py`. Class token and mean over
patches are both measured, always. Not here: files, splits and the Run (`evals/run_probe.py` and what it asks),
attentive probes and fine-tuning.

Letters: n training images, m test images, D width of a feature, T target columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from unmask.data.annotations.label_tables import CLASSES, MULTILABEL, REGRESSION
from unmask.data.annotations.splits import FIRST_DRAW, HOLD_OUT_FOR_LAYER, SHOTS, hold_out
from unmask.errors import UserError
from unmask.evals.encoder_views import Layer, best_layer, majority
from unmask.evals.frozen_features import FeatureTable, RawPixels
from unmask.evals.measures import average_precision, by_column, r_squared, resampled
from unmask.evals.probes.knn import knn, knn_mean
from unmask.evals.probes.linear import linear, linear_labels, ridge
from unmask.evals.statistics import (
    ACCURACY,
    MEAN_AP,
    PRETRAINED,
    R2,
    RANDOM_INIT,
    RAW_PIXELS,
    Answers,
    Sampled,
    Score,
    beside,
    show,
    verdict,
)
from unmask.rng import Stream, words

KINDS = ("knn", "linear")  # on pooled features; an attentive probe needs the tokens (`attentive.py`)
METRICS = {CLASSES: ACCURACY, MULTILABEL: MEAN_AP, REGRESSION: R2}
INTERVALS = {
    CLASSES: "Wilson, over the test images",
    MULTILABEL: "bootstrap, over the test images",
    REGRESSION: "bootstrap, over the test images",
}
C_FOR_LAYERS = 0.1
ANSWERS_FOR_LAYER = 500  # from here on one round is enough
VOTE = " mask "  # parts the name of features from the number of the mask under which they were seen once more


def encoders_of(encoder: nn.Module, untrained: nn.Module | None) -> dict[str, nn.Module]:
    """What a probe measures, for `collect_each`.

    untrained: the same encoder at its random start, or None for no controls; with it come raw pixels, and the verdict
    compares all three on the same test images.
    """
    if untrained is None:
        return {PRETRAINED: encoder}
    return {RAW_PIXELS: RawPixels(), RANDOM_INIT: untrained, PRETRAINED: encoder}


@dataclass(frozen=True)
class Aim:
    """What images are labelled with: a task of `data/label_tables.py`, and the names of its classes or columns."""

    task: str
    names: Sequence[str]


@dataclass(frozen=True)
class Guess:
    """What a probe on one feature set says of the m test images: `values` classes (m,), or scores or quantities (m, T).

    `about` is what its row says of the fit.
    """

    features: str
    pool: str
    values: np.ndarray
    about: dict[str, Any]


def guess(
    train: Mapping[str, FeatureTable],
    test: Mapping[str, FeatureTable],
    train_y: np.ndarray,
    *,
    kind: str,
    aim: Aim,
    seed: int,
) -> list[Guess]:
    """Fit a kNN or linear probe on every feature set, and ask it about the test images.

    train, test: tables by the names of the feature sets, all of the same images; in `test` also, as NAME + VOTE +
    number, those of the same encoder under other masks, and then the majority counts. train_y: classes (n,), or (n, T)
    of 0 and 1 or of quantities. kind: "knn" or "linear". seed: of the part of the training images on which the linear
    probe chooses its C. Raises ValueError for fewer than two classes.
    """
    require_kind(kind)
    if aim.task == CLASSES:
        require_two(train_y)
    found = []
    for features in train:
        seen = [test[name] for name in masks_of(test, features)]
        for pool, train_x, test_x in _pools(features, train[features], seen):
            about, values = _measure(kind, train_x, train_y, test_x, seed, task=aim.task)
            found.append(voted(features, pool, values, about, seen, aim, seed))
    return found


def masks_of(names: Iterable[str], features: str) -> list[str]:
    """Of the names of test tables, those of one feature set: under as many masks as count."""
    others = [name for name in names if name.startswith(features + VOTE)]
    return [features, *(name for name in others if name.removeprefix(features + VOTE).isdecimal())]


def voted(
    features: str,
    pool: str,
    values: np.ndarray,
    about: dict[str, Any],
    seen: Sequence[FeatureTable],
    aim: Aim,
    seed: int,
) -> Guess:
    """The guess of one feature set from `values` under all masks, one after another: the majority, or the mean."""
    values = values.reshape(len(seen), -1, *values.shape[1:])
    if len(seen) == 1:
        return Guess(features, pool, values[0], about)
    one = majority(values, seen[0].index, seed) if aim.task == CLASSES else values.mean(0)
    return Guess(features, pool, one, about | {"votes": len(seen)})


def summary(
    guesses: Sequence[Guess],
    train_y: np.ndarray,
    test_y: np.ndarray,
    *,
    kind: str,
    aim: Aim,
    shared: int,
    runs: Sequence[str] = (),
) -> dict[str, Any]:
    """How good the guesses are: task, metric, kind, train_images, test_images, classes (or columns), chance, rows, the
    kind of interval, `shared` (test images that are also in the training set) and the verdict.

    runs: the feature sets that are other runs' encoders; the verdict says how this one compares with each.
    """
    if not _defined(test_y, aim).any():
        raise UserError(
            f"{', '.join(aim.names)} came for {len(test_y)} test images of which none differs from the others; give "
            "other ones with --test, or more images"
        )
    scores = [score(each, test_y, aim) for each in guesses]
    rows = [
        {"features": each.features, "pool": each.pool, **_numbers(scored), **_columns(each, test_y, aim), **each.about}
        for each, scored in zip(guesses, scores, strict=True)
    ]
    chance = chance_of(train_y, test_y, aim)
    judged = verdict(scores, kind=kind, chance=chance)
    return {
        "kind": kind,
        "task": aim.task,
        "metric": scores[0].metric,
        "train_images": len(train_y),
        "test_images": len(test_y),
        "classes" if aim.task == CLASSES else "columns": list(aim.names),
        "chance": chance,
        "rows": rows,
        "interval": INTERVALS[aim.task],
        "shared": shared,
        "verdict": " ".join([judged, *beside(scores, runs), *_cautions(train_y, test_y, aim, shared)]),
    }


def _defined(test_y: np.ndarray, aim: Aim) -> np.ndarray:
    """(T,) bool: the columns whose measure is defined on these test images; of classes always."""
    if aim.task == CLASSES:
        return np.ones(1, bool)
    return np.asarray(test_y.any(0) if aim.task == MULTILABEL else np.ptp(test_y, 0) > 0)


def score(guessed: Guess, test_y: np.ndarray, aim: Aim) -> Score:
    """How good a guess is, with what its interval needs."""
    if aim.task == CLASSES:
        return Answers(guessed.features, guessed.pool, guessed.values == test_y)
    measure, metric = (average_precision, MEAN_AP) if aim.task == MULTILABEL else (r_squared, R2)
    value = float(np.nanmean(by_column(measure, test_y, guessed.values)))
    draws = resampled(measure, test_y, guessed.values)
    return Sampled(guessed.features, guessed.pool, metric, value, draws, len(test_y))


def _numbers(scored: Score) -> dict[str, Any]:
    low, high = scored.interval
    if isinstance(scored, Answers):
        return {
            "accuracy": scored.accuracy, "low": low, "high": high, "correct": scored.correct, "total": scored.total,
        }  # fmt: skip
    return {"value": scored.value, "low": low, "high": high, "total": scored.total}


def _columns(guessed: Guess, test_y: np.ndarray, aim: Aim) -> dict[str, Any]:
    """Every column by itself; None where it is not defined."""
    if aim.task == CLASSES:
        return {}
    if aim.task == MULTILABEL:
        each = by_column(average_precision, test_y, guessed.values)
        found = [
            {"name": name, "average_precision": _or_none(value), "positives": int(column.sum())}
            for name, value, column in zip(aim.names, each, test_y.T, strict=True)
        ]
        return {"columns": found}
    errors = np.abs(test_y - guessed.values).mean(0)
    found = [
        {"name": name, "r2": _or_none(value), "mean_absolute_error": float(error)}
        for name, value, error in zip(aim.names, by_column(r_squared, test_y, guessed.values), errors, strict=True)
    ]
    return {"columns": found}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def shared_images(train: Mapping[str, FeatureTable], test: Mapping[str, FeatureTable]) -> int:
    """How many test images are also training images, pixel for pixel."""
    return int(np.isin(test[PRETRAINED].digest, train[PRETRAINED].digest).sum())


def chance_of(train_y: np.ndarray, test_y: np.ndarray, aim: Aim) -> float:
    """What one scores without looking: of mean average precision the share of positives, of R2 nothing."""
    if aim.task == CLASSES:
        return chance_level(train_y, test_y, len(aim.names))
    if aim.task == REGRESSION:
        return 0.0
    return float(test_y.mean(0)[_defined(test_y, aim)].mean())


def require_kind(kind: str, kinds: Sequence[str] = KINDS) -> None:
    """Raises ValueError for a kind of probe that there is not."""
    if kind not in kinds:
        raise UserError(f"probe kind {kind!r} came; {' or '.join(kinds)} was expected")


def require_two(labels: np.ndarray) -> None:
    """Raises ValueError where all training images are of one class."""
    if len(np.unique(labels)) < 2:
        raise UserError(f"all {len(labels)} training images are of one class; a probe needs images of at least two")


def require_classes(classes: Sequence[str]) -> None:
    """Raises ValueError for fewer than two classes."""
    if len(classes) < 2:
        raise UserError(
            f"{len(classes)} classes came ({', '.join(classes) or 'none'}); a probe needs at least two: one sub-folder "
            "for each class"
        )


def chance_level(train_y: np.ndarray, test_y: np.ndarray, num_classes: int) -> float:
    """What one scores without looking: one in so many classes, or always answering the commonest class of training."""
    commonest = np.bincount(train_y).argmax()
    return max(1 / num_classes, float((test_y == commonest).mean()))


def few_shots(
    index: np.ndarray, labels: np.ndarray, classes: Sequence[str], shots: int, seed: int, *, draw: int = 0
) -> np.ndarray:
    """Of `index` (n,) with `labels` (n,), the `shots` per class that `seed` picks, sorted.

    The pick of `shots + 1` contains that of `shots`. draw: another choice of labels for the same split. Raises
    ValueError for shots < 1, or more than a class has.
    """
    if shots < 1:
        raise UserError(f"{shots} labels per class came; at least 1 was expected")
    counts = np.bincount(labels, minlength=len(classes))
    poorest = int(counts.argmin())
    if counts[poorest] < shots:
        raise UserError(
            f"{shots} labels per class were asked for, but class {classes[poorest]!r} has only {counts[poorest]} "
            f"training images; use --shots {max(1, counts[poorest])} or fewer, or leave it out to use all"
        )
    epoch = np.full_like(index, FIRST_DRAW + draw if draw else SHOTS)
    order = np.lexsort((index, np.asarray(words(seed, Stream.LABELS, epoch, index, 1))[:, 0]))
    return np.sort(np.concatenate([index[order][labels[order] == label][:shots] for label in range(len(classes))]))


def _pools(
    features: str, train: FeatureTable, seen: Sequence[FeatureTable]
) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """(pool, training rows, test rows) of every definition of a feature that this encoder has.

    seen: the test images, as often as they vote; their rows come one table after another.
    """
    tested = np.concatenate([table.mean for table in seen])
    if features == RAW_PIXELS:
        # Cosine similarity of pixels, none of them negative, is mostly brightness; without their mean it is fair.
        mean = train.mean.mean(0)
        yield "pixels", train.mean - mean, tested - mean
        return
    tokens = [table.cls for table in seen if table.cls is not None]
    if train.cls is not None and len(tokens) == len(seen):
        yield "cls", train.cls, np.concatenate(tokens)
    yield "mean", train.mean, tested


def _measure(
    kind: str,
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    seed: int,
    *,
    c: float | None = None,
    task: str = CLASSES,
) -> tuple[dict[str, Any], np.ndarray]:
    """What a row says about the fit, and what is predicted for the test rows. c: of the linear probe, if given."""
    if kind == "knn":
        return {"c": None}, (knn if task == CLASSES else knn_mean)(train_x, train_y, test_x)
    if task == CLASSES:
        fit = linear(train_x, train_y, test_x, seed=seed, c=c)
    else:
        fit = (linear_labels if task == MULTILABEL else ridge)(train_x, train_y, test_x, seed=seed)
    return {"c": fit.c, "converged": fit.converged}, fit.predictions


def choose_layer(
    tables: Sequence[FeatureTable], kind: str, seed: int, *, y: np.ndarray | None = None, task: str = CLASSES
) -> Layer:
    """The layer whose mean over patches is best: fitted on four fifths of these TRAINING images, tried on the rest.

    y: their targets, if not the tables' labels. With few images that is done up to five times, with another fifth each,
    and a linear probe of classes has the same C for all layers: else chance decides more than the layers do (a C chosen
    on 80 images misled it by 9 points).
    """
    labels = tables[0].labels if y is None else y
    assert labels is not None, "layers are compared on labelled images"
    strata = labels if task == CLASSES else np.zeros(len(labels), np.int64)
    rounds: list[list[float]] = []
    counts: list[int] = []
    for purpose in HOLD_OUT_FOR_LAYER:
        fit, held = hold_out(strata, tables[0].index, seed, purpose)
        if not len(held) or (task == CLASSES and len(np.unique(labels[fit])) < 2):
            raise UserError(
                f"{len(labels)} training images are too few to choose a layer with; give more with --shots, or name "
                "one with --layer"
            )
        found = [
            _measure(kind, table.mean[fit], labels[fit], table.mean[held], seed, c=C_FOR_LAYERS, task=task)[1]
            for table in tables
        ]
        rounds.append([_worth(each, labels[held], task) for each in found])
        counts.append(len(held))
        if sum(counts) >= ANSWERS_FOR_LAYER:
            break
    values = (np.sum(rounds, 0) / sum(counts)).tolist()
    metric = METRICS[task]
    said = ", ".join(show(value, metric) for value in values)
    asked = f"{counts[0]} training images held out" + (f", {len(rounds)} times" if len(rounds) > 1 else "")
    why = f"best {kind} probe of layers 0 to {len(tables) - 1} on {asked}: {said}"
    return Layer(best_layer(values), len(tables) - 1, why)


def _worth(guessed: np.ndarray, truth: np.ndarray, task: str) -> float:
    """Accuracy, mean average precision or R2 on these images, times their number; 0 where it is not defined."""
    if task == CLASSES:
        return float((guessed == truth).sum())  # whole numbers, so that equal layers are equal
    columns = by_column(average_precision if task == MULTILABEL else r_squared, truth, guessed)
    return 0.0 if np.isnan(columns).all() else float(np.nanmean(columns)) * len(truth)


def _cautions(train_y: np.ndarray, test_y: np.ndarray, aim: Aim, shared: int) -> list[str]:
    """Sentences for what makes the numbers mean less than they seem to."""
    said = []
    if shared:
        said.append(
            f"Careful: {shared} of the {len(test_y)} test images are also training images, pixel for pixel, so the "
            "numbers are too good."
        )
    if aim.task != CLASSES:
        if missing := [name for name, known in zip(aim.names, _defined(test_y, aim), strict=True) if not known]:
            lacking = "has no positive image" if aim.task == MULTILABEL else "has one value for all"
            said.append(f"{', '.join(missing)} {lacking} among the test images and is left out of the mean.")
        return said
    unseen = sorted(set(test_y.tolist()) - set(train_y.tolist()))
    if unseen:
        named = ", ".join(str(aim.names[label]) for label in unseen[:5])
        count = int(np.isin(test_y, unseen).sum())
        said.append(f"{count} test images are of classes without any training image ({named}) and count as wrong.")
    return said
