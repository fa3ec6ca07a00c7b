"""`unmask probe`: how good are the frozen features of a run? Reads the images and labels, asks the evaluator, keeps it.

The labels are folder names, or columns of a table (`data/label_tables.py`). The features of this run, of the controls
and of other runs are measured on the same test images, each as its own encoder wants them. Every result is one JSON
file in RUN/evals. Nothing is ever chosen on a test image.

Letters: n training images, m test images, T target columns.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from unmask.config import task_names
from unmask.console import Console
from unmask.data.annotations.label_tables import CLASSES
from unmask.engine.device import choose_device
from unmask.engine.load import Loaded, load, untrained_encoder
from unmask.errors import UserError
from unmask.evals.embed import FEATURES
from unmask.evals.feature_sets import FeatureSets, about_features, feature_sets, load_others, tables_of
from unmask.evals.frozen_features import FeatureTable, joined_tables
from unmask.evals.images import eval_precision
from unmask.evals.label_budget import Draw, budget_curve
from unmask.evals.probe import (
    KINDS,
    VOTE,
    Aim,
    Guess,
    encoders_of,
    guess,
    masks_of,
    require_kind,
    require_two,
    shared_images,
    summary,
    voted,
)
from unmask.evals.probe_labels import DRAWS, Asked, Labelled, Pick, pick, read_labels, require_asked
from unmask.evals.probe_text import protocol, say_probe
from unmask.evals.probes.attentive import ATTENTIVE, AttentiveFit, fit_attentive
from unmask.evals.statistics import PRETRAINED, RAW_PIXELS
from unmask.run import Run

TEST_PIECE = 4096  # test images whose tokens are in memory at a time


def probe_run(run: Path, data: str, *, kind: str, **more: Any) -> dict[str, Any]:
    """Probe a run on labelled images; writes one JSON file in RUN/evals and returns it. As `probe_kinds`."""
    return probe_kinds(run, data, kinds=(kind,), **more)[kind]


def probe_kinds(
    run: Path,
    data: str,
    *,
    test: str | None,
    kinds: Sequence[str],
    shots: int | Sequence[int] | None,
    controls: bool,
    seed: int,
    step: int | None,
    device: str,
    console: Console,
    layer: str | None = None,
    masks: int | None = None,
    draws: int | None = None,
    against: Sequence[Path] = (),
    targets: Path | None = None,
    test_targets: Path | None = None,
    columns: Sequence[str] | None = None,
    task: str | None = None,
    exclude: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Several kinds of probe on the same features; writes one file of each in RUN/evals, returns them all.

    test: labelled images to be measured on; None holds out a fifth of every class of `data`. shots: train on so many
    images per class only; several numbers make a label-budget curve, for which `draws` choices of labels are fitted
    each. controls: also raw pixels and the untrained encoder. against: also the encoders of these runs. seed: chooses
    the held-out fifth, the shots, and the part on which a probe chooses its settings. The split and the shots depend on
    the seed and on the images' rows alone, not on the kind, the encoder, or which files are broken.

    layer: "best", "last" or a number; None is what suits the encoder (best for iGPT, else what `forward` gives). masks:
    how many masks the test images are seen under, the majority counts; None is one for a method that hides tokens in
    its encoder's input and measures so (iGPT's bert), else none. The layer is also that of other runs, as far as their
    encoders have layers; their masks are as suits them.

    exclude: patterns of names to leave out, of `data` and of `test`.

    targets: a table of labels or quantities instead of class folders (`columns` of it, all by default; `task` overrides
    what they are taken for); test_targets: another one for `test`.
    """
    asked = Asked(
        data, test, shots, controls, seed, step, layer, masks, draws, against, targets, test_targets, columns, task,
        tuple(exclude),
    )  # fmt: skip
    for kind in kinds:
        require_kind(kind, (*KINDS, ATTENTIVE))
    require_asked(asked)
    if asked.curve and asked.num_draws < DRAWS:
        console.warn(f"intervals over {asked.num_draws} draws of the labels are wide; {DRAWS} or more say more")
    loaded = load(run, device=choose_device(device), step=step)
    others = load_others(run, against, device)
    labelled = read_labels(asked, console)
    if shots is not None and labelled.aim.task != CLASSES:
        numbers = ",".join(str(number) for number in asked.budgets)
        raise UserError(
            f"--shots {numbers} came, which are labels per class, but the task is {labelled.aim.task}; leave it out"
        )
    sets = all_sets(loaded, others, labelled, asked, console)
    folder = Run.open(run).path / FEATURES
    train, picks = training_features(sets, labelled, asked, console, tokens=ATTENTIVE in kinds, folder=folder)
    fits: dict[str, list[AttentiveFit]] = {}
    if ATTENTIVE in kinds:
        fits = fit_all(train, picks, labelled, seed, loaded.device, console)
        train = {name: replace(table, tokens=None) for name, table in train.items()}
    measured, answers = tested(sets, labelled, fits, console, folder)

    summaries = {}
    for kind in kinds:
        drawn = []
        for number, each in enumerate(picks):
            y = labelled.train_y[each.rows]
            if kind == ATTENTIVE:
                guesses = attentive_guesses(fits, answers, measured, number, labelled.aim, seed)
            else:
                part = {name: table.at(each.places) for name, table in train.items()}
                counted = f" {number + 1} of {len(picks)}" if len(picks) > 1 else ""
                with console.working(f"fitting {kind} probes{counted} on {len(y):,} images"):
                    guesses = guess(part, measured, y, kind=kind, aim=labelled.aim, seed=seed)
            drawn.append(Draw(each.shots or 0, y, guesses))
        test_y = labelled.test_y[measured[PRETRAINED].index]
        more = {"aim": labelled.aim, "shared": shared_images(train, measured), "runs": list(others)}
        found = (
            budget_curve(drawn, test_y, kind=kind, **more)
            if asked.curve
            else summary(drawn[0].guesses, drawn[0].train_y, test_y, kind=kind, **more)
        )
        for row in found["rows"]:
            row |= about_features(sets, row["features"])
        found |= about_asked(asked, loaded, others, labelled)
        if (tuned := loaded.config.method.name) in task_names() and tuned != "encoder":
            found["verdict"] += f" This run was fine-tuned to {tuned}: its features are those after that."
        found["protocol"] = protocol(found)
        keep(Run.open(run), file_name(found, asked), found)
        say_probe(found, console)
        summaries[kind] = found
    return summaries


def about_asked(asked: Asked, loaded: Loaded, others: Mapping[str, Loaded], labelled: Labelled) -> dict[str, Any]:
    """What every file says of the question."""
    found: dict[str, Any] = {
        "shots": asked.budgets if asked.curve else asked.budgets[0],
        "seed": asked.seed,
        "data": asked.images,
        "test": asked.test or f"a held-out fifth of {asked.images}",
        "paths": [None if path is None else str(Path(path).absolute()) for path in (asked.data, asked.test)],
        "layer": asked.layer,  # as asked for: None is the protocol that suits the encoder
        "masks": asked.masks,
        "step": loaded.step,
        "precision": eval_precision(loaded),
        "command": shlex.join(["unmask", *sys.argv[1:]]),
    }
    if asked.against:
        found["against"] = [
            {"name": name, "run": str(path), "step": other.step}
            for (name, other), path in zip(others.items(), asked.against, strict=True)
        ]
    if asked.targets is not None:
        found |= {
            "targets": str(asked.targets),
            "test_targets": None if asked.test_targets is None else str(asked.test_targets),
            "target_columns": None if asked.columns is None else list(asked.columns),
            "why": labelled.why,
            "without_target": labelled.without,
        }
    return found


def all_sets(
    loaded: Loaded, others: Mapping[str, Loaded], labelled: Labelled, asked: Asked, console: Console
) -> list[FeatureSets]:
    """This run's encoder with its controls, then every other run's."""
    rows = pick(labelled, labelled.train_rows, asked.budgets, 1, asked.seed)[-1].rows  # that layers are compared on
    encoders = encoders_of(loaded.method.encoder, untrained_encoder(loaded) if asked.controls else None)
    own = feature_sets(loaded, encoders, labelled, rows, asked.layer, asked.masks, asked.seed, console)
    return [
        own,
        *(
            feature_sets(
                other, {name: other.method.encoder}, labelled, rows, _layer_of(other, asked), None, asked.seed, console
            )
            for name, other in others.items()
        ),
    ]


def _layer_of(other: Loaded, asked: Asked) -> str | None:
    """The layer that was asked for, of another run's encoder too, if it has layers to choose from."""
    return asked.layer if hasattr(other.method.encoder, "feature_layers") else None


def training_features(
    sets: Sequence[FeatureSets], labelled: Labelled, asked: Asked, console: Console, *, tokens: bool, folder: Path
) -> tuple[dict[str, FeatureTable], list[Pick]]:
    """The features of all images that any fit is made on, computed once, and which of them each is made on."""
    rows = labelled.train_rows
    while True:
        picks = pick(labelled, rows, asked.budgets, asked.num_draws, asked.seed)
        union = reduce(np.union1d, [each.rows for each in picks])
        train = tables_of(sets, labelled.train, union, "training images", console, tokens=tokens, folder=folder)
        index = train[PRETRAINED].index
        broken = np.setdiff1d(union, index)
        if asked.shots is None:
            return train, [Pick(None, index, np.arange(len(index)))]
        if not len(broken):
            return train, [replace(each, places=np.searchsorted(index, each.rows)) for each in picks]
        rows = np.setdiff1d(rows, broken)  # the next in line of the same class takes the place


def fit_all(
    train: Mapping[str, FeatureTable],
    picks: Sequence[Pick],
    labelled: Labelled,
    seed: int,
    device: str,
    console: Console,
) -> dict[str, list[AttentiveFit]]:
    """An attentive head for every feature set and every choice of training images."""
    found: dict[str, list[AttentiveFit]] = {name: [] for name in train}
    task = labelled.aim.task
    with console.progress("fitting attentive probes", len(train) * len(picks)) as bar:
        for number, each in enumerate(picks):
            y = labelled.train_y[each.rows]
            if task == CLASSES:
                require_two(y)
            for place, (name, table) in enumerate(train.items(), 1):
                assert table.tokens is not None, "asked for"
                found[name].append(fit_attentive(table.tokens, each.places, y, task=task, seed=seed, device=device))
                bar.update(number * len(train) + place)
    return found


def tested(
    sets: Sequence[FeatureSets],
    labelled: Labelled,
    fits: Mapping[str, Sequence[AttentiveFit]],
    console: Console,
    folder: Path,
) -> tuple[dict[str, FeatureTable], dict[str, list[np.ndarray]]]:
    """The features of the test images, and what each attentive head makes of them; only of a piece tokens are kept."""
    if not fits:
        rows = labelled.test_rows
        return tables_of(sets, labelled.test, rows, "test images", console, voting=True, folder=folder), {}
    pieces: list[dict[str, FeatureTable]] = []
    answers: dict[str, list[list[np.ndarray]]] = {}
    for start in range(0, len(labelled.test_rows), TEST_PIECE):
        rows = labelled.test_rows[start : start + TEST_PIECE]
        piece = tables_of(sets, labelled.test, rows, "test images", console, tokens=True, voting=True)
        for name, table in piece.items():
            assert table.tokens is not None, "asked for"
            heads = fits[name] if name in fits else fits[name.rpartition(VOTE)[0]]
            answers.setdefault(name, []).append([head.predict(table.tokens) for head in heads])
        pieces.append({name: replace(table, tokens=None) for name, table in piece.items()})
    joined = {name: [np.concatenate(parts) for parts in zip(*each, strict=True)] for name, each in answers.items()}
    return {name: joined_tables([piece[name] for piece in pieces]) for name in pieces[0]}, joined


def attentive_guesses(
    fits: Mapping[str, Sequence[AttentiveFit]],
    answers: Mapping[str, Sequence[np.ndarray]],
    measured: Mapping[str, FeatureTable],
    number: int,
    aim: Aim,
    seed: int,
) -> list[Guess]:
    """What the heads of one choice of training images say."""
    found = []
    for features_name, heads in fits.items():
        names = masks_of(measured, features_name)
        values = np.concatenate([answers[name][number] for name in names])
        pool = "pixels" if features_name == RAW_PIXELS else ATTENTIVE
        about = {"c": None, "rate": heads[number].rate}
        found.append(voted(features_name, pool, values, about, [measured[name] for name in names], aim, seed))
    return found


def file_name(summary: Mapping[str, Any], asked: Asked) -> str:
    """Without .json. Its beginning says what shape the file has: `probe-`, `attentive-`, `targets-` or `curve-`."""
    kind, shots = summary["kind"], summary["shots"]
    if asked.curve:
        first = f"curve-{kind}"
    elif "targets" in summary:
        first = f"targets-{kind}"
    else:
        first = kind if kind == ATTENTIVE else f"probe-{kind}"
    parts = [first, _plain(summary["data"]) or "data"]
    if shots is not None:
        parts += [*(str(number) for number in ([shots] if isinstance(shots, int) else shots)), "shots"]
    if asked.curve and asked.num_draws != DRAWS:
        parts += [str(asked.num_draws), "draws"]
    for key, value in (("step", asked.step), ("layer", summary["layer"]), ("masks", summary["masks"])):
        parts += [] if value is None else [key, str(value)]
        if key == "step" and summary["seed"]:
            parts += ["seed", str(summary["seed"])]
    if asked.test is not None:
        parts += ["on", _plain(asked.test)]
    if "targets" in summary:
        parts += ["by", _plain(Path(summary["targets"]).stem), *map(_plain, summary["target_columns"] or [])]
        parts += [summary["task"]]
    return "-".join(parts)


def keep(run: Run, name: str, summary: dict[str, Any]) -> None:
    """Write RUN/evals/NAME.json in the place of an earlier result on the same images; beside one on others, numbered.

    Many data sets end in a folder called train.
    """
    number, free = 1, name
    while (run.evals / f"{free}.json").exists():
        before = run.results(free)[0].get(free)  # None: damaged, and replaced
        if before is None or before.get("paths", summary["paths"]) == summary["paths"]:
            break
        number, free = number + 1, f"{name}-{number + 1}"
    run.write(f"evals/{free}.json", summary)


def _plain(path: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in Path(path).name).strip("-")
