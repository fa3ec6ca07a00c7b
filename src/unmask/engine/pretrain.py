"""From a folder of images to a trained Run: scan, recipe, plan, train; and going on with one that was stopped.

The order matters to people: settings are checked before anything is read, files before anything is planned, and the
plan is said before the first step. What the loop itself does is in `engine/train.py`.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from unmask.batch import ImageSpec
from unmask.config import Config, ConfigError, override, parse, task_names
from unmask.console import Console, duration
from unmask.data.augment import crop_for
from unmask.data.findings import findings
from unmask.data.identity import Difference
from unmask.data.loader import Annotations, Images, Order, choose_workers
from unmask.data.odd_images import constant_line, mask_warnings
from unmask.data.scan import Scan, scan
from unmask.data.sources.open_source import Source, open_source
from unmask.data.sources.pages import read_as
from unmask.engine import checkpoint, dataset_check, edit_run, initial_weights
from unmask.engine.device import choose_device
from unmask.engine.image_size import candidates, consequence
from unmask.engine.load import read_config, read_plan
from unmask.engine.plan import NO_TIME, Plan, Timing, choose_steps, few_steps, make_plan, require_micro_batch
from unmask.engine.time_budget import Budget, as_budget, now
from unmask.engine.train import BASELINES, Judge, train
from unmask.errors import SourceError, UserError
from unmask.nn.default_dtype import float32_default
from unmask.recipes import catalogue
from unmask.run import CONFIG, PLAN, PROVENANCE, STATUS, Run, free_path
from unmask.system.processes import refuse_several_processes, require_main_guard

NAMED_BAD_FILES = 5
MOST_EPOCHS_A_STEP = 256
MOST_PATCHES = 1 << 18
ENOUGH_TO_HOLD_OUT = 1_000  # images; of fewer, each is worth more in the training
FEWEST_HELD_OUT, MOST_HELD_OUT = 64, 256
SIZE_KEYS = ("data.size", "method.encoder.patch", "method.pattern")
LOADED_PARTS = 3  # of the images, each loaded to measure how long that takes


class Supervision(NamedTuple):
    """What a supervised run has beside its images: annotations other than labels, its tests, and its result.

    conclude: measures the last weights and writes the result; a run is not finished before.
    """

    annotations: Annotations | None
    judge: Judge
    conclude: Callable[[Run], object]


Supervise = Callable[[Run, Config, Plan, Source], Supervision]
"""Makes it, once it is known what is trained on what."""


class DataError(UserError):
    """The images as a whole cannot be trained on; the message says why and what to do."""


@float32_default()
def pretrain(
    data: str | Path | Sequence[str | Path],
    *,
    exclude: Sequence[str] = (),
    recipe: str = "auto",
    config: str | Path | None = None,
    out: str | Path | None = None,
    budget: float | str | Budget | None = None,
    settings: Iterable[str] = (),
    from_run: str | Path | None = None,
    tokenizer: str | Path | None = None,
    palette: str | Path | None = None,
    masks: str | Path | None = None,
    console: Console | None = None,
) -> Run:
    """Pre-train on the images of `data` and return the Run; `run.read("status.json")["state"]` says how it ended.

    data: one or several. exclude: patterns of names to leave out, see `data.joined.matcher`.
    recipe: a name from `unmask recipes`, or "auto". config: another Run, or its config.json, whose settings are used in
    place of a recipe's. out: a new folder; made up from data and recipe when None. budget: seconds, or a time such as
    "30m", for everything from this call on; the number of steps follows the pace of training. settings: KEY=VALUE
    assignments. from_run: start from the weights of that Run, see `initial_weights.continued`. tokenizer: the Run of a
    dVAE whose codes are predicted. palette: a file of `unmask palette`, or the Run of an iGPT whose colours are used.
    masks: a file of masks to hide patches with. console: `Console(quiet=True)` for no progress. Raises UserError for
    anything a person can mend, and what can be said without the images before any is opened.
    """
    refuse_several_processes()
    console, budget = console or Console(), as_budget(budget)
    if config is not None:
        refuse_two_sources_of_settings(recipe, from_run)
    base = settings_of(config) if config is not None else None
    base = base if from_run is None else initial_weights.continued(from_run, recipe)
    settings = with_options(
        base, recipe, list(settings), weights=from_run is not None, tokenizer=tokenizer, palette=palette, masks=masks
    )
    draft = drafted(base, recipe, settings, budget)
    refuse_labels(draft, from_run)
    if from_run is not None and (own := sorted({"data.mean", "data.std"} & set(parse(settings)))):
        raise ConfigError(f"{own[0]} cannot be set: the weights of --from know their normalisation; leave it out")
    device = choose_device(draft.train.device)
    if out is not None:
        Run.check_free(out)
    source = read_as(open_source(data, exclude), draft.data.reading)
    console.say(f"{source.name}: {len(source)} images found" + skipped(source))
    found = scan_all(source, draft, console)
    for line in odd_images(source, found):
        console.warn(line)
    if base is not None:
        chosen = resolve(base, settings, budget=budget, source=source)
        reasons: tuple[str, ...] = (f"settings of {config}" if from_run is None else f"weights of {from_run}",)
    else:
        chosen, reasons, _ = settle(source, found, recipe, settings, device, budget=budget)
    return start_run(source, found, chosen, device, out=out, budget=budget, reasons=reasons, console=console)


def refuse_two_sources_of_settings(recipe: str, from_run: str | Path | None) -> None:
    """Raises ConfigError where --config comes with --recipe or --from, which also say what the settings are."""
    if recipe != "auto" or from_run is not None:
        option = f"--recipe {recipe}" if recipe != "auto" else f"--from {from_run}"
        raise ConfigError(f"got both --config and {option}; each names a run's settings: leave one of them out")


def settings_of(path: str | Path) -> Config:
    """The settings of a Run (its folder, or its config.json) for another run on images that are named anew.

    The steps of a run that was planned for a time budget are taken from its plan. Raises RunError, ConfigError.
    """
    file = Path(path)
    run = Run.open(file.parent if file.name == "config.json" else file)
    config = read_config(run)
    refuse_labels(config, None)
    train, plan = config.train, read_plan(run)
    expected, _, _ = choose_steps(config, plan.num_images, budget=None, step_seconds=lambda: NO_TIME)
    if plan.steps and plan.steps != expected:
        train = train.model_copy(update={"steps": plan.steps, "epochs": None})
    data = config.data.model_copy(update={"source": ""})
    return config.model_copy(update={"data": data, "train": train})


def start_run(
    source: Source,
    found: Scan,
    config: Config,
    device: str,
    *,
    out: str | Path | None,
    budget: Budget | None,
    reasons: tuple[str, ...],
    console: Console,
    held_out: np.ndarray | None = None,
    test_rows: np.ndarray | None = None,
    num_test: int = 0,
    taught: str = "",
    supervise: Supervise | None = None,
) -> Run:
    """Plan, make the Run, and train it.

    held_out: rows of the source that are kept from the training, test_rows: those of them that it is tested on.
    num_test: images that it is tested on, wherever they lie. taught: see `Plan`.
    """
    refuse_absurd_batch(config, found.usable)
    size = consequence(found.median_size, config.data.size, patch_of(config))
    console.say(size)
    images, plan = prepare(
        source, found, config, device, budget=budget, reasons=reasons, held_out=held_out, num_test=num_test
    )
    tested = () if test_rows is None else tuple(np.setdiff1d(test_rows, found.bad_rows).tolist())
    plan = plan.model_copy(update={"test_rows": tested, "taught": taught})
    if plan.cached:
        images.keep_decoded()
    if plan.workers:
        require_main_guard()
    initial_weights.require_grafts(config, plan.images)

    if budget is not None:
        plan = plan.model_copy(update={"startup": budget.used()})

    def fill(run: Run) -> None:
        checkpoint.check_space(run, (config.train.keep_checkpoints + 1) * 12 * plan.parameters)
        dataset_check.write_record(run, source)
        for row, bad in zip(found.bad_rows, found.bad, strict=True):
            run.add_quarantine({"name": bad.name, "code": bad.code, "detail": bad.detail, "row": int(row)})

    recorded = plan.model_copy(update={"reasons": (size, *plan.reasons)})  # the size has been reported already
    files = {
        CONFIG: config.model_dump(mode="json"),
        PROVENANCE: provenance(plan) | initial_weights.licence(config),
        PLAN: recorded.model_dump(mode="json"),
    }
    folder = out if out is not None else free_name(source, config)
    with Run.begin(folder, files, fill=fill, say=console.say) as run:
        say_plan(plan, config, console)
        say_taken(config, console)
        if (warning := few_steps(plan)) is not None:
            console.warn(warning)
        _train(run, config, recorded, images, console, supervise)
    return run


def patch_of(config: Config) -> tuple[int, int] | None:
    """(H, W) of the encoder's patches; None where it has none."""
    return getattr(getattr(config.method, "encoder", None), "patch", None)


def with_options(
    base: Config | None,
    recipe: str,
    settings: list[str],
    *,
    weights: bool = False,
    tokenizer: str | Path | None,
    palette: str | Path | None,
    masks: str | Path | None,
) -> list[str]:
    """What --tokenizer, --palette and --masks stand for, as settings before those set by hand.

    base: settings that stand in for the recipe's; `weights` when they come with weights (--from).

    Raises ConfigError where an option and a setting say the same, or an option would be ignored.
    """
    if "graft" in parse(settings) and (weights or tokenizer is not None):
        option = "--from" if weights else "--tokenizer"
        raise ConfigError(
            f"both {option} and graft were given, which say where weights come from; leave one of them out"
        )
    if weights and palette is not None:
        raise ConfigError(
            "both --from and --palette were given, but those weights come with their palette; leave it out"
        )
    config = base or catalogue.find(catalogue.AUTO[0] if recipe == "auto" else recipe)
    given = {
        "--masks": [] if masks is None else initial_weights.with_masks(masks),
        "--palette": [] if palette is None else initial_weights.with_palette(palette),
        "--tokenizer": [] if tokenizer is None else initial_weights.with_tokenizer(tokenizer, config.graft),
    }
    for option, filled in given.items():
        initial_weights.require_own_settings(option, filled, settings, config)
    return [*(text for filled in given.values() for text in filled), *settings]


@float32_default()
def resume(
    run_folder: str | Path,
    *,
    allow_dataset_change: bool = False,
    places: Places | None = None,
    supervise: Supervise | None = None,
    concluded: Callable[[Run], bool] = lambda run: True,
    console: Console | None = None,
) -> Run:
    """Continue a Run exactly where it stopped. Raises ValueError when it cannot be the same run any more.

    A finished run is looked at, too: where its last checkpoint is damaged or missing, the steps since the one before
    are repeated; where its result is missing (`concluded`), it is measured. supervise: for a supervised run, which
    `finetune.resume` continues. places: where its data lie now, if they have moved.
    """
    console = console or Console()
    refuse_several_processes()
    run = Run.open(run_folder)
    with run.lock():
        edit_run.complete(run)
        config, plan = read_config(run), read_plan(run)
        if is_done(run, plan, concluded, console):
            return run
        run.add_digests()
        choose_device(plan.device)
        before = config
        if places is not None:
            config = places.applied(config)
        try:
            source = read_as(open_source(config.data.source, config.data.exclude), plan.reading)
        except SourceError as error:
            if places is not None:
                raise
            raise SourceError(f"{error}; if the images have moved: unmask resume {run.path} --data NEW") from None
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": source.data})})
        if found := dataset_check.compare(run, plan, source, console):
            if not allow_dataset_change:
                raise DataError(refusal(config, plan, source, found))
            if found.unknown:
                plan = accept_unverified(plan, source, run, found)
                console.warn("the images are taken for those the run began with: their names and sizes are the same")
            else:
                plan = adopt(source, plan, run, found)
                console.warn(f"the images have changed: going on with the {plan.num_images} there are now, not exactly")
        excluded = set(plan.excluded)
        rows = np.array([row for row in range(len(source)) if row not in excluded], np.int64)
        images = training_images(source, rows, plan.images, config)
        if plan.cached:
            images.keep_decoded()
        if places is not None and supervise is None:
            note_moved(run, before, config, console)
        elif places is not None and supervise is not None:
            supervise = _noting_moved(supervise, before, console)
        _train(run, config, plan, images, console, supervise)
    return run


def is_done(run: Run, plan: Plan, concluded: Callable[[Run], bool], console: Console) -> bool:
    """Whether nothing is left to do in a run; if so, says so."""
    if plan.steps == 0:
        if not checkpoint.is_complete(run, 0):
            raise checkpoint.CheckpointError(
                f"{run.path} holds imported weights, and they are damaged: import them again (provenance.json names "
                "the file they came from)"
            )
        if not run.finished:
            run.set_status("finished", 0, total=0)
        console.say(f"{run.path} is finished: it holds imported weights, and there is nothing to train")
        return True
    if not run.finished:
        return False
    if not checkpoint.is_complete(run, plan.steps):
        checkpoint.require_any(run)
        console.warn(f"{run.path} was finished, but its last checkpoint cannot be used: the last steps are repeated")
        return False
    if not concluded(run):
        console.say(f"{run.path} has all its {plan.steps} steps, but not its result: measuring it")
        return False
    console.say(
        f"{run.path} is finished ({plan.steps} steps); nothing to do. To train it longer: unmask set {run.path} "
        f"train.steps={2 * plan.steps}, then unmask resume {run.path}"
    )
    return True


@dataclass(frozen=True)
class Places:
    """Where the data of a run lie now; what is None or empty is where it was."""

    data: tuple[str, ...] = ()
    test: str | None = None
    annotations: str | None = None
    test_annotations: str | None = None

    def applied(self, config: Config) -> Config:
        """The configuration with these places, as absolute paths. Raises ConfigError for one that would be ignored."""
        for name in ("test", "annotations", "test_annotations"):
            if getattr(self, name) is not None and getattr(config.data, name) is None:
                raise ConfigError(f"got --{name.replace('_', '-')}, but this run has none; leave it out")
        others = {name: getattr(self, name) for name in ("test", "annotations", "test_annotations")}
        changes: dict[str, Any] = {
            name: os.path.abspath(place) if os.path.exists(place) else place
            for name, place in others.items()
            if place is not None
        }
        if self.data:
            changes["source"] = self.data[0] if len(self.data) == 1 else self.data
        return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def note_moved(run: Run, before: Config, config: Config, console: Console) -> None:
    """Write down that a run's data lie elsewhere from now on, and from where they moved."""
    keys = ("source", "test", "annotations", "test_annotations")
    old, new = ({key: getattr(each.data, key) for key in keys} for each in (before, config))
    if old == new:
        return
    moved = {key: [old[key], new[key]] for key in keys if old[key] != new[key]}
    run.write("config.json", config.model_dump(mode="json"))
    told = "; ".join(f"{key} {then} -> {now}" for key, (then, now) in moved.items())
    console.say(dataset_check.note_change(run, "moved", summary=told, places=moved))


def _noting_moved(supervise: Supervise, before: Config, console: Console) -> Supervise:
    """`supervise` that notes the new places once it has found everything there."""

    def both(run: Run, config: Config, plan: Plan, source: Source) -> Supervision:
        made = supervise(run, config, plan, source)
        note_moved(run, before, config, console)
        return made

    return both


def refusal(config: Config, plan: Plan, source: Source, found: Difference) -> str:
    """Why a run does not go on with these images as they are, and what to do."""
    if found.unknown:
        return (
            f"the images of {config.data.place} cannot be compared with those this run began with: {found.unknown}. "
            "Restore it from a backup, or, if they are the same, give --allow-dataset-change to record them anew"
        )
    return (
        f"the images of {config.data.place} have changed since this run began "
        f"({plan.num_images + len(plan.excluded)} files then, {len(source)} now), so it could not go on "
        f"exactly: {found.lines()}. Bring the old files back, or give --allow-dataset-change to go on all "
        "the same"
    )


def accept_unverified(plan: Plan, source: Source, run: Run, found: Difference) -> Plan:
    """Record images of the same names and sizes anew, whose contents cannot be compared; returns the plan."""
    told = dataset_check.note_change(run, "recorded anew", summary=f"--allow-dataset-change: {found.lines()}")
    plan = plan.model_copy(update={"reasons": (*plan.reasons, told)})
    run.write("plan.json", plan.model_dump(mode="json"))
    dataset_check.write_record(run, source)  # last: a run that is killed before this asks again
    return plan


def adopt(source: Source, plan: Plan, run: Run, found: Difference) -> Plan:
    """Make a data set that has changed the run's own: the new plan, written down with what differed.

    What was unreadable or held out is left out by name, because rows may have moved.
    """
    if read_config(run).method.name in task_names():
        raise DataError(
            f"the images of {source.name} have changed, and test images may be held out of them for this run, which "
            f"could no longer be told from the others: {found.lines()}. Bring the old files back, or begin anew"
        )
    unreadable = {entry["name"] for entry in run.quarantine() if entry.get("code") != "CHANGED"}
    bad = [row for row, name in enumerate(source.names) if name in unreadable]
    if len(bad) == len(source):
        raise DataError(f"none of the {len(source)} files of {source.name} could be read before; bring others")
    known = source.fingerprint() == plan.fingerprint  # the rows are the plan's already
    held_out = plan.held_out if known else dataset_check.rows_now(run, plan.held_out, source)
    excluded = tuple(sorted({*bad, *held_out}))
    if len(excluded) == len(source):
        raise DataError(
            f"only images that this run does not train on are left of {source.name}: {len(held_out)} held out, "
            f"{len(bad)} unreadable; bring others"
        )
    summary = f"--allow-dataset-change: {found.lines(3)}"
    told = dataset_check.note_change(run, "changed", summary=summary, **found.as_json())
    changes = {
        "fingerprint": source.fingerprint(),
        "num_images": len(source) - len(excluded),
        "excluded": excluded,
        "held_out": held_out,
        "epochs": plan.steps * plan.batch_size / (len(source) - len(excluded)),
        "reasons": (*plan.reasons, told),
    }
    plan = plan.model_copy(update=changes)
    run.write("plan.json", plan.model_dump(mode="json"))
    dataset_check.write_record(run, source)  # last: a run that is killed before this asks again
    return plan


def resolve(
    base: Config,
    settings: list[str],
    *,
    budget: Budget | None = None,
    proposals: Iterable[str] = (),
    source: Source | None = None,
) -> Config:
    """`base`, over it what `auto` proposes, and over both what a person has set; and which images it is for.

    Whose answer to "how long?" counts: a person's epochs go before the steps of a base or a proposal, as a budget goes
    before all. Raises ConfigError for a setting that does not fit, or that would be ignored without a word.
    """
    asked = parse(settings)
    refuse_conflicts(asked, budget)
    steps = ["train.steps=none"] if asked.get("train.epochs") is not None else []
    config = override(base, [*proposals, *steps, *settings])
    if "data.crop.eval_share" not in asked:
        crop = crop_for(config.data.crop, config.data.size, base.data.size)
        config = config.model_copy(update={"data": config.data.model_copy(update={"crop": crop})})
    if "train.test_every" in asked and config.method.name not in task_names():
        raise ConfigError(
            f"train.test_every was set, but {config.method.name} learns without labels, so there is nothing to test; "
            "leave it out"
        )
    ignored = sorted({"data.crop.scale", "data.crop.ratio"} & set(asked))
    if ignored and config.data.crop.kind != "random_resized":
        raise ConfigError(
            f"{ignored[0]} was set, but crops of kind {config.data.crop.kind!r} have a fixed size; set "
            "data.crop.eval_share, or data.crop.kind=random_resized, or leave it out"
        )
    if source is not None:
        where = {"source": source.data, "exclude": source.exclude}
        config = config.model_copy(update={"data": config.data.model_copy(update=where)})
    return config


def refuse_conflicts(asked: dict[str, Any], budget: object) -> None:
    """What cannot be set is refused, and so are two answers to "how long?": one of them would be ignored."""
    if "data.exclude" in asked:
        raise ConfigError("data.exclude cannot be set: give --exclude PATTERN to the command")
    if "data.source" in asked:
        raise ConfigError("data.source cannot be set: it is the DATA that the command names; name other images there")
    for key in ("data.test", "data.annotations", "data.test_annotations", "data.test_split"):
        if key in asked:
            option = key.removeprefix("data.").replace("_", "-")
            raise ConfigError(f"{key} cannot be set: give --{option} to `unmask finetune` instead")
    if "recipe" in asked:
        raise ConfigError("recipe cannot be set: it says where the settings came from; choose one with --recipe NAME")
    wanted = [key for key in ("train.epochs", "train.steps") if asked.get(key) is not None]
    if budget is not None and wanted:
        raise ConfigError(f"both a time budget and {wanted[0]} were given; leave one of them out")
    if len(wanted) > 1:
        raise ConfigError("both train.steps and train.epochs were given; leave one of them out")


def drafted(base: Config | None, recipe: str, settings: list[str], budget: Budget | None) -> Config:
    """The configuration as far as it is known without the images, tried out: sizes, patches, heads and ratios agree.

    For `auto` it is enough that one of the recipes it chooses from would go with the settings.
    """
    if base is not None or recipe != "auto":
        config = resolve(base or catalogue.find(recipe), settings, budget=budget)
        require_micro_batch(config)
        initial_weights.require_size(config)
        require_method(config)
        return config
    tries = [resolve(catalogue.find(name), settings, budget=budget) for name in catalogue.AUTO]
    faults = []
    for config in tries:
        try:
            require_method(_as_auto_would(config, settings))
            return tries[0]
        except UserError as error:
            faults.append(error)
    raise faults[0]


def _as_auto_would(config: Config, settings: list[str]) -> Config:
    """Of size and patch the one that was not set, chosen to fit the other; `auto` will look at the images for it."""
    asked = parse(settings)
    if "data.size" in asked and "method.encoder.patch" not in asked:
        divisors = [side for side in range(2, 17) if all(length % side == 0 for length in config.data.size)]
        return override(config, [f"method.encoder.patch={side}" for side in divisors[:1]])
    if "method.encoder.patch" in asked and "data.size" not in asked:
        height, width = config.model_dump()["method"]["encoder"]["patch"]
        return override(config, [f"data.size=[{height * 16},{width * 16}]"])
    return config


def refuse_labels(config: Config, from_run: str | Path | None) -> None:
    """Raises ConfigError for a method that learns from labels: those belong to `unmask finetune`."""
    if config.method.name not in task_names():
        return
    if from_run is None:
        raise ConfigError(
            f"recipe {config.recipe} learns from labels, and this is pre-training; use it with `unmask finetune RUN "
            f"DATA --recipe {config.recipe}`"
        )
    raise ConfigError(
        f"--from {from_run} is a run of {config.method.name}, which learns from labels; give `unmask finetune "
        f"{from_run} DATA` to train on, or name a --recipe to pre-train its encoder"
    )


def require_method(config: Config) -> None:
    """Build the method for made-up images, without memory for weights: what does not fit together is said now."""
    initial_weights.require_tokenizer(config)
    refuse_absurd_size(config)
    channels = config.data.channels or len(config.data.mean or config.data.std or (0, 0, 0))
    mean, std = config.data.mean or (0.0,) * channels, config.data.std or (1.0,) * channels
    require_statistics(channels, mean, std)
    with torch.device("meta"):
        config.build(ImageSpec(channels, config.data.size, "uint8", mean, std))


def require_statistics(channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"{len(mean)} means and {len(std)} standard deviations for {channels} channels; give --set data.mean=[...] "
            "and --set data.std=[...] with one number per channel, or leave both out"
        )


def scan_all(source: Source, draft: Config, console: Console) -> Scan:
    """Look at the files, as many as the settings ask for. Raises DataError when too many cannot be read."""
    source.reading = draft.data.reading
    checked = min(len(source), draft.data.scan_sample or len(source))
    with console.progress("checking files", checked) as bar:
        found = scan(source, sample=checked, channels=draft.data.channels, progress=bar.update)
    if found.known:
        console.say(
            f"{found.known} of {found.checked} files are as they were when last looked at, and were not looked at "
            "again (`unmask check` does)"
        )
    source.digests = found.digests
    if found.forgotten:
        console.say(f"the next command will look at all files again: {found.forgotten}")
    refuse_bad_data(found, draft)
    return found


def odd_images(source: Source, found: Scan) -> list[str]:
    """Sentences about images that are probably not meant to be learned from: masks, or images of one value."""
    constant = [] if found.constant is None else [constant_line(found.constant, found.good)]
    return mask_warnings(source) + constant


def refuse_absurd_batch(config: Config, num_images: int) -> None:
    """A batch of very many times the data set is a slip of the finger, and one step of it would take for ever."""
    batch = config.train.batch_size
    if batch > MOST_EPOCHS_A_STEP * num_images:
        raise ConfigError(
            f"train.batch_size={batch} came for {num_images} images: every step would see each of them "
            f"{batch // num_images} times; use at most {MOST_EPOCHS_A_STEP * num_images}, 16 to 256 is usual"
        )


def refuse_absurd_size(config: Config) -> None:
    """More patches than could be attended to are a slip of the finger, and their positions alone gigabytes."""
    height, width = config.data.size
    patch = config.method.model_dump().get("encoder", {}).get("patch") or (1, 1)
    patches = (height // patch[0]) * (width // patch[1])
    if patches > MOST_PATCHES:
        raise ConfigError(
            f"data.size={[height, width]} came, which is {patches:,} patches of {patch[0]} x {patch[1]} pixels; at "
            f"most {MOST_PATCHES:,} were expected (196 is usual): use smaller images, or larger patches"
        )


def settle(
    source: Source, found: Scan, recipe: str, settings: list[str], device: str, *, budget: Budget | None
) -> tuple[Config, tuple[str, ...], list[str]]:
    """The configuration, the reasons for what was chosen from the images, and that as KEY=VALUE.

    What a person set is not chosen for them.
    """
    if recipe != "auto":
        return named(source, found, recipe, settings, budget=budget)
    asked = parse(settings)
    fixed = set(asked)
    if budget is not None or asked.get("train.epochs") is not None:
        fixed.add("train.steps")
    size = resolve(catalogue.find(catalogue.AUTO[0]), settings).data.size if "data.size" in fixed else None
    name, proposals, reasons = catalogue.choose(
        found.usable, found.median_size, device, fixed=fixed, size=size, about=found.sampled
    )
    config = resolve(catalogue.find(name), settings, budget=budget, proposals=proposals, source=source)
    return config, (f"recipe {name}, chosen by auto:", *reasons), proposals


def named(
    source: Source, found: Scan, recipe: str, settings: list[str], *, budget: Budget | None
) -> tuple[Config, tuple[str, ...], list[str]]:
    """As `settle` for a recipe by name: size and patch follow the images where no paper and no person fixes them."""
    plain = resolve(catalogue.find(recipe), settings, budget=budget, source=source)
    if not set(SIZE_KEYS) & set(parse(settings)):
        for proposals in candidates(recipe, found.median_size):
            try:
                config = resolve(plain, proposals, budget=budget, source=source)
                require_method(config)
            except UserError:  # a mask in larger cells, for example
                continue
            return config, (f"{' '.join(proposals)}: recipe {recipe} follows the images",), proposals
    return plain, (), []


def refuse_bad_data(found: Scan, config: Config) -> None:
    """Stop before training when nothing, or too little, of the data can be read."""
    examples = "; ".join(f"{bad.name} ({bad.code}: {bad.detail})" for bad in found.bad[:NAMED_BAD_FILES])
    if found.good == 0:
        raise DataError(f"none of the {found.files} files of {found.source} can be read, for example {examples}")
    if found.empty_files == found.good:
        raise DataError(
            f"all pixels of the {found.good} images of {found.source} are absent (NaN, or the declared no-data value), "
            "so there is nothing to learn from; if they are data after all: --set data.nodata=none"
        )
    if found.bad_fraction > config.data.max_bad_fraction:
        enough = math.ceil(20 * found.bad_fraction) / 20
        raise DataError(
            f"{len(found.bad)} of {found.checked} files checked cannot be read ({found.bad_fraction:.1%}; at most "
            f"{config.data.max_bad_fraction:.1%} may be): {examples}. Mend or remove them (`unmask check` lists all), "
            f"or --set data.max_bad_fraction={enough:g} to train on the rest"
        )


def image_spec(found: Scan, config: Config) -> ImageSpec:
    """What the scan found, with what the person fixed by hand."""
    channels = config.data.channels or found.channels_majority
    mean, std = config.data.mean or found.mean, config.data.std or found.std
    require_statistics(channels, mean, std)
    return ImageSpec(channels, config.data.size, found.dtype_majority, tuple(mean), tuple(std))


def prepare(
    source: Source,
    found: Scan,
    config: Config,
    device: str,
    *,
    budget: Budget | None,
    reasons: tuple[str, ...],
    held_out: np.ndarray | None = None,
    num_test: int = 0,
) -> tuple[Images, Plan]:
    """The data set as the loop reads it, and the plan. Nothing is written, and no image is kept in memory yet."""
    spec = image_spec(found, config)
    excluded = np.union1d(found.bad_rows, [] if held_out is None else held_out).astype(np.int64)
    rows = np.setdiff1d(np.arange(len(source)), excluded)
    held_out_rows = held_out_for_loss(rows, config)
    if len(held_out_rows):
        excluded, rows = np.union1d(excluded, held_out_rows), np.setdiff1d(rows, held_out_rows)
        reasons += (f"{len(held_out_rows)} images held out of the training, for the held-out loss: data.held_out",)
    images = training_images(source, rows, spec, config)
    reasons += findings(found)
    if images.repeats > 1:
        reasons += (f"every image gives {images.repeats} samples when it is read: once in {images.repeats} epochs",)
    if images.on_device:
        reasons += ("crops are resampled on the device: asked for",)
    cached = config.data.cache
    if cached is None:
        cached = found.decoded_bytes * len(rows) <= config.data.cache_gib * 2**30
    if cached:
        reasons += (f"decoded images kept in memory: {found.decoded_bytes * len(rows) / 2**20:.0f} MiB",)
    workers, why = choose_workers(device, cached=cached)
    if config.data.workers is not None:
        workers, why = config.data.workers, f"{config.data.workers} loader workers: asked for"
    if found.median_size[0] < spec.size[0] or found.median_size[1] < spec.size[1]:
        reasons += (f"most images are smaller than the model's {spec.size[0]} x {spec.size[1]} and will be enlarged",)
    plan = make_plan(
        config,
        spec,
        num_images=len(rows),
        fingerprint=source.fingerprint(),
        excluded=tuple(excluded.tolist()),
        device=device,
        workers=workers,
        cached=cached,
        budget=budget,
        reasons=(*reasons, why),
        batch_seconds=lambda: batch_seconds(images, config.train.batch_size, workers, cached=cached),
        num_test=num_test,
    )
    return images, plan.model_copy(update={"reading": source.reading, "held_out": tuple(held_out_rows.tolist())})


def held_out_for_loss(rows: np.ndarray, config: Config) -> np.ndarray:
    """Of the rows that could be trained on, those on which a pre-training reports its loss; sorted.

    Raises ConfigError where none would be left to train on, or a supervised run would ignore the setting.
    """
    wanted = config.data.held_out
    if config.method.name in task_names():
        if wanted:
            raise ConfigError(f"got data.held_out={wanted}; supervised runs hold out test images instead: leave it out")
        return rows[:0]
    if wanted is None:
        few = len(rows) < ENOUGH_TO_HOLD_OUT
        wanted = 0 if few else min(MOST_HELD_OUT, max(FEWEST_HELD_OUT, len(rows) // 100))
    if wanted >= len(rows):
        raise ConfigError(f"got data.held_out={wanted} of {len(rows)} images; expected fewer than there are")
    return rows[np.linspace(0, len(rows) - 1, wanted).astype(int)]


def training_images(source: Source, rows: np.ndarray, spec: ImageSpec, config: Config) -> Images:
    """The data set as `config` wants it loaded. Raises ConfigError where the device cannot resample what it holds."""
    data = config.data
    on_device = data.resize == "device"
    if on_device and (spec.dtype != "uint8" or spec.channels not in (1, 3) or data.crop.jitter):
        what = "data.crop.jitter" if data.crop.jitter else f"{spec.dtype} images of {spec.channels} channels"
        raise ConfigError(
            f"data.resize=device came with {what}; it is for 8-bit gray or RGB images without jitter, use "
            "data.resize=loader"
        )
    return Images(source, rows, spec, data.crop, config.train.seed, repeats=data.repeats, on_device=on_device,
        min_valid=data.min_valid,
    )  # fmt: skip


def batch_seconds(images: Images, batch: int, workers: int, *, cached: bool) -> Timing:
    """Time to load one global batch, measured on the first images of the order; `cached`: when they lie in memory."""
    part = max(images.repeats, min(batch, 64) // 2 // images.repeats * images.repeats)
    parts = [Order(images.rows, images.seed, images.repeats).take(n * part, part) for n in range(LOADED_PARTS)]
    if cached:
        images = replace(images, rows=np.unique(np.concatenate([taken.index for taken in parts])), kept={})
        images.keep_decoded()
    times = []
    for taken in parts:
        images[taken]
        start = time.perf_counter()
        images[taken]
        times.append((time.perf_counter() - start) * batch / part / max(1, workers))
    return Timing.of(times)


def say_taken(config: Config, console: Console) -> None:
    """What came from files, in numbers, so that a mask upside down or another palette is seen at once."""
    method: Any = config.method
    if (patterns := getattr(method, "pattern", None)) is not None:
        marks = "".join(patterns[0])
        console.say(f"masks: {len(patterns)} drawn, {marks.count('#')} of {len(marks)} patches hidden")
    if (palette := getattr(method, "palette", None)) is not None:
        console.say(f"palette: {len(palette)} colours, given")


def say_plan(plan: Plan, config: Config, console: Console) -> None:
    console.say(
        f"recipe {config.recipe}: {config.method.name}, {plan.parameters / 1e6:.2f} M parameters "
        f"({plan.encoder_parameters / 1e6:.2f} M in the encoder)"
    )
    for reason in plan.reasons:
        console.say(f"  {reason}")
    console.say(
        f"{plan.steps} steps of {plan.batch_size} images = {plan.epochs:.1f} epochs, "
        f"warm-up {plan.warmup_steps} steps, {plan.precision} on {plan.device}"
    )


def _train(
    run: Run, config: Config, plan: Plan, images: Images, console: Console, supervise: Supervise | None = None
) -> None:
    """Run the loop and what concludes it, and record in the Run how that ended, whatever happens.

    "finished" is recorded after all of the work; a run that was interrupted outside the loop is stopped, not failed.
    """
    began = now()
    try:
        judge = conclude = None
        if supervise is not None:
            images.annotations, judge, conclude = supervise(run, config, plan, images.source)
        state = train(run, config, plan, images, console, judge, began)
        if state == "finished" and conclude is not None:
            conclude(run)
    except KeyboardInterrupt:
        _record(run, "stopped", console, total=plan.steps)
        raise
    except BaseException as error:
        _record(run, "failed", console, total=plan.steps, error=f"{type(error).__name__}: {error}")
        raise
    status = run.status()
    now_took = now() - began
    took = max(now_took, float(status.get("seconds", 0.0)))
    _record(run, state, console, total=status.get("total", plan.steps), seconds=took)
    said = duration(took) + (f" ({duration(now_took)} of it since it was resumed)" if took > now_took + 1 else "")
    if state == "stopped":
        console.say(f"stopped after {said}")
    else:
        console.say(f"finished {status['step']} steps in {said}: {run.path}")
        if supervise is None:
            warn_above_baseline(run, console)


def warn_above_baseline(run: Run, console: Console) -> None:
    """Warn when the last loss on the images of the pictures is no better than the best baseline; name what to do."""
    try:
        found, step = run.read(BASELINES), run.status()["step"]
        fair = {name: value for name, value in found["guesses"].items() if not name.startswith("true_")}
        measured, loss = found["losses"][-1]
    except (OSError, UserError, KeyError, IndexError):  # no picture was drawn; the weights are there all the same
        return
    if measured != step or not fair or loss < min(fair.values()):
        return
    name = min(fair, key=lambda name: fair[name])
    console.warn(
        f"the loss on the images of the pictures is {loss:.4f}; the baseline ({name.replace('_', ' ')}), which needs "
        f"no training, scores {fair[name]:.4f}: the features are hardly better than random ones yet. Train longer: "
        f"unmask set {run.path} train.steps={max(catalogue.FEWEST_STEPS, 2 * step)}; then: unmask resume {run.path}"
    )


def _record(run: Run, state: str, console: Console, **more: Any) -> None:
    """Write the status; the disk, or the file, may be the very trouble."""
    for _ in range(2):  # torch's signal handler may raise once more for the same dead loader worker
        try:
            kept = {"seconds": seconds} if (seconds := run.status().get("seconds")) is not None else {}
            run.set_status(state, checkpoint.newest_step(run) or 0, **kept | more)
            return
        except OSError as error:
            console.warn_once(f"cannot write {run.path / STATUS}: {error.strerror}")
            return
        except (ValueError, RuntimeError):
            continue


def provenance(plan: Plan) -> dict[str, Any]:
    """Versions, device, git state of the working folder, and the command: for whoever asks where a run came from."""
    device = torch.cuda.get_device_name(plan.device) if plan.device.startswith("cuda") else platform.processor()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device or platform.machine(),
        "cores": os.cpu_count(),
        "versions": provenance_versions(),
        "git": git_state(),
    }


def provenance_versions() -> dict[str, str]:
    """Installed versions of this package and of those that decide numbers."""
    found = {}
    for name in ("unmask", "torch", "numpy", "pillow", "simplejpeg", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the working folder and whether it has uncommitted changes; None outside a repository."""
    try:
        ask = {"capture_output": True, "text": True, "timeout": 5, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **ask).stdout.strip()
        return {"commit": commit, "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None


def free_name(source: Source, config: Config) -> Path:
    """runs/<data>-<recipe>, numbered when taken."""
    stem = "".join(letter if letter.isalnum() else "-" for letter in Path(source.name).name.split(".")[0]).strip("-")
    return free_path(Path("runs") / f"{stem or 'images'}-{config.recipe}")


def skipped(source: Source) -> str:
    """How many files of which kinds were passed over or excluded, in brackets; "" for none."""
    excluded = ", ".join(f"{count} by {pattern}" for pattern, count in source.excluded.items())
    told = f" (excluded: {excluded})" if excluded else ""
    if not (passed_over := +source.skipped):
        return told
    kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in passed_over.most_common(4))
    return f" ({passed_over.total()} other files passed over: {kinds})" + told
