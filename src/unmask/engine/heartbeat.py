"""Show that the training loop takes steps, so that a page can tell a slow run from a dead one."""

from __future__ import annotations

import time
from contextlib import suppress

from unmask.errors import UserError
from unmask.run import Run, RunGone

INTERVAL = 5.0  # seconds between two writes


class Heartbeat:
    """Records the newest step in heartbeat.json, at most every `INTERVAL` seconds. It does not wait for the device."""

    def __init__(self, run: Run) -> None:
        self.run, self.due = run, 0.0

    def beat(self, step: int) -> None:
        """Record that `step` steps were launched; a failure to write is ignored."""
        if (now := time.monotonic()) < self.due:
            return
        self.due = now + INTERVAL
        with suppress(OSError, UserError, RunGone):
            self.run.write_heartbeat(step)
