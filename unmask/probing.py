"""`unmask probe`: how good are the frozen features of a run? Reads the images and labels, asks the evaluator, keeps it.

The labels are folder names, or columns of a table (`data/targets.py`). The features of this run, of the controls and of
other runs are measured on the same test images, each as its own encoder wants them. Every result is one JSON file in
RUN/evals. Nothing is ever chosen on a test image.

Letters: n training images, m test images, T target columns.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from unmask.console import Console
from unmask.data.sources import Source, open_source, require_labels
from unmask.data.targets import CLASSES, MULTILABEL, REGRESSION, Targets, meaning_of, read_table, targets_of
from unmask.errors import UserError
from unmask.evals.attentive import BATCH, EPOCHS, LEAST_STEPS, AttentiveFit, fit_attentive
from unmask.evals.budget import Draw, budget_curve
from unmask.evals.collect import FeatureTable, collect_layers, joined_tables
from unmask.evals.linear import HOLD_OUT_FOR_TEST, hold_out
from unmask.evals.probe import (
    KINDS,
    VOTE,
    Aim,
    Guess,
    choose_layer,
    encoders_of,
    few_shots,
    guess,
    masks_of,
    require_classes,
    require_kind,
    require_two,
    shared_images,
    summary,
    voted,
)
from unmask.evals.scores import ACCURACY, MEAN_AP, POOLS, PRETRAINED, RANDOM_INIT, RAW_PIXELS, show
from unmask.evals.views import Hide, Layer, View, wanted_layer
from unmask.method import Method
from unmask.plan import choose_device
from unmask.run import Run
from unmask.saved import Loaded, load, untrained_encoder
from unmask.use import IMAGES_FOR_LAYER, eval_images, eval_precision, features, labels_of, read, with_classes

ATTENTIVE = "attentive"
DRAWS = 5
TEST_PIECE = 4096  # test images whose tokens are in memory at a time


@dataclass(frozen=True)
class Asked:
    """What a person wants to know; as the arguments of `probe_kinds`."""

    data: str
    test: str | None
    shots: int | Sequence[int] | None
    controls: bool
    seed: int
    step: int | None
    layer: str | None
    masks: int | None
    draws: int | None
    against: Sequence[Path]
    targets: Path | None
    test_targets: Path | None
    columns: Sequence[str] | None
    task: str | None

    @property
    def budgets(self) -> Sequence[int | None]:
        """Labels per class, ascending; None for all."""
        return [self.shots] if self.shots is None or isinstance(self.shots, int) else sorted(set(self.shots))

    @property
    def curve(self) -> bool:
        return self.draws is not None or len(self.budgets) > 1

    @property
    def num_draws(self) -> int:
        """Choices of labels for each budget."""
        return (DRAWS if self.draws is None else self.draws) if self.curve else 1


@dataclass(frozen=True)
class Labelled:
    """Training and test images, and what they are labelled with.

    `train_y` and `test_y` have a row for every image of their source; those of images outside `train_rows` and
    `test_rows` may mean nothing.
    """

    aim: Aim
    train: Source
    train_rows: np.ndarray
    train_y: np.ndarray
    test: Source
    test_rows: np.ndarray
    test_y: np.ndarray
    why: str = ""
    without: int = 0


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


@dataclass(frozen=True)
class Pick:
    """The training images of one fit: `shots` of every class, or None for all. `rows` of the source, `places` among
    the features."""

    shots: int | None
    rows: np.ndarray
    places: np.ndarray


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
) -> dict[str, dict[str, Any]]:
    """Several kinds of probe on the same features; writes one file of each in RUN/evals, returns them all.

    test: labelled images to be measured on; None holds out a fifth of every class of `data`. shots: train on so many
    images per class only; several numbers make a label-budget curve, for which `draws` choices of labels are fitted
    each. controls: also raw pixels and the untrained encoder. against: also the encoders of these runs. seed: chooses
    the held-out fifth, the shots, and the part on which a probe chooses its settings. The split and the shots depend on
    the seed and on the images' rows alone, not on the kind, the encoder, or which files are broken.

    layer: "best", "last" or a number; None is what suits the encoder (best for iGPT, else what `forward` gives). masks:
    how many masks the test images are seen under, the majority counts; None is one for a method that hides tokens in
    its encoder's input and measures so (iGPT's bert), else none. Both are for this run: others are seen as suits them.

    targets: a table of labels or quantities instead of class folders (`columns` of it, all by default; `task` overrides
    what they are taken for); test_targets: another one for `test`.
    """
    asked = Asked(
        data, test, shots, controls, seed, step, layer, masks, draws, against, targets, test_targets, columns, task
    )
    for kind in kinds:
        require_kind(kind, (*KINDS, ATTENTIVE))
    require_asked(asked)
    loaded = load(run, device=choose_device(device), step=step)
    others = load_others(run, against, device)
    labelled = read_labels(asked, console)
    if shots is not None and labelled.aim.task != CLASSES:
        raise UserError(f"--shots {shots} came, which are labels per class, but the task is {labelled.aim.task}")
    sets = all_sets(loaded, others, labelled, asked, console)
    train, picks = training_features(sets, labelled, asked, console, tokens=ATTENTIVE in kinds)
    fits: dict[str, list[AttentiveFit]] = {}
    if ATTENTIVE in kinds:
        fits = fit_all(train, picks, labelled, seed, loaded.device, console)
        train = {name: replace(table, tokens=None) for name, table in train.items()}
    measured, answers = tested(sets, labelled, fits, console)

    summaries = {}
    for kind in kinds:
        drawn = []
        for number, each in enumerate(picks):
            y = labelled.train_y[each.rows]
            if kind == ATTENTIVE:
                guesses = attentive_guesses(fits, answers, measured, number, labelled.aim, seed)
            else:
                part = {name: table.at(each.places) for name, table in train.items()}
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
        found["protocol"] = protocol(found)
        Run.open(run).write(f"evals/{file_name(found, asked)}.json", found)
        say_probe(found, console)
        summaries[kind] = found
    return summaries


def about_asked(asked: Asked, loaded: Loaded, others: Mapping[str, Loaded], labelled: Labelled) -> dict[str, Any]:
    """What every file says of the question."""
    found: dict[str, Any] = {
        "shots": asked.shots if isinstance(asked.shots, int | None) else asked.budgets,
        "seed": asked.seed,
        "data": asked.data,
        "test": asked.test or f"a held-out fifth of {asked.data}",
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
            feature_sets(other, {name: other.method.encoder}, labelled, rows, None, None, asked.seed, console)
            for name, other in others.items()
        ),
    ]


def training_features(
    sets: Sequence[FeatureSets], labelled: Labelled, asked: Asked, console: Console, *, tokens: bool
) -> tuple[dict[str, FeatureTable], list[Pick]]:
    """The features of all images that any fit is made on, computed once, and which of them each is made on."""
    rows = labelled.train_rows
    while True:
        picks = pick(labelled, rows, asked.budgets, asked.num_draws, asked.seed)
        union = reduce(np.union1d, [each.rows for each in picks])
        train = tables_of(sets, labelled.train, union, "training images", console, tokens=tokens)
        index = train[PRETRAINED].index
        broken = np.setdiff1d(union, index)
        if asked.shots is None:
            return train, [Pick(None, index, np.arange(len(index)))]
        if not len(broken):
            return train, [replace(each, places=np.searchsorted(index, each.rows)) for each in picks]
        rows = np.setdiff1d(rows, broken)  # the next in line of the same class takes the place


def require_asked(asked: Asked) -> None:
    """Raises UserError for what would be ignored, before anything is read."""
    if asked.draws is not None and (asked.shots is None or asked.draws < 2):
        raise UserError(
            f"--draws {asked.draws} came; at least 2 draws of a number of labels were expected, for example "
            f"--shots 1,5,10 --draws {DRAWS}"
        )
    if not asked.budgets:
        raise UserError("no number of labels per class came; at least one was expected, for example --shots 1,5,10")
    idle = {"--test-targets": asked.test_targets, "--columns": asked.columns, "--task": asked.task}
    if asked.targets is None and (given := [name for name, value in idle.items() if value is not None]):
        raise UserError(f"{', '.join(given)} came without --targets, and would be ignored; give the table too")
    if asked.test_targets is not None and asked.test is None:
        raise UserError("--test-targets came without --test, and would be ignored; give the test images too")


def shots_of(text: str | None) -> int | list[int] | None:
    """What --shots says: 5 is one number of labels per class, 1,5,10 a curve. Raises UserError for anything else."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--shots {text} came; a number of labels per class, or several as 1,5,10 was expected")
    numbers = [int(part) for part in parts]
    return numbers if len(numbers) > 1 else numbers[0]


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


def read_labels(asked: Asked, console: Console) -> Labelled:
    """Open the images with their labels, and part training from test images."""
    if asked.targets is not None:
        return _read_table(asked, asked.targets, console)
    train = require_labels(open_source(asked.data))
    require_classes(train.classes)
    train_y, aim = labels_of(train), Aim(CLASSES, train.classes)
    if asked.test is None:
        rows, test_rows = _part(train_y, np.arange(len(train)), asked)
        return Labelled(aim, train, rows, train_y, train, test_rows, train_y)
    other = with_classes(require_labels(open_source(asked.test)), train.classes, asked.data)
    return Labelled(aim, train, np.arange(len(train)), train_y, other, np.arange(len(other)), labels_of(other))


def _part(strata: np.ndarray, rows: np.ndarray, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, test rows): a fifth of every stratum of `rows` is held out."""
    train, held = hold_out(strata, rows, asked.seed, HOLD_OUT_FOR_TEST)
    if not len(held):
        raise UserError(f"{asked.data} has one image per class, so none can be held out; give other images with --test")
    return rows[train], rows[held]


def _read_table(asked: Asked, targets: Path, console: Console) -> Labelled:
    data, test, test_targets = asked.data, asked.test, asked.test_targets
    table = read_table(targets, asked.columns)
    meaning = meaning_of(table, asked.task)
    train = open_source(data)
    found = targets_of(table, train, meaning)
    aim, values = Aim(found.task, found.classes or found.columns), _by_row(found, train)
    without, unused = found.left_out, set(found.unused)
    if test is None:
        strata = found.values if found.task == CLASSES else np.zeros(len(found.rows), np.int64)
        rows, test_rows = _part(strata, found.rows, asked)
        labelled = Labelled(aim, train, rows, values, train, test_rows, values, found.why, without)
    else:
        other = open_source(test)
        if test_targets is None and (both := sorted(set(other.names) & set(train.names) & set(table.paths))):
            raise UserError(
                f"{both[0]} is an image of {data} and of {test}, so {targets} does not say which is meant; give the "
                "test images a table of their own with --test-targets"
            )
        second = table if test_targets is None else read_table(test_targets, meaning.columns)
        there = targets_of(second, other, meaning, classes=found.classes)
        unused = unused & set(there.unused) if test_targets is None else unused | set(there.unused)
        without += there.left_out
        labelled = Labelled(
            aim, train, found.rows, values, other, there.rows, _by_row(there, other), found.why, without
        )
    for source in (labelled.train, labelled.test):
        source.labels, source.classes = None, []  # those of the folders, if any, are not what is asked for
    console.say(f"targets of {targets}: {found.why}; {len(table.paths) - len(unused)} rows have an image")
    if without:
        console.warn(f"{without} images have no row in {test_targets or targets} and are left out")
    if unused:
        console.warn(f"{len(unused)} rows of {targets} name no image and are not used, for example {sorted(unused)[0]}")
    return labelled


def _by_row(found: Targets, source: Source) -> np.ndarray:
    """The values with a row for every image of the source."""
    values = np.zeros((len(source), *found.values.shape[1:]), found.values.dtype)
    values[found.rows] = found.values
    return values


def pick(labelled: Labelled, rows: np.ndarray, budgets: Sequence[int | None], draws: int, seed: int) -> list[Pick]:
    """The training images of every fit."""
    y, names = labelled.train_y[rows], labelled.aim.names
    return [
        Pick(shots, rows if shots is None else few_shots(rows, y, names, shots, seed, draw=draw), np.zeros(0, np.int64))
        for shots in budgets
        for draw in range(draws)
    ]


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
) -> dict[str, FeatureTable]:
    """The features of every set for the same images: those of `rows` that every encoder could be given."""
    found: dict[str, FeatureTable] = {}
    for each in sets:
        encoders = each.voting if voting else each.encoders
        precision = eval_precision(each.loaded)
        found |= features(
            each.loaded, encoders, source, rows, precision=precision, title=title, console=console, tokens=tokens
        )
    both = reduce(np.intersect1d, [table.index for table in found.values()])
    return {
        name: table if len(table) == len(both) else table.at(np.flatnonzero(np.isin(table.index, both)))
        for name, table in found.items()
    }


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
    sets: Sequence[FeatureSets], labelled: Labelled, fits: Mapping[str, Sequence[AttentiveFit]], console: Console
) -> tuple[dict[str, FeatureTable], dict[str, list[np.ndarray]]]:
    """The features of the test images, and what each attentive head makes of them; only of a piece tokens are kept."""
    if not fits:
        return tables_of(sets, labelled.test, labelled.test_rows, "test images", console, voting=True), {}
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


def about_features(sets: Sequence[FeatureSets], name: str) -> dict[str, Any]:
    """What is unusual about the features of a row: the layer, the masks."""
    for each in sets:
        if name in each.encoders:
            layer = {"layer": vars(each.chosen[name])} if name in each.chosen else {}
            return layer | ({"votes": each.votes} if each.votes is not None and name != RAW_PIXELS else {})
    return {}


def protocol(summary: Mapping[str, Any]) -> str:
    """One sentence: the features, what is fitted to them, the images, and what the intervals cover."""
    kind, task, rows = summary["kind"], summary["task"], summary["rows"]
    chosen = "chosen on a fifth of the training images"
    how = {
        ("knn", CLASSES): "the 20 nearest training images by cosine vote with weight exp(s / 0.07)",
        ("knn", MULTILABEL): "share of the votes of the 20 nearest training images by cosine, weight exp(s / 0.07)",
        ("knn", REGRESSION): "mean of the 20 nearest training images by cosine, weight exp(s / 0.07)",
        ("linear", CLASSES): f"logistic regression (L-BFGS) on standardised features, C {chosen}",
        ("linear", MULTILABEL): f"a logistic regression for each label on standardised features, one C {chosen}",
        ("linear", REGRESSION): f"ridge regression on standardised features, its penalty {chosen}",
    }.get(
        (kind, task),
        f"one learned query that attends to all tokens and a linear head (AdamW, batch {BATCH}, {EPOCHS} epochs but at "
        f"least {LEAST_STEPS} steps, learning rate {chosen})",
    )
    pools = " and ".join(dict.fromkeys(POOLS[row["pool"]] for row in rows if row["features"] != RAW_PIXELS))
    layers = [row["layer"] for row in rows if row["features"] == PRETRAINED and "layer" in row]
    where = f"layer {layers[0]['number']} of {layers[0]['last']}" if layers else "the encoder's output"
    shots = summary["shots"]
    labels = "" if shots is None else f", {shots} labels per class"
    if not isinstance(shots, int | None):
        labels = f", {', '.join(str(n) for n in shots)} labels per class, {summary['draws']} draws of each"
    train = f"{summary['train_images']} training images of {summary['data']}{labels}"
    test = f"{summary['test_images']} test images: {summary['test']}"
    table = f", targets of {summary['targets']}" if "targets" in summary else ""
    return (
        f"Frozen features ({pools}; {where}), {how}; {train}; {test}{table}; seed {summary['seed']}; 95 % intervals: "
        f"{summary['interval']}."
    )


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


def _plain(path: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in Path(path).name).strip("-")


def say_probe(summary: Mapping[str, Any], console: Console) -> None:
    """The table and the verdict, for a person."""
    what = {"knn": "k nearest neighbours", "linear": "linear probe", ATTENTIVE: "attentive probe"}[summary["kind"]]
    metric, task = summary["metric"], summary["task"]
    shots = f" ({summary['shots']} per class)" if isinstance(summary["shots"], int) else ""
    named = (
        f"{len(summary['classes'])} classes" if task == CLASSES else f"{task} of {', '.join(summary['columns'][:6])}"
    )
    up_to = "up to " if "draws" in summary else ""
    console.say(
        f"{what} on {summary['data']}: {up_to}{summary['train_images']} training images{shots}, "
        f"{summary['test_images']} test images, {named}"
        + (f", chance {show(summary['chance'], metric)}" if metric in (ACCURACY, MEAN_AP) else "")
    )
    if "draws" in summary:
        _say_curve(summary, console)
        return
    for row in summary["rows"]:
        value = row["accuracy"] if metric == ACCURACY else row["value"]
        low, high = show(row["low"], metric), show(row["high"], metric)
        console.say(
            f"  {row['features']:12s} {row['pool']:9s} {show(value, metric):>6s}  "
            f"(95% interval {low} to {high}{_unusual(row)})"
        )
        for column in row.get("columns", []) if len(row.get("columns", [])) > 1 or task == REGRESSION else []:
            console.say(f"      {column['name']}: {_column(column)}")
    console.say(f"  {summary['verdict']}")


def _unusual(row: Mapping[str, Any]) -> str:
    said = "" if row.get("converged", True) else ", the fit stopped before it converged"
    if "layer" in row:
        said += f"; layer {row['layer']['number']} of {row['layer']['last']}"
    if "votes" in row:
        said += "; under one mask" if row["votes"] == 1 else f"; majority over {row['votes']} masks"
    return said


def _column(column: Mapping[str, Any]) -> str:
    if "positives" in column:
        value = column["average_precision"]
        return f"{'not defined' if value is None else f'{value:.3f}'} ({column['positives']} positive test images)"
    value = "not defined" if column["r2"] is None else f"{column['r2']:.3f}"
    return f"R2 {value}, mean absolute error {column['mean_absolute_error']:.4g}"


def _say_curve(summary: Mapping[str, Any], console: Console) -> None:
    console.say(f"  {'labels per class':22s} " + " ".join(f"{number:>13d}" for number in summary["shots"]))
    for row in summary["rows"]:
        cells = [f"{p['mean']:.1%} ±{100 * (p['high'] - p['low']) / 2:.1f}" for p in row["points"]]
        console.say(f"  {row['features']:12s} {row['pool']:9s} " + " ".join(f"{cell:>13s}" for cell in cells))
    console.say(f"  mean of {summary['draws']} draws of the labels ± half of its 95% interval over them")
    console.say(f"  {summary['verdict']}")
