"""Detect stalls: a time limit for waits, and a watchdog for computations.

Time during which this process is suspended (Ctrl-Z, a sleeping laptop) does not count. Standard library only.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from unmask.errors import UserError
from unmask.system.processes import own_file

VARIABLE = "UNMASK_STALL_SECONDS"
DEFAULT_SECONDS = 300.0
TICK = 0.25  # Seconds between two checks.
GRACE = 10.0  # Seconds that a stalled thread has to react to `Stalled` before the process ends.
BUSY = 0.05  # Minimum use of one processor, as a share, that counts as progress on a CPU.


class Stalled(BaseException):
    """Raised by a `Watchdog` in the thread whose computation stalled."""


def stall_seconds() -> float:
    """Return the maximum number of seconds without progress: UNMASK_STALL_SECONDS, or 300 if it is not set.

    The value 0 means no limit, and is returned as infinity. Raises UserError if the variable is not a number.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return DEFAULT_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise UserError(f"got {VARIABLE}={text}; expected a number of seconds, or 0 for no limit")
    return seconds or float("inf")


class Patience:
    """Counts the seconds of a wait, without the time during which this process was suspended.

    Call `tick` at least every `TICK` seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.waited, self.last = limit, 0.0, time.monotonic()

    def tick(self) -> bool:
        """Add the time since the last call; return whether the limit has been reached."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        self.waited += passed if passed <= 4 * TICK else TICK  # if the gap is longer, the process was suspended
        return self.waited >= self.limit


class Watchdog:
    """Watches computations of the thread that creates it; see `watching`.

    If a computation makes no progress for `limit` seconds, the watchdog's own thread calls `report` with the name of
    the computation, and stores the returned error message in `message`. After that, `Stalled` is raised in the watched
    thread. If that thread does not respond, for example because it hangs in a driver, the process exits with code 1.

    on_cpu: whether CPU time of this process counts as progress, so that a slow processor is not mistaken for a hang.
    """

    def __init__(self, limit: float, report: Callable[[str], str], *, on_cpu: bool) -> None:
        self.limit, self.report, self.on_cpu = limit, report, on_cpu
        self.message = ""
        self.waited = limit  # seconds without progress of the computation that stalled
        self._thread_id = threading.get_ident()
        self._watched: tuple[str, Patience] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="unmask watchdog")

    def __enter__(self) -> Watchdog:
        if self.limit != float("inf"):
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    @contextmanager
    def watching(self, what: str, *, at_least: float = 0.0) -> Iterator[None]:
        """Context manager that watches one computation.

        what: name of the computation for messages. at_least: minimum time limit in seconds.
        """
        self._watched = what, Patience(max(self.limit, at_least))
        try:
            yield
        finally:
            self._watched = None

    def progressed(self) -> None:
        """Restart the time limit of the current computation."""
        if self._watched is not None:
            self._watched[1].waited = 0.0

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Context manager that pauses watching, for code that has its own time limit."""
        watched, self._watched = self._watched, None
        try:
            yield
        finally:
            self._watched = watched
            self.progressed()

    def _run(self) -> None:
        computed = time.process_time()
        while not self._closed.wait(TICK):
            before, computed = computed, time.process_time()
            if self._watched is None:
                continue
            what, patience = self._watched
            if self.on_cpu and computed - before > BUSY * TICK:
                patience.waited = 0.0
            if patience.tick():
                self.waited = patience.limit
                self._give_up(what)
                return

    def _give_up(self, what: str) -> None:
        self.message = self.report(what)
        if self._closed.is_set():  # the computation has finished meanwhile
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread_id), ctypes.py_object(Stalled))
        if not self._closed.wait(GRACE):
            write_now(f"error: {self.message}\n")
            os._exit(1)


def write_stacks(folder: Path | None, more: str = "") -> Path:
    """Write the stacks of all threads, followed by `more`, to stalled.txt in `folder` or to a temporary file; return
    its path. Of several processes, each writes a file of its own.
    """
    path = Path(tempfile.gettempdir(), f"unmask-stalled-{os.getpid()}.txt")
    for place in [path] if folder is None else [folder / own_file("stalled.txt"), path]:
        try:
            with place.open("w") as file:
                file.write(f"main process {os.getpid()}:\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0, os.SEEK_END)
                file.write(f"\n{more}")
            return place
        except OSError:
            continue
    return path


def write_now(text: str) -> None:
    """Write to stderr without buffers, for signal handlers and other threads.

    This function never raises and never blocks.
    """
    import select

    try:
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode("utf-8", "backslashreplace"))
    except (OSError, ValueError):
        pass
