"""Decide when the training loop logs, draws, evaluates and saves, and how many steps fit into a budget."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch

from unmask.console import duration
from unmask.engine import time_budget
from unmask.engine.compile import uncompiled
from unmask.engine.device import autocast
from unmask.engine.job import Job, Position, report_failure
from unmask.engine.supervision import Evaluator
from unmask.engine.time_budget import Pacer
from unmask.engine.training_plan import Plan
from unmask.errors import UserError
from unmask.nn.modes import eval_mode
from unmask.run import Run, RunGone

REPORT_SECONDS = 1.5  # seconds reserved for writing the report after the last step


class Stopwatch:
    """Measures the seconds of training, including those before a resume, which the run's status records."""

    def __init__(self, run: Run, began: float | None = None) -> None:
        self.began = time_budget.now() if began is None else began
        self.before = run.status().seconds

    def seconds(self) -> float:
        return self.before + time_budget.now() - self.began


def open_pacer(job: Job, stopwatch: Stopwatch, evaluator: Evaluator | None) -> Pacer:
    """Return the `Pacer` of a job. Without a time budget, the pacer never changes the number of steps.

    A resumed run repeats some steps exactly, so the number of steps cannot change before the last logged step or the
    last recorded change.
    """
    plan = job.plan
    if plan.budget is None:
        return Pacer(math.inf, 0.0)
    known = [replan.step for replan in plan.replans]
    with report_failure(job, job.run.metrics_file):
        known += job.world.from_writer(lambda: [row.get("step", 0) for row in job.run.metrics()])
    pacer = Pacer(plan.budget, plan.startup + stopwatch.seconds(), fixed=max(known, default=0))
    if evaluator is not None:
        times, estimate = (1 if job.config.optim.average is None else 2), evaluator.estimate_seconds
        with job.whole_method() as method:

            def seconds() -> float:
                with torch.no_grad(), eval_mode(method), uncompiled(), autocast(plan.precision, plan.device):
                    return estimate(method)

            pacer.expect("evaluation", job.world.from_writer(seconds) * times)
    return pacer


def picture_due(job: Job, step: int) -> bool:
    """Return whether to draw a picture after `step`. The default interval is a fixed share of the training."""
    plan, wanted = job.plan, job.config.train.picture_every
    if wanted is None and plan.replans:
        return plan.passed(step, plan.picture_every) or step in (1, plan.steps)
    return due(step, plan.picture_every, plan.steps)


def evaluation_due(job: Job, step: int) -> bool:
    """Return whether to evaluate a supervised run after `step`. The default interval is a share of the training."""
    plan = job.plan
    if step == plan.steps:
        return True
    if job.config.train.test_every is None and plan.replans:
        return plan.passed(step, plan.test_every or plan.first_steps)
    return step % (plan.test_every or plan.steps) == 0


def closing_seconds(pacer: Pacer) -> float:
    """Estimate the seconds from the last step to the end of the command.

    This time includes an evaluation, a picture, a checkpoint, the final result and the report.
    """
    return 2 * pacer.cost("evaluation") + pacer.cost("picture") + pacer.cost("last save") + REPORT_SECONDS


def affordable(job: Job, pacer: Pacer, kind: str, at: Position) -> bool:
    """Return whether there is time for a picture or an evaluation, because most of the budget is left for training.

    The result is always True at the last step.
    """
    if job.plan.budget is None or at.step == job.plan.steps:
        return True
    if job.world.from_writer(lambda: pacer.affords(kind, closing_seconds(pacer))):
        return True
    job.console.warn_once(
        f"no {kind}s before the last step: each takes about {pacer.cost(kind):.2g} s, and most of the budget of "
        f"{duration(job.plan.budget)} is reserved for training"
    )
    return False


def adjust_steps(job: Job, pacer: Pacer, at: Position) -> Job:
    """Return the job with the number of steps that fits the budget, after writing it to plan.json."""
    if job.plan.budget is None or at.step >= job.plan.steps:
        return job
    return replace(job, plan=job.world.from_writer(lambda: adjusted_plan(job, pacer, at)))


def adjusted_plan(job: Job, pacer: Pacer, at: Position) -> Plan:
    """Return the plan with the number of steps that fits the budget, after writing it to plan.json."""
    plan, train = job.plan, job.config.train
    closing = closing_seconds(pacer)
    rest = closing + (plan.steps - at.step) // train.checkpoint_every * pacer.cost("save")
    for kind, every in (("picture", plan.picture_every), ("evaluation", plan.test_every)):
        if every and pacer.affords(kind, closing):
            rest += max(0, plan.times(plan.steps, every) - plan.times(at.step, every) - 1) * pacer.cost(kind)
    steps = pacer.steps(at.step, plan.steps, rest)
    if steps == plan.steps:
        return plan
    changed = plan.replanned(at.step, steps)
    try:
        job.run.write("plan.json", changed.model_dump(mode="json"))
    except (OSError, UserError, RunGone) as error:
        job.console.warn_once(
            f"cannot write {job.run.path / 'plan.json'}: {error}; the number of steps stays {plan.steps}"
        )
        return plan
    return changed


def due(step: int, every: int, last: int) -> bool:
    """Return whether a periodic action is due after `step`: at step 1, multiples of `every`, and the last step."""
    return step % every == 0 or step in (1, last)


@dataclass
class Pace:
    """Throughput since the last logged step. start: samples used until then. waited: seconds spent waiting for data."""

    start: int
    waited: float = 0.0

    def __post_init__(self) -> None:
        self.began = time.perf_counter()

    def row(self, consumed: int) -> dict[str, float]:
        """Return images per second and the share of time spent waiting, when `consumed` samples have been used."""
        seconds = max(1e-9, time.perf_counter() - self.began)
        return {"images_per_second": (consumed - self.start) / seconds, "data_wait": self.waited / seconds}

    def text(self, consumed: int) -> str:
        """Return the throughput for the progress line."""
        row = self.row(consumed)
        return f"{row['images_per_second']:.0f} images/s  {row['data_wait']:.0%} waiting on data"
