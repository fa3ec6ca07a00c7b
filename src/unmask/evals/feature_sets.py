"""The features a probe measures: of a run, of its controls, of other runs, each as its own encoder sees images.

Which layer is read and which tokens are hidden is decided once for an encoder (`feature_sets`), on training images;
training and test features then come from one function (`tables_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from unmask.console import Console
from unmask.data.sources.source import Source
from unmask.engine.device import choose_device
from unmask.engine.load import Loaded, load
from unmask.errors import UserError
from unmask.evals.encoder_views import Hide, Layer, View, wanted_layer
from unmask.evals.frozen_features import FeatureTable, collect_layers
from unmask.evals.images import IMAGES_FOR_LAYER, eval_images, eval_precision, features, read
from unmask.evals.probe import (
    VOTE,
    choose_layer,
)
from unmask.evals.probe_labels import Labelled
from unmask.evals.statistics import PRETRAINED, RANDOM_INIT, RAW_PIXELS
from unmask.method import Method


@dataclass
class FeatureSets:
    """Encoders that see images in one way (size, channels), that of the run `loaded`.

    `voting` holds them under every mask that counts for the test images; `chosen` the layers; `votes` how many masks,
    0 where nothing is hidden.
    """

    loaded: Loaded
    encoders: dict[str, nn.Module]
    voting: dict[str, nn.Module]
    chosen: dict[str, Layer] = field(default_factory=dict)
    votes: int | None = None


def load_others(run: Path, against: Sequence[Path], device: str) -> dict[str, Loaded]:
    """The other runs, named by their folders, or by whole paths where that would not tell them apart."""
    places = [Path(other).resolve() for other in (run, *against)]
    if twice := [str(path) for path, place in zip(against, places[1:], strict=True) if places.count(place) > 1]:
        raise UserError(f"--against {twice[0]} is the run itself, or came twice; name every other run once")
    taken = [PRETRAINED, RANDOM_INIT, RAW_PIXELS, *(place.name for place in places)]
    return {
        place.name if taken.count(place.name) == 1 else str(path): load(path, device=choose_device(device))
        for path, place in zip(against, places[1:], strict=True)
    }


def feature_sets(
    loaded: Loaded,
    encoders: dict[str, nn.Module],
    labelled: Labelled,
    rows: np.ndarray,
    layer: str | None,
    masks: int | None,
    seed: int,
    console: Console,
) -> FeatureSets:
    """How these encoders of one run are seen: which layer, and with which tokens hidden; layers compared on `rows`."""
    hide, votes = evaluation_masks(loaded.method, masks)
    wanted = wanted_layer(loaded.method.encoder, layer)
    found = FeatureSets(loaded, dict(encoders), {}, votes=None if hide is None else votes)
    if wanted is not None or hide is not None:
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), IMAGES_FOR_LAYER)).astype(int)]
        for name in [name for name in encoders if name != RAW_PIXELS]:
            view = View(encoders[name], hide=hide)
            if wanted is not None:
                found.chosen[name] = pick_layer(loaded, view, wanted, labelled, rows, seed, console)
                view.layer = found.chosen[name].number
            found.encoders[name] = view
    found.voting = dict(found.encoders)
    for name, view in found.encoders.items():
        if isinstance(view, View) and view.hide is not None:
            found.voting |= {
                f"{name}{VOTE}{number}": View(view.encoder, view.layer, view.hide, number) for number in range(1, votes)
            }
    return found


def evaluation_masks(method: Method, masks: int | None) -> tuple[Hide | None, int]:
    """How tokens are hidden when features are measured, and under how many masks; (None, 0) where nothing is."""
    hide: Hide | None = getattr(method, "evaluation_mask", None)
    if hide is None:
        if masks:
            raise UserError(
                f"--masks {masks} came, but this run's encoder is measured on whole images; masks are for iGPT trained "
                "with objective=bert: leave them out"
            )
        return None, 0
    masks = 1 if masks is None else masks
    if masks < 0:
        raise UserError(f"--masks {masks} came; 0 (nothing hidden), 1 or more was expected")
    return (hide if masks else None), masks


def pick_layer(
    loaded: Loaded, view: View, layer: str, labelled: Labelled, rows: np.ndarray, seed: int, console: Console
) -> Layer:
    """The layer that was named, or the best one by a linear probe on a part of these training images."""
    last = len(view.encoder.blocks)  # type: ignore[arg-type]
    if layer != "best":
        return Layer(last if layer == "last" else int(layer), last, "asked for")
    with console.progress("comparing layers", len(rows)) as bar:
        batches = read(eval_images(loaded, labelled.train), rows, 0, console, bar)
        tables = collect_layers(view, batches, device=loaded.device, precision=eval_precision(loaded))
    y = labelled.train_y[tables[0].index]
    # By a linear probe whatever kind is measured then, so that kinds can be compared.
    with console.working(f"comparing {len(tables)} layers on {len(y):,} images"):
        return choose_layer(tables, "linear", seed, y=y, task=labelled.aim.task)


def tables_of(
    sets: Sequence[FeatureSets],
    source: Source,
    rows: np.ndarray,
    title: str,
    console: Console,
    *,
    tokens: bool = False,
    voting: bool = False,
    folder: Path | None = None,
) -> dict[str, FeatureTable]:
    """The features of every set for the same images: those of `rows` that every encoder could be given.

    voting, tokens, folder: as in `FeatureSets` and `images.features`.
    """
    found: dict[str, FeatureTable] = {}
    for each in sets:
        encoders = each.voting if voting else each.encoders
        precision = eval_precision(each.loaded)
        found |= features(
            each.loaded, encoders, source, rows, precision=precision, title=title, console=console, tokens=tokens,
            folder=folder,
        )  # fmt: skip
    both = reduce(np.intersect1d, [table.index for table in found.values()])
    return {
        name: table if len(table) == len(both) else table.at(np.flatnonzero(np.isin(table.index, both)))
        for name, table in found.items()
    }


def about_features(sets: Sequence[FeatureSets], name: str) -> dict[str, Any]:
    """What is unusual about the features of a row: the layer, the masks."""
    for each in sets:
        if name in each.encoders:
            layer = {"layer": vars(each.chosen[name])} if name in each.chosen else {}
            return layer | ({"votes": each.votes} if each.votes is not None and name != RAW_PIXELS else {})
    return {}
