"""`unmask finetune RUN DATA`: classes, masks or boxes from a pre-trained encoder, or from scratch as its control.

Images that it is tested on are kept out of the training (`plan.test_rows`, or other images, `data.test`). It is tested
ten times while it trains; the result, `evals/fine-tuned.json`, is that of the last weights, and beside it stands the
best test, which is what papers report and which flatters: it was chosen on the test images. With a running average of
the weights the last test of that is given too.

What is trained how is a recipe (`recipes/fine_tuning.py`); the encoder, its images' size and normalisation come from
the Run; what is learnt from and how it is measured is in `annotated.py`. `unmask ablate fig9` uses a plain recipe of
its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask.config import Config, ConfigError, Graft, parse, task_names
from unmask.console import Console
from unmask.data.augment import crop_for
from unmask.data.segmentation_masks import Maps, MaskOptions
from unmask.data.sources.open_source import Source, open_source
from unmask.engine import checkpoint, dataset_check, initial_weights, pretrain
from unmask.engine.device import autocast, choose_device
from unmask.engine.image_size import DENSE_TASKS, dense_size
from unmask.engine.load import load, read_config, read_plan
from unmask.engine.plan import Plan
from unmask.engine.pretrain import Supervision
from unmask.engine.time_budget import Budget, as_budget
from unmask.errors import UserError
from unmask.evals.images import eval_precision
from unmask.finetuning.annotated import (
    IN_WORDS,
    TASKS,
    AnnotatedImages,
    annotations_of,
    digest,
    masks_of,
    open_annotated,
    place_of_annotations,
    reopen,
    split_rows,
)
from unmask.finetuning.test_set import HEADLINES, open_test_set, shared_files
from unmask.nn.default_dtype import float32_default
from unmask.nn.modes import eval_mode
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig
from unmask.recipes import catalogue
from unmask.results import SCORE, find_score
from unmask.run import Run, RunError
from unmask.system.processes import refuse_several_processes
from unmask.tasks import classify

PLAIN = "classify"
PLAIN_OPTIM = OptimConfig(base_lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05, warmup=0.05)
"""Learning rate, betas and weight decay of MAE's Table 9, and nothing else of it: for `ablate fig9`."""
PROBE = "linear_probe"  # a task like the others, which `paper_linear` asks for
PAPER_BATCH, PAPER_PEAK = 16_384, 6.4  # of the paper's linear probe
UNSETTABLE = {
    "method.classes": "classes are found in the data; name them by sub-folders, in classes.txt or in the annotations",
    "method.ignored": "it must be known when the masks are read; give --ignore ID",
    "method.values": "it must be known when the masks are read; give --mask-values ID,ID",
    "method.stored_pixels": "it is found out when the masks are read",
    "data.mean": "the weights know their normalisation",
    "data.std": "the weights know their normalisation",
}
FEW, SOME = 1_000, 10_000
BASE, LARGE, HUGE = 700, 1_000, 1_200  # width of an encoder from which on it counts as such


def fine_tuning(
    pretrained: Config, classes: Sequence[str], recipe: str = PLAIN, *, ignored: Sequence[int] = ()
) -> Config:
    """The configuration of a supervised run with the encoder of `pretrained` and its images, without weights.

    recipe: of `recipes/fine_tuning.py`; PLAIN has the length of `pretrained`. ignored: ids in masks that are no class.
    Raises ConfigError for an encoder that is no plain vision transformer, or a recipe that does not fine-tune.
    """
    settings: Any = pretrained.method
    encoder = getattr(settings, "encoder", None)
    if not isinstance(encoder, ViTConfig):
        raise ConfigError(
            f"the encoder of {pretrained.method.name} came, and only a vision transformer's last blocks can be "
            "fine-tuned; choose a run or a recipe that has one, such as mae_nano"
        )
    if recipe == PLAIN:
        method = classify.Config(encoder=encoder, classes=tuple(classes))
        return Config(recipe=PLAIN, method=method, data=pretrained.data, optim=PLAIN_OPTIM, train=pretrained.train)
    found = catalogue.find(recipe)
    if found.method.name not in task_names():
        raise ConfigError(
            f"recipe {recipe} pre-trains without labels; choose one of {', '.join(recipes())}, or leave --recipe out"
        )
    crop = crop_for(found.data.crop, pretrained.data.size, found.data.size)
    data = pretrained.data.model_copy(update={"crop": crop})
    changes = {"encoder": encoder, "classes": tuple(classes)} | ({"ignored": tuple(ignored)} if ignored else {})
    return found.model_copy(update={"method": found.method.model_copy(update=changes), "data": data})


def enlarged(config: Config, median: tuple[int, int], most: tuple[int, int], console: Console) -> Config:
    """The configuration with a larger size, where that of the pre-training is too small for masks or boxes."""
    size, own = dense_size(config, median, most), config.data.size
    if size == own:
        return config
    larger = config.model_copy(update={"data": config.data.model_copy(update={"size": size})})
    try:
        pretrain.require_method(larger)
    except UserError:  # the task wants other steps than whole patches
        return config
    console.say(
        f"size {size[0]} x {size[1]}: the encoder was pre-trained at {own[0]} x {own[1]}, which is small for what is "
        f"learnt from these images; --set data.size=[{own[0]},{own[1]}] keeps it"
    )
    return larger


def recipes() -> list[str]:
    """The names of those that fine-tune."""
    return [name for name, make in catalogue.all_recipes().items() if make().method.name in task_names()]


def choose_recipe(task: str, encoder: ViTConfig, labelled: int, *, from_scratch: bool) -> tuple[str, str]:
    """(recipe, why), by the task, the width of the encoder and the number of labelled images."""
    if task != "classify":
        name = f"{task}_{'base' if encoder.width >= BASE else 'nano'}"
        return name, f"recipe {name}: an encoder {encoder.width} wide"
    amount = "few" if labelled <= FEW else "some" if labelled <= SOME else "nano"
    if encoder.width >= BASE and labelled > SOME:
        amount = "huge" if encoder.width >= HUGE else "large" if encoder.width >= LARGE else "base"
        amount = "large" if from_scratch and amount == "huge" else amount
    name = f"{'scratch' if from_scratch else 'finetune'}_{amount}"
    return name, f"recipe {name}: an encoder {encoder.width} wide and {labelled} labelled images"


def from_weights(
    run: Run, classes: Sequence[str], recipe: str = PLAIN, *, ignored: Sequence[int] = (), from_scratch: bool = False
) -> Config:
    """`fine_tuning` of what a Run holds: its newest weights, and the size and normalisation that they know."""
    step, _ = checkpoint.load_model(run)
    plan = read_plan(run)
    config, spec = fine_tuning(read_config(run), classes, recipe, ignored=ignored), plan.images
    data: dict[str, Any] = {"size": spec.size, "channels": spec.channels, "mean": spec.mean, "std": spec.std}
    data |= config.data.as_settled(plan.reading)
    if config.data.pages == "samples":  # labels belong to files
        data["pages"] = "first"
    none = dict.fromkeys(("test", "annotations", "test_annotations", "test_split"))
    taken = Graft(run=str(run.path.absolute()), source="encoder.", target="encoder.", step=step)
    graft = () if from_scratch else (taken,)
    if from_scratch and isinstance(config.method, classify.Config) and config.method.head_std is None:
        method = config.method.model_copy(update={"head_std": classify.SCRATCH_STD})
        config = config.model_copy(update={"method": method})
    return config.model_copy(update={"data": config.data.model_copy(update=data | none), "graft": graft})


@float32_default()
def fine_tune(
    from_run: str | Path,
    data: str,
    *,
    task: str = "classify",
    exclude: Sequence[str] = (),
    out: str | Path | None = None,
    test: str | None = None,
    annotations: str | None = None,
    test_annotations: str | None = None,
    split: str | None = None,
    test_split: str | None = None,
    ignored: Sequence[int] = (),
    mask_options: MaskOptions | None = None,
    shots: int | None = None,
    recipe: str = "auto",
    last_blocks: float | None = None,
    from_scratch: bool = False,
    budget: float | str | Budget | None = None,
    steps_of: str | Path | None = None,
    settings: Sequence[str] = (),
    console: Console | None = None,
) -> Run:
    """Train a classifier, segmenter or detector on `data` from the encoder of `from_run`; its Run says how it ended.

    exclude: patterns of names in `data` to leave out, for classes. test: other images that it is tested on; None holds
    a fifth of `data` out. annotations: where masks or boxes are,
    split: the list of images, both also for `test`; see `data/segmentation_masks.py` and `data/box_annotations.py`.
    ignored: ids in masks that are no class, mask_options: how else masks are read. shots: labels per class (masks,
    boxes: images), None for all.
    last_blocks: as in `classify.Config`. from_scratch: the encoder's random start instead of its weights. settings:
    KEY=VALUE. Stopped, it goes on with `finetune.resume`. Raises ValueError for what a person can mend.
    """
    console, budget = console or Console(), as_budget(budget)
    if out is not None:
        Run.check_free(out)
    if task not in (*TASKS, PROBE):
        raise ConfigError(f"task {task!r} came; {', '.join(TASKS)} was expected")
    if ignored and task != "segment":
        raise ConfigError(f"--ignore {ignored[0]} came, but only masks have ids to ignore; leave it out")
    if mask_options is not None and task != "segment":
        raise ConfigError("got --mask-values or --class-names, but only masks have ids; leave it out")
    if test is None and (test_annotations is not None or test_split is not None):
        raise ConfigError("--test-annotations or --test-split came without --test; give the test images too")
    settings = [*settings, *as_long_as(steps_of, settings, budget)]
    if from_scratch and budget is not None:
        console.warn(
            "with a time budget a run from scratch may take another number of steps than the one it is compared with; "
            "--steps-of RUN instead of --budget gives it as many"
        )
    asked = parse(settings)
    for key, why in UNSETTABLE.items():
        if key in asked:
            raise ConfigError(f"{key} cannot be set: {why}")
    if asked.get("method.head") == "linear" and "method.width" in asked:
        raise ConfigError("method.width came with method.head=linear, which has no width; leave one of them out")
    refuse_several_processes()
    run = Run.open(from_run)
    fine_tuning(read_config(run), ("one", "other"))  # refuses an encoder that cannot be tuned before anything is read
    annotated = open_annotated(
        task,
        data,
        annotations,
        split=split,
        exclude=exclude,
        ignored=ignored,
        mask_options=mask_options,
        console=console,
    )
    rows, held = split_rows(annotated, shots, hold=test is None)
    other, shared = None, list[str]()
    if test is not None:
        other = open_annotated(
            task, test, test_annotations, split=test_split, ignored=ignored,
            mask_options=None if mask_options is None else replace(mask_options, names=None),
            classes=annotated.classes, console=console,
        )  # fmt: skip
        shared = shared_files(annotated.source, rows, other.source, other.rows)
        if len(shared) == len(other.rows):
            raise ConfigError(
                f"all {len(shared)} test images are also training images; give others, or leave --test out to hold a "
                "fifth out"
            )
    why = f"recipe {recipe}: asked for"
    if recipe == "auto":
        pretrained: Any = read_config(run).method
        recipe, why = choose_recipe(task, pretrained.encoder, len(rows), from_scratch=from_scratch)
    settings = list(settings)
    if last_blocks is not None:
        if "method.last_blocks" in asked:
            raise ConfigError("both --last-blocks and method.last_blocks were given; leave one of them out")
        settings.append(f"method.last_blocks={last_blocks}")
    config = from_weights(run, annotated.classes, recipe, ignored=ignored, from_scratch=from_scratch)
    if config.method.name != task:
        raise ConfigError(f"recipe {recipe} is for --task {config.method.name}, but --task {task} came; change one")
    config = pretrain.resolve(with_masks(config, annotated), settings, budget=budget, source=annotated.source)
    if config.data.pages == "samples":
        raise ConfigError(
            "got data.pages=samples; expected first or channels: labels, masks and boxes belong to files, not to pages"
        )
    found = pretrain.scan_all(annotated.source, config, console)
    if task in DENSE_TASKS and "data.size" not in asked:
        config = enlarged(config, found.median_size, catalogue.find(recipe).data.size, console)
    if from_scratch and config.method.model_dump().get("last_blocks") is not None:
        raise ConfigError(
            "--from-scratch and --last-blocks came together, but frozen random blocks learn nothing; leave one out"
        )
    initial_weights.require_size(config)
    pretrain.require_method(config)
    where = {
        "test": test,
        "annotations": annotations_of(task, data, annotations, annotated),
        "test_annotations": test_annotations,
        "test_split": test_split,
    }
    config = config.model_copy(update={"data": config.data.model_copy(update=where)})
    say_annotations(annotated, config, console)
    num_test = len(held) if other is None else len(other.rows)
    reasons = [
        f"{len(rows)} images of {len(annotated.classes)} classes to learn from"
        + ("" if shots is None else f", {shots} {'of each class' if task in ('classify', PROBE) else 'in all'}"),
        f"{num_test} images to be tested on: {test or f'a held-out fifth of {data}'}",
    ]
    if last_blocks is not None:
        reasons.append(f"trained are the last {last_blocks:g} blocks and the head, all below them is frozen")
    if shared:
        flatters = f"{len(shared)} test images are also training images, byte for byte: the result flatters"
        reasons.append(flatters)
        console.warn(f"{flatters} ({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''})")
    source, origin = annotated.source, "random weights, from scratch" if from_scratch else f"weights of {from_run}"
    done = pretrain.start_run(
        source,
        found,
        config,
        choose_device(config.train.device),
        out=out if out is not None else pretrain.free_name(source, config),
        budget=budget,
        reasons=(why, origin, *reasons),
        console=console,
        held_out=np.setdiff1d(np.arange(len(source)), rows),
        test_rows=held if test is None else None,
        num_test=num_test,
        taught=digest(annotated, np.union1d(rows, held)) + ("" if other is None else digest(other, other.rows)),
        supervise=partial(supervise, console=console),
    )
    report(done, console)
    return done


def as_long_as(other: str | Path | None, settings: Sequence[str], budget: Budget | None) -> list[str]:
    """The steps and the batch size of another Run as settings. Raises ConfigError where they were also set."""
    if other is None:
        return []
    plan, asked = read_plan(Run.open(other)), parse(settings)
    both = [key for key in ("train.steps", "train.epochs", "train.batch_size") if key in asked]
    if budget is not None or both:
        option = "--budget" if budget is not None else both[0]
        raise ConfigError(f"got both --steps-of and {option}, which decide the length; leave one of them out")
    return [f"train.steps={plan.steps}", f"train.batch_size={plan.batch_size}"]


def with_masks(config: Config, annotated: AnnotatedImages) -> Config:
    """The configuration with what was found out about reading the masks, so that a resumed run reads them alike."""
    if not isinstance(maps := annotated.annotations, Maps):
        return config
    changes: dict[str, Any] = {"stored_pixels": maps.stored}
    if maps.values:  # 255 may be one of them, and is not ignored then
        changes |= {"values": maps.values, "ignored": maps.ignored}
    return config.model_copy(update={"method": config.method.model_copy(update=changes)})


def say_annotations(annotated: AnnotatedImages, config: Config, console: Console) -> None:
    """What the masks or boxes hold, and what the size that is trained at means for them."""
    if annotated.annotations is None:
        return
    notes = annotated.annotations.notes
    for line in annotated.annotations.lines():
        (console.warn if line in notes else console.say)(line)
    if isinstance(annotated.annotations, Maps):
        encoder: Any = config.method
        line, costly = annotated.annotations.size_line(config.data.size, encoder.encoder.patch[0])
        (console.warn if costly else console.say)(line)


def resume(
    run_folder: str | Path,
    *,
    allow_dataset_change: bool = False,
    places: pretrain.Places | None = None,
    console: Console | None = None,
) -> Run:
    """Go on exactly where a supervised Run stopped; as `pretrain.resume`.

    places: where its images, test images and annotations lie now, if they have moved.
    """
    console = console or Console()
    if places is not None:
        places = moved_places(read_config(Run(run_folder)), places)
    done = pretrain.resume(
        run_folder,
        allow_dataset_change=allow_dataset_change,
        places=places,
        supervise=partial(supervise, console=console),
        concluded=lambda run: find_score(run) is not None,
        console=console,
    )
    report(done, console)
    return done


def moved_places(config: Config, places: pretrain.Places) -> pretrain.Places:
    """Where masks or boxes lie beside images that have moved, unless that is said. Raises UserError."""
    task, before = config.method.name, config.data.annotations
    if task not in ("segment", "detect") or not places.data:
        return places
    first, *more = places.data
    if more:
        raise ConfigError(f"got {len(places.data)} DATA; a run of task {task} has one")
    try:
        images, found = place_of_annotations(task, first, places.annotations)
    except UserError:
        if places.annotations is not None or before is None or not os.path.exists(before):
            raise
        images, found = first, before
    return replace(places, data=(images,), annotations=found)


def supervise(run: Run, config: Config, plan: Plan, source: Source, *, console: Console) -> Supervision:
    """The masks or boxes of a run that begins or goes on, and its tests. Raises DataError when they have changed."""
    annotated = reopen(config, plan, source)
    test_set = open_test_set(config, plan, annotated, console)
    wanted = np.setdiff1d(np.arange(len(source)), np.setdiff1d(plan.excluded, plan.test_rows)).astype(np.int64)
    known = [
        digest(annotated, wanted, labels=labels) + ("" if config.data.test is None else test_set.digest(labels=labels))
        for labels in (True, False)  # earlier versions left the labels of images out
    ]
    if plan.taught and plan.taught not in known:
        raise pretrain.DataError(
            f"the labels, masks or boxes of {source.name}, or the test images, have changed since this run began, so "
            "it could not go on exactly; bring the old files back, or begin anew"
        )
    test = test_set.annotated if config.data.test is not None else None
    for role, of in ((dataset_check.MASKS, masks_of(annotated)), (dataset_check.TEST, test and test.source),
                     (dataset_check.TEST_MASKS, test and masks_of(test))):  # fmt: skip
        if of is not None and (found := dataset_check.require_same(run, of, role, console)):
            raise pretrain.DataError(
                f"the {role.replace('-', ' ')} files of {of.name} have changed since this run began, so it could not "
                f"go on exactly: {found.lines()}. Bring the old files back, or begin anew"
            )
    return Supervision(annotated.annotations, test_set, partial(score, console=console))


def score(run: Run, *, console: Console | None = None) -> dict[str, Any]:
    """How good the last weights are, with a 95 % interval, beside the best test on the way; kept in `SCORE`."""
    console = console or Console()
    loaded = load(run.path, device=choose_device(read_plan(run).device))
    data, settings = loaded.config.data, loaded.config.method
    found: dict[str, Any] = settings.model_dump()
    annotated = reopen(loaded.config, loaded.plan, open_source(data.source, data.exclude), tests_only=data.test is None)
    test_set = open_test_set(loaded.config, loaded.plan, annotated, console)
    with torch.inference_mode(), eval_mode(loaded.method), autocast(eval_precision(loaded), loaded.device):
        measured = test_set.measure(loaded.method)
    headline = HEADLINES[settings.name][0]
    try:
        tested = [row for row in run.metrics() if f"test_{headline}" in row]
    except RunError as error:
        console.warn(f"the best test on the way is not known: {error}")
        tested = []
    best = max(tested, key=lambda row: row[f"test_{headline}"], default=None)
    summary = measured | {
        "task": settings.name, "metric": headline, "step": loaded.step, "classes": list(annotated.classes),
        "best": None if best is None else {headline: best[f"test_{headline}"], "step": best["step"]},
        "averaged": tested[-1].get(f"test_averaged_{headline}") if tested else None,
        "data": data.place, "test": data.test or f"a held-out fifth of {data.place}",
        "test_images": measured.get("total", measured.get("images", len(test_set.rows))),
        "train_images": loaded.plan.num_images, "recipe": loaded.config.recipe,
        "last_blocks": found.get("last_blocks"), "from": loaded.config.graft[0].run if loaded.config.graft else None,
    }  # fmt: skip
    run.write(SCORE, summary)
    return summary


def report(run: Run, console: Console) -> None:
    """The result of a finished Run, for a person."""
    found = find_score(run) if run.finished else None
    if found is None:
        return
    first, *others = HEADLINES[found["task"]]
    said = f"{found[first]:.1%} {IN_WORDS[first]} on {found['test_images']} test images, last weights"
    if "low" in found:
        said += f" (95% interval {found['low']:.1%} to {found['high']:.1%})"
    said += "".join(f", {found[name]:.1%} {IN_WORDS[name]}" for name in others)
    if found["averaged"] is not None:
        said += f", {found['averaged']:.1%} with their running average"
    if (best := found["best"]) is not None and not math.isclose(best[first], found[first], abs_tol=1e-9):
        said += f"; the best test on the way {best[first]:.1%} at step {best['step']}, which the test images chose"
    console.say(said)
