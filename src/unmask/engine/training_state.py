"""Initialise, save and restore the state of the training, and roll back to an earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.engine import checkpoint, copy_weights, fixed_tensors, optimizer_state
from unmask.engine.build import build_method
from unmask.engine.checkpoint_formats import (
    IN_MODEL,
    IN_OPTIM,
    SHARDS,
    CheckpointError,
    describe_shards,
    read_shards,
)
from unmask.engine.checkpoint_manifest import listed_files
from unmask.engine.checkpoint_writer import CheckpointWriter, Snapshot
from unmask.engine.choose_parallel import size
from unmask.engine.device import free_memory
from unmask.engine.job import Job, Position, Step, report_failure
from unmask.engine.load import take_weights
from unmask.engine.pacing import Stopwatch
from unmask.engine.samples import evenly_spaced, fixed_images
from unmask.engine.sharding import hand_out
from unmask.engine.training_plan import Plan
from unmask.errors import TrainingFailed, UserError
from unmask.method import Method
from unmask.run import STATUS, Run, RunGone

BAD_STEPS_IN_A_ROW = 3
SKIP_AHEAD_BATCHES = 50
MOST_ROLLBACKS = 2
AVERAGE = "/average"  # suffix of averaged parameters among a checkpoint's optimiser tensors


def initialise(job: Job) -> Position:
    """Prepare step 0: copy initial weights, set buffers that depend on the data, save the tensors that never change.

    The writer does this, and hands the weights out to the other processes, so that they do not depend on the number of
    processes or on how the weights are divided among them.
    """
    world = job.world

    def prepared() -> Method:
        whole = build_method(job.config, job.plan.images) if job.distributed.sharded else job.method
        prepare_weights(job, whole)
        return whole

    whole = world.on_writer(prepared)
    if not world.alone:
        hand_out(job.method.state_dict(), None if whole is None else whole.state_dict(), world)
    return Position()


def prepare_weights(job: Job, method: Method) -> None:
    """Set the weights and buffers of step 0 in a method that has all its weights; see `initialise`."""
    take_weights(method, job.config)
    grafted = tuple(entry.target for entry in job.config.graft)
    # Do not recompute grafted palettes or PCA bases: the grafted weights depend on them.
    if method.num_prepare and not any(prefix.startswith(grafted) for prefix in method.fixed if grafted):
        rows = evenly_spaced(job.images.rows, method.num_prepare)
        sample = fixed_images(job.images, job.plan, rows).to(method.device)
        method.prepare(sample.images, sample.valid)
    if method.fixed:
        state = method.state_dict()
        fixed = {name: value for name, value in state.items() if name.startswith(method.fixed)}
        fixed_tensors.save_fixed(job.run, fixed)


def restore(job: Job) -> Position | None:
    """Load weights and optimiser state from the newest intact checkpoint; return its position, or None without a
    checkpoint.

    Where each process holds a share of the weights, it reads its share from a checkpoint in shards. Otherwise the
    writer reads the checkpoint, and hands the tensors out. Raises CheckpointError if all checkpoints are damaged, or if
    one does not fit the method.
    """
    shards = None
    if job.distributed.sharded:
        shards = checkpoint.latest_in_shards(job.run, job.world, log=job.console.warn)
    found = read_whole(job) if shards is None else read_own_shards(job, shards)
    if found is None:
        return None
    optim, state = found
    moments = {entry: value for entry, value in optim.items() if not entry.endswith(AVERAGE)}
    optimizer_state.tensors_to_optimizer(job.optimizer, parameter_names(job.method), moments, state["optimizer"])
    if job.average is not None:
        averages = {entry: value for entry, value in optim.items() if entry.endswith(AVERAGE)}
        job.average.load({entry.removesuffix(AVERAGE): value for entry, value in averages.items()})
    return Position(**state["position"])


def read_whole(job: Job) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Load the weights of the newest intact checkpoint, which the writer reads; return optimiser tensors and state."""
    world = job.world
    found = world.on_writer(lambda: read_latest(job))
    contents = world.from_writer(lambda: None if found is None else (describe(found.optim), found.state))
    if contents is None:
        return None
    described, state = contents
    if world.alone and found is not None:
        job.method.load_state_dict(found.model)
        return found.optim, state
    hand_out(job.method.state_dict(), None if found is None else found.model, world)
    optim = room_for(described, job.method)
    hand_out(optim, None if found is None else found.optim, world)
    return optim, state


def read_own_shards(job: Job, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load this process's share of the weights from a verified checkpoint; return optimiser tensors and state."""
    world, weights = job.world, job.method.state_dict()
    fixed = world.on_writer(lambda: fixed_tensors.load_fixed(job.run.checkpoints)) or {}
    fixed_names = world.from_writer(lambda: list(fixed))
    described = world.from_writer(lambda: describe_shards(path / SHARDS))
    stored = {name.removeprefix(IN_MODEL): shape for name, (shape, _) in described.items() if name.startswith(IN_MODEL)}
    shapes = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
    shapes |= {name: weights[name].detach() for name in fixed_names if name in weights}
    what = f"the checkpoint of step {checkpoint.step_of(path)} of {job.run.path}"
    copy_weights.require_fit(job.method, shapes, what)
    optim = room_for(
        {name.removeprefix(IN_OPTIM): value for name, value in described.items() if name.startswith(IN_OPTIM)},
        job.method,
    )
    targets = {IN_MODEL + name: weights[name].detach() for name in stored}
    targets |= {IN_OPTIM + name: value for name, value in optim.items()}
    failure = None
    try:
        read_shards(path / SHARDS, targets)
    except CheckpointError as error:
        failure = str(error)
    if failures := [text for text in world.gather(failure) if text is not None]:
        raise CheckpointError(failures[0])
    hand_out({name: weights[name] for name in fixed_names}, fixed if world.is_writer else None, world)
    return optim, world.from_writer(lambda: checkpoint.read_state(path))


def read_latest(job: Job) -> checkpoint.Checkpoint | None:
    """Return the newest intact checkpoint, which fits the method, or None without a checkpoint."""
    if not job.world.alone:
        require_memory(job.run)
    found = checkpoint.load_latest(job.run, log=job.console.warn)
    if found is not None:
        copy_weights.require_fit(job.method, found.model, f"the checkpoint of step {found.step} of {job.run.path}")
    return found


def require_memory(run: Run) -> None:
    """Raise CheckpointError unless this process has enough memory to read the newest checkpoint as a whole."""
    for step, path in checkpoint.steps_on_disk(run)[:1]:
        with suppress(checkpoint.Damaged):
            needed, free = sum(number for number, _ in listed_files(path).values()), free_memory("cpu")
            if needed > free:
                raise CheckpointError(
                    f"got a checkpoint of {size(needed)} (step {step}), but rank 0 has {size(free)} of main memory "
                    "free; expected enough for the whole checkpoint, which rank 0 reads and hands out; run rank 0 on a "
                    "host with more memory"
                )


def describe(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor."""
    return {name: (value.shape, value.dtype) for name, value in tensors.items()}


def room_for(described: Mapping[str, tuple[torch.Size, torch.dtype]], method: Method) -> dict[str, Tensor]:
    """Return tensors of zeros for an optimiser's state, divided among the processes like its parameters."""
    parameters, room = dict(method.named_parameters()), {}
    for entry, (shape, dtype) in described.items():
        like = parameters[entry.rpartition("/")[0]].detach()
        if shape == like.shape:
            room[entry] = torch.zeros_like(like, dtype=dtype)
        else:
            room[entry] = torch.zeros(shape, dtype=dtype, device=like.device)
    return room


def parameter_names(method: Method) -> dict[Tensor, str]:
    """Return {parameter: its name}."""
    return {parameter: name for name, parameter in method.named_parameters()}


def open_writer(job: Job) -> CheckpointWriter:
    """Return the writer of the run's checkpoints; all processes must call this together."""
    train, kind = job.config.train, job.config.train.checkpoint_format
    if kind == "auto":
        kind = "dcp" if job.distributed.sharded else "dense"
    return CheckpointWriter(job.run, job.world.channel(), kind, train.keep_checkpoints)


def save(job: Job, at: Position, stopwatch: Stopwatch, writer: CheckpointWriter) -> None:
    """Take a snapshot of the state, and begin to write it and the status; the outcome is `writer.finish()`."""
    run, method = job.run, job.method
    tensors, numbers = optimizer_state.optimizer_to_tensors(job.optimizer, parameter_names(method))
    if job.average is not None:
        tensors |= {name + AVERAGE: value for name, value in job.average.values.items()}
    state = {"step": at.step, "position": asdict(at), "optimizer": numbers, "seed": job.config.train.seed}
    weights = {name: value for name, value in method.state_dict().items() if not name.startswith(method.fixed)}
    snapshot = Snapshot(at.step, writer.copied(weights), writer.copied(tensors), state)
    total, seconds = job.plan.steps, stopwatch.seconds()

    def sync_metrics() -> None:
        with report_failure(job, run.metrics_file):
            run.sync_metrics()

    def set_status() -> None:
        with report_failure(job, run.path / STATUS):
            run.set_status("running", snapshot.step, total=total, seconds=seconds)

    writer.start(snapshot, before=sync_metrics, after=set_status)


def roll_back(job: Job, fault: Step, at: Position, stopwatch: Stopwatch, writer: CheckpointWriter) -> Position:
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
        if not job.distributed.sharded:
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
    save(job, back, stopwatch, writer)
    if reason := writer.finish():
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
