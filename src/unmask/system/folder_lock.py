"""Advisory lock on a folder for one process at a time. The system releases the lock when the process dies for any
reason.

An `flock` belongs to the open file, which forked processes inherit: a loader worker that outlives its trainer would
keep the folder locked. So every process that is forked from the holder of a lock closes its copy immediately.
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
except ImportError:  # on Windows, where two processes that train in one folder are not detected
    fcntl = None


FILE = ".lock"
GRACE = 1.0  # seconds to retry, because a process that was just killed needs a moment to close its files

_held: set[int] = set()  # file descriptors of the locks that this process holds


class Locked(Exception):
    """Raised if another process has locked the folder. The message continues a sentence whose subject is the folder."""


@contextmanager
def locked(folder: Path, *, grace: float = GRACE) -> Iterator[int]:
    """Context manager that locks `folder` and yields the lock file's descriptor. Raises Locked or OSError."""
    _register()
    handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    _held.add(handle)
    try:
        _acquire(handle, time.monotonic() + grace)
        with suppress(OSError):  # a full disk, for example; the content is used in messages only
            os.ftruncate(handle, 0)
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.pwrite(handle, json.dumps(about).encode() + b"\n", 0)
        yield handle
    finally:
        if handle in _held:  # a forked process has already closed its copy, and the number may belong to another file
            _held.discard(handle)
            os.close(handle)


def is_held(folder: Path) -> bool:
    """Return whether a process has locked `folder`, or True if that cannot be determined. No file is created."""
    if fcntl is None:
        return True
    try:
        handle = os.open(folder / FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released at once; other processes retry for GRACE seconds
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
    """Return which process holds a lock and what to do, as a message that continues a sentence.

    content: content of the lock file.
    """
    try:
        about = json.loads(content)
        pid, host, since = int(about["pid"]), str(about["host"]), str(about["since"])
    except (ValueError, TypeError, KeyError):  # the holder has not written the file yet, or is an earlier version
        return "is in use by another process; wait for it, or stop it"
    if host != socket.gethostname():
        return f"is in use by process {pid} on {host}, since {since}; wait for it, or stop it there"
    if pid == os.getpid():
        return f"is in use by this very process ({pid}), since {since}; wait until it has finished"
    state = _state(pid)
    if state in (None, "Z", "X"):
        return (
            f"is still locked by a child of process {pid} on {host}, which has ended; try again in a moment, or end "
            f"the child (run `fuser -v {FILE}` in the folder to find it)"
        )
    suspended = f" and is suspended (kill -CONT {pid} lets it continue)" if state == "T" else ""
    return f"is in use by process {pid} on {host}, which has held it since {since}{suspended}; wait for it, or stop it"


def _state(pid: int) -> str | None:
    """Return the state of a process as one letter, "?" if it is unknown, or None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # a process of another user
        pass
    return "?"
