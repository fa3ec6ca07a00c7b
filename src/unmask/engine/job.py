"""What the modules of the training loop share: its inputs, objects and position, and how it logs rows and faults."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unmask.config import Config
from unmask.console import Console
from unmask.data.image_reader import ImageReader
from unmask.data.order import places
from unmask.engine.build import build_method
from unmask.engine.sharding import Distributed, whole_method
from unmask.engine.supervision import Evaluator
from unmask.engine.training_plan import Plan
from unmask.engine.world import World
from unmask.errors import UserError
from unmask.method import Method
from unmask.nn.ema import MovingAverage
from unmask.run import Run, RunGone


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of `train`.

    evaluator: evaluates a supervised method on its test images. began: the time at which training began or was resumed,
    on the clock of `time_budget.now` (None: now).
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
    """The objects that the training loop uses.

    They stay the same, except that a time budget can change the number of steps in `plan`.
    """

    run: Run
    config: Config
    plan: Plan
    images: ImageReader
    console: Console
    distributed: Distributed
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None = None

    @property
    def method(self) -> Method:
        return self.distributed.method

    @property
    def world(self) -> World:
        return self.distributed.world

    def places(self, micro: int) -> np.ndarray | None:
        """Return the places in the step's batch of the images that this process gets in a micro-batch.

        The result is None if it gets the whole micro-batch.
        """
        world, size = self.world, self.plan.micro_batch
        if world.alone:
            return None
        return micro * size + places(size, world.rank, world.size, self.images.repeats)

    def whole_method(self) -> AbstractContextManager[Method]:
        """Context manager that yields the method with all its weights, which only the writer may call."""
        return whole_method(self.distributed, lambda: build_method(self.config, self.plan.images), self.plan.device)


@dataclass
class Position:
    """The position in the training; saved with every checkpoint.

    step: optimiser steps done. consumed: number of samples used, in the order of the data set. bad_steps: number of
    consecutive steps with non-finite numbers up to now. fault_step: the step at which the last rollback happened.
    rollbacks: number of rollbacks since training last continued beyond that step.
    """

    step: int = 0
    consumed: int = 0
    bad_steps: int = 0
    rollbacks: int = 0
    fault_step: int = 0


@dataclass(frozen=True)
class Step:
    """One optimiser step. The device may still be computing it, so reading a tensor waits.

    number, consumed: the position after the step. lr: learning rate. rows: (B,) int64, rows of the step's images in the
    source. waited: seconds spent waiting for data. loss, norm: 0-d tensors, the mean loss and the gradient norm. logs:
    0-d tensors to log, by name.
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
    """Context manager for access to a file other than a checkpoint.

    An error is reported once, and training continues.
    """
    try:
        yield
    except RunGone as error:
        job.console.warn_once(str(error))
    except (OSError, UserError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        job.console.warn_once(f"cannot use {file}: {reason}; training continues without it")


def log_row(job: Job, row: Mapping[str, object]) -> None:
    """Append a row to metrics.jsonl, with the current time."""
    with report_failure(job, job.run.metrics_file):
        job.run.log({**row, "time": time.time()})
