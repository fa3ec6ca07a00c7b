"""Initialise, save and restore the state of the training, and roll back to an earlier one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict

from torch import Tensor

from unmask.engine import checkpoint, copy_weights, optimizer_state
from unmask.engine.build import build_method
from unmask.engine.checkpoint import CheckpointFull, CheckpointRefused
from unmask.engine.job import Job, Position, Step, report_failure
from unmask.engine.load import take_weights
from unmask.engine.pacing import Stopwatch
from unmask.engine.samples import evenly_spaced, fixed_images
from unmask.engine.training_plan import Plan
from unmask.errors import TrainingFailed, UserError
from unmask.method import Method
from unmask.run import STATUS, Run, RunGone

BAD_STEPS_IN_A_ROW = 3
SKIP_AHEAD_BATCHES = 50
MOST_ROLLBACKS = 2
AVERAGE = "/average"  # suffix of averaged parameters among a checkpoint's optimiser tensors


def initialise(job: Job) -> Position:
    """Prepare step 0: copy initial weights, set buffers that depend on the data, save the tensors that never change."""
    take_weights(job.method, job.config)
    grafted = tuple(entry.target for entry in job.config.graft)
    # Do not recompute grafted palettes or PCA bases: the grafted weights depend on them.
    if job.method.num_prepare and not any(prefix.startswith(grafted) for prefix in job.method.fixed if grafted):
        rows = evenly_spaced(job.images.rows, job.method.num_prepare)
        sample = fixed_images(job.images, job.plan, rows)
        job.method.prepare(sample.images, sample.valid)
    if job.method.fixed:
        state = job.method.state_dict()
        fixed = {name: value for name, value in state.items() if name.startswith(job.method.fixed)}
        checkpoint.save_fixed(job.run, fixed)
    return Position()


def restore(job: Job) -> Position | None:
    """Load weights and optimiser state from the newest intact checkpoint; return its position, or None without a
    checkpoint.

    Raises CheckpointError if all checkpoints are damaged, or if one does not fit the method.
    """
    found = checkpoint.load_latest(job.run, log=job.console.warn)
    if found is None:
        return None
    copy_weights.require_fit(job.method, found.model, f"the checkpoint of step {found.step} of {job.run.path}")
    job.method.load_state_dict(found.model)
    names = parameter_names(job.method)
    moments = {entry: value for entry, value in found.optim.items() if not entry.endswith(AVERAGE)}
    optimizer_state.tensors_to_optimizer(job.optimizer, names, moments, found.state["optimizer"])
    if job.average is not None:
        averages = {entry: value for entry, value in found.optim.items() if entry.endswith(AVERAGE)}
        job.average.load({entry.removesuffix(AVERAGE): value for entry, value in averages.items()})
    return Position(**found.state["position"])


def parameter_names(method: Method) -> dict[Tensor, str]:
    """Return {parameter: its name}."""
    return {parameter: name for name, parameter in method.named_parameters()}


def save(job: Job, at: Position, stopwatch: Stopwatch) -> str | None:
    """Write a checkpoint and the status; return None, or why no checkpoint was written.

    Reasons are a full disk or non-finite weights.
    """
    run, method, train = job.run, job.method, job.config.train
    tensors, numbers = optimizer_state.optimizer_to_tensors(job.optimizer, parameter_names(method))
    if job.average is not None:
        tensors |= {name + AVERAGE: value for name, value in job.average.values.items()}
    state = {"step": at.step, "position": asdict(at), "optimizer": numbers, "seed": train.seed}
    weights = {name: value for name, value in method.state_dict().items() if not name.startswith(method.fixed)}
    with report_failure(job, run.metrics_file):
        run.sync_metrics()
    try:
        checkpoint.save(run, at.step, weights, tensors, state, keep=train.keep_checkpoints)
    except (CheckpointFull, CheckpointRefused, RunGone) as error:
        return str(error)
    with report_failure(job, run.path / STATUS):
        run.set_status("running", at.step, total=job.plan.steps, seconds=stopwatch.seconds())
    return None


def roll_back(job: Job, fault: Step, at: Position, stopwatch: Stopwatch) -> Position:
    """Return to the newest checkpoint after several bad steps in a row, and skip the data that led to them.

    Raises TrainingFailed if training has failed at the same step after `MOST_ROLLBACKS` rollbacks.
    """
    got_past = fault.number - BAD_STEPS_IN_A_ROW >= at.fault_step  # whether a step beyond the last fault succeeded
    rollbacks = 1 if got_past else at.rollbacks + 1
    if rollbacks > MOST_ROLLBACKS:
        raise TrainingFailed(
            f"{BAD_STEPS_IN_A_ROW} non-finite steps in a row at step {fault.number}, after {MOST_ROLLBACKS} rollbacks "
            f"without getting past it; the images are named in {job.run.faults_file}. Lower optim.base_lr, set "
            "optim.clip=1, or use train.precision=fp32, and start again"
        )
    back = restore(job)
    if back is None:
        job.method.load_state_dict(build_method(job.config, job.plan.images).state_dict())
        job.optimizer.state.clear()
        if job.average is not None:
            job.average.load({})
        back = initialise(job)
    back.consumed = fault.consumed + SKIP_AHEAD_BATCHES * job.plan.batch_size
    back.bad_steps, back.rollbacks, back.fault_step = 0, rollbacks, fault.number
    with report_failure(job, job.run.metrics_file):
        job.run.truncate_metrics(back.step)
    # Save immediately, so that the rollback is counted even if the process is killed now.
    if reason := save(job, back, stopwatch):
        job.console.warn(reason)
    job.console.warn(
        f"{BAD_STEPS_IN_A_ROW} non-finite steps in a row: going back from step {fault.number} to {back.step}, and "
        f"skipping {SKIP_AHEAD_BATCHES} batches of the data"
    )
    return back


def record_stop(run: Run, plan: Plan, step: int, stopwatch: Stopwatch) -> None:
    """Set the status to "stopped".

    Write errors are ignored, because the caller writes the status again and reports errors.
    """
    with suppress(OSError, UserError, RunGone):
        run.set_status("stopped", step, total=plan.steps, seconds=stopwatch.seconds())


def describe_saved(run: Run) -> str:
    """Return which checkpoint is saved, for the message when the process ends at once."""
    step = checkpoint.newest_step(run)
    if step is None:
        return f"there is no checkpoint yet, and `unmask resume {run.path}` starts from step 0"
    return f"the checkpoint of step {step} is kept, and `unmask resume {run.path}` continues from it"
