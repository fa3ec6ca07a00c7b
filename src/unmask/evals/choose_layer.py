"""Choose the layer of an encoder with the best features, using training images only.

iGPT's features are best in the middle of the network, so its probe measures the best layer (Chen et al. 2020,
"Generative pretraining from pixels", section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unmask.data.annotations.splits import HOLD_OUT_FOR_LAYER, hold_out
from unmask.errors import UserError
from unmask.evals.encoder_views import best_layer
from unmask.evals.frozen_features import FeatureTable
from unmask.evals.measures import average_precision, by_column, r_squared
from unmask.evals.probe_kind import TrainingTargets
from unmask.evals.probes.linear import fit_linear
from unmask.results import CLASSES, METRICS, MULTILABEL, LayerChoice, show_score

C_FOR_LAYERS = 0.1
ENOUGH_PREDICTIONS = 500  # with this many held-out predictions, no further fifth is held out


def choose_layer(tables: Sequence[FeatureTable], y: np.ndarray, *, task: str, seed: int) -> LayerChoice:
    """Return the layer on whose features (the mean over patches) linear probes score best.

    Probes are fitted to 4/5 of the images and scored on the rest. tables: the features of every layer for the same
    images, whose targets are `y`. Layers are always compared with linear probes, so that all kinds of probe use the
    same layer. With few images, the comparison is repeated up to five times, each time with another held-out fifth. For
    classes, C is the same for all layers: choosing it on few images would add more noise than the difference between
    layers. Raises UserError if there are too few images to hold out a part of them.
    """
    strata = y if task == CLASSES else np.zeros(len(y), np.int64)
    rounds: list[list[float]] = []
    counts: list[int] = []
    for purpose in HOLD_OUT_FOR_LAYER:
        fit, held = hold_out(strata, tables[0].index, seed, purpose)
        if not len(held) or (task == CLASSES and len(np.unique(y[fit])) < 2):
            raise UserError(
                f"got {len(y)} training images, too few to choose a layer; give more with --shots, or choose one "
                "with --layer"
            )
        targets = TrainingTargets(y=y[fit], task=task, seed=seed)
        probes = [fit_linear(table.mean[fit], targets, c=C_FOR_LAYERS) for table in tables]
        predictions = [probe.predict(table.mean[held]) for probe, table in zip(probes, tables, strict=True)]
        rounds.append([_total(each, y[held], task) for each in predictions])
        counts.append(len(held))
        if sum(counts) >= ENOUGH_PREDICTIONS:
            break
    values = (np.sum(rounds, 0) / sum(counts)).tolist()
    scores = ", ".join(show_score(value, METRICS[task]) for value in values)
    images = f"{counts[0]} training images held out" + (f", {len(rounds)} times" if len(rounds) > 1 else "")
    why = f"best linear probe of layers 0 to {len(tables) - 1} on {images}: {scores}"
    return LayerChoice(best_layer(values), len(tables) - 1, why)


def _total(predicted: np.ndarray, truth: np.ndarray, task: str) -> float:
    """Return the score (in the metric of the task) times the number of images, or 0 if the metric is undefined."""
    if task == CLASSES:
        return float((predicted == truth).sum())  # integers, so that ties between layers are exact
    columns = by_column(average_precision if task == MULTILABEL else r_squared, truth, predicted)
    return 0.0 if np.isnan(columns).all() else float(np.nanmean(columns)) * len(truth)
