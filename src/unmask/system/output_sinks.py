"""stdout and stderr as sinks: where nothing can be written any more, work continues without output.

A closed or full stream, a reader that has gone (`| head`), a lost terminal or one that is held with Ctrl-S must not
end or hold a training. `install` is for the command line; `Words` is what a library prints to. Standard library only.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

PATIENCE = 3.0  # seconds that a full pipe or a held terminal delays words on stderr, once
PIECE = 4096  # bytes; a pipe that can be written to takes as many without a wait


class Sink(io.RawIOBase):
    """Bytes for a file descriptor. The first error is kept in `error`, and from then on everything is dropped.

    may_drop: drop also what a reader does not take within `PATIENCE` seconds; otherwise wait for it.
    """

    def __init__(self, descriptor: int, *, may_drop: bool, error: OSError | None = None) -> None:
        self.descriptor, self.may_drop, self.error = descriptor, may_drop, error
        self.lost = False
        self.held = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return self.error is None and os.isatty(self.descriptor)

    def write(self, b: Any, /) -> int:
        view = memoryview(b).cast("B")
        done = 0
        while self.error is None and done < len(view):
            if not self._ready():
                break
            try:
                done += os.write(self.descriptor, view[done : done + PIECE])
            except BlockingIOError:
                continue
            except OSError as error:
                self.error = error
        self.lost = self.lost or done < len(view)
        return len(view)

    def _ready(self) -> bool:
        """Whether something can be written now."""
        limit = (0 if self.held else PATIENCE) if self.may_drop else None
        try:
            self.held = not select.select([], [self.descriptor], [], limit)[1]
        except (OSError, ValueError):  # not a kind of file that can be waited for
            return True
        return not self.held


@dataclass(frozen=True)
class Outputs:
    """The sinks of this process."""

    stdout: Sink
    stderr: Sink

    def finish(self) -> str | None:
        """Flush; what was lost of stdout, as a sentence, "" where its reader has simply gone, None for nothing."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        if not self.stdout.lost:
            return None
        error = self.stdout.error
        if error is None or error.errno == errno.EPIPE:
            return ""
        return f"stdout cannot be written to ({error.strerror}); the work itself is done"


def install() -> Outputs:
    """Make stdout and stderr of this process sinks. A closed descriptor is opened on the null device first.

    Otherwise the next file that is opened would get its number, and everything that is written to stderr.
    """
    closed: dict[int, OSError] = {}
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError as error:
            closed[descriptor] = error
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sinks = Sink(1, may_drop=False, error=closed.get(1)), Sink(2, may_drop=True, error=closed.get(2))
    for name, sink in zip(("stdout", "stderr"), sinks, strict=True):
        stream = getattr(sys, name)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        errors = getattr(stream, "errors", None) or "backslashreplace"
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
        text = io.TextIOWrapper(io.BufferedWriter(sink), encoding=encoding, errors=errors, line_buffering=True)
        setattr(sys, name, text)
    return Outputs(*sinks)


def _stderr() -> Any:
    """sys.stderr; while rich draws a bar, what lies beneath its stand-in, which would lead back to us."""
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


class Words(io.TextIOBase):
    """sys.stderr as it is at each call, with every failure ignored: for words that matter less than the work."""

    def write(self, text: str) -> int:
        self._try(lambda: _stderr().write(text))
        return len(text)

    def flush(self) -> None:
        self._try(lambda: _stderr().flush())

    def isatty(self) -> bool:
        return bool(self._try(lambda: _stderr().isatty()))

    def fileno(self) -> int:
        return _stderr().fileno()

    @property
    def encoding(self) -> str:
        return getattr(sys.stderr, "encoding", None) or "utf-8"

    @staticmethod
    def _try(call: Callable[[], object]) -> object:
        try:
            return call()
        except (OSError, ValueError, AttributeError):  # gone, closed, None
            return None
