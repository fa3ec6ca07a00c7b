"""The training loop for any `Method`. Read it from top to bottom: `train`, `Loop.run`, `step`.

The state of the training is its `Position`: the numbers of optimiser steps done and of samples used. All random draws
depend on the position (see `rng.py`), so a checkpoint only contains weights, optimiser state and these numbers, and a
resumed run is bit-identical to an uninterrupted run on the same device. Methods are in `methods/`, and the plan of a
run is in `engine/training_plan.py`.

The host does not wait for the device at every step: it reads the loss of a step only to log, draw, evaluate or save. A
step with non-finite numbers leaves the weights unchanged, whether or not the host has read it, and a rollback depends
on the number of the failed step, not on when the host notices it. So the result does not depend on when the host reads.
(A rollback returns to the newest checkpoint, whose step may depend on the time, so two runs may differ after a
rollback.)

With a time budget the number of steps is adapted to the speed (`engine/time_budget.py`). The number changes at logged
steps only, and is written to plan.json before the change takes effect, so a resumed run repeats all steps exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from unmask.batch import Batch
from unmask.config import Config
from unmask.console import Bar, Console, duration
from unmask.data.device_crops import to_device
from unmask.engine import checkpoint
from unmask.engine.build import build_method
from unmask.engine.checkpoint_writer import CheckpointWriter
from unmask.engine.compile import compile_blocks, why_not_compiled
from unmask.engine.device import autocast
from unmask.engine.evaluation import evaluate, evaluation_missing
from unmask.engine.fault_points import fault_points
from unmask.engine.guard import Guard, guarded
from unmask.engine.heartbeat import Heartbeat
from unmask.engine.host_memory import memory_kept
from unmask.engine.job import Job, Position, Step, TrainingInputs, log_row, report_failure
from unmask.engine.pacing import (
    Pace,
    Stopwatch,
    adjust_steps,
    affordable,
    due,
    evaluation_due,
    open_pacer,
    picture_due,
)
from unmask.engine.samples import Samples, draw_and_score, picture_missing
from unmask.engine.sharding import Distributed, distribute, recompute_blocks
from unmask.engine.stream import loading_failures, open_stream
from unmask.engine.supervision import Evaluator
from unmask.engine.time_budget import Pacer
from unmask.engine.training_plan import Plan
from unmask.engine.training_state import (
    BAD_STEPS_IN_A_ROW,
    describe_saved,
    initialise,
    open_writer,
    record_stop,
    restore,
    roll_back,
    save,
)
from unmask.engine.world import World, blame_other_process, current
from unmask.errors import TrainingFailed
from unmask.method import Method
from unmask.nn.ema import MovingAverage
from unmask.optim import make_optimizer, update
from unmask.rng import Draws
from unmask.run import STATUS
from unmask.system.stop_requests import StopRequest, StopRequested, stop_requests

MOST_FAILED_SAVES = 5
MOST_UNREAD_STEPS = 32
OTHERS_SECONDS = 10.0  # longest wait for a checkpoint after an error, because other processes may not finish theirs
REPORTED_CHANGE = 1.2  # print the number of steps when it has changed by this factor

Outcome = Literal["finished", "stopped"]


def train(inputs: TrainingInputs) -> Outcome:
    """Train to the last step of the plan, or until a signal requests a stop.

    Continues from the newest intact checkpoint of the run if there is one. If a file other than a checkpoint cannot be
    written, the error is reported once and training continues. The caller records the state "finished", because the
    result of a supervised run is written after this call. Raises TrainingFailed.
    """
    run, plan, stopwatch = inputs.run, inputs.plan, Stopwatch(inputs.run, inputs.began)
    with (
        stop_requests() as stop,
        loading_failures(run),
        memory_kept(plan.device),
        guarded(run, plan, stop, stopwatch) as guard,
    ):
        try:
            loop = Loop.start(inputs, stop, guard, stopwatch)
            loop.run()
        except StopRequested:  # the update may be incomplete, so the last checkpoint counts
            record_stop(run, plan, checkpoint.newest_step(run) or 0, stopwatch)
            return "stopped"
        except RuntimeError as error:
            blame_other_process(error)
            raise
    return loop.finish()


@dataclass(frozen=True)
class Due:
    """Actions that are due after a step. read: whether to wait for the device, even if nothing else is due."""

    log: bool
    picture: bool
    evaluation: bool
    save: bool
    read: bool

    @property
    def anything(self) -> bool:
        return self.log or self.picture or self.evaluation or self.save or self.read


@dataclass
class Loop:
    """The training loop. unread: steps whose results have not been read from the device."""

    job: Job
    position: Position
    writer: CheckpointWriter
    evaluator: Evaluator | None
    pacer: Pacer
    samples: Samples
    stop: StopRequest
    guard: Guard
    stopwatch: Stopwatch
    unread: list[Step] = field(default_factory=list)
    stopping: bool = False
    evaluation_interrupted: bool = False
    failed_saves: int = 0

    def __post_init__(self) -> None:
        self.stream = open_stream(self.job, self.position, self.guard)
        self.pace = Pace(self.position.consumed)
        self.first_step = self.position.step + 1
        self.reported_steps = self.job.plan.steps
        self.last_save = time.monotonic()
        self.heartbeat = Heartbeat(self.job.run)
        self.heartbeat.beat(self.position.step)

    @classmethod
    def start(cls, inputs: TrainingInputs, stop: StopRequest, guard: Guard, stopwatch: Stopwatch) -> Loop:
        """Build the method, restore or initialise its state, and draw the first picture. May raise StopRequested."""
        run, config, plan, images = inputs.run, inputs.config, inputs.plan, inputs.images
        fault_points().before_training(run)
        world = current()
        stop.postponed = not world.alone  # a stop request is agreed after each step, see `what_is_due`
        with stop.interruptible():
            distributed = build_distributed(config, plan, inputs.console, world)
            decay = config.optim.average
            job = Job(
                run=run,
                config=config,
                plan=plan,
                images=images,
                console=inputs.console,
                distributed=distributed,
                optimizer=make_optimizer(distributed.method, config.optim),
                average=None if decay is None else MovingAverage(distributed.method, decay),
            )
            writer = open_writer(job)
            position = restore(job) or initialise(job)
            pacer = open_pacer(job, stopwatch, inputs.evaluator)
            with report_failure(job, run.metrics_file):
                run.truncate_metrics(position.step or -1)  # the first picture, which is drawn again, logs a row too
            with report_failure(job, run.quarantine_file):
                earlier = world.from_writer(run.quarantine)
                images.gone_bad.update(row["name"] for row in earlier if "step" in row and row.get("code") != "CHANGED")
            samples = world.on_writer(lambda: Samples.of(images, plan)) or Samples.nothing()
        if position.step == 0:
            with pacer.aside("picture"):
                draw_and_score(job, samples, position, stop)
        with report_failure(job, run.path / STATUS):
            run.set_status("running", position.step, total=plan.steps, seconds=stopwatch.seconds())
        stop.kept = describe_saved(run)
        return cls(job, position, writer, inputs.evaluator, pacer, samples, stop, guard, stopwatch)

    def run(self) -> None:
        """Train to the last step of the plan or a stop request, and save. Raises StopRequested, TrainingFailed."""
        try:
            with self.job.console.progress("step", self.job.plan.steps, self.position.step) as bar:
                self.repeat_interrupted()
                while self.position.step < self.job.plan.steps and not self.stopping:
                    self.take_step()
                    now = self.what_is_due()
                    if not now.anything:
                        continue
                    numbers, fault = self.read_steps()
                    if fault is not None:
                        self.roll_back(fault)
                        continue
                    if now.log and self.position.bad_steps == 0:
                        self.log(numbers, bar)
                    interrupted = self.draw_and_evaluate(now)
                    if now.save or interrupted:
                        self.save()
                    if now.log and not self.stopping:
                        self.adjust_steps(bar)
                    self.unread = []
        except BaseException:
            self.writer.wait(None if self.job.world.alone else OTHERS_SECONDS)
            raise
        finally:
            self.stream.close()  # ends the loader's workers

    def repeat_interrupted(self) -> None:
        """Repeat the picture and the evaluation during which the run was stopped, if any. Raises StopRequested."""
        job, at = self.job, self.position
        if picture_missing(job, at) and affordable(job, self.pacer, "picture", at):
            with self.pacer.aside("picture"):
                draw_and_score(job, self.samples, at, self.stop)
        if self.evaluator is None or not evaluation_missing(job, at):
            return
        if affordable(job, self.pacer, "evaluation", at):
            with self.pacer.aside("evaluation"):
                evaluate(job, self.evaluator, at, self.stop)

    def take_step(self) -> None:
        """Launch one optimiser step, unless a stop is requested during the wait for its data.

        Raises StopRequested for a stop request while torch.compile runs, which may interrupt the update.
        """
        compiling = self.job.config.train.compile and self.position.step + 1 == self.first_step
        try:
            with self.guard.step(self.position.step + 1, compiling=compiling):
                fault_points().before_step(self.job, self.position)
                taken = fault_points().after_step(self.job, step(self.job, self.stream, self.position))
        except StopRequested:
            if compiling:
                raise
            self.job.optimizer.zero_grad()  # the stop was requested during a wait for data, before the update
            self.stopping = True
            return
        self.unread.append(taken)
        self.position.step, self.position.consumed = taken.number, taken.consumed
        self.pace.waited += taken.waited
        self.heartbeat.beat(self.position.step)

    def what_is_due(self) -> Due:
        """Return which actions are due after the newest step; all processes agree on stop requests and clocks."""
        number, train, last = self.position.step, self.job.config.train, self.job.plan.steps
        self.stopping, slow, late = self.job.world.any(
            self.stopping or self.stop.requested,
            self.pacer.due(),
            (time.monotonic() - self.last_save) / 60 >= train.checkpoint_minutes,
        )
        is_new = bool(self.unread)  # False if the step was read before and the wait for the next one was interrupted
        return Due(
            log=is_new and (due(number, train.log_every, last) or slow),
            picture=is_new and picture_due(self.job, number),
            evaluation=is_new and self.evaluator is not None and evaluation_due(self.job, number),
            save=due(number, train.checkpoint_every, last) or self.stopping or late,
            read=len(self.unread) >= MOST_UNREAD_STEPS,
        )

    def read_steps(self) -> tuple[dict[str, float], Step | None]:
        """Wait for the device and check the steps since the last call; see `read`."""
        if not self.unread:
            return {}, None
        with self.guard.step(self.position.step):
            return read(self.job, self.unread, self.position)

    def roll_back(self, fault: Step) -> None:
        """Continue from the newest checkpoint; see `training_state.roll_back`. Raises TrainingFailed."""
        self.stream.close()
        self.finish_saving()
        self.position = roll_back(self.job, fault, self.position, self.stopwatch, self.writer)
        self.stream = open_stream(self.job, self.position, self.guard)
        self.unread, self.pace = [], Pace(self.position.consumed)
        self.pacer.restart(self.position.step)

    def log(self, numbers: dict[str, float], bar: Bar) -> None:
        """Append the newest step to metrics.jsonl and move the progress bar."""
        at = self.position
        row = {"step": at.step, "lr": self.unread[-1].lr, "images": at.consumed, **self.pace.row(at.consumed)}
        log_row(self.job, row | numbers)
        if at.step == 1:
            bar.begin(1)  # exclude the first step from the estimated time left, because it is slower
        bar.update(at.step, self.progress_text(numbers["loss"]))
        self.pace = Pace(at.consumed)

    def progress_text(self, loss: float) -> str:
        """Return the text beside the progress bar: epoch, losses, speed, time so far."""
        images, consumed = self.job.plan.num_images, self.position.consumed
        losses = [f"loss {loss:.4f}", *(f"{name} {value:.4f}" for name, value in self.samples.losses.items())]
        epochs = epoch_text(consumed / images, self.job.plan.steps * self.job.plan.batch_size / images)
        so_far = f"{duration(self.stopwatch.seconds())} so far"
        return "  ".join([epochs, ", ".join(losses), self.pace.text(consumed), so_far])

    def draw_and_evaluate(self, now: Due) -> bool:
        """Draw a picture and evaluate if that is due; return whether a stop request interrupted this."""
        job, at = self.job, self.position
        try:
            if now.picture and affordable(job, self.pacer, "picture", at):
                with self.pacer.aside("picture"):
                    draw_and_score(job, self.samples, at, self.stop)
            if self.evaluator is not None and now.evaluation and affordable(job, self.pacer, "evaluation", at):
                with self.pacer.aside("evaluation"):
                    self.pace.began += evaluate(job, self.evaluator, at, self.stop)
        except StopRequested:
            self.stopping = self.evaluation_interrupted = True
            return True
        return False

    def save(self) -> None:
        """Begin to write a checkpoint, and wait for it at the end of training or if the one before failed.

        Raises TrainingFailed if several checkpoints in a row could not be written.
        """
        with self.pacer.aside("save"):
            self.finish_saving()
            save(self.job, self.position, self.stopwatch, self.writer)
            if self.stopping or self.position.step >= self.job.plan.steps or self.failed_saves:
                self.finish_saving()
        self.last_save = time.monotonic()

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if any. Raises TrainingFailed as `save` does."""
        if not self.writer.busy:
            return
        run, reason = self.job.run, self.writer.finish()
        self.failed_saves = self.failed_saves + 1 if reason else 0
        self.pacer.expect("last save", self.writer.seconds)
        self.stop.kept = describe_saved(run)
        if reason:
            self.job.console.warn(reason)
        if self.failed_saves >= MOST_FAILED_SAVES:
            raise TrainingFailed(
                f"{self.failed_saves} checkpoints in a row could not be written, the last: {reason}. Fix the cause, "
                f"then `unmask resume {run.path}`"
            )

    def adjust_steps(self, bar: Bar) -> None:
        """Adapt the number of steps to the time budget, and report a large change."""
        self.job = adjust_steps(self.job, self.pacer, self.position)
        bar.total = steps = self.job.plan.steps
        if not self.reported_steps / REPORTED_CHANGE < steps < self.reported_steps * REPORTED_CHANGE:
            self.reported_steps = steps
            self.job.console.print(
                f"step {self.position.step}: {steps} steps in all now, to fit the budget at this speed"
            )

    def finish(self) -> Outcome:
        """Check that the last weights are saved, and record a stop in the status. Raises TrainingFailed, RunGone."""
        run, plan, at, console = self.job.run, self.job.plan, self.position, self.job.console
        self.finish_saving()
        with report_failure(self.job, run.metrics_file):
            if skipped := sum("skipped" in row for row in run.metrics()):
                console.warn(f"{skipped} steps with non-finite numbers were skipped; faults.jsonl lists their images")
        run.require_present()
        if (saved := self.job.world.from_writer(lambda: checkpoint.newest_step(run))) != at.step:
            raise TrainingFailed(
                f"the last weights (step {at.step}) could not be written; free disk space, then repeat the steps since "
                f"step {saved or 0} with `unmask resume {run.path}`"
            )
        if at.step < plan.steps or self.evaluation_interrupted:
            record_stop(run, plan, at.step, self.stopwatch)
            return "stopped"
        with report_failure(self.job, run.path / STATUS):
            run.set_status("running", at.step, total=plan.steps, seconds=self.stopwatch.seconds())
        return "finished"


def step(job: Job, stream: Iterator[Batch], at: Position) -> Step:
    """Launch one optimiser step over `plan.accumulation` micro-batches from position `at`, which is not modified.

    If the mean loss or the gradient is not finite, the device leaves weights and optimiser state unchanged, and `read`
    reports the step later.
    """
    plan, seed = job.plan, job.config.train.seed
    waited, rows, total, logs = 0.0, [], torch.zeros((), device=plan.device), dict[str, Tensor]()
    for micro in range(plan.accumulation):
        start = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - start
        rows.append(batch.index)
        batch = to_device(batch, plan.device)
        clock = plan.clock(at.step, Draws(seed, batch.epoch, batch.index), micro, job.places(micro))
        with job.distributed.accumulating(last=micro + 1 == plan.accumulation):
            with autocast(plan.precision, plan.device):
                loss = job.distributed.loss(batch, clock)
            value = loss.value / plan.accumulation
            value.backward()
        total += value.detach()
        for name, number in loss.logs.items():
            logs[name] = logs.get(name, 0) + number.detach() / plan.accumulation
    total, *numbers = job.world.means(total, *logs.values())
    logs = dict(zip(logs, numbers, strict=True))
    lr = plan.lr(at.step)
    norm = update(job.optimizer, lr, total, job.config.optim.clip)
    counted = total.isfinite() & norm.isfinite()
    if job.average is not None:
        job.average.update(at.step, counted)
    job.method.after_step(replace(clock, counted=counted))
    return Step(
        number=at.step + 1,
        consumed=at.consumed + plan.batch_size,
        lr=lr,
        rows=torch.cat(rows),
        waited=waited,
        loss=total,
        norm=norm,
        logs=logs,
    )


def read(job: Job, unread: list[Step], at: Position) -> tuple[dict[str, float], Step | None]:
    """Wait for the device and check the steps since the last call; return (numbers of the newest step, fault).

    fault: the step that requires a rollback, because too many steps in a row were non-finite (None: no rollback). Later
    steps are then not checked, because the rollback undoes them. The images of skipped steps are recorded in
    metrics.jsonl and faults.jsonl.
    """
    found = torch.stack([torch.stack([taken.loss, taken.norm]) for taken in unread]).tolist()
    for taken, (loss, norm) in zip(unread, found, strict=True):
        if math.isfinite(loss) and math.isfinite(norm):
            at.bad_steps = 0
            continue
        at.bad_steps += 1
        names = [job.images.source.names[row] for rows in job.world.gather(taken.rows.tolist()) for row in rows]
        row = {"step": taken.number, "loss": None, "lr": taken.lr, "skipped": names}
        log_row(job, row)
        with report_failure(job, job.run.faults_file):
            job.run.add_fault({**row, "time": time.time()})
        job.console.warn(
            f"step {taken.number} had a non-finite loss or gradient and was skipped; faults.jsonl lists its "
            f"{len(names)} images"
        )
        if at.bad_steps >= BAD_STEPS_IN_A_ROW:
            return {}, taken
    loss, norm = found[-1]
    return {name: float(value) for name, value in unread[-1].logs.items()} | {"loss": loss, "grad_norm": norm}, None


def epoch_text(done: float, total: float) -> str:
    """Return 'epoch 1.5/20.0', with more decimals for a run that is shorter than an epoch."""
    decimals = 1 if total >= 1 else 1 - math.floor(math.log10(total))
    return f"epoch {done:.{decimals}f}/{total:.{decimals}f}"


def build_distributed(config: Config, plan: Plan, console: Console, world: World) -> Distributed:
    """Build the method, apply train.recompute and train.compile, and distribute it over the processes."""
    kind = "none" if world.alone else plan.parallel
    method = build_method(config, plan.images, empty=kind in ("fsdp", "hsdp"))
    if config.train.recompute and not recompute_blocks(method):
        console.warn(f"train.recompute has no effect: {config.method.name} has no transformer blocks")
    if config.train.compile:
        compile_or_explain(method, config, plan, console)
    return distribute(
        method,
        kind,
        world,
        precision=plan.precision,
        device=plan.device,
        divide_gradients=plan.divide_gradients,
    )


def compile_or_explain(method: Method, config: Config, plan: Plan, console: Console) -> None:
    """Compile the transformer blocks of the method, or warn why they run uncompiled."""
    if reason := why_not_compiled(plan.device):
        console.warn(f"torch.compile does not work here ({reason}); training continues without train.compile")
    elif compile_blocks(method):
        console.print("compiling the transformer blocks: the first step takes up to a minute longer")
    else:
        console.warn(f"train.compile has no effect: {config.method.name} has no transformer blocks to compile")
