"""Points of training at which tests inject faults.

The package itself never sets such functions. A test that needs a non-finite loss, a signal, a stall or a full disk at a
certain step sets a function for a `with` block, instead of monkeypatching the loop:

    def spoil(job, step):
        return replace(step, loss=torch.tensor(float("nan"))) if step.number == 4 else step

    with injected(FaultPoints(after_step=spoil)):
        pretrain(images, out=folder)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unmask.engine.job import Job, Position, Step
    from unmask.run import Run


def _nothing_at_start(run: Run) -> None: ...


def _nothing_before(job: Job, at: Position) -> None: ...


def _unchanged(job: Job, step: Step) -> Step:
    return step


def _nothing_written(path: Path) -> None: ...


@dataclass(frozen=True)
class FaultPoints:
    """Functions that training calls; by default they do nothing.

    before_training: called once, after the images have been scanned and the run folder has been written. before_step:
    called with the position before each optimiser step; the watchdog is active, so a hang counts as a stall.
    after_step: called after each optimiser step; returns the step that the loop continues with.
    before_write: called before each file of a checkpoint is written; an OSError raised here acts like a disk error.
    """

    before_training: Callable[[Run], None] = _nothing_at_start
    before_step: Callable[[Job, Position], None] = _nothing_before
    after_step: Callable[[Job, Step], Step] = _unchanged
    before_write: Callable[[Path], None] = _nothing_written


_current: ContextVar[FaultPoints] = ContextVar("fault_points", default=FaultPoints())  # noqa: B039 (it is immutable)


def fault_points() -> FaultPoints:
    """Return the fault points of the current context."""
    return _current.get()


@contextmanager
def injected(points: FaultPoints) -> Iterator[None]:
    """Context manager in which training calls `points`, in place of the fault points outside it."""
    token = _current.set(points)
    try:
        yield
    finally:
        _current.reset(token)
