"""Records of the training loop: its inputs, the job made from them, the position, and one step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unmask.config import Config
from unmask.console import Console
from unmask.data.image_reader import ImageReader
from unmask.engine.plan import Plan
from unmask.engine.supervision import Evaluator
from unmask.errors import UserError
from unmask.method import Method
from unmask.nn.ema import MovingAverage
from unmask.run import Run, RunGone


@dataclass(frozen=True)
class TrainingInputs:
    """What `train` needs.

    evaluator: measures a supervised method on its test images. began: when this part of the training began, on the
    clock of `time_budget.now`; None for now.
    """

    run: Run
    config: Config
    plan: Plan
    images: ImageReader
    console: Console
    evaluator: Evaluator | None = None
    began: float | None = None


@dataclass(frozen=True)
class Job:
    """What is trained, on which images, into which Run. Only the number of steps in `plan` changes, with a budget."""

    run: Run
    config: Config
    plan: Plan
    images: ImageReader
    console: Console
    method: Method
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None = None


@dataclass
class Position:
    """How far training is; saved with every checkpoint.

    step: optimiser steps done. consumed: samples taken from the order of the data set. bad_steps: the newest steps in a
    row that gave non-finite numbers. fault_step: the step at which such numbers last forced a rollback. rollbacks:
    how often since training last got past that step.
    """

    step: int = 0
    consumed: int = 0
    bad_steps: int = 0
    rollbacks: int = 0
    fault_step: int = 0


@dataclass(frozen=True)
class Step:
    """One optimiser step, which the device may still be computing: reading a tensor waits for it.

    number, consumed: the position after the step. lr: its learning rate. rows: (B,) int64, its images. waited: seconds
    spent waiting for data. loss, norm: 0-d tensors, the mean loss and the gradient norm. logs: 0-d tensors to log.
    """

    number: int
    consumed: int
    lr: float
    rows: Tensor
    waited: float
    loss: Tensor
    norm: Tensor
    logs: dict[str, Tensor]


@contextmanager
def report_failure(job: Job, file: Path) -> Iterator[None]:
    """Context manager around the use of any file but a checkpoint: a failure is reported once, training continues."""
    try:
        yield
    except RunGone as error:
        job.console.warn_once(str(error))
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        job.console.warn_once(f"cannot use {file}: {reason}; training continues without it")


def log_row(job: Job, row: Mapping[str, object]) -> None:
    """Append a row, and the time, to metrics.jsonl."""
    with report_failure(job, job.run.metrics_file):
        job.run.log({**row, "time": time.time()})
