"""`unmask probe`: measure the frozen features of a run on labelled images, or their rank on any images.

This run, the controls and other runs are measured on the same test images, each with its own encoder and preprocessing.
Every result is a record of `results.py`, written to its own JSON file in RUN/evals. Hyperparameters and layers are
chosen on training images only.

Letters: n training images, m test images, T target columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TypedDict

import numpy as np

from unmask.config import task_names
from unmask.console import Console
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.engine.device import choose_device
from unmask.engine.load import Loaded, load, untrained_encoder
from unmask.engine.world import current, joined
from unmask.errors import UserError
from unmask.evals.embed_images import FEATURES
from unmask.evals.feature_sets import (
    VOTE,
    FeatureSets,
    describe_view,
    load_others,
    make_feature_sets,
    tables_of,
    with_controls,
)
from unmask.evals.frozen_features import FeatureTable, joined_tables
from unmask.evals.images import FeatureOptions, eval_precision
from unmask.evals.label_budget import INTERVAL, Draw, curve_differences, curve_rows
from unmask.evals.labelled_images import (
    LabelledImages,
    TrainingSet,
    identity_of_test,
    image_set,
    open_labelled_images,
    require_two,
    training_sets,
)
from unmask.evals.predictions import images_in_both, predict_pooled, predictions_from_tokens
from unmask.evals.probe_kind import (
    Fitted,
    LabelFreeMeasure,
    PooledProbe,
    TokenProbe,
    TrainingTargets,
    find_kind,
    require_task,
)
from unmask.evals.probe_options import DEFAULT_DRAWS, ProbeOptions
from unmask.evals.probe_text import curve_verdict, print_result, protocol, verdict
from unmask.evals.result_files import save_result
from unmask.evals.scores import INTERVALS, caveats_of, chance_of, differences, require_defined, score
from unmask.results import (
    CLASSES,
    METRICS,
    PRETRAINED,
    RAW_PIXELS,
    UNLABELLED,
    CurveResult,
    FeatureScore,
    ImageSet,
    OtherRun,
    ProbeResult,
    TargetTable,
    TestIdentity,
)
from unmask.run import Run
from unmask.system.shell_command import shell_command

TEST_PIECE = 4096  # number of test images whose tokens are in memory at once


@dataclass(frozen=True)
class ProbeJob:
    """The input of a probe: the run, its loaded checkpoint, the other runs by name, and the options."""

    run: Run
    loaded: Loaded
    others: Mapping[str, Loaded]
    options: ProbeOptions
    console: Console

    @property
    def cache(self) -> Path:
        """Folder of cached features."""
        return self.run.path / FEATURES


def run_probe(run: str | Path, kind: str, options: ProbeOptions, console: Console) -> ProbeResult | CurveResult:
    """Measure the features of a run with one kind of probe. See `run_probes`."""
    return run_probes(run, (kind,), options, console)[kind]


def run_probes(
    run: str | Path, kinds: Sequence[str], options: ProbeOptions, console: Console
) -> dict[str, ProbeResult | CurveResult]:
    """Measure the features of a run with several kinds of probe, and write each result to RUN/evals.

    The split into training and test images and the draw of labels depend only on the seed and the rows of the images in
    their source, not on the kind of probe, the encoder, or unreadable files. Raises UserError for options that cannot
    be combined, and for unusable data.
    """
    probes = {name: find_kind(name) for name in kinds}
    options.check()
    label_free = {name: probe for name, probe in probes.items() if isinstance(probe, LabelFreeMeasure)}
    labelled = {name: probe for name, probe in probes.items() if not isinstance(probe, LabelFreeMeasure)}
    for name in label_free:
        options.check_label_free(name)
    if labelled and options.is_curve and options.num_draws < DEFAULT_DRAWS:
        console.warn(f"intervals over {options.num_draws} draws of the labels are wide; use {DEFAULT_DRAWS} or more")
    with joined() as world:
        opened = Run.open(run)
        job = ProbeJob(
            run=opened,
            loaded=load(opened.path, device=choose_device(options.device), step=options.step),
            others=load_others(opened.path, options.other_runs, options.device),
            options=options,
            console=world.console(console),
        )
        results = probe_with_labels(job, labelled) if labelled else {}
        results |= measure_without_labels(job, label_free) if label_free else {}

        def finish() -> None:
            for result in results.values():
                save_result(job.run, result, options)
                print_result(result, job.console)

        world.on_writer(finish)
        return results


# Probes with labels


def probe_with_labels(
    job: ProbeJob, probes: Mapping[str, PooledProbe | TokenProbe]
) -> dict[str, ProbeResult | CurveResult]:
    """Fit probes of several kinds to the same features, and score them on the same test images."""
    images = open_labelled_images(job.options, job.console)
    if not current().alone:
        advice = "give all hosts the same files and the same tables of labels"
        current().require_same("the labelled images", images.summary(), advice)
    for name, probe in probes.items():
        require_task(name, probe, images.labelling.task)
    if job.options.shots is not None and images.labelling.task != CLASSES:
        numbers = ",".join(str(number) for number in job.options.budgets)
        raise UserError(
            f"got --shots {numbers}, which are labels per class, but the task is {images.labelling.task}; leave it out"
        )
    rows = training_sets(images, images.train_rows, job.options, draws=1)[-1].rows
    sets = all_feature_sets(job, images, rows, controls=job.options.controls)
    on_tokens = {name: probe for name, probe in probes.items() if isinstance(probe, TokenProbe)}
    train, chosen = training_features(job, sets, images, tokens=bool(on_tokens))
    fits: dict[str, dict[str, list[Fitted]]] = {name: {} for name in on_tokens}

    def fit() -> None:
        for name, probe in on_tokens.items():
            fits[name] = fit_to_tokens(job, probe, train=train, chosen=chosen, images=images)

    current().on_writer(fit)
    train = {name: replace(table, tokens=None) for name, table in train.items()}
    test, values = test_features(job, sets, images, fits)
    found = FeaturesOfProbe(sets, train, chosen, test, fits, values)
    return current().from_writer(lambda: results_with_labels(job, probes, images, found))


@dataclass(frozen=True)
class FeaturesOfProbe:
    """The features of training and test images, and what the probes of all tokens have made of them.

    fits, values: fitted probes, and their predictions for the test images; see `test_features`.
    """

    sets: Sequence[FeatureSets]
    train: Mapping[str, FeatureTable]
    chosen: Sequence[TrainingSet]
    test: Mapping[str, FeatureTable]
    fits: Mapping[str, Mapping[str, Sequence[Fitted]]]
    values: Mapping[str, Mapping[str, Sequence[np.ndarray]]]


def results_with_labels(
    job: ProbeJob, probes: Mapping[str, PooledProbe | TokenProbe], images: LabelledImages, found: FeaturesOfProbe
) -> dict[str, ProbeResult | CurveResult]:
    """Fit the probes of pooled features, and score the predictions of all probes."""
    train, test, chosen = found.train, found.test, found.chosen
    test_y = images.test_y[test[PRETRAINED].index]
    shared = images_in_both(train[PRETRAINED], test[PRETRAINED])
    results: dict[str, ProbeResult | CurveResult] = {}
    for name, probe in probes.items():
        draws = []
        for number, each in enumerate(chosen):
            y = images.train_y[each.rows]
            targets = _targets(job, images, y)
            if isinstance(probe, TokenProbe):
                fitted = {features: heads[number] for features, heads in found.fits[name].items()}
                answers = {features: each[number] for features, each in found.values[name].items()}
                predictions = predictions_from_tokens(probe, fitted, answers, test, targets)
            else:
                part = {features: table.at(each.positions) for features, table in train.items()}
                counted = f" {number + 1} of {len(chosen)}" if len(chosen) > 1 else ""
                with job.console.working(f"fitting {name} probes{counted} on {len(y):,} images"):
                    predictions = predict_pooled(probe, part, test, targets)
            draws.append(Draw(each.shots or 0, y, predictions))
        results[name] = make_result(
            job, name, probe=probe, images=images, sets=found.sets, predicted=TestPredictions(draws, test_y, shared)
        )
    return results


def _targets(job: ProbeJob, images: LabelledImages, y: np.ndarray) -> TrainingTargets:
    return TrainingTargets(y=y, task=images.labelling.task, seed=job.options.seed, device=job.loaded.device)


def all_feature_sets(
    job: ProbeJob, images: LabelledImages | None, rows: np.ndarray, *, controls: bool
) -> list[FeatureSets]:
    """Return the feature sets of this run, with its controls, and of the other runs.

    rows: rows of the images on which layers are compared.
    """
    untrained = untrained_encoder(job.loaded) if controls else None
    encoders = with_controls(job.loaded.method.encoder, untrained)
    found = [
        make_feature_sets(job.loaded, encoders, images=images, rows=rows, options=job.options, console=job.console)
    ]
    for name, other in job.others.items():
        layer = job.options.layer if other.method.encoder.depth is not None else None
        options = replace(job.options, layer=layer, mask_votes=None)
        found.append(
            make_feature_sets(
                other, {name: other.method.encoder}, images=images, rows=rows, options=options, console=job.console
            )
        )
    return found


def training_features(
    job: ProbeJob, sets: Sequence[FeatureSets], images: LabelledImages, *, tokens: bool
) -> tuple[dict[str, FeatureTable], list[TrainingSet]]:
    """Compute the features of all training images once; return them with the training images of every fit."""
    rows, options = images.train_rows, FeatureOptions(title="training images", tokens=tokens, cache=job.cache)
    while True:
        chosen = training_sets(images, rows, job.options, draws=job.options.num_draws)
        union = reduce(np.union1d, [each.rows for each in chosen])
        train = tables_of(sets, images.train, rows=union, options=options, console=job.console)
        index = train[PRETRAINED].index
        broken = np.setdiff1d(union, index)
        if job.options.shots is None:
            return train, [TrainingSet(None, index, np.arange(len(index)))]
        if not len(broken):
            return train, [replace(each, positions=np.searchsorted(index, each.rows)) for each in chosen]
        rows = np.setdiff1d(rows, broken)  # the next image of the same class replaces an unreadable one


def fit_to_tokens(
    job: ProbeJob,
    probe: TokenProbe,
    train: Mapping[str, FeatureTable],
    chosen: Sequence[TrainingSet],
    images: LabelledImages,
) -> dict[str, list[Fitted]]:
    """Fit a probe of all tokens to every feature set and every draw of training images."""
    fits: dict[str, list[Fitted]] = {name: [] for name in train}
    with job.console.progress(f"fitting {probe.title.lower()}s", len(train) * len(chosen)) as bar:
        for number, each in enumerate(chosen):
            targets = _targets(job, images, images.train_y[each.rows])
            if targets.task == CLASSES:
                require_two(targets.y)
            for place, (name, table) in enumerate(train.items(), 1):
                assert table.tokens is not None, "tokens were requested"
                fits[name].append(probe.fit(table.tokens, each.positions, targets))
                bar.update(number * len(train) + place)
    return fits


def test_features(
    job: ProbeJob,
    sets: Sequence[FeatureSets],
    images: LabelledImages,
    fits: Mapping[str, Mapping[str, Sequence[Fitted]]],
) -> tuple[dict[str, FeatureTable], dict[str, dict[str, list[np.ndarray]]]]:
    """Compute the features of the test images, and predict their targets with the probes of all tokens.

    fits: fitted probes by kind and feature set. Returns the tables of features by name, and the predictions by kind of
    probe and name of the table, one array per fit. The tokens of at most TEST_PIECE images are in memory at once.
    """
    rows = images.test_rows
    if not fits:
        options = FeatureOptions(title="test images", cache=job.cache)
        return tables_of(sets, images.test, rows=rows, options=options, console=job.console, test=True), {}
    options = FeatureOptions(title="test images", tokens=True)
    pieces: list[dict[str, FeatureTable]] = []
    answers: dict[str, dict[str, list[list[np.ndarray]]]] = {kind: {} for kind in fits}
    for start in range(0, len(rows), TEST_PIECE):
        part = rows[start : start + TEST_PIECE]
        piece = tables_of(sets, images.test, rows=part, options=options, console=job.console, test=True)
        for kind, fitted in fits.items():
            for name, table in piece.items():
                if table.tokens is None:
                    continue  # the writer has them
                heads = fitted[name] if name in fitted else fitted[name.rpartition(VOTE)[0]]
                answers[kind].setdefault(name, []).append([head.predict(table.tokens) for head in heads])
        pieces.append({name: replace(table, tokens=None) for name, table in piece.items()})
    joined = {
        kind: {name: [np.concatenate(parts) for parts in zip(*each, strict=True)] for name, each in by_name.items()}
        for kind, by_name in answers.items()
    }
    return {name: joined_tables([piece[name] for piece in pieces]) for name in pieces[0]}, joined


@dataclass(frozen=True)
class TestPredictions:
    """The predictions of one kind of probe for the test images, for every draw of labels, with the true labels.

    shared: number of test images that are also training images.
    """

    __test__ = False  # keeps pytest from collecting this class as a test

    draws: Sequence[Draw]
    test_y: np.ndarray
    shared: int


class MeasuredRun(TypedDict):
    """The fields of `FeatureMeasurement` that record the run and the options."""

    seed: int
    step: int
    layer: str | None
    mask_votes: int | None
    precision: str
    command: str | None
    against: tuple[OtherRun, ...]


class MeasuredImages(MeasuredRun):
    """The fields of `FeatureMeasurement` that have the same content in a `ProbeResult` and a `CurveResult`."""

    kind: str
    title: str
    data: ImageSet
    test: TestIdentity
    targets: TargetTable | None
    task: str
    metric: str
    names: tuple[str, ...]
    train_images: int
    test_images: int
    chance: float | None
    shared: int
    caveats: tuple[str, ...]


def make_result(
    job: ProbeJob,
    kind: str,
    probe: PooledProbe | TokenProbe,
    images: LabelledImages,
    sets: Sequence[FeatureSets],
    predicted: TestPredictions,
) -> ProbeResult | CurveResult:
    """Score the predictions of one kind of probe, and return its result."""
    draws, test_y, shared = predicted.draws, predicted.test_y, predicted.shared
    labelling, options = images.labelling, job.options
    require_defined(test_y, labelling)
    measured = MeasuredImages(
        **_measured_run(job),
        kind=kind,
        title=probe.title,
        data=image_set(str(options.data), images.train, options.exclude),
        test=identity_of_test(options, images.test),
        targets=images.table,
        task=labelling.task,
        metric=METRICS[labelling.task],
        names=labelling.names,
        train_images=max(len(draw.train_y) for draw in draws),
        test_images=len(test_y),
        chance=chance_of(draws[0].train_y, test_y, labelling),
        shared=shared,
        caveats=(*caveats_of(draws[0].train_y, test_y, labelling, shared), *_caveat_of_finetuning(job.loaded)),
    )
    if options.is_curve:
        rows = curve_rows(draws, test_y)
        curve = CurveResult(
            **measured,
            interval=INTERVAL,
            shots=tuple(number for number in options.budgets if number is not None),
            draws=options.num_draws,
            rows=tuple(describe_view(sets, row) for row in rows),
            differences=curve_differences(rows, list(job.others)),
        )
        return replace(curve, verdict=curve_verdict(curve), protocol=protocol(curve, probe.protocol(labelling.task)))
    scored = [score(each, test_y, labelling) for each in draws[0].predictions]
    result = ProbeResult(
        **measured,
        interval=INTERVALS[labelling.task],
        shots=options.budgets[0],
        rows=tuple(describe_view(sets, each.score) for each in scored),
        differences=differences(scored, list(job.others)),
    )
    return replace(
        result, verdict=verdict(result, probe.phrase), protocol=protocol(result, probe.protocol(labelling.task))
    )


def _measured_run(job: ProbeJob) -> MeasuredRun:
    others = zip(job.others.items(), job.options.other_runs, strict=True)
    return MeasuredRun(
        seed=job.options.seed,
        step=job.loaded.step,
        layer=job.options.layer,
        mask_votes=job.options.mask_votes,
        precision=eval_precision(job.loaded),
        command=shell_command(),
        against=tuple(OtherRun(name=name, run=str(path), step=other.step) for (name, other), path in others),
    )


def _caveat_of_finetuning(loaded: Loaded) -> Iterable[str]:
    task = loaded.config.method.name
    if task in task_names():
        yield f"This run was fine-tuned to {task}, so its features are the fine-tuned ones."


# Measures without labels


def measure_without_labels(job: ProbeJob, kinds: Mapping[str, LabelFreeMeasure]) -> dict[str, ProbeResult]:
    """Compute label-free measures of the features of this run and of the controls, with which they are compared."""
    source = open_source(job.options.data, job.options.exclude)
    rows = np.arange(len(source))
    sets = all_feature_sets(job, None, rows, controls=True)
    tables = tables_of(
        sets, source, rows=rows, options=FeatureOptions(title="images", cache=job.cache), console=job.console
    )
    return current().from_writer(lambda: results_without_labels(job, kinds, source, sets, tables))


def results_without_labels(
    job: ProbeJob,
    kinds: Mapping[str, LabelFreeMeasure],
    source: Source,
    sets: Sequence[FeatureSets],
    tables: Mapping[str, FeatureTable],
) -> dict[str, ProbeResult]:
    """Compute the measures from the features."""
    data = image_set(str(job.options.data), source, job.options.exclude)
    results = {}
    for kind, measure in kinds.items():
        with job.console.working(f"computing the {measure.metric} of {len(tables[PRETRAINED]):,} images"):
            scores = [row for name, table in tables.items() for row in _measure(measure, name, table)]
        result = ProbeResult(
            kind=kind,
            title=measure.title,
            data=data,
            test=TestIdentity(images=data),
            task=UNLABELLED,
            metric=measure.metric,
            test_images=len(tables[PRETRAINED]),
            rows=tuple(describe_view(sets, row) for row in scores),
            caveats=tuple(_caveat_of_finetuning(job.loaded)),
            **_measured_run(job),
        )
        limit = min(tables[PRETRAINED].mean.shape)
        results[kind] = replace(
            result, verdict=measure.verdict(scores, limit), protocol=protocol(result, measure.protocol)
        )
    return results


def _measure(measure: LabelFreeMeasure, features: str, table: FeatureTable) -> Iterable[FeatureScore]:
    """Yield the value of a label-free measure for every pooling of one feature set."""
    if table.cls is not None:
        yield FeatureScore(features=features, pool="cls", value=measure.measure(table.cls), total=len(table))
    pool = "pixels" if features == RAW_PIXELS else "mean"
    yield FeatureScore(features=features, pool=pool, value=measure.measure(table.mean), total=len(table))
