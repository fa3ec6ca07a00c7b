"""What the training loop works on: the job, which is fixed, and the position, which moves."""

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
from unmask.data.image_reader import Images
from unmask.engine.plan import Plan
from unmask.errors import UserError
from unmask.method import Method
from unmask.nn.ema import MovingAverage
from unmask.run import Run, RunGone


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
    average: MovingAverage | None = None


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
