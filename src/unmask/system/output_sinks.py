"""Replace stdout and stderr by streams that never fail: if nothing can be written any more, the program continues
without output.

A closed or full stream, a reader that has ended (`| head`), or a lost or paused (Ctrl-S) terminal must not end or block
a training. The command line calls `install`; library code prints to `Words`. Standard library only.
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

PATIENCE = 3.0  # Seconds to wait, once, for a full pipe or a paused terminal before stderr output is dropped.
PIECE = 4096  # Number of bytes that a pipe accepts without blocking if it is ready for writing.


class Sink(io.RawIOBase):
    """Binary output to a file descriptor. The first error is stored in `error`, and all output after it is dropped.

    may_drop: whether to drop output as well if the reader does not accept it within `PATIENCE` seconds, instead of
    waiting for the reader.
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
        """Return whether the descriptor is ready for writing."""
        limit = (0 if self.held else PATIENCE) if self.may_drop else None
        try:
            self.held = not select.select([], [self.descriptor], [], limit)[1]
        except (OSError, ValueError):  # `select` does not support this kind of file
            return True
        return not self.held


@dataclass(frozen=True)
class Outputs:
    """The sinks that stdout and stderr of this process write to."""

    stdout: Sink
    stderr: Sink

    def finish(self) -> str | None:
        """Flush both streams.

        Return an error message if stdout output was lost, "" if its reader has ended, else None.
        """
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
    """Replace stdout and stderr of this process by sinks.

    If descriptor 1 or 2 is closed, it is opened on the null device first. Otherwise the next opened file would get the
    number of stderr, and messages would be written to that file.
    """
    closed: dict[int, OSError] = {}
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError as error:
            closed[descriptor] = error
            os.open(os.devnull, os.O_RDWR)  # os.open returns the lowest free number, which is this one
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
    """Return sys.stderr, or the stream behind it while rich draws a bar and replaces sys.stderr."""
    return getattr(sys.stderr, "rich_proxied_file", sys.stderr)


class Words(io.TextIOBase):
    """A text stream that looks up sys.stderr at each call and ignores all errors, for messages."""

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
        except (OSError, ValueError, AttributeError):  # the reader has ended, the stream is closed, or it is None
            return None
