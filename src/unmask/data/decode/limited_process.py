"""Call a function in a separate process with limits on memory and time, for files that may crash a decoder.

The limits apply on Linux only; on other systems the function is called in this process, without limits.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SLACK = 256 << 20  # Bytes of address space to allow in addition to the memory that a process uses.
PATIENCE = 3  # Seconds of wall-clock time allowed per second of processor time, because other processes run too.


class TooSlow(Exception):
    """Raised if the call exceeds its time limit."""


class Crashed(Exception):
    """Raised if the process ends without a result."""


def call_in_process(function: Callable[..., Any], *arguments: Any, memory: int, seconds: float) -> Any:
    """Call `function(*arguments)` in a forked process and return its result.

    The process may use `memory` bytes more than this one, and `seconds` of processor time. The result is pickled; the
    arguments are not. Raises TooSlow, Crashed, MemoryError, or the exception of the function.
    """
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return function(*arguments)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments, memory, seconds), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE * seconds):
            raise TooSlow
        try:
            raised, answer = receiver.recv()
        except EOFError:
            process.join()
            raise (TooSlow if process.exitcode == -signal.SIGXCPU else Crashed) from None
    finally:
        receiver.close()
        process.kill()
        process.join()
        process.close()
    if raised:
        raise answer
    return answer


def _answer(
    sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], memory: int, seconds: float
) -> None:
    import resource

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with suppress(OSError, ValueError):  # a stricter limit may already be set
        limit = _virtual_bytes() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    used = sum(os.times()[:2])
    with suppress(OSError, ValueError):
        limit = max(1, round(used + seconds))
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = False, function(*arguments)
    except MemoryError:
        answer = True, MemoryError()
    except Exception as error:
        answer = True, error
    sender.send(answer)


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
