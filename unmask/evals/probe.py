"""The evaluator: a frozen encoder, labelled images, and how good its features are beside controls.

Reads images through `collect.py`, asks `knn.py` or `linear.py`, judges with `scores.py`. Class token and mean over patches
are both measured, always. Not here: files, splits and the Run (the caller's), attentive probes and fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from unmask.batch import Batch
from unmask.evals.collect import FeatureTable, RawPixels, collect_each, labels_only, only
from unmask.evals.knn import knn
from unmask.evals.linear import linear
from unmask.evals.scores import PRETRAINED, RANDOM_INIT, RAW_PIXELS, Answers, verdict
from unmask.rng import Stream, words

KINDS = ("knn", "linear")
Read = Callable[[], Iterable[Batch]]


def probe(
    encoder: nn.Module,
    untrained: nn.Module | None,
    train: Read,
    test: Read,
    *,
    kind: str,
    classes: Sequence[str],
    shots: int | None = None,
    seed: int = 0,
    device: str,
    precision: str,
) -> dict[str, Any]:
    """Accuracy of `encoder` on labelled images, as the object that `evals/probe-*.json` holds.

    untrained: the same encoder at its random start; with it, raw pixels are measured as well, and the verdict compares
    all three on the same test images. train, test: each call reads the labelled images from the start. kind: "knn" or
    "linear". classes: names of the labels 0, 1, ... shots: use only so many labelled training images per class, chosen by
    `seed` and the images' rows alone. Encoders must be on `device`.

    Returns kind, shots, train_images, test_images, classes, chance, rows, verdict, and `shared`, the number of test images
    that are also in the training set. Raises ValueError for missing labels, fewer than two classes, more shots than a
    class has, or labels that `classes` does not name.
    """
    if kind not in KINDS:
        raise ValueError(f"probe kind {kind!r} came; {' or '.join(KINDS)} was expected")
    if len(classes) < 2:
        raise ValueError(
            f"{len(classes)} classes came ({', '.join(classes) or 'none'}); a probe needs at least two: one sub-folder for "
            "each class"
        )
    if shots is not None:
        train = _few(train, classes, shots, seed)
    encoders = {PRETRAINED: encoder}
    if untrained is not None:
        encoders = {RAW_PIXELS: RawPixels(), RANDOM_INIT: untrained, PRETRAINED: encoder}
    train_tables = collect_each(encoders, train(), device=device, precision=precision)
    test_tables = collect_each(encoders, test(), device=device, precision=precision)
    train_y = require_labels(train_tables[PRETRAINED].labels, classes, "training")
    test_y = require_labels(test_tables[PRETRAINED].labels, classes, "test")
    if len(np.unique(train_y)) < 2:
        raise ValueError(f"all {len(train_y)} training images are of one class; a probe needs images of at least two")

    rows, answers = [], []
    for features in encoders:
        for pool, train_x, test_x in _pools(features, train_tables[features], test_tables[features]):
            row, right = _measure(kind, train_x, train_y, test_x, test_y, seed)
            answers.append(Answers(features, pool, right))
            low, high = answers[-1].interval
            counts = {"accuracy": answers[-1].accuracy, "low": low, "high": high, "correct": answers[-1].correct}
            rows.append({"features": features, "pool": pool, **counts, "total": len(right), **row})
    chance = chance_level(train_y, test_y, len(classes))
    shared = int(np.isin(test_tables[PRETRAINED].digest, train_tables[PRETRAINED].digest).sum())
    return {
        "kind": kind,
        "shots": shots,
        "train_images": len(train_y),
        "test_images": len(test_y),
        "classes": list(classes),
        "chance": chance,
        "rows": rows,
        "shared": shared,
        "verdict": " ".join([verdict(answers, kind=kind, chance=chance), *_cautions(train_y, test_y, classes, shared)]),
    }


def chance_level(train_y: np.ndarray, test_y: np.ndarray, num_classes: int) -> float:
    """What one scores without looking: one in so many classes, or always answering the commonest class of training."""
    commonest = np.bincount(train_y).argmax()
    return max(1 / num_classes, float((test_y == commonest).mean()))


def require_labels(labels: np.ndarray | None, classes: Sequence[str], which: str) -> np.ndarray:
    """The labels (n,). Raises ValueError when there are none, or some that `classes` does not name."""
    if labels is None:
        raise ValueError(
            f"the {which} images have no labels; a probe needs them: put the images of each class in a sub-folder of its own"
        )
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise ValueError(
            f"the {which} images have label {wrong[0]}, but only {len(classes)} classes are named ({', '.join(classes[:6])}); "
            "training and test images must have the same classes, in sub-folders of the same names"
        )
    return labels


def few_shots(index: np.ndarray, labels: np.ndarray, classes: Sequence[str], shots: int, seed: int) -> np.ndarray:
    """Of `index` (n,) with `labels` (n,), the `shots` per class that `seed` picks, sorted.

    The pick of `shots + 1` contains that of `shots`. Raises ValueError for shots < 1, or more than a class has.
    """
    if shots < 1:
        raise ValueError(f"{shots} labels per class came; at least 1 was expected")
    counts = np.bincount(labels, minlength=len(classes))
    poorest = int(counts.argmin())
    if counts[poorest] < shots:
        raise ValueError(
            f"{shots} labels per class were asked for, but class {classes[poorest]!r} has only {counts[poorest]} training "
            f"images; use --shots {max(1, counts[poorest])} or fewer, or leave it out to use all"
        )
    draw = words(seed, Stream.LABELS, np.ones_like(index), index, 1)[:, 0]  # epoch 0 draws the train-test split
    order = np.lexsort((index, draw))
    return np.sort(np.concatenate([index[order][labels[order] == label][:shots] for label in range(len(classes))]))


def _few(train: Read, classes: Sequence[str], shots: int, seed: int) -> Read:
    """`train` with only `shots` images per class; the choice needs the labels alone, so it comes before any features."""
    index, labels = labels_only(train())
    wanted = few_shots(index, require_labels(labels, classes, "training"), classes, shots, seed)
    return lambda: only(train(), wanted)


def _pools(features: str, train: FeatureTable, test: FeatureTable) -> Iterable[tuple[str, np.ndarray, np.ndarray]]:
    """(pool, training rows, test rows) of every definition of a feature that this encoder has."""
    if features == RAW_PIXELS:
        # Cosine similarity of pixels, none of them negative, is mostly brightness; without their mean it is a fair control.
        mean = train.mean.mean(0)
        yield "pixels", train.mean - mean, test.mean - mean
        return
    if train.cls is not None and test.cls is not None:
        yield "cls", train.cls, test.cls
    yield "mean", train.mean, test.mean


def _measure(
    kind: str, train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """What a row says about the fit, and which test images are right (m,)."""
    if kind == "knn":
        return {"c": None}, knn(train_x, train_y, test_x) == test_y
    fit = linear(train_x, train_y, test_x, seed=seed)
    return {"c": fit.c, "converged": fit.converged}, fit.predictions == test_y


def _cautions(train_y: np.ndarray, test_y: np.ndarray, classes: Sequence[str], shared: int) -> list[str]:
    """Sentences for what makes the numbers mean less than they seem to."""
    said = []
    if shared:
        said.append(
            f"Careful: {shared} of the {len(test_y)} test images are also training images, pixel for pixel, so the numbers "
            "are too good."
        )
    unseen = sorted(set(test_y.tolist()) - set(train_y.tolist()))
    if unseen:
        named = ", ".join(classes[label] for label in unseen[:5])
        count = int(np.isin(test_y, unseen).sum())
        said.append(f"{count} test images are of classes without any training image ({named}) and count as wrong.")
    return said
