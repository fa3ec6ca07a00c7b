"""Detect stalls: a time limit for waits, and a watchdog for computations.

A wait counts only while this process runs, so Ctrl-Z or a sleeping laptop ends no healthy run. Standard library only.
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

VARIABLE = "UNMASK_STALL_SECONDS"
DEFAULT_SECONDS = 300.0
TICK = 0.25  # seconds between two looks
GRACE = 10.0  # seconds for a thread to raise `Stalled` before the process ends
BUSY = 0.05  # share of one processor that counts as progress on a CPU


class Stalled(BaseException):
    """Raised in a thread whose computation a `Watchdog` has given up."""


def stall_seconds() -> float:
    """Seconds without progress after which waiting is given up: UNMASK_STALL_SECONDS, else 300; inf for 0.

    Raises UserError when the variable is not a number.
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
    """Counts the seconds of a wait, without those in which this process was suspended.

    Call `tick` at least every `TICK` seconds.
    """

    def __init__(self, limit: float) -> None:
        self.limit, self.waited, self.last = limit, 0.0, time.monotonic()

    def tick(self) -> bool:
        """Whether the limit has been reached."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        self.waited += passed if passed <= 4 * TICK else TICK  # a longer gap: this process did not run in it
        return self.waited >= self.limit


class Watchdog:
    """Watches computations of the thread that makes it; see `watching`.

    When one has made no progress for `limit` seconds, `report` is called with what stalled, in a thread of its own,
    and returns the sentence for a person, `message`. Then `Stalled` is raised in the watched thread; one that does not
    even notice that (it hangs in a driver) ends the process with exit code 1.

    on_cpu: time that the process spends computing is progress, so that a slow processor is not taken for a hang.
    """

    def __init__(self, limit: float, report: Callable[[str], str], *, on_cpu: bool) -> None:
        self.limit, self.report, self.on_cpu = limit, report, on_cpu
        self.message = ""
        self.waited = limit  # seconds without progress, once a computation is given up
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
        """Context manager around one computation, `what` in a sentence, with a limit of `at_least` seconds."""
        self._watched = what, Patience(max(self.limit, at_least))
        try:
            yield
        finally:
            self._watched = None

    def progressed(self) -> None:
        """The limit begins anew for what is being watched."""
        if self._watched is not None:
            self._watched[1].waited = 0.0

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Context manager in which nothing is watched: another guard watches this part."""
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
        if self._closed.is_set():  # it came to its end after all
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread_id), ctypes.py_object(Stalled))
        if not self._closed.wait(GRACE):
            write_now(f"error: {self.message}\n")
            os._exit(1)


def write_stacks(folder: Path | None, more: str = "") -> Path:
    """Write the stacks of all threads of this process, and `more`, to stalled.txt in `folder`, or a temporary file."""
    path = Path(tempfile.gettempdir(), f"unmask-stalled-{os.getpid()}.txt")
    for place in [path] if folder is None else [folder / "stalled.txt", path]:
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
    """Write to stderr past every buffer, as a signal handler or a second thread must; never raises, never waits."""
    import select

    try:
        if select.select([], [2], [], 0)[1]:
            os.write(2, text.encode("utf-8", "backslashreplace"))
    except (OSError, ValueError):
        pass
