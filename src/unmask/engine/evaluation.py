"""Evaluate a supervised method on its test images during training."""

from __future__ import annotations

import time

import torch

from unmask.engine.compile import uncompiled
from unmask.engine.device import autocast
from unmask.engine.job import Job, Position, log_row, report_failure
from unmask.engine.pacing import evaluation_due
from unmask.engine.supervision import Evaluator
from unmask.nn.modes import eval_mode
from unmask.system.stop_requests import StopRequest


def evaluate(job: Job, evaluator: Evaluator, at: Position, stop: StopRequest) -> float:
    """Evaluate the method, and its averaged weights if there are any; log the metrics and return the duration in
    seconds.

    Raises StopRequested for a stop request, with unchanged weights.
    """
    began = time.perf_counter()
    with torch.no_grad(), eval_mode(job.method), uncompiled(), autocast(job.plan.precision, job.plan.device):
        with stop.interruptible():
            numbers = {f"test_{name}": value for name, value in evaluator(job.method).items()}
        if job.average is not None:
            with job.average.applied(), stop.interruptible():
                numbers |= {f"test_averaged_{name}": value for name, value in evaluator(job.method).items()}
    log_row(job, {"step": at.step, **numbers})
    job.console.print(
        f"step {at.step}: " + ", ".join(f"{name.replace('_', ' ')} {n:.4f}" for name, n in numbers.items())
    )
    return time.perf_counter() - began


def evaluation_missing(job: Job, at: Position) -> bool:
    """Return whether a stop request interrupted the evaluation that was due after the last step."""
    if at.step == 0 or not evaluation_due(job, at.step):
        return False
    with report_failure(job, job.run.metrics_file):
        rows = [row for row in job.run.metrics() if row.get("step") == at.step]
        return not any(name.startswith("test_") for row in rows for name in row)
    return False
