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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from unmask.batch import Batch
from unmask.config import Config
from unmask.console import Console, duration
from unmask.data.decode.decode import BadImage
from unmask.data.device_crops import to_device
from unmask.data.loader import Delivery, Images, Taken, training_batches
from unmask.engine import checkpoint, time_budget
from unmask.engine.checkpoint import CheckpointFull, CheckpointRefused
from unmask.engine.compile import compile_blocks, uncompiled, why_not_compiled
from unmask.engine.device import autocast
from unmask.engine.host_memory import memory_kept
from unmask.engine.load import take_weights
from unmask.engine.plan import Plan, fresh_method
from unmask.engine.time_budget import Pacer
from unmask.errors import LoadingFailed, TrainingFailed, UserError
from unmask.method import Method
from unmask.nn.modes import eval_mode
from unmask.optim import average_weights, averaged, make_optimizer, update
from unmask.report.pictures import draw
from unmask.rng import Draws
from unmask.run import STATUS, Run, RunGone
from unmask.system.stalls import VARIABLE, Stalled, Watchdog, stall_seconds, write_stacks
from unmask.system.stop_requests import StopRequest, StopRequested, stop_requests

BAD_STEPS_IN_A_ROW = 3
SKIP_AHEAD_BATCHES = 50
MOST_ROLLBACKS = 2
MOST_FAILED_SAVES = 5
MOST_UNREAD_STEPS = 32
ENDLESS = 1 << 40  # micro-batches: with a budget the last step is not known
REPORT_SECONDS = 1.5  # to write the report after the last step, which is part of a budget
SAID_CHANGE = 1.2  # a number of steps so many times larger or smaller is reported
BASELINES = "evals/baselines.json"
PICTURE_SAMPLE = 64
COMPILING_SECONDS = 1800  # the least limit of a step in which torch.compile works


class Judge(Protocol):
    """The test images of a supervised run (`tasks/`). Both get the method in eval mode, without gradients."""

    def __call__(self, method: Method) -> dict[str, float]:
        """Return how good the method is, by name."""
        ...

    def trial(self, method: Method) -> float:
        """Return the seconds that a test takes, estimated on a few images."""
        ...


@dataclass(frozen=True)
class Job:
    """What is trained on what, and where to: the same from the first step to the last."""

    run: Run
    config: Config
    plan: Plan
    images: Images
    console: Console
    method: Method
    optimizer: torch.optim.Optimizer


@dataclass
class Position:
    """Where training stands; saved with every checkpoint.

    `step` optimiser steps done, `consumed` samples taken from the order. `bad_steps` in a row until now gave non-finite
    numbers. `rollbacks` since the run last got past `fault_step`, the step where bad numbers last forced one.
    """

    step: int = 0
    consumed: int = 0
    bad_steps: int = 0
    rollbacks: int = 0
    fault_step: int = 0


@dataclass(frozen=True)
class Step:
    """One optimiser step, perhaps still being computed: reading `loss` or `norm` (0-d tensors) waits for the device.

    `number` and `consumed` are the position after it, `rows` (B,) its images, `waited` seconds it waited for data,
    `logs` what the method wants logged.
    """

    number: int
    consumed: int
    lr: float
    rows: Tensor
    waited: float
    loss: Tensor
    norm: Tensor
    logs: dict[str, Tensor]


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
                job = Job(run, config, plan, images, console, method, make_optimizer(method, config.optim))
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
                        unread.append(step(job, stream, at))
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


def stopped_at(run: Run, plan: Plan, step: int, watch: Stopwatch) -> str:
    with suppress(OSError, UserError, RunGone):  # the caller tries again, and reports it
        run.set_status("stopped", step, total=plan.steps, seconds=watch.seconds())
    return "stopped"


def not_tested(job: Job, at: Position) -> bool:
    """Whether the test that belongs to this step is missing: a stop was requested in the middle of it."""
    if at.step == 0 or not test_due(job, at.step):
        return False
    with optional(job, job.run.metrics_file):
        rows = [row for row in job.run.metrics() if row.get("step") == at.step]
        return not any(name.startswith("test_") for row in rows for name in row)
    return False


def what_is_kept(run: Run) -> str:
    """What is saved now, as a sentence for whoever ends the training at once."""
    step = checkpoint.newest_step(run)
    if step is None:
        return f"there is no checkpoint yet, and `unmask resume {run.path}` begins anew"
    return f"the checkpoint of step {step} is kept, and `unmask resume {run.path}` continues from it"


class Guard:
    """What ends a wait or a computation of the loop early: a request to stop, or no progress for too long."""

    def __init__(self, run: Run, plan: Plan, stop: StopRequest, watch: Stopwatch) -> None:
        self.run, self.plan, self.stop, self.watch = run, plan, stop, watch
        self.dog = Watchdog(stall_seconds(), self._report, on_cpu=plan.device == "cpu")

    @contextmanager
    def step(self, number: int, *, compiling: bool = False) -> Iterator[None]:
        """Context manager around a step, in which torch.compile may still be at work."""
        least = COMPILING_SECONDS if compiling else 0
        with (
            self.dog.watching(f"step {number}", at_least=least),
            self.stop.interruptible() if compiling else nullcontext(),
        ):
            yield

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Context manager around a wait for a micro-batch; loader workers are watched by their own pool."""
        with self.dog.pausing() if self.plan.workers else nullcontext(), self.stop.interruptible():
            yield
        self.dog.progressed()

    def _report(self, what: str) -> str:
        file = write_stacks(self.run.path)
        sentence = (
            f"{what} made no progress for {self.dog.waited:g} s; the stacks of all threads are in {file}. "
            f"`unmask resume {self.run.path}` continues from the last checkpoint; {VARIABLE} sets another limit"
        )
        with suppress(OSError, UserError, RunGone):
            step = checkpoint.newest_step(self.run) or 0
            seconds = self.watch.seconds()
            self.run.set_status("failed", step, total=self.plan.steps, error=sentence, seconds=seconds)
        return sentence


@contextmanager
def guarded(run: Run, plan: Plan, stop: StopRequest, watch: Stopwatch) -> Iterator[Guard]:
    """Context manager for a `Guard`; a step that stalls raises TrainingFailed."""
    guard = Guard(run, plan, stop, watch)
    with guard.dog:
        try:
            yield guard
        except Stalled:
            raise TrainingFailed(guard.dog.message) from None


class Stopwatch:
    """Seconds of training: of the earlier legs of a Run, as its status has them, and of this one."""

    def __init__(self, run: Run, began: float | None = None) -> None:
        self.began = time_budget.now() if began is None else began
        self.before = float(run.status().get("seconds", 0.0))

    def seconds(self) -> float:
        return self.before + time_budget.now() - self.began


def open_pacer(job: Job, watch: Stopwatch, judge: Judge | None) -> Pacer:
    """What counts the time of a budget; without one it never asks for anything.

    The number of steps stays as it is up to the last step that an earlier leg logged or replanned, which this one
    repeats.
    """
    plan = job.plan
    if plan.budget is None:
        return Pacer(math.inf, 0.0)
    known = [replan.step for replan in plan.replans]
    with optional(job, job.run.metrics_file):
        known += [row.get("step", 0) for row in job.run.metrics()]
    pacer = Pacer(plan.budget, plan.startup + watch.seconds(), fixed=max(known, default=0))
    if judge is not None:
        with torch.no_grad(), eval_mode(job.method), uncompiled(), autocast(plan.precision, plan.device):
            pacer.expect("test", judge.trial(job.method) * (1 if job.config.optim.average is None else 2))
    return pacer


def draw_due(job: Job, step: int) -> bool:
    """Whether a picture is drawn after this step: an interval that was not set is a share of the training."""
    plan, wanted = job.plan, job.config.train.picture_every
    if wanted is None and plan.replans:
        return plan.passed(step, plan.picture_every) or step in (1, plan.steps)
    return due(step, plan.picture_every, plan.steps)


def test_due(job: Job, step: int) -> bool:
    """Whether a supervised run is tested after this step; as `draw_due`."""
    plan = job.plan
    if step == plan.steps:
        return True
    if job.config.train.test_every is None and plan.replans:
        return plan.passed(step, plan.test_every or plan.first_steps)
    return step % (plan.test_every or plan.steps) == 0


def closing_seconds(pacer: Pacer) -> float:
    """Seconds from the last step to the end of the command: test, picture, checkpoint, the result and the report."""
    return 2 * pacer.cost("test") + pacer.cost("picture") + pacer.cost("save") + REPORT_SECONDS


def affordable(job: Job, pacer: Pacer, kind: str, at: Position) -> bool:
    """Whether a picture or a test leaves most of a budget for training; those of the last step are always made."""
    if job.plan.budget is None or at.step == job.plan.steps or pacer.affords(kind, closing_seconds(pacer)):
        return True
    job.console.warn_once(
        f"no {kind}s before the last step: one takes about {pacer.cost(kind):.2g} s, and most of the budget of "
        f"{duration(job.plan.budget)} is for training"
    )
    return False


def replanned(job: Job, pacer: Pacer, at: Position) -> Job:
    """The job with as many steps as the budget has time for; plan.json says so before the next step is taken."""
    plan, train = job.plan, job.config.train
    if plan.budget is None or at.step >= plan.steps:
        return job
    closing = closing_seconds(pacer)
    rest = closing + (plan.steps - at.step) // train.checkpoint_every * pacer.cost("save")
    for kind, every in (("picture", plan.picture_every), ("test", plan.test_every)):
        if every and pacer.affords(kind, closing):
            rest += max(0, plan.times(plan.steps, every) - plan.times(at.step, every) - 1) * pacer.cost(kind)
    steps = pacer.steps(at.step, plan.steps, rest)
    if steps == plan.steps:
        return job
    plan = plan.replanned(at.step, steps)
    try:
        job.run.write("plan.json", plan.model_dump(mode="json"))
    except (OSError, UserError, RunGone) as error:
        job.console.warn_once(
            f"cannot write {job.run.path / 'plan.json'}: {error}; the number of steps stays {job.plan.steps}"
        )
        return job
    return replace(job, plan=plan)


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
    if job.config.optim.average is not None:
        average_weights(job.optimizer, job.config.optim.average, at.step)
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


def due(step: int, every: int, last: int) -> bool:
    """Whether something periodic happens after this step: at the first, every so many, and at the last."""
    return step % every == 0 or step in (1, last)


@dataclass
class Pace:
    """Images and seconds since the last logged step, when `start` samples had been consumed."""

    start: int
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.began = time.perf_counter()

    def row(self, consumed: int) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self.began)
        return {"images_per_second": (consumed - self.start) / seconds, "data_wait": self.waited / seconds}

    def sentence(self, consumed: int) -> str:
        row = self.row(consumed)
        return f"{row['images_per_second']:.0f} images/s  {row['data_wait']:.0%} waiting on data"


@contextmanager
def optional(job: Job, file: Path) -> Iterator[None]:
    """Context manager around reading or writing anything but a checkpoint: a failure is reported once, no more."""
    try:
        yield
    except RunGone as error:
        job.console.warn_once(str(error))
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        job.console.warn_once(f"cannot use {file}: {reason}; training continues without it")


def note(job: Job, row: Mapping[str, object]) -> None:
    """Append a row, and the time, to metrics.jsonl."""
    with optional(job, job.run.metrics_file):
        job.run.log({**row, "time": time.time()})


def open_stream(job: Job, at: Position, guard: Guard) -> Iterator[Batch]:
    """The micro-batches from this position to the end of the plan; files gone bad since the scan are noted.

    Raises StopRequested when a stop is requested while waiting for one.
    """
    plan = job.plan
    deliveries = training_batches(
        job.images,
        start=at.consumed,
        batch=plan.micro_batch,
        batches=(plan.steps - at.step) * plan.accumulation if plan.budget is None else ENDLESS,
        workers=plan.workers,
        pin=plan.device.startswith("cuda"),
        folder=job.run.path,
    )
    try:
        while True:
            with guard.waiting_for_data():
                delivery = next(deliveries, None)
            if delivery is None:
                return
            quarantine(job, delivery, at)
            yield delivery.batch
    finally:
        deliveries.close()


@contextmanager
def failures_as_sentences(run: Run) -> Iterator[None]:
    """Context manager that raises TrainingFailed for a dead or stalled loader worker and for data that have gone."""
    try:
        yield
    except BadImage as error:
        raise TrainingFailed(str(error)) from error
    except LoadingFailed as error:
        raise TrainingFailed(
            f"loading images stopped: {error}. `unmask resume {run.path}` continues from the last checkpoint; after "
            f"`unmask set {run.path} data.workers=0` it reads the files itself and shows the cause"
        ) from error


def quarantine(job: Job, delivery: Delivery, at: Position) -> None:
    """Write files that went bad since the scan to quarantine.jsonl, once each; stop when there are too many."""
    images = job.images
    for bad in delivery.bad:
        if bad.name in images.gone_bad:
            continue
        images.gone_bad.add(bad.name)
        with optional(job, job.run.quarantine_file):
            job.run.add_quarantine({"name": bad.name, "code": bad.code, "detail": bad.detail, "step": at.step})
        if len(images.gone_bad) > max(1, job.config.data.max_bad_fraction * len(images.rows)):
            raise TrainingFailed(
                f"{len(images.gone_bad)} of {len(images.rows)} images have become unreadable or changed since the "
                f"scan, the last {bad.name} ({bad.code}); see {job.run.quarantine_file}, bring the files back, then "
                "resume"
            )


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
    checkpoint.require_fit(job.method, found.model, f"the checkpoint of step {found.step} of {job.run.path}")
    job.method.load_state_dict(found.model)
    checkpoint.tensors_to_optimizer(job.optimizer, names_of(job.method), found.optim, found.state["optimizer"])
    return Position(**found.state["position"])


def compile_or_say(job: Job) -> None:
    """Compile the method's transformer blocks, or say why they run as they are."""
    if reason := why_not_compiled(job.plan.device):
        job.console.warn(f"torch.compile does not work here ({reason}); training goes on without train.compile")
    elif compile_blocks(job.method):
        job.console.say("compiling the transformer blocks: the first step takes up to a minute more")
    else:
        job.console.warn(f"train.compile is for transformer blocks; {job.config.method.name} has none that it knows")


def names_of(method: Method) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in method.named_parameters()}


def save(job: Job, at: Position, watch: Stopwatch) -> str | None:
    """Write a checkpoint and the status; returns what was in the way: a full disk, weights that are not finite."""
    run, method, train = job.run, job.method, job.config.train
    tensors, numbers = checkpoint.optimizer_to_tensors(job.optimizer, names_of(method))
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


@dataclass
class Samples:
    """Images on which training is looked at, the same in every run.

    pictures: training images, drawn and scored beside what trivial guesses score. held_out: images that are not trained
    on, None where there are none. `losses` holds the newest numbers for the progress line: of the held-out images, and
    the best guess that needs no learning and sees only what the model sees.
    """

    pictures: Batch
    held_out: Batch | None
    losses: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Images, plan: Plan) -> Samples:
        held_out = fixed_images(images, plan, np.array(plan.held_out, np.int64)) if plan.held_out else None
        return cls(fixed_images(images, plan, spread(images.rows, PICTURE_SAMPLE)), held_out)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` of the rows, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def fixed_images(images: Images, plan: Plan, rows: np.ndarray) -> Batch:
    """These images without augmentation; those that cannot be read are left out. Raises TrainingFailed for none."""
    fixed = replace(images, training=False)
    drawn: list[Batch] = []
    for row in rows:
        with suppress(BadImage):  # gone bad since the scan; training meets it, replaces it and notes it
            drawn.append(fixed[Taken(np.array([row]), np.zeros(1, np.int64))].batch)
    if not drawn:
        raise TrainingFailed(f"none of {len(rows)} images of {images.source.name} can be read; bring them back, resume")
    return to_device(Batch.join(drawn), plan.device)


def progress_text(job: Job, samples: Samples, at: Position, loss: float, pace: Pace, watch: Stopwatch) -> str:
    """The line beside the progress bar: epoch, losses, speed, time so far."""
    images = job.plan.num_images
    losses = [f"loss {loss:.4f}", *(f"{name} {value:.4f}" for name, value in samples.losses.items())]
    epochs = f"epoch {at.consumed / images:.1f}/{job.plan.steps * job.plan.batch_size / images:.1f}"
    return "  ".join([epochs, ", ".join(losses), pace.sentence(at.consumed), f"{duration(watch.seconds())} so far"])


@torch.no_grad()
def look(job: Job, samples: Samples, at: Position, stop: StopRequest) -> None:
    """Draw what the method makes of the sample, and note its loss beside what trivial guesses score on the same images.

    `evals/baselines.json`: the guesses by name; under "losses" and "held_out_losses" a [step, loss] for every look.
    """
    plan, train, sample = job.plan, job.config.train, samples.pictures
    clock = plan.clock(at.step, Draws(train.seed, sample.epoch, sample.index))
    with eval_mode(job.method), uncompiled(), autocast(plan.precision, plan.device), stop.interruptible():
        picture = job.method.picture(sample, clock)._replace(valid=sample.valid)
        held_out = None if samples.held_out is None else mean_loss(job, samples.held_out, at)
    file, title = job.run.pictures / f"step-{at.step:08d}.png", f"step {at.step} of {plan.steps}"
    numbers = {name: float(value) for name, value in picture.numbers.items()}
    loss = numbers.pop("loss")
    samples.losses = {} if held_out is None else {"held out": held_out}
    if fair := {name: value for name, value in numbers.items() if not name.startswith("true_")}:
        name = min(fair, key=lambda name: fair[name])
        samples.losses[f"baseline ({name.replace('_', ' ')})"] = fair[name]
    if held_out is not None:
        note(job, {"step": at.step, "held_out_loss": held_out})
    with optional(job, job.run.pictures):
        draw(picture.spread(train.picture_images), plan.images.dtype, file, title)
    before: dict[str, Any] = {}
    if at.step > 0:
        with optional(job, job.run.path / BASELINES):
            before = job.run.read(BASELINES)
    found: dict[str, Any] = {"images": len(sample), "losses": _with(before, "losses", at.step, loss)}
    if held_out is not None and samples.held_out is not None:
        found["held_out_images"] = len(samples.held_out)
        found["held_out_losses"] = _with(before, "held_out_losses", at.step, held_out)
    with optional(job, job.run.path / BASELINES):
        job.run.write(BASELINES, found | {"guesses": numbers})


def _with(before: dict[str, Any], key: str, step: int, loss: float) -> list[list[float]]:
    return [pair for pair in before.get(key, []) if pair[0] < step] + [[step, loss]]


def mean_loss(job: Job, batch: Batch, at: Position) -> float:
    """Mean loss of the method, in eval mode, on these images in micro-batches; the masks are the same at every step."""
    plan, total = job.plan, torch.zeros((), device=job.plan.device)
    for start in range(0, len(batch), plan.micro_batch):
        part = batch[start : start + plan.micro_batch]
        clock = plan.clock(at.step, Draws(job.config.train.seed, part.epoch, part.index))
        total += job.method(part, clock).value.detach() * len(part)
    return float(total / len(batch))


def test(job: Job, judge: Judge, at: Position, stop: StopRequest) -> float:
    """Note how good the method is on its test images, and its averaged weights; returns the seconds that it took.

    Raises StopRequested, with the weights as they were.
    """
    began = time.perf_counter()
    with torch.no_grad(), eval_mode(job.method), uncompiled(), autocast(job.plan.precision, job.plan.device):
        with stop.interruptible():
            numbers = {f"test_{name}": value for name, value in judge(job.method).items()}
        if job.config.optim.average is not None:
            with averaged(job.optimizer), stop.interruptible():
                numbers |= {f"test_averaged_{name}": value for name, value in judge(job.method).items()}
    note(job, {"step": at.step, **numbers})
    job.console.say(f"step {at.step}: " + ", ".join(f"{name.replace('_', ' ')} {n:.4f}" for name, n in numbers.items()))
    return time.perf_counter() - began
