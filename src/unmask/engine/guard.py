"""Interrupt a wait or a step of the training loop on a stop request, or if it makes no progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from unmask.engine import checkpoint
from unmask.engine.pacing import Stopwatch
from unmask.engine.training_plan import Plan
from unmask.errors import TrainingFailed, UserError
from unmask.run import Run, RunGone
from unmask.system.stalls import VARIABLE, Stalled, Watchdog, stall_seconds, write_stacks
from unmask.system.stop_requests import StopRequest

COMPILING_SECONDS = 1800  # minimum time limit of a step during which torch.compile runs


class Guard:
    """Interrupts waits and steps of the training loop on a stop request, or if they make no progress."""

    def __init__(self, run: Run, plan: Plan, stop: StopRequest, stopwatch: Stopwatch) -> None:
        self.run, self.plan, self.stop, self.stopwatch = run, plan, stop, stopwatch
        self.watchdog = Watchdog(stall_seconds(), self._report, on_cpu=plan.device == "cpu")

    @contextmanager
    def step(self, number: int, *, compiling: bool = False) -> Iterator[None]:
        """Context manager around a training step.

        compiling: whether torch.compile runs in this step; then a longer time limit applies, and a stop request
        interrupts the step.
        """
        least = COMPILING_SECONDS if compiling else 0
        with (
            self.watchdog.watching(f"step {number}", at_least=least),
            self.stop.interruptible() if compiling else nullcontext(),
        ):
            yield

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Context manager around a wait for a micro-batch. Loader workers have their own time limit."""
        with self.watchdog.pausing() if self.plan.workers else nullcontext(), self.stop.interruptible():
            yield
        self.watchdog.progressed()

    def _report(self, what: str) -> str:
        file = write_stacks(self.run.path)
        sentence = (
            f"{what} made no progress for {self.watchdog.waited:g} s; the stacks of all threads are in {file}. "
            f"`unmask resume {self.run.path}` continues from the last checkpoint; the environment variable {VARIABLE} "
            "sets another limit"
        )
        with suppress(OSError, UserError, RunGone):
            step = checkpoint.newest_step(self.run) or 0
            seconds = self.stopwatch.seconds()
            self.run.set_status("failed", step, total=self.plan.steps, error=sentence, seconds=seconds)
        return sentence


@contextmanager
def guarded(run: Run, plan: Plan, stop: StopRequest, stopwatch: Stopwatch) -> Iterator[Guard]:
    """Context manager that yields a `Guard`. A step that stalls raises TrainingFailed."""
    guard = Guard(run, plan, stop, stopwatch)
    with guard.watchdog:
        try:
            yield guard
        except Stalled:
            raise TrainingFailed(guard.watchdog.message) from None
