"""Faults for tests of training, injected at the points of `unmask.engine.fault_points`."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unmask.engine.fault_points import FaultPoints, injected


@contextmanager
def faults(**points: Callable) -> Iterator[None]:
    """Context manager within which training calls the given points; `FaultPoints` says which there are."""
    with injected(FaultPoints(**points)):
        yield


@contextmanager
def signal_after(number: int, sign: int = signal.SIGTERM) -> Iterator[None]:
    """Context manager in which this process gets a signal when optimiser step `number` (1-based) has been taken."""

    def after_step(job, step):
        if step.number == number:
            os.kill(os.getpid(), sign)
        return step

    with faults(after_step=after_step):
        yield


@contextmanager
def error_before(number: int, error: BaseException) -> Iterator[None]:
    """Context manager in which `error` is raised in place of optimiser step `number` (1-based)."""

    def before_step(job, at):
        if at.step + 1 == number:
            raise error

    with faults(before_step=before_step):
        yield
