"""Continue a run from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from unmask.config import Config
from unmask.console import Console
from unmask.data.sources.open_source import open_source
from unmask.engine import checkpoint, dataset_record, edit_run
from unmask.engine.changed_data import (
    DataLocations,
    accept_unverified,
    explain_refusal,
    plan_for_changed_data,
    record_move,
    recording_move,
)
from unmask.engine.device import choose_device
from unmask.engine.divided_scan import read_as, require_same_files
from unmask.engine.job import TrainingInputs
from unmask.engine.load import read_config, read_plan
from unmask.engine.make_plan import Processes, for_processes
from unmask.engine.run_training import train_and_record
from unmask.engine.shared_run import locked
from unmask.engine.supervision import Supervise
from unmask.engine.training_data import DataError, training_images
from unmask.engine.training_plan import Plan
from unmask.engine.world import World, current, together
from unmask.errors import SourceError
from unmask.nn.default_dtype import float32_default
from unmask.run import PLAN, Run


@together
@float32_default()
def resume(
    run_folder: str | Path,
    *,
    allow_dataset_change: bool = False,
    places: DataLocations | None = None,
    supervise: Supervise | None = None,
    concluded: Callable[[Run], bool] = lambda run: True,
    console: Console | None = None,
) -> Run:
    """Continue a run exactly where it stopped. Raises UserError if that is not possible.

    If the last checkpoint of a finished run is damaged or missing, the steps since the previous checkpoint are
    repeated. If its result is missing, it is evaluated again. allow_dataset_change: whether to continue even if the
    images have changed. places: new locations of the run's data. supervise: makes the `Supervision` of a supervised run
    (None: pre-training). concluded: returns whether the result of a supervised run has been written.
    """
    console = console or Console()
    world = current()
    with locked(world, run_folder) as run:
        world.on_writer(lambda: edit_run.complete(run))
        config, plan = world.from_writer(lambda: (read_config(run), read_plan(run)))
        if world.from_writer(lambda: is_done(run, plan, concluded, console)):
            return run
        run.add_digests()
        if world.size != plan.processes:
            plan = world.from_writer(lambda: divided_anew(run, plan, config, world, console))
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
        require_same_files(source, world)
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": source.data})})
        if found := dataset_record.compare(run, plan, source, console):
            if not allow_dataset_change:
                raise DataError(explain_refusal(config, plan, source, found))
            if found.unknown:
                plan = world.from_writer(lambda: accept_unverified(plan, source, run, found))
                console.warn("the images are assumed unchanged, because their names and sizes are the same")
            else:
                plan = world.from_writer(lambda: plan_for_changed_data(source, plan, run, found))
                console.warn(f"the images have changed: continuing with the current {plan.num_images} images")
        excluded = set(plan.excluded)
        rows = np.array([row for row in range(len(source)) if row not in excluded], np.int64)
        images = training_images(source, rows, plan.images, config)
        if plan.cached:
            images.keep_decoded()
        if places is not None and supervise is None:
            record_move(run, before, config, console)
        elif places is not None and supervise is not None:
            supervise = recording_move(supervise, before, console)
        train_and_record(TrainingInputs(run=run, config=config, plan=plan, images=images, console=console), supervise)
    return run


def divided_anew(run: Run, plan: Plan, config: Config, world: World, console: Console) -> Plan:
    """Return the plan for another number of processes than before, after writing it to plan.json."""
    read = checkpoint.newest_size(run) if world.alone else 0  # several processes check this when they read it
    new = for_processes(plan, config, Processes(world.size, world.local_size), read=read)
    run.write(PLAN, new.model_dump(mode="json"))
    shares = f"micro-batches of {new.micro_batch}" + (f", {new.parallel}" if new.processes > 1 else "")
    console.print(f"continuing with {new.processes} instead of {plan.processes} processes: {shares}")
    return new


def is_done(run: Run, plan: Plan, concluded: Callable[[Run], bool], console: Console) -> bool:
    """Return whether `resume` has nothing to do for this run, and print the reason.

    Raises CheckpointError if imported weights are damaged.
    """
    if plan.steps == 0:
        if not checkpoint.is_complete(run, 0):
            raise checkpoint.CheckpointError(
                f"the imported weights in {run.path} are damaged; import them again (provenance.json contains the path "
                "of the original file)"
            )
        if not run.finished:
            run.set_status("finished", 0, total=0)
        console.print(f"{run.path} is finished: it contains imported weights; nothing to train")
        return True
    if not run.finished:
        return False
    if not checkpoint.is_complete(run, plan.steps):
        checkpoint.require_any(run)
        console.warn(f"{run.path} was finished, but its last checkpoint cannot be used: repeating the last steps")
        return False
    if not concluded(run):
        console.print(f"{run.path} has done all {plan.steps} steps, but its result is missing: evaluating it")
        return False
    console.print(
        f"{run.path} is finished ({plan.steps} steps); nothing to do. To train it longer: unmask set {run.path} "
        f"train.steps={2 * plan.steps}, then unmask resume {run.path}"
    )
    return True
