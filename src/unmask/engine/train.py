"""THE LOOP: trains any `Method`, from a plan, into a Run. Reads top to bottom; there are no callbacks.

Where training stands is `Position`: optimiser steps done and samples consumed. Everything random follows from it (see
`rng.py`), so a checkpoint holds weights, optimiser moments and these numbers, and a resumed run repeats the unbroken
one bit for bit on the same device. Not here: what a method computes (`methods/`), what a run will do
(`engine/plan.py`).

The host does not wait for the device at every step: a step's loss is read when something has to be logged, drawn or
saved. A step with bad numbers leaves the weights alone whether or not anybody has looked yet, and what follows from
three of them is counted from the step where it happened; so when the host looks never changes what is trained. (A
rollback goes to the newest checkpoint, which may have been written by the clock: after one, two runs may differ.)

With a time budget the number of steps follows the pace (`engine/time_budget.py`). That is decided at logged steps only,
and stands in plan.json before it takes effect, so a resumed run repeats every step as it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from unmask.batch import Batch
from unmask.config import Config
from unmask.console import Console, duration
from unmask.data.device_crops import to_device
from unmask.data.image_reader import Images
from unmask.engine import checkpoint
from unmask.engine.build import fresh_method
from unmask.engine.compile import compile_blocks, uncompiled, why_not_compiled
from unmask.engine.device import autocast
from unmask.engine.fault_points import fault_points
from unmask.engine.guard import guarded
from unmask.engine.host_memory import memory_kept
from unmask.engine.job import Job, Position, Step, note, optional
from unmask.engine.pacing import Pace, Stopwatch, affordable, draw_due, due, open_pacer, replanned, test_due
from unmask.engine.plan import Plan
from unmask.engine.samples import Samples, look
from unmask.engine.stream import failures_as_sentences, open_stream
from unmask.engine.supervision import Judge
from unmask.engine.training_state import begin, restore, save, stopped_at, what_is_kept
from unmask.errors import TrainingFailed
from unmask.nn.ema import MovingAverage
from unmask.nn.modes import eval_mode
from unmask.optim import make_optimizer, update
from unmask.rng import Draws
from unmask.run import STATUS, Run
from unmask.system.stop_requests import StopRequest, StopRequested, stop_requests

BAD_STEPS_IN_A_ROW = 3
SKIP_AHEAD_BATCHES = 50
MOST_ROLLBACKS = 2
MOST_FAILED_SAVES = 5
MOST_UNREAD_STEPS = 32
SAID_CHANGE = 1.2  # a number of steps so many times larger or smaller is reported


def train(
    run: Run,
    config: Config,
    plan: Plan,
    images: Images,
    console: Console,
    judge: Judge | None = None,
    began: float | None = None,
) -> str:
    """Train until the plan is done or a signal asks to stop; returns "finished" or "stopped".

    Goes on from the newest sound checkpoint of the Run when there is one. Whatever cannot be written but a checkpoint
    is reported once, and training continues. That it is finished is left to the caller to record, who may have more to
    do. began: when this leg of the training began, on the clock of `time_budget.now`; None for now. Raises
    TrainingFailed.
    """
    fault_points().before_training(run)
    watch = Stopwatch(run, began)
    with (
        stop_requests() as stop,
        failures_as_sentences(run),
        memory_kept(plan.device),
        guarded(run, plan, stop, watch) as guard,
    ):
        try:
            with stop.interruptible():
                method = fresh_method(config, plan.images).to(plan.device)
                decay = config.optim.average
                average = None if decay is None else MovingAverage(method, decay)
                job = Job(run, config, plan, images, console, method, make_optimizer(method, config.optim), average)
                at = restore(job) or begin(job)
                pacer = open_pacer(job, watch, judge)
                with optional(job, run.metrics_file):
                    run.truncate_metrics(at.step)
                with optional(job, run.quarantine_file):
                    noted = [row for row in run.quarantine() if "step" in row and row.get("code") != "CHANGED"]
                    images.gone_bad.update(row["name"] for row in noted)
                if config.train.compile:
                    compile_or_say(job)
                samples = Samples.of(images, plan)
            if at.step == 0:
                with pacer.aside("picture"):
                    look(job, samples, at, stop)
        except StopRequested:  # nothing has been trained yet
            return stopped_at(run, plan, checkpoint.newest_step(run) or 0, watch)
        with optional(job, run.path / STATUS):
            run.set_status("running", at.step, total=plan.steps, seconds=watch.seconds())
        stop.kept = what_is_kept(run)

        stream, unread, pace = open_stream(job, at, guard), [], Pace(at.consumed)
        last_save, failed_saves, stopping, untested, first = time.monotonic(), 0, False, False, at.step + 1
        said_steps = plan.steps
        with console.progress("step", plan.steps, at.step) as bar:
            if judge is not None and not_tested(job, at) and affordable(job, pacer, "test", at):  # stopped within it
                try:
                    with pacer.aside("test"):
                        test(job, judge, at, stop)
                except StopRequested:
                    return stopped_at(run, plan, at.step, watch)
            while at.step < job.plan.steps and not stopping:
                try:
                    compiling = config.train.compile and at.step + 1 == first
                    with guard.step(at.step + 1, compiling=compiling):
                        fault_points().before_step(job, at)
                        unread.append(fault_points().after_step(job, step(job, stream, at)))
                except StopRequested:
                    if compiling:  # perhaps in the middle of the update: what is on disk counts
                        return stopped_at(run, plan, checkpoint.newest_step(run) or 0, watch)
                    job.optimizer.zero_grad()  # while waiting for data: the step has changed nothing yet
                    stopping = True
                else:
                    at.step, at.consumed = unread[-1].number, unread[-1].consumed
                    pace.waited += unread[-1].waited
                    stopping = stop.requested

                plan = job.plan
                judged = not unread  # already, when the wait for the next step was given up
                log_now = not judged and (due(at.step, config.train.log_every, plan.steps) or pacer.due())
                draw_now = not judged and draw_due(job, at.step)
                save_now = due(at.step, config.train.checkpoint_every, plan.steps) or stopping
                save_now = save_now or time.monotonic() - last_save >= 60 * config.train.checkpoint_minutes
                test_now = judge is not None and not judged and test_due(job, at.step)
                if not (log_now or draw_now or save_now or test_now or len(unread) >= MOST_UNREAD_STEPS):
                    continue

                numbers, fault = {}, None
                if not judged:
                    with guard.step(at.step):
                        numbers, fault = read(job, unread, at)  # waits for the device
                if fault is not None:
                    at = roll_back(job, fault, at, watch)
                    stream, unread, pace = open_stream(job, at, guard), [], Pace(at.consumed)
                    pacer.restart(at.step)
                    continue
                if log_now and at.bad_steps == 0:
                    row = {"step": at.step, "lr": unread[-1].lr, "images": at.consumed, **pace.row(at.consumed)}
                    note(job, row | numbers)
                    if at.step == 1:
                        bar.begin(1)  # it is slower than all others, and tells nothing of the time left
                    bar.update(at.step, progress_text(job, samples, at, numbers["loss"], pace, watch))
                    pace = Pace(at.consumed)
                try:
                    if draw_now and affordable(job, pacer, "picture", at):
                        with pacer.aside("picture"):
                            look(job, samples, at, stop)
                    if judge is not None and test_now and affordable(job, pacer, "test", at):
                        with pacer.aside("test"):
                            pace.began += test(job, judge, at, stop)
                except StopRequested:
                    stopping = save_now = untested = True
                if save_now:
                    with pacer.aside("save"):
                        trouble = save(job, at, watch)
                    failed_saves, last_save = failed_saves + 1 if trouble else 0, time.monotonic()
                    stop.kept = what_is_kept(run)
                    if trouble:
                        console.warn(trouble)
                    if failed_saves >= MOST_FAILED_SAVES:
                        raise TrainingFailed(
                            f"{failed_saves} checkpoints in a row could not be written, the last: {trouble}. Mend "
                            f"that, then `unmask resume {run.path}`"
                        )
                if log_now and not stopping:
                    job = replanned(job, pacer, at)
                    bar.total = job.plan.steps
                    if not said_steps / SAID_CHANGE < job.plan.steps < said_steps * SAID_CHANGE:
                        said_steps = job.plan.steps
                        console.say(f"step {at.step}: {said_steps} steps in all now, to fit the budget at this pace")
                unread = []
            del stream  # closes the loader's workers

    plan = job.plan
    with optional(job, run.metrics_file):
        if skipped := sum("skipped" in row for row in run.metrics()):
            console.warn(f"{skipped} steps were skipped for non-finite numbers; their images are named in faults.jsonl")
    run.require_present()
    if checkpoint.newest_step(run) != at.step:
        raise TrainingFailed(
            f"the last weights (step {at.step}) could not be written; make room and `unmask resume {run.path}`, which "
            f"repeats the steps since step {checkpoint.newest_step(run) or 0}"
        )
    if at.step < plan.steps or untested:
        return stopped_at(run, plan, at.step, watch)
    with optional(job, run.path / STATUS):
        run.set_status("running", at.step, total=plan.steps, seconds=watch.seconds())
    return "finished"


def not_tested(job: Job, at: Position) -> bool:
    """Whether the test that belongs to this step is missing: a stop was requested in the middle of it."""
    if at.step == 0 or not test_due(job, at.step):
        return False
    with optional(job, job.run.metrics_file):
        rows = [row for row in job.run.metrics() if row.get("step") == at.step]
        return not any(name.startswith("test_") for row in rows for name in row)
    return False


def step(job: Job, stream: Iterator[Batch], at: Position) -> Step:
    """One optimiser step over `plan.accumulation` micro-batches, from `at`, which is not moved.

    When the mean loss or the gradient is not finite, weights and moments stay as they were; that is decided on the
    device, and whoever reads the step learns of it.
    """
    plan, seed = job.plan, job.config.train.seed
    waited, rows, total, logs = 0.0, [], torch.zeros((), device=plan.device), dict[str, Tensor]()
    for micro in range(plan.accumulation):
        start = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - start
        rows.append(batch.index)
        batch = to_device(batch, plan.device)
        clock = plan.clock(at.step, Draws(seed, batch.epoch, batch.index), micro)
        with autocast(plan.precision, plan.device):
            loss = job.method(batch, clock)
        value = loss.value / plan.accumulation
        value.backward()
        total += value.detach()
        for name, number in loss.logs.items():
            logs[name] = logs.get(name, 0) + number.detach() / plan.accumulation
    lr = plan.lr(at.step)
    norm = update(job.optimizer, lr, total, job.config.optim.clip)
    counted = total.isfinite() & norm.isfinite()
    if job.average is not None:
        job.average.update(at.step, counted)
    job.method.after_step(replace(clock, counted=counted))
    return Step(at.step + 1, at.consumed + plan.batch_size, lr, torch.cat(rows), waited, total, norm, logs)


def read(job: Job, unread: list[Step], at: Position) -> tuple[dict[str, float], Step | None]:
    """Wait for the device and judge the steps taken since the last time: (numbers of the last step, fault).

    Names the images of skipped steps in metrics.jsonl and faults.jsonl. `fault` is the step at which too many in a
    row were bad; what was trained after it is not judged, and is to be taken back.
    """
    found = torch.stack([torch.stack([taken.loss, taken.norm]) for taken in unread]).tolist()
    for taken, (loss, norm) in zip(unread, found, strict=True):
        if math.isfinite(loss) and math.isfinite(norm):
            at.bad_steps = 0
            continue
        at.bad_steps += 1
        names = [job.images.source.names[row] for row in taken.rows.tolist()]
        row = {"step": taken.number, "loss": None, "lr": taken.lr, "skipped": names}
        note(job, row)
        with optional(job, job.run.faults_file):
            job.run.add_fault({**row, "time": time.time()})
        job.console.warn(
            f"step {taken.number} gave a non-finite loss or gradient and was skipped; its {len(names)} images "
            "are named in faults.jsonl"
        )
        if at.bad_steps >= BAD_STEPS_IN_A_ROW:
            return {}, taken
    loss, norm = found[-1]
    return {name: float(value) for name, value in unread[-1].logs.items()} | {"loss": loss, "grad_norm": norm}, None


def roll_back(job: Job, fault: Step, at: Position, watch: Stopwatch) -> Position:
    """After several bad steps in a row: the last good checkpoint, with the data moved past where it went wrong."""
    got_past = fault.number - BAD_STEPS_IN_A_ROW >= at.fault_step  # the last good step lies there or beyond
    rollbacks = 1 if got_past else at.rollbacks + 1
    if rollbacks > MOST_ROLLBACKS:
        raise TrainingFailed(
            f"{BAD_STEPS_IN_A_ROW} non-finite steps in a row at step {fault.number}, after {MOST_ROLLBACKS} rollbacks "
            f"without getting past it; the images are named in {job.run.faults_file}. Lower optim.base_lr, set "
            "optim.clip=1, or use train.precision=fp32, and start again"
        )
    back = restore(job)
    if back is None:
        job.method.load_state_dict(fresh_method(job.config, job.plan.images).state_dict())
        job.optimizer.state.clear()
        if job.average is not None:
            job.average.load({})
        back = begin(job)
    back.consumed = fault.consumed + SKIP_AHEAD_BATCHES * job.plan.batch_size
    back.bad_steps, back.rollbacks, back.fault_step = 0, rollbacks, fault.number
    with optional(job, job.run.metrics_file):
        job.run.truncate_metrics(back.step)
    # Saved at once, so that a run killed now does not forget that it has been here.
    if trouble := save(job, back, watch):
        job.console.warn(trouble)
    job.console.warn(
        f"{BAD_STEPS_IN_A_ROW} non-finite steps in a row: back from step {fault.number} to {back.step}, going on "
        f"{SKIP_AHEAD_BATCHES} batches further in the data"
    )
    return back


def compile_or_say(job: Job) -> None:
    """Compile the method's transformer blocks, or say why they run as they are."""
    if reason := why_not_compiled(job.plan.device):
        job.console.warn(f"torch.compile does not work here ({reason}); training goes on without train.compile")
    elif compile_blocks(job.method):
        job.console.say("compiling the transformer blocks: the first step takes up to a minute more")
    else:
        job.console.warn(f"train.compile is for transformer blocks; {job.config.method.name} has none that it knows")


def epoch_text(done: float, total: float) -> str:
    """Return 'epoch 1.5/20.0', with more decimals for a run that is shorter than an epoch."""
    decimals = 1 if total >= 1 else 1 - math.floor(math.log10(total))
    return f"epoch {done:.{decimals}f}/{total:.{decimals}f}"


def progress_text(job: Job, samples: Samples, at: Position, loss: float, pace: Pace, watch: Stopwatch) -> str:
    """The line beside the progress bar: epoch, losses, speed, time so far."""
    images = job.plan.num_images
    losses = [f"loss {loss:.4f}", *(f"{name} {value:.4f}" for name, value in samples.losses.items())]
    epochs = epoch_text(at.consumed / images, job.plan.steps * job.plan.batch_size / images)
    return "  ".join([epochs, ", ".join(losses), pace.sentence(at.consumed), f"{duration(watch.seconds())} so far"])


def test(job: Job, judge: Judge, at: Position, stop: StopRequest) -> float:
    """Note how good the method is on its test images, and its averaged weights; returns the seconds that it took.

    Raises StopRequested, with the weights as they were.
    """
    began = time.perf_counter()
    with torch.no_grad(), eval_mode(job.method), uncompiled(), autocast(job.plan.precision, job.plan.device):
        with stop.interruptible():
            numbers = {f"test_{name}": value for name, value in judge(job.method).items()}
        if job.average is not None:
            with job.average.applied(), stop.interruptible():
                numbers |= {f"test_averaged_{name}": value for name, value in judge(job.method).items()}
    note(job, {"step": at.step, **numbers})
    job.console.say(f"step {at.step}: " + ", ".join(f"{name.replace('_', ' ')} {n:.4f}" for name, n in numbers.items()))
    return time.perf_counter() - began
