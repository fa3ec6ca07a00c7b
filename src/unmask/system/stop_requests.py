"""Requests to stop: what SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 do, in a training and outside of one.

While a training runs they ask for a checkpoint after the current step, and raise `StopRequested` where a wait or an
evaluation may be given up. Outside of one they raise KeyboardInterrupt. Ctrl-C a second time ends the process at once
in both cases. SIGHUP stays ignored where it was at the start (nohup). Python runs signal handlers in the main thread.
Standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from unmask.system.processes import STOP_SIGNALS
from unmask.system.stalls import write_now

INTERRUPTED = 130
NOTHING_KEPT = "there is no checkpoint yet"
ONE_PRESS = 0.5  # seconds within which several SIGINTs are one Ctrl-C: launchers pass on what the terminal sent already
LATER = 0.05  # seconds after which a signal is sent again that came where Python swallows exceptions


class StopRequested(BaseException):
    """A stop was requested in a part of the training that may be given up."""


class StopRequest:
    """Whether a stop was requested; `kept` is a sentence about what is saved, for whoever ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self.kept = ""
        self._interruptible = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context manager in which a request raises StopRequested at once, also one that came before.

        Nothing inside may leave the training's state half changed.
        """
        if self.requested:
            raise StopRequested
        before, self._interruptible = self._interruptible, True
        try:
            yield
        finally:
            self._interruptible = before

    def request(self) -> None:
        """Called by a signal handler."""
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise StopRequested


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Context manager in which the signals are requests to stop; does nothing in another thread than the main one."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    presses = _Presses(lambda: f"\nended at once; {stop.kept or NOTHING_KEPT}\n")

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGINT and not stop.requested:
            write_now(f"\nstopping after this step; Ctrl-C again ends at once: {stop.kept or NOTHING_KEPT}\n")
        stop.request()

    with _handlers(on_signal), presses.heard():
        yield stop


@contextmanager
def interrupts() -> Iterator[None]:
    """Context manager in which all the signals do what Ctrl-C does: raise KeyboardInterrupt, once."""
    presses = _Presses(lambda: "\nended at once; a file that was being written may be left with .partial in its name\n")
    raised = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised:
            return
        if _swallows_exceptions(frame):
            threading.Timer(LATER, os.kill, (os.getpid(), number)).start()
            return
        raised = True
        raise KeyboardInterrupt

    with _handlers(on_signal), presses.heard():
        yield


def _swallows_exceptions(frame: FrameType | None) -> bool:
    """Return whether this is a finaliser or a weakref callback: Python prints what is raised there, and continues."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename.endswith(("_weakrefset.py", "weakref.py")):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _handlers(on_signal: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before: dict[int, object] = {}
    for name in STOP_SIGNALS:
        number = getattr(signal, name, None)
        if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            continue
        before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class _Presses:
    """Counts Ctrl-C; the second ends the process, also while the main thread is deep in a library.

    Python calls handlers between two of its instructions only, but writes the number of each signal to a socket at
    once, and a thread reads it there.
    """

    def __init__(self, sentence: Callable[[], str]) -> None:
        self.sentence = sentence
        self.first: float | None = None

    @contextmanager
    def heard(self) -> Iterator[None]:
        here, there = socket.socketpair()
        there.setblocking(False)
        before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(here,), daemon=True, name="unmask signals").start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            there.close()  # which ends the thread

    def _listen(self, here: socket.socket) -> None:
        with here:
            while numbers := here.recv(16):
                for number in numbers:
                    if number == signal.SIGINT:
                        self._count()

    def _count(self) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
        elif now - self.first > ONE_PRESS:
            write_now(self.sentence())
            os._exit(INTERRUPTED)
