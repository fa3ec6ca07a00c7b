"""Record that the training loop is alive, so that `Run.status()` can distinguish a slow run from a dead run."""

from __future__ import annotations

import time
from contextlib import suppress

from unmask.errors import UserError
from unmask.run import Run, RunGone

INTERVAL = 5.0  # seconds between two writes


class Heartbeat:
    """Records the newest step in heartbeat.json, at most every `INTERVAL` seconds, without waiting for the device."""

    def __init__(self, run: Run) -> None:
        self.run, self.due = run, 0.0

    def beat(self, step: int) -> None:
        """Record that `step` steps were launched on the device. Write errors are ignored."""
        if (now := time.monotonic()) < self.due:
            return
        self.due = now + INTERVAL
        with suppress(OSError, UserError, RunGone):
            self.run.write_heartbeat(step)
