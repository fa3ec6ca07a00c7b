"""THE LOOP: trains any `Method`, from a plan, into a Run. Reads top to bottom; there are no callbacks.

Where training stands is `Position`: optimiser steps done and samples consumed. Everything random follows from it (see
`rng.py`), so a checkpoint holds weights, optimiser moments and these numbers, and a resumed run repeats the unbroken one
bit for bit on the same device. Not here: what a method computes (`methods/`), what a run will do (`plan.py`).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from unmask import checkpoint
from unmask.batch import Batch
from unmask.checkpoint import CheckpointFull, CheckpointRefused
from unmask.config import Config
from unmask.console import Console
from unmask.data.loader import Delivery, Images, eval_batches, training_batches
from unmask.evals.pictures import draw
from unmask.method import Clock, Method
from unmask.optim import make_optimizer
from unmask.plan import Plan, autocast, seed_weights
from unmask.rng import Draws
from unmask.run import Run

BAD_STEPS_IN_A_ROW = 3
SKIP_AHEAD_BATCHES = 50
MOST_ROLLBACKS = 2
MOST_FAILED_SAVES = 5
PICTURE_SAMPLE = 64


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why and what to do. The Run keeps its last good checkpoint."""


@dataclass
class Position:
    """Where training stands; saved with every checkpoint.

    `step` optimiser steps done, `consumed` samples taken from the order. `rollbacks` since the run last got past
    `fault_step`, the step where bad numbers last forced one.
    """

    step: int = 0
    consumed: int = 0
    rollbacks: int = 0
    fault_step: int = 0


@dataclass
class Pace:
    """Images and seconds since the last logged step."""

    began: float = field(default_factory=time.perf_counter)
    images: int = 0
    waited: float = 0.0

    def row(self) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self.began)
        return {"images_per_second": self.images / seconds, "data_wait": self.waited / seconds}


def train(run: Run, config: Config, plan: Plan, images: Images, console: Console) -> str:
    """Train until the plan is done or a signal asks to stop; returns "finished" or "stopped".

    Goes on from the newest sound checkpoint of the Run when there is one. Raises TrainingFailed.
    """
    seed_weights(config.train.seed)
    method = config.build(plan.images).to(plan.device)
    optimizer = make_optimizer(method, config.optim)
    at = restore(run, method, optimizer, console)
    run.truncate_metrics(at.step)
    if config.train.compile:
        method.compile()
    sample = picture_sample(images, plan)
    if at.step == 0:
        look(run, method, sample, at, config, plan)
    last_save, failed_saves, bad_steps, skipped_steps = time.monotonic(), 0, 0, 0
    run.set_status("running", at.step, total=plan.steps)

    with stop_requests() as stop, console.progress("step", plan.steps, at.step) as bar:
        stream, pace = open_stream(images, plan, at), Pace()
        while at.step < plan.steps and not stop.requested:
            loss, norm, rows, waited = step(method, optimizer, stream, run, config, plan, at, images)
            at.step += 1
            at.consumed += plan.batch_size
            pace.images += plan.batch_size
            pace.waited += waited

            value = float(loss)
            if np.isfinite(value) and np.isfinite(float(norm)):
                bad_steps = 0
                if due(at.step, config.train.log_every, plan.steps):
                    row = {"step": at.step, "loss": value, "lr": plan.lr(at.step - 1), **pace.row()}
                    run.log({**row, "grad_norm": float(norm), "images": at.consumed, "time": time.time()})
                    bar.update(
                        at.step,
                        f"loss {value:.4f}  {row['images_per_second']:.0f} images/s  "
                        f"{row['data_wait']:.0%} waiting on data",
                    )
                    pace = Pace()
            else:
                bad_steps += 1
                skipped_steps += 1
                names = [images.source.names[row] for row in rows]
                run.log(
                    {"step": at.step, "loss": None, "lr": plan.lr(at.step - 1), "skipped": names, "time": time.time()}
                )
                console.warn(
                    f"step {at.step} gave a non-finite loss or gradient and was skipped; its {len(names)} images "
                    "are named in metrics.jsonl"
                )
                if bad_steps >= BAD_STEPS_IN_A_ROW:
                    at = roll_back(run, method, optimizer, at, config, plan, console)
                    stream, pace, bad_steps = open_stream(images, plan, at), Pace(), 0
                    continue

            if due(at.step, plan.picture_every, plan.steps):
                look(run, method, sample, at, config, plan)
            waited_minutes = (time.monotonic() - last_save) / 60
            if (
                due(at.step, config.train.checkpoint_every, plan.steps)
                or waited_minutes >= config.train.checkpoint_minutes
            ):
                failed_saves = 0 if save(run, method, optimizer, at, config, console) else failed_saves + 1
                last_save = time.monotonic()
                run.set_status("running", at.step, total=plan.steps)
                if failed_saves >= MOST_FAILED_SAVES:
                    raise TrainingFailed(
                        f"{failed_saves} checkpoints in a row could not be written; make room or mend the disk, then "
                        f"`unmask resume {run.path}`"
                    )
        del stream  # closes the loader's workers

    if skipped_steps:
        console.warn(
            f"{skipped_steps} steps were skipped for non-finite numbers; their images are named in metrics.jsonl"
        )
    if at.step < plan.steps:
        save(run, method, optimizer, at, config, console)
    state = "finished" if at.step >= plan.steps else "stopped"
    run.set_status(state, at.step, total=plan.steps)
    if checkpoint.newest_step(run) != at.step:
        raise TrainingFailed(
            f"the last weights (step {at.step}) could not be written; make room and `unmask resume {run.path}`, which "
            f"repeats the steps since step {checkpoint.newest_step(run)}"
        )
    return state


def step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Delivery],
    run: Run,
    config: Config,
    plan: Plan,
    at: Position,
    images: Images,
) -> tuple[Tensor, Tensor, list[int], float]:
    """One optimiser step over `plan.accumulation` micro-batches.

    Returns the mean loss, the gradient norm (0-d tensors), the rows of the images, and the seconds spent waiting on data.
    When either number is not finite the fused optimiser leaves weights and moments untouched, on the device.
    """
    waited, rows, total = 0.0, [], torch.zeros((), device=plan.device)
    for micro in range(plan.accumulation):
        start = time.perf_counter()
        delivery = next_delivery(stream, run)
        waited += time.perf_counter() - start
        rows += delivery.batch.index.tolist()
        note_bad_files(run, images, delivery, config, at)
        batch = delivery.batch.to(plan.device)
        clock = Clock(at.step, plan.steps, Draws(config.train.seed, batch.epoch, batch.index), micro)
        with autocast(plan.precision, plan.device):
            loss = method(batch, clock)
        (loss.value / plan.accumulation).backward()
        total += loss.value.detach() / plan.accumulation
    for group in optimizer.param_groups:
        group["lr"] = plan.lr(at.step)
    parameters = [p for p in method.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.optim.clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip, norm)
    # The fused kernel's own gate, the one gradient scalers use: 1 means "leave everything as it is".
    optimizer.found_inf = (~(total.isfinite() & norm.isfinite())).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    return total, norm, rows, waited


def due(step: int, every: int, last: int) -> bool:
    """Whether something periodic happens after this step: at the first, every so many, and at the last."""
    return step % every == 0 or step in (1, last)


def open_stream(images: Images, plan: Plan, at: Position) -> Iterator[Delivery]:
    """The micro-batches from this position to the end of the plan."""
    return training_batches(
        images,
        start=at.consumed,
        batch=plan.micro_batch,
        batches=(plan.steps - at.step) * plan.accumulation,
        workers=plan.workers,
        pin=plan.device.startswith("cuda"),
    )


def next_delivery(stream: Iterator[Delivery], run: Run) -> Delivery:
    """The next micro-batch; a dead or stuck loader worker becomes a sentence."""
    try:
        return next(stream)
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise TrainingFailed(
            f"loading images stopped: {error}. A worker was killed (out of memory?) or hung on a file; "
            f"`unmask resume {run.path}` goes on from the last checkpoint, with --set data.workers=0 to see the cause"
        ) from error


def note_bad_files(run: Run, images: Images, delivery: Delivery, config: Config, at: Position) -> None:
    """Write files that went bad since the scan to the quarantine, once each; stop when there are too many."""
    for bad in delivery.bad:
        if bad.name in images.gone_bad:
            continue
        images.gone_bad.add(bad.name)
        run.add_quarantine({"name": bad.name, "code": bad.code, "detail": bad.detail, "step": at.step})
    if len(images.gone_bad) > max(1, config.data.max_bad_fraction * len(images.rows)):
        raise TrainingFailed(
            f"{len(images.gone_bad)} of {len(images.rows)} images have become unreadable since the scan, the last "
            f"{delivery.bad[-1].name} ({delivery.bad[-1].code}); see {run.quarantine_file}, bring the files back, then resume"
        )


def restore(run: Run, method: Method, optimizer: torch.optim.Optimizer, console: Console) -> Position:
    """Weights, moments and position of the newest sound checkpoint; a fresh position when there is none."""
    found = checkpoint.load_latest(run, say=console.warn)
    if found is None:
        return Position()
    method.load_state_dict(found.model)
    checkpoint.tensors_to_optimizer(optimizer, names_of(method), found.optim, found.state["optimizer"])
    return Position(**found.state["position"])


def names_of(method: Method) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in method.named_parameters()}


def save(
    run: Run, method: Method, optimizer: torch.optim.Optimizer, at: Position, config: Config, console: Console
) -> bool:
    """Write a checkpoint; a full disk or poisoned weights is said and survived. Returns whether it was written."""
    tensors, numbers = checkpoint.optimizer_to_tensors(optimizer, names_of(method))
    state = {"step": at.step, "position": asdict(at), "optimizer": numbers, "seed": config.train.seed}
    try:
        checkpoint.save(run, at.step, method.state_dict(), tensors, state, keep=config.train.keep_checkpoints)
    except (CheckpointFull, CheckpointRefused) as error:
        console.warn(str(error))
        return False
    return True


def roll_back(
    run: Run,
    method: Method,
    optimizer: torch.optim.Optimizer,
    at: Position,
    config: Config,
    plan: Plan,
    console: Console,
) -> Position:
    """After several bad steps in a row: the last good checkpoint, with the data moved past where it went wrong."""
    rollbacks = at.rollbacks + 1 if at.step <= at.fault_step else 1
    if rollbacks > MOST_ROLLBACKS:
        raise TrainingFailed(
            f"{BAD_STEPS_IN_A_ROW} non-finite steps in a row at step {at.step}, after {MOST_ROLLBACKS} rollbacks without "
            f"getting past it; the images are named in {run.metrics_file}. Lower optim.base_lr, set optim.clip=1, or use "
            "train.precision=fp32, and start again"
        )
    fault, consumed = at.step, at.consumed
    found = checkpoint.load_latest(run, say=console.warn)
    if found is None:
        seed_weights(config.train.seed)
        method.load_state_dict(config.build(plan.images).state_dict())
        optimizer.state.clear()
        at = Position()
    else:
        at = restore(run, method, optimizer, console)
    at.consumed = consumed + SKIP_AHEAD_BATCHES * plan.batch_size
    at.rollbacks, at.fault_step = rollbacks, fault
    run.truncate_metrics(at.step)
    console.warn(
        f"{BAD_STEPS_IN_A_ROW} non-finite steps in a row: back from step {fault} to {at.step}, going on "
        f"{SKIP_AHEAD_BATCHES} batches further in the data"
    )
    return at


def picture_sample(images: Images, plan: Plan) -> Batch:
    """The fixed images that are drawn during the whole run: the first ones of the source, centred."""
    fixed = Images(images.source, images.rows, images.spec, images.crop, images.seed, training=False, kept=images.kept)
    rows = images.rows[np.linspace(0, len(images.rows) - 1, min(PICTURE_SAMPLE, len(images.rows))).astype(int)]
    return next(eval_batches(fixed, rows, batch=len(rows))).to(plan.device)


@torch.no_grad()
def look(run: Run, method: Method, sample: Batch, at: Position, config: Config, plan: Plan) -> None:
    """Draw what the method makes of the sample; before the first step also keep what trivial guesses would score."""
    clock = Clock(at.step, plan.steps, Draws(config.train.seed, sample.epoch, sample.index))
    method.eval()
    with autocast(plan.precision, plan.device):
        picture = method.picture(sample, clock)
    method.train()
    draw(
        picture.first(config.train.picture_images),
        plan.images.dtype,
        run.pictures / f"step-{at.step:08d}.png",
        f"step {at.step} of {plan.steps}",
    )
    if at.step == 0:
        numbers = {name: float(value) for name, value in picture.numbers.items()}
        run.write("evals/baselines.json", {"step": 0, "images": len(sample), **numbers})


@dataclass
class StopRequest:
    """Set by a signal, read between steps."""

    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGUSR1 ask for a checkpoint after the current step; a second SIGINT leaves at once."""
    stop = StopRequest()

    def on_signal(number: int, frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            os._exit(130)  # the newest complete checkpoint stays as it is
        stop.requested = True

    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), on_signal) for name in names}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
