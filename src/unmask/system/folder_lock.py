"""One process at a time in a folder: an advisory lock that the system drops when its holder dies, however it dies.

`flock` belongs to the open file, which forked processes inherit: a loader worker that outlives its trainer would keep
the folder locked for as long as it lives. So every process that is forked from a holder closes its copy at once.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two trainers in one folder are then not noticed
    fcntl = None


FILE = ".lock"
GRACE = 1.0  # seconds: a process that was just killed needs a moment to close its files

_held: set[int] = set()  # descriptors


class Locked(Exception):
    """Another process holds the folder; the message is the rest of a sentence that begins with the folder."""


@contextmanager
def locked(folder: Path, *, grace: float = GRACE) -> Iterator[int]:
    """Context manager that holds `folder` and gives the lock file's descriptor. Raises Locked or OSError."""
    _register()
    handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        _acquire(handle, time.monotonic() + grace)
        with suppress(OSError):  # a full disk; it only serves the message to others
            os.ftruncate(handle, 0)
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.pwrite(handle, json.dumps(about).encode() + b"\n", 0)
        yield handle
    finally:
        if handle in _held:  # in a forked process it is closed already, and the number may be another file's
            _held.discard(handle)
            os.close(handle)


def is_held(folder: Path) -> bool:
    """Return whether a process holds `folder`; True where the system cannot tell. Creates no file."""
    if fcntl is None:
        return True
    try:
        handle = os.open(folder / FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for an instant: whoever wants the folder tries for GRACE
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


@functools.cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


def _acquire(handle: int, deadline: float) -> None:
    while fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise Locked(describe_holder(os.pread(handle, 4096, 0))) from None
            time.sleep(0.05)


def describe_holder(content: bytes) -> str:
    """Return who holds a lock and what to do, from what the holder wrote: the rest of a sentence."""
    try:
        about = json.loads(content)
        pid, host, since = int(about["pid"]), str(about["host"]), str(about["since"])
    except (ValueError, TypeError, KeyError):  # just taken, or by an earlier version
        return "is in use by another process; wait for it, or stop it"
    if host != socket.gethostname():
        return f"is in use by process {pid} on {host}, since {since}; wait for it, or stop it there"
    if pid == os.getpid():
        return f"is in use by this very process ({pid}), since {since}; wait until it has finished"
    state = _state(pid)
    if state in (None, "Z", "X"):
        return (
            f"is still locked, although process {pid} on {host} that locked it has ended: a process that it started "
            f"holds on; try again in a moment, or end that one (`fuser -v` on the file {FILE} in it names it)"
        )
    suspended = f" and is suspended (kill -CONT {pid} lets it continue)" if state == "T" else ""
    return f"is in use by process {pid} on {host}, which has held it since {since}{suspended}; wait for it, or stop it"


def _state(pid: int) -> str | None:
    """The state of a process as one letter, "?" where the system does not tell; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # somebody else's
        pass
    return "?"
