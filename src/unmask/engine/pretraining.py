"""Pre-train on a folder of images: combine settings, scan files, make the plan, train.

Settings are checked before any file is read, files are checked before the plan is made, and the plan is printed before
the first step. The loop is in `engine/train.py`; `engine/continue_run.py` continues a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unmask.config import Config, ConfigError, parse
from unmask.console import Console
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.data.sources.tiff_samples import apply_reading
from unmask.engine import checkpoint, dataset_record, initial_weights
from unmask.engine.device import choose_device
from unmask.engine.image_size import consequence
from unmask.engine.job import TrainingInputs
from unmask.engine.make_plan import few_steps
from unmask.engine.plan_text import print_inputs, print_plan
from unmask.engine.pretrain_options import PretrainOptions
from unmask.engine.provenance import provenance
from unmask.engine.resolve import (
    choose_config,
    config_of_run,
    draft_config,
    patch_of,
    reject_absurd_batch,
    reject_supervised,
    reject_two_sources_of_settings,
    resolve_config,
    settings_with_options,
)
from unmask.engine.run_training import train_and_record
from unmask.engine.time_budget import Budget, as_budget
from unmask.engine.training_data import (
    TrainingRequest,
    odd_image_warnings,
    prepare_images,
    scan_source,
    skipped_files,
)
from unmask.nn.default_dtype import float32_default
from unmask.run import CONFIG, PLAN, PROVENANCE, Run
from unmask.system.atomic_files import free_path
from unmask.system.plain_names import default_folder
from unmask.system.processes import reject_several_processes, require_main_guard


@float32_default()
def pretrain(
    data: str | Path | Sequence[str | Path],
    options: PretrainOptions | None = None,
    *,
    out: str | Path | None = None,
    budget: float | str | Budget | None = None,
    console: Console | None = None,
) -> Run:
    """Pre-train on the images of `data` and return the run, which is finished or was stopped (see `run.status()`).

    data: one source or several. out: a new folder (None: named after data and recipe). budget: seconds, or a time such
    as "30m", for this whole call; the number of steps is adapted to the speed of training. console: prints messages and
    progress; `Console(quiet=True)` prints only warnings. Raises UserError. Invalid settings are reported before any
    image is opened.
    """
    reject_several_processes()
    options, console, budget = options or PretrainOptions(), console or Console(), as_budget(budget)
    recipe, from_run = options.recipe, options.from_run
    base = base_of(options)
    settings = settings_of(options, base)
    draft = draft_config(base, recipe, settings, budget)
    reject_supervised(draft, from_run)
    if from_run is not None and (own := sorted({"data.mean", "data.std"} & set(parse(settings)))):
        raise ConfigError(f"{own[0]} cannot be set: the weights of --from include their normalisation; leave it out")
    device = choose_device(draft.train.device)
    if out is not None:
        Run.check_free(out)
    source = apply_reading(open_source(data, options.exclude), draft.data.reading)
    console.print(f"{source.name}: {len(source)} images found" + skipped_files(source))
    source, found = scan_source(source, draft, console)
    for line in odd_image_warnings(source, found):
        console.warn(line)
    if base is not None:
        chosen = resolve_config(base, settings, budget=budget, source=source)
        reasons: tuple[str, ...] = (f"settings of {options.config}" if from_run is None else f"weights of {from_run}",)
    else:
        chosen, reasons, _ = choose_config(
            source, found, recipe=recipe, settings=settings, device=device, budget=budget
        )
    request = TrainingRequest(source=source, scan=found, config=chosen, device=device, budget=budget, reasons=reasons)
    return start_run(request, out=out, console=console)


def base_of(options: PretrainOptions) -> Config | None:
    """Return the configuration that `config` or `from_run` selects in place of a recipe, or None. Raises UserError."""
    if options.config is not None:
        reject_two_sources_of_settings(options.recipe, options.from_run)
        return config_of_run(options.config)
    return None if options.from_run is None else initial_weights.continued(options.from_run, options.recipe)


def settings_of(options: PretrainOptions, base: Config | None) -> list[str]:
    """Return the settings of the options, preceded by the settings that other options imply. Raises ConfigError."""
    return settings_with_options(
        base,
        options.recipe,
        list(options.settings),
        weights=options.from_run is not None,
        tokenizer=options.tokenizer,
        palette=options.palette,
        masks=options.masks,
    )


def start_run(request: TrainingRequest, *, out: str | Path | None, console: Console) -> Run:
    """Make the plan, create the run, and train. Raises UserError, TrainingFailed."""
    source, found, config, split = request.source, request.scan, request.config, request.supervised
    reject_absurd_batch(config, found.usable)
    size = consequence(found.median_size, config.data.size, patch_of(config))
    console.print(size)
    images, plan = prepare_images(request)
    if split is not None:
        tested = () if split.test_rows is None else tuple(np.setdiff1d(split.test_rows, found.bad_rows).tolist())
        plan = plan.model_copy(update={"test_rows": tested, "annotations_digest": split.annotations_digest})
    if plan.cached:
        images.keep_decoded()
    if plan.workers:
        require_main_guard()
    initial_weights.require_grafts(config, plan.images)

    if request.budget is not None:
        plan = plan.model_copy(update={"startup": request.budget.used()})

    def fill(run: Run) -> None:
        checkpoint.check_space(run, (config.train.keep_checkpoints + 1) * 12 * plan.parameters)
        dataset_record.write_record(run, source)
        for row, bad in zip(found.bad_rows, found.bad, strict=True):
            run.add_quarantine({"name": bad.name, "code": bad.code, "detail": bad.detail, "row": int(row)})

    recorded = plan.model_copy(update={"reasons": (size, *plan.reasons)})  # the size has been reported already
    files = {
        CONFIG: config.model_dump(mode="json"),
        PROVENANCE: provenance(plan) | initial_weights.licence(config),
        PLAN: recorded.model_dump(mode="json"),
    }
    folder = out if out is not None else free_name(source, config)
    with Run.begin(folder, files, fill=fill, log=console.print) as run:
        print_plan(plan, config, console)
        print_inputs(config, console)
        if (warning := few_steps(plan)) is not None:
            console.warn(warning)
        supervise = None if split is None else split.supervise
        train_and_record(
            TrainingInputs(run=run, config=config, plan=recorded, images=images, console=console), supervise
        )
    return run


def free_name(source: Source, config: Config) -> Path:
    """Return runs/<data>-<recipe>, with a number appended if that folder exists."""
    return free_path(default_folder(source.name, config.recipe))
