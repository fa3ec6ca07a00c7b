"""The shell command of this call, for records and messages. Calls from Python have none."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_current: ContextVar[str | None] = ContextVar("shell_command", default=None)


def shell_command() -> str | None:
    """Return the command, such as `unmask probe RUN DATA`, that can be pasted into a shell; None in a Python call."""
    return _current.get()


@contextmanager
def as_shell_command(arguments: Sequence[str]) -> Iterator[None]:
    """Context manager of a call from the command line. arguments: the words after `unmask`."""
    before = _current.set(shlex.join(["unmask", *arguments]))
    try:
        yield
    finally:
        _current.reset(before)
