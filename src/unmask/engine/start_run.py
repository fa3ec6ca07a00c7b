"""Start a run: make the plan, create the run folder, and train. Pre-training and fine-tuning both use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unmask.config import Config
from unmask.console import Console
from unmask.data.sources.source import Source
from unmask.engine import checkpoint, dataset_record, initial_weights
from unmask.engine.image_size import consequence
from unmask.engine.job import TrainingInputs
from unmask.engine.make_plan import few_steps
from unmask.engine.plan_text import print_inputs, print_plan
from unmask.engine.provenance import provenance
from unmask.engine.resolve import patch_of, reject_absurd_batch
from unmask.engine.run_training import train_and_record
from unmask.engine.shared_run import begun
from unmask.engine.training_data import TrainingRequest, plan_training
from unmask.engine.world import current
from unmask.run import CONFIG, PLAN, PROVENANCE, Run
from unmask.system.atomic_files import free_path
from unmask.system.plain_names import default_folder
from unmask.system.processes import require_main_guard


def start_run(request: TrainingRequest, *, out: str | Path | None, console: Console) -> Run:
    """Make the plan, create the run, and train. Raises UserError, TrainingFailed."""
    world = current()
    out, config = world.from_writer(lambda: (out, request.config))
    request = replace(request, config=config)
    source, found, split = request.source, request.scan, request.supervised
    reject_absurd_batch(config, found.usable)
    size = consequence(found.median_size, config.data.size, patch_of(config))
    console.print(size)
    images, plan = plan_training(replace(request, reasons=(size, *request.reasons)))
    if plan.cached:
        images.keep_decoded()
    if plan.workers:
        require_main_guard()
    initial_weights.require_grafts(config, plan.images)
    if request.budget is not None:
        plan = plan.started(request.budget.used())  # includes the time to decode images into memory

    def fill(run: Run) -> None:
        checkpoint.check_space(run, (config.train.keep_checkpoints + 1) * 12 * plan.parameters)
        dataset_record.write_record(run, source)
        for row, bad in zip(found.bad_rows, found.bad, strict=True):
            run.add_quarantine({"name": bad.name, "code": bad.code, "detail": bad.detail, "row": int(row)})

    files = {
        CONFIG: config.model_dump(mode="json"),
        PROVENANCE: provenance(plan) | initial_weights.licence(config) | dict(request.record),
        PLAN: plan.model_dump(mode="json"),
    }
    folder = out if out is not None else world.from_writer(lambda: free_name(source, config))
    with begun(world, folder, files, fill=fill, log=console.print) as run:
        print_plan(plan, config, console, printed=(size,))
        print_inputs(config, console)
        if found.bad:
            console.warn(
                f"{len(found.bad)} of {found.checked} files cannot be read and are left out; {run.quarantine_file} "
                "lists them"
            )
        if (warning := few_steps(plan)) is not None:
            console.warn(warning)
        supervise = None if split is None else split.supervise
        train_and_record(TrainingInputs(run=run, config=config, plan=plan, images=images, console=console), supervise)
    return run


def free_name(source: Source, config: Config) -> Path:
    """Return runs/<data>-<recipe>, with a number appended if that folder exists."""
    return free_path(default_folder(source.name, config.recipe))
