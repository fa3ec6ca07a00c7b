"""Evaluate a supervised method on its test images during training."""

from __future__ import annotations

import time

import torch

from unmask.engine.compile import uncompiled
from unmask.engine.device import autocast
from unmask.engine.job import Job, Position, log_row, report_failure
from unmask.engine.pacing import evaluation_due
from unmask.engine.supervision import Evaluator
from unmask.method import Method
from unmask.nn.modes import eval_mode
from unmask.system.stop_requests import StopRequest


def evaluate(job: Job, evaluator: Evaluator, at: Position, stop: StopRequest) -> float:
    """Evaluate the method, and its averaged weights if there are any; log the metrics and return the duration in
    seconds.

    Raises StopRequested for a stop request, with unchanged weights.
    """
    began = time.perf_counter()
    numbers = {f"test_{name}": value for name, value in measure(job, evaluator, stop).items()}
    if job.average is not None:
        with job.average.applied():
            numbers |= {f"test_averaged_{name}": value for name, value in measure(job, evaluator, stop).items()}
    log_row(job, {"step": at.step, **numbers})
    job.console.print(
        f"step {at.step}: " + ", ".join(f"{name.replace('_', ' ')} {n:.4f}" for name, n in numbers.items())
    )
    return time.perf_counter() - began


def measure(job: Job, evaluator: Evaluator, stop: StopRequest) -> dict[str, float]:
    """Return the metrics of the method with its current weights, by name. Raises StopRequested."""

    def numbers(method: Method) -> dict[str, float]:
        cast = autocast(job.plan.precision, job.plan.device)
        with torch.no_grad(), eval_mode(method), uncompiled(), cast, stop.interruptible():
            return evaluator(method)

    with job.whole_method() as method:
        return job.world.unless_stopped(stop, lambda: numbers(method))


def evaluation_missing(job: Job, at: Position) -> bool:
    """Return whether a stop request interrupted the evaluation that was due after the last step."""
    if at.step == 0 or not evaluation_due(job, at.step):
        return False
    with report_failure(job, job.run.metrics_file):
        rows = job.world.from_writer(lambda: [row for row in job.run.metrics() if row.get("step") == at.step])
        return not any(name.startswith("test_") for row in rows for name in row)
    return False
