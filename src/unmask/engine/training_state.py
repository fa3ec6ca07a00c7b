"""The state that checkpoints hold: initialise it, save it, restore it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict

from torch import Tensor

from unmask.engine import checkpoint, copy_weights, optimizer_state
from unmask.engine.checkpoint import CheckpointFull, CheckpointRefused
from unmask.engine.job import Job, Position, optional
from unmask.engine.load import take_weights
from unmask.engine.pacing import Stopwatch
from unmask.engine.plan import Plan
from unmask.engine.samples import fixed_images, spread
from unmask.errors import UserError
from unmask.method import Method
from unmask.run import STATUS, Run, RunGone

AVERAGE = "/average"  # of the name of an averaged parameter, among the tensors of the optimiser in a checkpoint


def stopped_at(run: Run, plan: Plan, step: int, watch: Stopwatch) -> str:
    with suppress(OSError, UserError, RunGone):  # the caller tries again, and reports it
        run.set_status("stopped", step, total=plan.steps, seconds=watch.seconds())
    return "stopped"


def what_is_kept(run: Run) -> str:
    """What is saved now, as a sentence for whoever ends the training at once."""
    step = checkpoint.newest_step(run)
    if step is None:
        return f"there is no checkpoint yet, and `unmask resume {run.path}` begins anew"
    return f"the checkpoint of step {step} is kept, and `unmask resume {run.path}` continues from it"


def begin(job: Job) -> Position:
    """Step 0: other weights grafted on, buffers that depend on the data set, and what is fixed from now on saved."""
    take_weights(job.method, job.config)
    taken = tuple(entry.target for entry in job.config.graft)
    # What came with other weights stays as it was: they mean nothing with another palette, or other components.
    if job.method.num_prepare and not any(prefix.startswith(taken) for prefix in job.method.fixed if taken):
        rows = spread(job.images.rows, job.method.num_prepare)
        sample = fixed_images(job.images, job.plan, rows)
        job.method.prepare(sample.images, sample.valid)
    if job.method.fixed:
        state = job.method.state_dict()
        kept = {name: value for name, value in state.items() if name.startswith(job.method.fixed)}
        checkpoint.save_fixed(job.run, kept)
    return Position()


def restore(job: Job) -> Position | None:
    """Weights, moments and position of the newest sound checkpoint; None when there is none."""
    found = checkpoint.load_latest(job.run, say=job.console.warn)
    if found is None:
        return None
    copy_weights.require_fit(job.method, found.model, f"the checkpoint of step {found.step} of {job.run.path}")
    job.method.load_state_dict(found.model)
    moments = {entry: value for entry, value in found.optim.items() if not entry.endswith(AVERAGE)}
    optimizer_state.tensors_to_optimizer(job.optimizer, names_of(job.method), moments, found.state["optimizer"])
    if job.average is not None:
        averages = {entry: value for entry, value in found.optim.items() if entry.endswith(AVERAGE)}
        job.average.load({entry.removesuffix(AVERAGE): value for entry, value in averages.items()})
    return Position(**found.state["position"])


def names_of(method: Method) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in method.named_parameters()}


def save(job: Job, at: Position, watch: Stopwatch) -> str | None:
    """Write a checkpoint and the status; returns what was in the way: a full disk, weights that are not finite."""
    run, method, train = job.run, job.method, job.config.train
    tensors, numbers = optimizer_state.optimizer_to_tensors(job.optimizer, names_of(method))
    if job.average is not None:
        tensors |= {name + AVERAGE: value for name, value in job.average.values.items()}
    state = {"step": at.step, "position": asdict(at), "optimizer": numbers, "seed": train.seed}
    weights = {name: value for name, value in method.state_dict().items() if not name.startswith(method.fixed)}
    with optional(job, run.metrics_file):
        run.sync_metrics()
    try:
        checkpoint.save(run, at.step, weights, tensors, state, keep=train.keep_checkpoints)
    except (CheckpointFull, CheckpointRefused, RunGone) as error:
        return str(error)
    with optional(job, run.path / STATUS):
        run.set_status("running", at.step, total=job.plan.steps, seconds=watch.seconds())
    return None
