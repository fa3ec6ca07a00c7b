"""Detect that one of several processes has ended, failed or hangs, and end all of them with one message.

Each process publishes a pulse every second in the store that the launcher or rank 0 holds, and watches the pulse of the
next process. Whoever detects a failure records it in the store, one process prints it, and all end with the same exit
code. A thread of its own does this, because the main thread may be blocked in a collective operation.

A process whose main thread hangs has a pulse. Its own watchdog (`system/stalls.py`) ends it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from unmask.console import escape_controls
from unmask.errors import TrainingFailed, UserError
from unmask.system.launched_process import exit_at_once
from unmask.system.processes import STOP_SIGNALS
from unmask.system.stalls import Patience, write_now
from unmask.system.stop_requests import INTERRUPTED

VARIABLE = "UNMASK_PEER_SECONDS"
DEFAULT_SECONDS = 60.0
BEAT = 1.0
TICK = 0.2
LEFT = "left"
CAUSE_INTERRUPTED = "was interrupted"
CLOSE_SECONDS = 2.0  # longest wait for a thread that waits for the store
OWN_ERROR_SECONDS = 3.0  # seconds in which the main thread may fail by itself, after another process has failed
SAME_ERROR_SECONDS = 2.0  # seconds in which rank 0 may fail for the same cause as another process, which then is silent
LAST_SECONDS = OWN_ERROR_SECONDS + 4 * BEAT  # shortest limit of the wait for the other processes to end
CULPRIT_SECONDS = 20.0  # longest wait until it is known which process has failed


def limit_seconds() -> float:
    """Return after how many seconds without a pulse a process counts as dead. Raises UserError."""
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise UserError(f"got {VARIABLE}={text}; expected a positive number of seconds")
    return seconds


def launcher_holds_store() -> bool:
    """Return whether the store of values that processes share is in the launcher, as with torchrun, not in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@dataclass(frozen=True)
class Failure:
    """Why all processes end. rank, host, pid: the process that failed. code: exit code of all processes.

    responds: whether that process is able to end by itself.
    """

    rank: int
    host: str
    pid: int
    cause: str
    code: int = 1
    responds: bool = True

    def message(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid}) {self.cause}"


class Pulse:
    """Publishes the pulse of this process and watches the others.

    key: prefix of all keys in the store, different for each start. limit: seconds without a pulse after which a process
    counts as dead. on_failure: function that records the message of a failure, or an interruption (None), in the run;
    the training sets it.
    """

    def __init__(self, rank: int, size: int, key: str, limit: float) -> None:
        self.rank, self.size, self.key, self.limit = rank, size, key, limit
        self.on_failure: Callable[[str | None], object] = lambda message: None
        self.host, self.pid = socket.gethostname(), os.getpid()
        self._store = _connect(limit)
        self._closing = _connect(limit)  # for the main thread, because a client does one operation at a time
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._contact, self._cause = time.monotonic(), ""
        self._store.set(f"{key}/who/{rank}", json.dumps({"host": self.host, "pid": self.pid}))

    def start(self) -> None:
        for name, run in (("pulse", self._beat), ("contact", self._watch_contact)):
            thread = threading.Thread(target=run, daemon=True, name=f"unmask {name}")
            thread.start()
            self._threads.append(thread)

    # Called by the main thread

    @property
    def failed(self) -> bool:
        """Whether this process has ended its part because of an error."""
        return self._closed.is_set()

    def error_prefix(self) -> str | None:
        """Return the text before the message about an error, or None if another process prints the message.

        Rank 0 prints an error that it has too. An error of another process names that process.
        """
        if self.rank != 0 and self._rank_0_has(self._cause):
            return None
        if not self.claim():
            return None
        return "" if self.rank == 0 else f"rank {self.rank} on {self.host}: "

    def _rank_0_has(self, cause: str) -> bool:
        """Return whether rank 0 fails for the same cause within a short time."""
        key, deadline = f"{self.key}/cause", time.monotonic() + SAME_ERROR_SECONDS
        with suppress(Exception):
            while time.monotonic() < deadline:
                if self._closing.check([key]):
                    return self._closing.get(key).decode() == cause
                time.sleep(TICK)
        return False

    def claim(self) -> bool:
        """Return True in the first process that calls this; it prints the message about an error."""
        try:
            return self._closing.add(f"{self.key}/claimed", 1) == 1
        except Exception:  # without the store, a message printed twice is better than none
            return True

    def fail(self, error: BaseException) -> None:
        """Record that this process ends because of an error, so that the others end too.

        If the error is only the consequence of another process that has failed or ended, this process ends here, with
        the message about that process. The same error in all processes is left to the caller.
        """
        if isinstance(error, SystemExit | GeneratorExit):
            self.leave()
            return
        self.blame(error)
        if isinstance(error, KeyboardInterrupt):
            own = self._interruption()
        else:
            code = 2 if isinstance(error, UserError) else 1
            own = Failure(self.rank, self.host, self.pid, f"failed: {_line(error)}", code)
        self._cause, found = own.cause, None
        with suppress(RuntimeError):
            if self.rank == 0:
                self._closing.set(f"{self.key}/cause", own.cause)
            found = self._recorded(self._closing)
        self._close()
        if found is not None and found.cause != own.cause:
            self._end(found)
        with suppress(Exception):
            self._record(own, self._closing)

    def blame(self, error: BaseException) -> None:
        """End this process with a message about another process, if the error shows that its connection was lost."""
        if not _is_lost_connection(error):
            return
        _ignore_stop_requests()
        try:
            found = self._culprit()
        except RuntimeError:  # the store is gone; only the launcher, or rank 0, holds it
            self._end_without_contact()
            return
        if found is not None:
            self._end(found)

    def interrupt(self) -> None:
        """End all processes because a signal has interrupted this one, whose main thread is blocked."""
        own = self._interruption()
        with suppress(Exception):
            own = self._record(own, self._closing)
        self._end(own)

    def _interruption(self) -> Failure:
        return Failure(self.rank, self.host, self.pid, CAUSE_INTERRUPTED, INTERRUPTED)

    def leave(self) -> None:
        """Record that this process has finished, so that the end of its pulse is no failure."""
        self._close()
        with suppress(Exception):
            self._closing.set(f"{self.key}/pulse/{self.rank}", LEFT)

    def end_in_order(self, silent: int = 0) -> None:
        """Record that this process is about to end; if it holds the store, wait until the others have recorded it too.

        They still read from the store why they end. silent: number of processes that are unable to record anything.
        """
        limit = max(LAST_SECONDS, min(self.limit, CULPRIT_SECONDS))
        keys, deadline = [f"{self.key}/ended/{rank}" for rank in range(self.size)], time.monotonic() + limit
        with suppress(Exception):
            self._closing.set(keys[self.rank], "")
            while self._holds_store and len(keys) > silent and time.monotonic() < deadline:
                keys = [key for key in keys if not self._closing.check([key])]
                time.sleep(TICK)

    @property
    def _holds_store(self) -> bool:
        return self.rank == 0 and not launcher_holds_store()

    def _close(self) -> None:
        """End the threads. Python aborts if a thread is inside the store's C++ code while the interpreter ends."""
        self._closed.set()
        for thread in self._threads:
            thread.join(CLOSE_SECONDS)

    # In the threads

    def _beat(self) -> None:
        watched, seen, patience, count, due = self._after(self.rank), "", Patience(self.limit), 0, 0.0
        while not self._closed.wait(TICK):
            dead = patience.tick()
            if time.monotonic() < due:
                continue
            count, due = count + 1, time.monotonic() + BEAT
            with suppress(Exception):  # without the store; `_watch_contact` detects that
                self._store.set(f"{self.key}/pulse/{self.rank}", str(count))
                if (failure := self._recorded(self._store)) is not None:
                    if self._closed.wait(OWN_ERROR_SECONDS):  # the main thread has failed with the same error
                        return
                    self._end(failure)
                now = self._pulse_of(watched)
                if now == LEFT:
                    watched, seen, patience = self._after(watched), "", Patience(self.limit)
                elif now != seen:
                    seen, patience = now, Patience(self.limit)
                elif dead:
                    self._end(self._record(self._about(watched, f"has not answered for {self.limit:g} s")))
                self._contact = time.monotonic()

    def _after(self, rank: int) -> int:
        """Return the next rank that is not this process."""
        following = (rank + 1) % self.size
        return following if following != self.rank else (following + 1) % self.size

    def _watch_contact(self) -> None:
        patience, seen = Patience(self.limit + 5 * BEAT), self._contact
        while not self._closed.wait(TICK):
            if self._contact != seen:
                seen, patience = self._contact, Patience(self.limit + 5 * BEAT)
            elif patience.tick():
                self._end_without_contact()

    def _end_without_contact(self) -> None:
        where = os.environ.get("MASTER_ADDR", "rank 0")
        cause = f"has lost contact to rank 0 and its launcher on {where}: they have ended, or the network has failed"
        self._end(Failure(self.rank, self.host, self.pid, cause), claim=False)

    def _pulse_of(self, rank: int) -> str:
        key = f"{self.key}/pulse/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _about(self, rank: int, cause: str) -> Failure:
        who = json.loads(self._store.get(f"{self.key}/who/{rank}"))
        return Failure(rank, who["host"], who["pid"], cause, responds=False)

    def _record(self, failure: Failure, store: dist.Store | None = None) -> Failure:
        """Record a failure unless one is recorded already; return the one that is recorded."""
        text = json.dumps(asdict(failure))
        return Failure(**json.loads((store or self._store).compare_set(f"{self.key}/failure", "", text)))

    def _recorded(self, store: dist.Store) -> Failure | None:
        key = f"{self.key}/failure"
        return Failure(**json.loads(store.get(key))) if store.check([key]) else None

    def _culprit(self) -> Failure | None:
        """Wait until it is known which other process has failed or ended; None if nothing is known in time."""
        deadline, before, since = time.monotonic() + min(self.limit, CULPRIT_SECONDS), self._pulses(), time.monotonic()
        while time.monotonic() < deadline:
            if (failure := self._recorded(self._closing)) is not None:
                return failure
            if time.monotonic() - since > 4 * BEAT:
                after = self._pulses()
                dead = [rank for rank in before if before[rank] == after.get(rank) and rank != self.rank]
                if dead:
                    cause = "ended without a message; it was killed, perhaps because memory ran out"
                    return self._record(self._about(dead[0], cause))
                before, since = after, time.monotonic()
            time.sleep(TICK)
        return None

    def _pulses(self) -> dict[int, str]:
        found = {rank: self._pulse_of(rank) for rank in range(self.size)}
        return {rank: value for rank, value in found.items() if value != LEFT}

    def _end(self, failure: Failure, *, claim: bool = True) -> None:
        """End this process with the message of a failure, which one process prints."""
        interrupted = failure.code == INTERRUPTED
        message = failure.message()
        with suppress(Exception):
            self.on_failure(None if interrupted else message)
        if not claim or self.claim():
            write_now("Interrupted.\n" if interrupted else escape_controls(f"error: {message}; all processes end\n"))
        if claim:
            self.end_in_order(silent=not failure.responds)
        exit_at_once(failure.code)


def _ignore_stop_requests() -> None:
    """Ignore the signals that stop a run: this process ends anyway, and torchrun sends SIGTERM if one ends."""
    if threading.current_thread() is threading.main_thread():
        for name in STOP_SIGNALS:
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _connect(limit: float) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=max(limit, 5.0)))


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective operation failed because another process has ended."""
    words = ("Connection closed", "Connection reset", "Broken pipe", "timed out", "Timed out", "NCCL", "gloo")
    is_ours = isinstance(error, TrainingFailed)
    return isinstance(error, RuntimeError) and not is_ours and any(word in str(error) for word in words)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
