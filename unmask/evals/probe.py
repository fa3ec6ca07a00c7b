"""The evaluator: features of labelled images, and how good they are beside controls.

Gets the tables that `collect.py` made, asks `knn.py` or `linear.py`, judges with `scores.py`. Class token and mean over
patches are both measured, always. Not here: files, splits and the Run (`use.py`), attentive probes and fine-tuning.

Letters: n training images, m test images, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from unmask.errors import UserError
from unmask.evals.collect import FeatureTable, RawPixels
from unmask.evals.knn import knn
from unmask.evals.linear import HOLD_OUT_FOR_LAYER, SHOTS, hold_out, linear
from unmask.evals.scores import PRETRAINED, RANDOM_INIT, RAW_PIXELS, Answers, verdict
from unmask.evals.views import Layer, best_layer, majority
from unmask.rng import Stream, words

KINDS = ("knn", "linear")
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


def probe(
    train: Mapping[str, FeatureTable],
    test: Mapping[str, FeatureTable],
    *,
    kind: str,
    classes: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of features on labelled images, as the object that `evals/probe-*.json` holds.

    train, test: tables by the names of `encoders_of`, all of the same images; in `test` also, as NAME + VOTE + number,
    those of the same encoder under other masks, and then the majority counts. kind: "knn" or "linear". classes: names
    of the labels 0, 1, ... seed: of the part of the training images on which the linear probe chooses its C.

    Returns kind, train_images, test_images, classes, chance, rows, verdict, and `shared`, the number of test images
    that are also in the training set. Raises ValueError for missing labels, fewer than two classes, or labels that
    `classes` does not name.
    """
    require_kind(kind)
    require_classes(classes)
    train_y = require_labels(train[PRETRAINED].labels, classes, "training")
    test_y = require_labels(test[PRETRAINED].labels, classes, "test")
    if len(np.unique(train_y)) < 2:
        raise UserError(f"all {len(train_y)} training images are of one class; a probe needs images of at least two")

    rows, answers = [], []
    for features in train:
        seen = [table for name, table in test.items() if name.split(VOTE)[0] == features]
        for pool, train_x, test_x in _pools(features, train[features], seen):
            about, predictions = _measure(kind, train_x, train_y, test_x, seed)
            predictions = predictions.reshape(len(seen), -1)
            if len(seen) > 1:
                predictions, about = majority(predictions, seen[0].index, seed)[None], about | {"votes": len(seen)}
            right = predictions[0] == test_y
            answers.append(Answers(features, pool, right))
            low, high = answers[-1].interval
            counts = {"accuracy": answers[-1].accuracy, "low": low, "high": high, "correct": answers[-1].correct}
            rows.append({"features": features, "pool": pool, **counts, "total": len(right), **about})
    chance = chance_level(train_y, test_y, len(classes))
    shared = int(np.isin(test[PRETRAINED].digest, train[PRETRAINED].digest).sum())
    return {
        "kind": kind,
        "train_images": len(train_y),
        "test_images": len(test_y),
        "classes": list(classes),
        "chance": chance,
        "rows": rows,
        "shared": shared,
        "verdict": " ".join([verdict(answers, kind=kind, chance=chance), *_cautions(train_y, test_y, classes, shared)]),
    }


def require_kind(kind: str) -> None:
    """Raises ValueError for a kind of probe that there is not."""
    if kind not in KINDS:
        raise UserError(f"probe kind {kind!r} came; {' or '.join(KINDS)} was expected")


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


def require_labels(labels: np.ndarray | None, classes: Sequence[str], which: str) -> np.ndarray:
    """The labels (n,). Raises ValueError when there are none, or some that `classes` does not name."""
    if labels is None:
        raise UserError(
            f"the {which} images have no labels; a probe needs them: put the images of each class in a sub-folder of "
            "its own"
        )
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise UserError(
            f"the {which} images have label {wrong[0]}, but only {len(classes)} classes are named "
            f"({', '.join(classes[:6])}); training and test images must have the same classes, in sub-folders of the "
            "same names"
        )
    return labels


def few_shots(index: np.ndarray, labels: np.ndarray, classes: Sequence[str], shots: int, seed: int) -> np.ndarray:
    """Of `index` (n,) with `labels` (n,), the `shots` per class that `seed` picks, sorted.

    The pick of `shots + 1` contains that of `shots`. Raises ValueError for shots < 1, or more than a class has.
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
    draw = np.asarray(words(seed, Stream.LABELS, np.full_like(index, SHOTS), index, 1))[:, 0]
    order = np.lexsort((index, draw))
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
    kind: str, train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, seed: int, c: float | None = None
) -> tuple[dict[str, Any], np.ndarray]:
    """What a row says about the fit, and the classes predicted for the test rows. c: of the linear probe, if given."""
    if kind == "knn":
        return {"c": None}, knn(train_x, train_y, test_x)
    fit = linear(train_x, train_y, test_x, seed=seed, c=c)
    return {"c": fit.c, "converged": fit.converged}, fit.predictions


def choose_layer(tables: Sequence[FeatureTable], kind: str, seed: int) -> Layer:
    """The layer whose mean over patches is best: fitted on four fifths of these TRAINING images, tried on the rest.

    With few images that is done up to five times, with another fifth each, and a linear probe has the same C for all
    layers: else chance decides more than the layers do (a C chosen on 80 images misled it by 9 points).
    """
    labels = tables[0].labels
    assert labels is not None, "layers are compared on labelled images"
    rounds: list[list[np.ndarray]] = []
    for purpose in HOLD_OUT_FOR_LAYER:
        fit, held = hold_out(labels, tables[0].index, seed, purpose)
        if not len(held) or len(np.unique(labels[fit])) < 2:
            raise UserError(
                f"{len(labels)} training images are too few to choose a layer with; give more with --shots, or name "
                "one with --layer"
            )
        rounds.append(
            [
                _measure(kind, table.mean[fit], labels[fit], table.mean[held], seed, C_FOR_LAYERS)[1] == labels[held]
                for table in tables
            ]
        )
        if len(rounds) * len(held) >= ANSWERS_FOR_LAYER:
            break
    accuracies = np.concatenate(rounds, 1).mean(1).tolist()
    found = ", ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    asked = f"{len(rounds[0][0])} training images held out" + (f", {len(rounds)} times" if len(rounds) > 1 else "")
    why = f"best {kind} probe of layers 0 to {len(tables) - 1} on {asked}: {found}"
    return Layer(best_layer(accuracies), len(tables) - 1, why)


def _cautions(train_y: np.ndarray, test_y: np.ndarray, classes: Sequence[str], shared: int) -> list[str]:
    """Sentences for what makes the numbers mean less than they seem to."""
    said = []
    if shared:
        said.append(
            f"Careful: {shared} of the {len(test_y)} test images are also training images, pixel for pixel, so the "
            "numbers are too good."
        )
    unseen = sorted(set(test_y.tolist()) - set(train_y.tolist()))
    if unseen:
        named = ", ".join(str(classes[label]) for label in unseen[:5])
        count = int(np.isin(test_y, unseen).sum())
        said.append(f"{count} test images are of classes without any training image ({named}) and count as wrong.")
    return said
