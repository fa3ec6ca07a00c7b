"""The status of a run: its progress, and whether its process is alive. Standard library only."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SLOW_AFTER = 60.0  # seconds without a heartbeat after which a run counts as slow

Health = Literal["ended", "training", "slow", "dead"]


@dataclass(frozen=True)
class RunStatus:
    """Status of a run, from status.json and heartbeat.json.

    state: "running", "stopped", "finished" or "failed", or "" if none is recorded, as before the training begins. step,
    steps: number of optimiser steps done and in all. time: when the state was recorded, in seconds since 1970. seconds:
    training time. error: why the run failed. pid, host: the process that recorded the state. heartbeat: time of the
    last training step, in seconds since 1970, or None unless the run is running. locked: whether a process holds the
    run's lock. Runs of earlier versions did not record all fields; the others are None.
    """

    state: str = ""
    step: int = 0
    steps: int | None = None
    time: float | None = None
    seconds: float = 0.0
    error: str | None = None
    pid: int | None = None
    host: str | None = None
    heartbeat: float | None = None
    locked: bool = False

    @classmethod
    def of(cls, status: Mapping[str, Any], heartbeat: Mapping[str, Any], *, locked: bool) -> RunStatus:
        """Build the status from the contents of status.json and heartbeat.json. Entries of a wrong type are ignored."""
        state, error, host = (status.get(key) for key in ("state", "error", "host"))
        running = state == "running"
        step = _number(status.get("step")) or 0
        if running:
            step = max(step, _number(heartbeat.get("step")) or 0)
        steps, pid = _number(status.get("total")), _number(status.get("pid"))
        return cls(
            state=state if isinstance(state, str) else "",
            step=int(step),
            steps=None if steps is None else int(steps),
            time=_number(status.get("time")),
            seconds=_number(status.get("seconds")) or 0.0,
            error=error if isinstance(error, str) else None,
            pid=None if pid is None else int(pid),
            host=host if isinstance(host, str) else None,
            heartbeat=_number(heartbeat.get("time")) if running else None,
            locked=locked,
        )

    @property
    def shown_state(self) -> str:
        """`state`, or "interrupted" if the process was killed before it could record another state."""
        return "interrupted" if self.state == "running" and not self.locked else self.state

    def health(self, now: float | None = None) -> Health:
        """Return whether the run is training now.

        "ended": the run was stopped, finished or failed. "training": the last heartbeat is recent. "slow": the process
        is alive, or may be alive on another machine, but has finished no step for `SLOW_AFTER` seconds; a large
        picture, an evaluation or a checkpoint can take that long. "dead": the process is gone. now: seconds since 1970.
        """
        if self.state != "running":
            return "ended"
        latest = max(self.heartbeat or 0.0, self.time or 0.0)
        recent = (time.time() if now is None else now) - latest <= SLOW_AFTER
        elsewhere = self.host is not None and self.host != socket.gethostname()  # the lock may be invisible
        if not self.locked and not elsewhere:
            return "dead"
        return "training" if recent else "slow"

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not None as a JSON object."""
        found = {
            "state": self.state, "step": self.step, "time": self.time, "total": self.steps, "seconds": self.seconds,
            "error": self.error, "pid": self.pid, "host": self.host, "heartbeat": self.heartbeat,
        }  # fmt: skip
        return {key: value for key, value in found.items() if value is not None}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
