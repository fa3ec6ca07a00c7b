"""The run folder as several processes see it: the writer writes it, and the others only read it.

The folder must be on a disk that all hosts share, because each process writes its part of a checkpoint in shards, and
its own failures.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from unmask.engine.world import World
from unmask.run import Run, RunError
from unmask.system import json_lines

VISIBLE_SECONDS = 15.0  # time after which a file that another host has written must be visible


class ObservedRun(Run):
    """A run that another process writes: writing does nothing here.

    Failures of this process are recorded in a file of its own, faults-rank-N.jsonl.
    """

    def __init__(self, path: str | Path, rank: int) -> None:
        super().__init__(path)
        self.rank = rank

    @contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        pass

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        pass

    def log(self, row: dict[str, Any]) -> None:
        pass

    def truncate_metrics(self, step: int) -> None:
        pass

    def sync_metrics(self) -> None:
        pass

    def write_heartbeat(self, step: int) -> None:
        pass

    def add_quarantine(self, row: dict[str, Any]) -> None:
        pass

    def add_fault(self, row: dict[str, Any]) -> None:
        pass

    def add_digests(self) -> None:
        pass

    def set_status(
        self,
        state: str,
        step: int,
        *,
        total: int | None = None,
        seconds: float | None = None,
        error: str | None = None,
    ) -> None:
        """Keep the status in memory, so that this process ends with the same exit code as the writer."""
        self._status = {"state": state, "step": step, "time": time.time(), "total": total, "seconds": seconds or 0.0}
        if error is not None:
            row = {"time": time.time(), "step": step, "rank": self.rank, "host": socket.gethostname(), "error": error}
            json_lines.append(self.path / f"faults-rank-{self.rank}.jsonl", row)


@contextmanager
def begun(
    world: World,
    path: str | Path,
    files: Mapping[str, Mapping[str, Any]],
    *,
    fill: Callable[[Run], object],
    log: Callable[[str], object],
) -> Iterator[Run]:
    """Context manager in which the writer has created a run and holds its lock; see `Run.begin`. Raises RunError."""
    with ExitStack() as stack:
        created = world.on_writer(lambda: stack.enter_context(Run.begin(path, files, fill=fill, log=log)))
        yield _observed(world, path, created)


@contextmanager
def locked(world: World, path: str | Path) -> Iterator[Run]:
    """Context manager in which the writer holds the lock of an existing run. Raises RunError, RunInUse."""
    with ExitStack() as stack:

        def lock() -> Run:
            run = Run.open(path)
            stack.enter_context(run.lock())
            return run

        yield _observed(world, path, world.on_writer(lock))


def _observed(world: World, path: str | Path, written: Run | None) -> Run:
    """Return the run for this process, after checking that all processes see the same folder. Raises RunError."""
    if world.alone:
        assert written is not None, "the only process is the writer"
        return written
    run_id = world.from_writer(lambda: written.id if written is not None else None)
    run = written or ObservedRun(path, world.rank)
    for rank, (sees, where, host) in enumerate(
        world.gather((_sees(run, run_id), str(run.path.absolute()), socket.gethostname()))
    ):
        if not sees:
            raise RunError(
                f"the run folder {where} is not the same on all hosts: rank {rank} on {host} does not see what rank 0 "
                "has written; expected a folder on a disk that all hosts share; choose another --out"
            )
    return run


def _sees(run: Run, run_id: str | None) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        try:
            if Run(run.path).id == run_id and (run.path / "plan.json").exists():
                return True
        except RunError:
            pass
        time.sleep(0.2)
    return False
