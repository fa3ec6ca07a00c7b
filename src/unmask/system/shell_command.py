"""The shell command that this process is running, for records and messages. A call from Python has no shell command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_current: ContextVar[str | None] = ContextVar("shell_command", default=None)


def shell_command() -> str | None:
    """Return the command to paste into a shell, such as `unmask probe RUN DATA`, or None in a call from Python."""
    return _current.get()


@contextmanager
def as_shell_command(arguments: Sequence[str]) -> Iterator[None]:
    """Context manager that sets the shell command during a call from the command line.

    arguments: the words after `unmask`.
    """
    before = _current.set(shlex.join(["unmask", *arguments]))
    try:
        yield
    finally:
        _current.reset(before)
