"""`unmask finetune RUN DATA`: train a pre-trained encoder, or random weights as control, on classes, masks or boxes.

Test images are held out (`plan.test_rows`), or are a separate set (`data.test`). The run is tested ten times during
training. The result, `evals/fine-tuned.json`, is the score of the last weights. The best score during training is
stored too: papers report it, but it is optimistic, because it was chosen on the test images. If there is a moving
average of the weights, its last score is stored as well.

The training settings are a recipe (`recipes/fine_tuning.py`). The encoder, image size and normalisation are copied from
the run (`configure.py`). Annotations are opened by `annotated.py`. `unmask ablate fig9` uses its own plain recipe.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from unmask.config import Config, ConfigError, parse, task_class
from unmask.console import Console
from unmask.data.annotations.segmentation_masks import MaskOptions, SegmentationMasks
from unmask.data.scan.scan import Scan
from unmask.data.sources.source import Source
from unmask.engine import (
    changed_data,
    continue_run,
    dataset_record,
    initial_weights,
    resolve,
    training_data,
)
from unmask.engine.continue_or_start import ChosenFrom, Request, run_to_continue
from unmask.engine.device import choose_device
from unmask.engine.load import read_config
from unmask.engine.start_run import start_run
from unmask.engine.supervision import SupervisedSplit, Supervision
from unmask.engine.time_budget import Budget, as_budget
from unmask.engine.training_plan import Plan
from unmask.engine.world import together
from unmask.errors import UserError
from unmask.finetuning.annotated import (
    AnnotatedImages,
    AnnotationOptions,
    annotations_of,
    digest,
    masks_of,
    open_annotated,
    place_of_annotations,
    reopen,
    split_rows,
)
from unmask.finetuning.choose_recipe import choose_recipe, task_for
from unmask.finetuning.configure import (
    config_from_run,
    enlarged,
    finetuning_config,
    require_settable,
    settings_of,
    steps_like,
    task_settings,
    with_masks,
)
from unmask.finetuning.final_test import measure_run, report_result
from unmask.finetuning.test_set import open_test_set, shared_files
from unmask.nn.default_dtype import float32_default
from unmask.recipes import catalogue
from unmask.results import read_score
from unmask.run import Run
from unmask.task import MaskTaskConfig, PartialTaskConfig


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of a fine-tuning.

    task: name of a file of `tasks/` (None: the task of the recipe, or classify). exclude: for classes, patterns of file
    names to leave out. annotations: location of masks or boxes (None: search beside the images). split: name of a list
    of images in a VOC folder. test: separate test images (None: hold out a fifth of the data). test_annotations,
    test_split: like annotations and split, for the separate test images. ignored: ids in masks to ignore. mask_options:
    other options for reading masks. shots: number of labels per class, or number of images for masks and boxes (None:
    all). recipe: name from `recipes/fine_tuning.py`, or "auto". last_blocks: number of last blocks of the encoder to
    train (None: as in the recipe). from_scratch: whether to start from random weights. steps_of: run whose number of
    steps and batch size are used. settings: KEY=VALUE assignments.
    """

    task: str | None = None
    exclude: Sequence[str] = ()
    annotations: str | None = None
    split: str | None = None
    test: str | None = None
    test_annotations: str | None = None
    test_split: str | None = None
    ignored: Sequence[int] = ()
    mask_options: MaskOptions | None = None
    shots: int | None = None
    recipe: str = "auto"
    last_blocks: float | None = None
    from_scratch: bool = False
    steps_of: str | Path | None = None
    settings: Sequence[str] = ()

    def annotation_options(self) -> AnnotationOptions:
        """Return the options for opening the annotations of the training images."""
        return AnnotationOptions(
            path=self.annotations,
            split=self.split,
            exclude=tuple(self.exclude),
            ignored=tuple(self.ignored),
            mask_options=self.mask_options,
        )

    def test_annotation_options(self, classes: Sequence[str]) -> AnnotationOptions:
        """Return the options for opening the annotations of separate test images."""
        masks = None if self.mask_options is None else replace(self.mask_options, names=None)
        return AnnotationOptions(
            path=self.test_annotations,
            split=self.test_split,
            exclude=(),
            ignored=tuple(self.ignored),
            mask_options=masks,
            classes=tuple(classes),
        )


@dataclass(frozen=True)
class Examples:
    """The training and test images of a fine-tuning.

    train, held_out: indices in `annotated` of the training images and of the held-out test images. test: separate test
    images, or None. shared: names of test images that are byte-identical to training images.
    """

    annotated: AnnotatedImages
    train: np.ndarray
    held_out: np.ndarray
    test: AnnotatedImages | None = None
    shared: list[str] = field(default_factory=list)

    @property
    def num_test(self) -> int:
        return len(self.held_out) if self.test is None else len(self.test.rows)

    def digest(self, unreadable: np.ndarray) -> str:
        """Return a digest of the images and their annotations, which `supervise` computes again from the plan.

        unreadable: rows of `annotated` that cannot be read.
        """
        own = digest(self.annotated, np.setdiff1d(np.union1d(self.train, self.held_out), unreadable))
        return own if self.test is None else own + digest(self.test, self.test.rows)


@together
@float32_default()
def finetune(
    from_run: str | Path,
    data: str,
    options: FinetuneOptions | None = None,
    *,
    out: str | Path | None = None,
    budget: float | str | Budget | None = None,
    resume_auto: bool = False,
    console: Console | None = None,
) -> Run:
    """Train the encoder of `from_run` on a task with annotated images; return the new run, which is finished or was
    stopped.

    out: a new folder (None: named automatically). budget: seconds, or a time such as "30m". resume_auto: whether to
    continue the run in `out` if this call began it (`engine/continue_or_start.py`). `resume` continues a stopped run.
    Raises UserError for invalid input.
    """
    options, console, budget = options or FinetuneOptions(), console or Console(), as_budget(budget)
    task = task_for(options.task, options.recipe)
    asked = Request.of("finetune", data, budget, options, from_run=from_run)
    choose_again = partial(configure_again, from_run, replace(options, task=task), budget)
    if resume_auto and (begun := run_to_continue(out, asked, choose_again, console)):
        return resume(begun, console=console)
    if out is not None:
        Run.check_free(out)
    settings = checked_settings(task, options, budget, console)
    run = Run.open(from_run)
    finetuning_config(
        read_config(run), ("one", "other")
    )  # called here to reject unsupported encoders before images are read
    examples = open_examples(task, data, options, console)
    recipe, why = options.recipe, f"recipe {options.recipe}: as requested"
    if recipe == "auto":
        pretrained: Any = read_config(run).method
        recipe, why = choose_recipe(
            task_class(task), pretrained.encoder, len(examples.train), from_scratch=options.from_scratch
        )
    config, source, found = configure(
        run,
        examples,
        options=replace(options, task=task, recipe=recipe, settings=settings),
        budget=budget,
        console=console,
    )
    where = {
        "test": options.test,
        "annotations": annotations_of(task, data, options.annotations, examples.annotated),
        "test_annotations": options.test_annotations,
        "test_split": options.test_split,
    }
    config = config.model_copy(update={"data": config.data.model_copy(update=where)})
    report_annotations(examples.annotated, config, console)
    origin = "random weights, from scratch" if options.from_scratch else f"weights of {from_run}"
    split = SupervisedSplit(
        held_out=np.setdiff1d(np.arange(len(source)), examples.train),
        test_rows=examples.held_out if examples.test is None else None,
        num_test=examples.num_test,
        annotations_digest=examples.digest(found.bad_rows),
        supervise=partial(supervise, console=console),
    )
    reasons = (why, origin, *reasons_for(examples, data, options, console))
    request = training_data.TrainingRequest(
        source=source,
        scan=found,
        config=config,
        device=choose_device(config.train.device),
        budget=budget,
        reasons=reasons,
        supervised=split,
        record=asked.record(found, labelled=len(examples.train)),
    )
    done = start_run(request, out=out, console=console)
    report_result(done, console)
    return done


def checked_settings(task: str, options: FinetuneOptions, budget: Budget | None, console: Console) -> list[str]:
    """Return the settings KEY=VALUE that the options imply. Reads no images. Raises ConfigError."""
    if options.test is None and (options.test_annotations is not None or options.test_split is not None):
        raise ConfigError("got --test-annotations or --test-split without --test; give --test too")
    settings = [*options.settings, *steps_like(options.steps_of, options.settings, budget)]
    if options.from_scratch and budget is not None:
        console.warn(
            "with a time budget, a run from scratch may train for a different number of steps than the run it is "
            "compared with; use --steps-of RUN instead of --budget for the same number"
        )
    require_settable(task, parse(settings))
    if options.last_blocks is not None:
        if not issubclass(task_settings(task), PartialTaskConfig):
            raise ConfigError(
                f"got --last-blocks {options.last_blocks:g} with --task {task}, which cannot train the last "
                "blocks only; leave it out"
            )
        if "method.last_blocks" in parse(settings):
            raise ConfigError("got both --last-blocks and method.last_blocks; leave one of them out")
        settings.append(f"method.last_blocks={options.last_blocks}")
    return settings


def open_examples(task: str, data: str, options: FinetuneOptions, console: Console) -> Examples:
    """Open the training and test images with their annotations. Raises UserError if the images cannot be used."""
    annotated = open_annotated(task, data, options.annotation_options(), console=console)
    train, held_out = split_rows(annotated, options.shots, hold=options.test is None)
    if options.test is None:
        return Examples(annotated, train, held_out)
    test = open_annotated(task, options.test, options.test_annotation_options(annotated.classes), console=console)
    shared = shared_files(annotated.source, train, test.source, test.rows)
    if len(shared) == len(test.rows):
        raise ConfigError(
            f"all {len(shared)} test images are also training images; give others, or leave --test out to hold out a "
            "fifth"
        )
    return Examples(annotated=annotated, train=train, held_out=held_out, test=test, shared=shared)


def configure(
    run: Run, examples: Examples, options: FinetuneOptions, budget: Budget | None, console: Console
) -> tuple[Config, Source, Scan]:
    """Return the configuration of the new run, its images and their scan. Raises ConfigError if they do not fit."""
    annotated, recipe = examples.annotated, options.recipe
    config = config_from_run(run, annotated.classes, recipe, from_scratch=options.from_scratch)
    config = resolve.resolve_config(
        with_masks(config, annotated), list(options.settings), budget=budget, source=annotated.source
    )
    if config.data.pages == "samples":
        raise ConfigError(
            "got data.pages=samples; expected first or channels: labels, masks and boxes belong to files, not to pages"
        )
    source, found = training_data.scan_source(annotated.source, config, console)
    config = sized(config, found.median_size, options, console)
    if options.from_scratch and settings_of(config).trained_blocks is not None:
        raise ConfigError(
            "got --from-scratch and --last-blocks together; frozen random blocks learn nothing; leave one of them out"
        )
    initial_weights.require_size(config)
    resolve.require_method(config)
    return config, source, found


def sized(config: Config, median: tuple[int, int], options: FinetuneOptions, console: Console) -> Config:
    """Return the configuration with an image size that suits the task and the images, unless the size is set."""
    if not task_class(config.method.name).whole_images() or "data.size" in parse(options.settings):
        return config
    return enlarged(config, median, catalogue.find(options.recipe).data.size, console)


def configure_again(
    from_run: str | Path, options: FinetuneOptions, budget: Budget | None, config: Config, found: ChosenFrom
) -> Config:
    """Return the configuration that these options choose for the images of a run with this configuration and facts.

    The annotations are not read again: what depends on them is copied from the run.
    """
    quiet, run, theirs = Console(quiet=True), Run.open(from_run), settings_of(config)
    options = replace(options, settings=checked_settings(str(options.task), options, budget, quiet))
    if options.recipe == "auto":
        pretrained: Any = read_config(run).method
        task = task_class(str(options.task))
        recipe, _ = choose_recipe(task, pretrained.encoder, found.labelled, from_scratch=options.from_scratch)
        options = replace(options, recipe=recipe)
    new = config_from_run(run, theirs.classes, options.recipe, from_scratch=options.from_scratch)
    if isinstance(theirs, MaskTaskConfig) and isinstance(new.method, MaskTaskConfig):
        read = {name: getattr(theirs, name) for name in ("ignored", "values", "stored_pixels")}
        new = new.model_copy(update={"method": new.method.model_copy(update=read)})
    new = resolve.resolve_config(new, list(options.settings), budget=budget)
    return sized(new, found.median_size, options, quiet)


def reasons_for(examples: Examples, data: str, options: FinetuneOptions, console: Console) -> list[str]:
    """Return sentences for the plan about training images, test images, and limitations of the result."""
    annotated, shots = examples.annotated, options.shots
    per = "in all" if annotated.annotations is not None else "of each class"
    reasons = [
        f"{len(examples.train)} training images of {len(annotated.classes)} classes"
        + ("" if shots is None else f", {shots} {per}"),
        f"{examples.num_test} test images: {options.test or f'a held-out fifth of {data}'}",
    ]
    if options.last_blocks is not None:
        reasons.append(
            f"the last {options.last_blocks:g} blocks and the head are trained, all other weights are frozen"
        )
    if shared := examples.shared:
        optimistic = f"{len(shared)} test images are also training images, byte for byte: the result is optimistic"
        reasons.append(optimistic)
        console.warn(f"{optimistic} ({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''})")
    return reasons


def report_annotations(annotated: AnnotatedImages, config: Config, console: Console) -> None:
    """Print statistics of the masks or boxes, and the effect of the image size on masks."""
    if annotated.annotations is None:
        return
    notes = annotated.annotations.notes
    for line in annotated.annotations.lines():
        (console.warn if line in notes else console.print)(line)
    if isinstance(annotated.annotations, SegmentationMasks):
        settings: Any = config.method
        line, costly = annotated.annotations.size_line(config.data.size, settings.encoder.patch[0])
        (console.warn if costly else console.print)(line)


@together
def resume(
    run_folder: str | Path,
    *,
    allow_dataset_change: bool = False,
    places: changed_data.DataLocations | None = None,
    console: Console | None = None,
) -> Run:
    """Continue a supervised run exactly where it stopped.

    places: new locations of the run's images, test images and annotations, if they have moved.
    """
    console = console or Console()
    if places is not None:
        places = moved_places(read_config(Run(run_folder)), places)
    done = continue_run.resume(
        run_folder,
        allow_dataset_change=allow_dataset_change,
        places=places,
        supervise=partial(supervise, console=console),
        concluded=lambda run: read_score(run) is not None,
        console=console,
    )
    report_result(done, console)
    return done


def moved_places(config: Config, places: changed_data.DataLocations) -> changed_data.DataLocations:
    """Find the masks or boxes of images that have moved beside the images, unless their location is given.

    Raises UserError.
    """
    task, before = config.method.name, config.data.annotations
    if not places.data or task_class(task).annotation == "classes":
        return places
    first, *more = places.data
    if more:
        raise ConfigError(f"got {len(places.data)} values of --data; expected one for a run of task {task}")
    try:
        images, found = place_of_annotations(task, first, places.annotations)
    except UserError:
        if places.annotations is not None or before is None or not os.path.exists(before):
            raise
        images, found = first, before
    return replace(places, data=(images,), annotations=found)


def supervise(run: Run, config: Config, plan: Plan, source: Source, *, console: Console) -> Supervision:
    """Open the annotations and test images of a run that starts or resumes.

    Raises DataError if the annotations or test images have changed since the run began.
    """
    annotated = reopen(config, plan, source)
    test_set = open_test_set(config, plan, annotated, console)
    used = dataset_record.used_rows(plan, len(source))
    known = [
        digest(annotated, used, labels=labels) + ("" if config.data.test is None else test_set.digest(labels=labels))
        for labels in (True, False)  # digests of earlier versions did not include the class labels
    ]
    if plan.annotations_digest and plan.annotations_digest not in known:
        raise training_data.DataError(
            f"the labels, masks or boxes of {source.name}, or the test images, have changed since this run began, so "
            "it cannot continue exactly; restore the old files, or start a new run"
        )
    test = test_set.annotated if config.data.test is not None else None
    for role, of in ((dataset_record.MASKS, masks_of(annotated)), (dataset_record.TEST, test and test.source),
                     (dataset_record.TEST_MASKS, test and masks_of(test))):  # fmt: skip
        if of is not None and (found := dataset_record.compare_or_record(run, of, role, console)):
            raise training_data.DataError(
                f"the {role.replace('-', ' ')} files of {of.name} have changed since this run began, so it cannot "
                f"continue exactly: {found.lines()}; restore the old files, or start a new run"
            )
    return Supervision(annotated.annotations, test_set, partial(measure_run, console=console))
