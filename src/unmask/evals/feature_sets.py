"""The feature sets of a probe: this run, its controls and other runs, each with its own encoder and preprocessing.

The layer and the hidden tokens of an encoder are chosen once, on training images (`make_feature_sets`); then
`tables_of` computes both training and test features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import nn

from unmask.console import Console
from unmask.data.sources.source import Source
from unmask.engine.device import choose_device
from unmask.engine.load import Loaded, load
from unmask.engine.world import current
from unmask.errors import UserError
from unmask.evals.choose_layer import choose_layer
from unmask.evals.encoder_views import Hide, View, wanted_layer
from unmask.evals.frozen_features import FeatureTable, RawPixels, collect_layers
from unmask.evals.images import (
    IMAGES_FOR_LAYER,
    FeatureOptions,
    each_batch,
    eval_images,
    eval_precision,
    features,
)
from unmask.evals.labelled_images import LabelledImages
from unmask.evals.probe_options import ProbeOptions
from unmask.method import Method
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS, CurveRow, FeatureScore, LayerChoice

Row = TypeVar("Row", FeatureScore, CurveRow)
VOTE = " mask "  # separates the name of a feature set from the number of its patch mask


@dataclass
class FeatureSets:
    """The encoders of one run, by the names of their feature sets, with the preprocessing of `loaded`.

    test_encoders: the encoders for test images, one per patch mask that votes; the encoder for the first mask has the
    name of the feature set, the others have the name plus VOTE plus the number of the mask. layers: the layer of each
    encoder by name, empty for encoders without layers. votes: the number of patch masks, or None if no token is hidden.
    """

    loaded: Loaded
    encoders: dict[str, nn.Module]
    test_encoders: dict[str, nn.Module]
    layers: dict[str, LayerChoice] = field(default_factory=dict)
    votes: int | None = None


def with_controls(encoder: nn.Module, untrained: nn.Module | None) -> dict[str, nn.Module]:
    """Return encoders by name: `encoder`, and, unless `untrained` is None, the controls raw pixels and `untrained`."""
    if untrained is None:
        return {PRETRAINED: encoder}
    return {RAW_PIXELS: RawPixels(), RANDOM_INIT: untrained, PRETRAINED: encoder}


def load_others(run: Path, against: Sequence[Path], device: str) -> dict[str, Loaded]:
    """Load the other runs; the keys are their folder names, or whole paths if folder names are the same."""
    places = [Path(other).resolve() for other in (run, *against)]
    if twice := [str(path) for path, place in zip(against, places[1:], strict=True) if places.count(place) > 1]:
        raise UserError(
            f"got --against {twice[0]}, which is the run itself or was given twice; give every other run once"
        )
    taken = [PRETRAINED, RANDOM_INIT, RAW_PIXELS, *(place.name for place in places)]
    return {
        place.name if taken.count(place.name) == 1 else str(path): load(path, device=choose_device(device))
        for path, place in zip(against, places[1:], strict=True)
    }


def make_feature_sets(
    loaded: Loaded,
    encoders: dict[str, nn.Module],
    images: LabelledImages | None,
    rows: np.ndarray,
    options: ProbeOptions,
    console: Console,
) -> FeatureSets:
    """Choose the layer and the hidden tokens for the encoders of one run.

    images: the labelled images, or None for a measurement without labels. rows: rows of the training images on which
    layers are compared.
    """
    hide, votes = evaluation_masks(loaded.method, options.mask_votes)
    layer = wanted_layer(loaded.method.encoder, options.layer)
    sets = FeatureSets(loaded, dict(encoders), {}, votes=None if hide is None else votes)
    if layer == "best" and images is None:
        layer = None  # without labels layers cannot be compared: use the output of `forward`
    if layer is not None or hide is not None:
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), IMAGES_FOR_LAYER)).astype(int)]
        for name in [name for name in encoders if name != RAW_PIXELS]:
            view = View(encoders[name], hide=hide)
            if layer is not None:
                sets.layers[name] = _layer_of(
                    loaded, view, layer=layer, images=images, rows=rows, seed=options.seed, console=console
                )
                view.layer = sets.layers[name].number
            sets.encoders[name] = view
    sets.test_encoders = dict(sets.encoders)
    for name, view in sets.encoders.items():
        if isinstance(view, View) and view.hide is not None:
            sets.test_encoders |= {
                f"{name}{VOTE}{number}": View(view.encoder, view.layer, view.hide, number) for number in range(1, votes)
            }
    return sets


def evaluation_masks(method: Method, votes: int | None) -> tuple[Hide | None, int]:
    """Return the function that hides tokens in evaluations, and the number of patch masks; (None, 0) without.

    Raises UserError when votes are requested for an encoder that is evaluated on whole images.
    """
    hide = method.evaluation_mask
    if hide is None:
        if votes:
            raise UserError(
                f"got --mask-votes {votes}, but this run's encoder is measured on whole images; only iGPT trained "
                "with objective=bert uses masks: leave it out"
            )
        return None, 0
    votes = 1 if votes is None else votes
    return (hide if votes else None), votes


def _layer_of(
    loaded: Loaded,
    view: View,
    layer: str,
    images: LabelledImages | None,
    rows: np.ndarray,
    seed: int,
    console: Console,
) -> LayerChoice:
    """Return the requested layer, or compare all layers on these training images and return the best."""
    last = loaded.method.encoder.depth
    assert last is not None, "`wanted_layer` rejects encoders without layers"
    if layer != "best":
        return LayerChoice(last if layer == "last" else int(layer), last, "asked for")
    assert images is not None, "choosing the best layer needs labelled images"
    with console.progress("comparing layers", len(rows)) as bar:
        tables = collect_layers(
            view,
            partial(
                each_batch, images=eval_images(loaded, images.train), rows=rows, workers=0, console=console, bar=bar
            ),
            device=loaded.device,
            precision=eval_precision(loaded),
        )

    def compare() -> LayerChoice:
        y = images.train_y[tables[0].index]
        with console.working(f"comparing {len(tables)} layers on {len(y):,} images"):
            return choose_layer(tables, y, task=images.labelling.task, seed=seed)

    return current().from_writer(compare)


def tables_of(
    sets: Sequence[FeatureSets],
    source: Source,
    rows: np.ndarray,
    options: FeatureOptions,
    console: Console,
    *,
    test: bool = False,
) -> dict[str, FeatureTable]:
    """Compute the features of all feature sets for the images of `rows` that every run can read.

    test: use the encoders for test images.
    """
    tables: dict[str, FeatureTable] = {}
    for each in sets:
        encoders = each.test_encoders if test else each.encoders
        tables |= features(each.loaded, encoders, source, rows, options, console)
    both = reduce(np.intersect1d, [table.index for table in tables.values()])
    return {
        name: table if len(table) == len(both) else table.at(np.flatnonzero(np.isin(table.index, both)))
        for name, table in tables.items()
    }


def describe_view(sets: Sequence[FeatureSets], row: Row) -> Row:
    """Return a row of a result with the layer and the number of mask votes of its feature set filled in."""
    for each in sets:
        if row.features in each.encoders:
            votes = None if row.features == RAW_PIXELS else each.votes
            return replace(row, layer=each.layers.get(row.features), votes=votes)
    return row
