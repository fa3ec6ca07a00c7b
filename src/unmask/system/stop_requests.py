"""Handle SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1, during a training and at other times.

During a training these signals request a checkpoint after the current step, and raise `StopRequested` in waits and
evaluations, because these can be abandoned. At other times the signals raise KeyboardInterrupt. A second Ctrl-C ends
the process at once in both cases. SIGHUP remains ignored if it was ignored at the start (nohup). Python runs signal
handlers in the main thread. Standard library only.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from unmask.system.processes import STOP_SIGNALS, speaks
from unmask.system.stalls import write_now

INTERRUPTED = 130
NOTHING_KEPT = "there is no checkpoint yet"
ONE_PRESS = 0.5  # Seconds within which several SIGINTs count as one, because launchers forward Ctrl-C.
BLOCKED = 3.0  # Seconds after which the main thread counts as blocked in a C library if it has not handled a signal.
LATER = 0.05  # Seconds after which a signal is sent again if it arrived in code that ignores exceptions.

on_blocked: Callable[[], object] | None = None
"""Called by a thread if a signal arrives outside a training and the main thread is blocked; None: wait for it.

Processes that work together set this, because each of them may be waiting for another one.
"""


class StopRequested(BaseException):
    """Raised if a stop is requested in a part of the training that can be abandoned."""


class StopRequest:
    """Records whether a stop was requested.

    kept: what is saved so far, for the message when the process ends at once. postponed: whether no code is
    interrupted, because several processes must agree to stop first.
    """

    def __init__(self) -> None:
        self.requested = self.postponed = False
        self.kept = ""
        self._interruptible = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Context manager in which a stop request raises StopRequested immediately, also if it arrived before.

        The body may be interrupted anywhere, so it must not change the training's state.
        """
        if self.postponed:
            yield
            return
        if self.requested:
            raise StopRequested
        before, self._interruptible = self._interruptible, True
        try:
            yield
        finally:
            self._interruptible = before

    @contextmanager
    def deciding(self) -> Iterator[None]:
        """Context manager in which code can be interrupted, because the other processes wait for what this one does."""
        before, self.postponed = self.postponed, False
        try:
            yield
        finally:
            self.postponed = before

    def request_by_thread(self) -> None:
        """Request a stop in the main thread, as if a signal had arrived. Another thread calls this."""
        self.requested = True
        interrupt_main(signal.SIGTERM)  # has no effect if the signal has no handler

    def request(self) -> None:
        """Request a stop. Signal handlers call this."""
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise StopRequested


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Context manager in which the signals request a stop.

    The context manager has no effect outside the main thread.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    presses = _Presses(lambda: f"\nended at once; {stop.kept or NOTHING_KEPT}\n")

    def on_signal(number: int, frame: object) -> None:
        if number == signal.SIGINT and not stop.requested and speaks():
            write_now(f"\nstopping after this step; Ctrl-C again ends at once: {stop.kept or NOTHING_KEPT}\n")
        stop.request()

    with _handlers(on_signal), presses.counted():
        yield stop


@contextmanager
def interrupts() -> Iterator[None]:
    """Context manager in which the first of the signals raises KeyboardInterrupt."""
    raised = False

    def end_if_blocked() -> None:
        if not raised and on_blocked is not None:
            on_blocked()

    def watch(number: int) -> None:
        if on_blocked is not None:
            timer = threading.Timer(BLOCKED, end_if_blocked)
            timer.daemon = True
            timer.start()

    message = "\nended at once; an unfinished file may remain, with .partial in its name\n"
    presses = _Presses(lambda: message, watch)

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised:
            return
        if _swallows_exceptions(frame):
            threading.Timer(LATER, os.kill, (os.getpid(), number)).start()
            return
        raised = True
        raise KeyboardInterrupt

    with _handlers(on_signal), presses.counted():
        yield


def _swallows_exceptions(frame: FrameType | None) -> bool:
    """Return whether this is a finaliser or a weakref callback, where Python prints exceptions and continues."""
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
    """Ends the process on the second Ctrl-C, even if the main thread is busy in a C library.

    Python runs signal handlers only between bytecode instructions, but writes the number of each signal to a socket
    immediately; a thread reads it from there. arrived: function that the thread calls with each number.
    """

    def __init__(self, message: Callable[[], str], arrived: Callable[[int], None] = lambda number: None) -> None:
        self.message, self.arrived = message, arrived
        self.first: float | None = None

    @contextmanager
    def counted(self) -> Iterator[None]:
        here, there = socket.socketpair()
        there.setblocking(False)
        before = signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(here,), daemon=True, name="unmask signals").start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            there.close()  # closing the socket ends the thread

    def _listen(self, here: socket.socket) -> None:
        with here:
            while numbers := here.recv(16):
                for number in numbers:
                    self.arrived(number)
                    if number == signal.SIGINT:
                        self._count()

    def _count(self) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
        elif now - self.first > ONE_PRESS:
            if speaks():
                write_now(self.message())
            os._exit(INTERRUPTED)
