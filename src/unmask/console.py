"""Print messages and progress of a command to stderr. stdout is reserved for `--json`.

On a terminal, progress is a live bar (rich); elsewhere it is one plain line per interval, without carriage returns or
colours.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from unmask.system.output_sinks import Words

PLAIN_INTERVAL = 30.0
# Matches C0 and C1 controls except tab and line feed, line separators, and Unicode's bidirectional controls. In a file
# name or a label they would move the cursor, recolour the screen or hide part of the line.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def duration(seconds: float) -> str:
    """Format seconds in at most two units: 90 -> '1 min 30 s'."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def escape_controls(text: str) -> str:
    """Replace control characters and undecodable bytes by \\xNN or \\uNNNN, so that text is safe to print.

    Tabs and newlines are kept.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class Console:
    """Prints messages and progress to stderr. quiet: print warnings only. silent: print nothing."""

    def __init__(self, *, quiet: bool = False, silent: bool = False) -> None:
        self.quiet, self.silent = quiet or silent, silent
        self._words = Words()
        self.live = self._words.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
        self._warned: set[str] = set()
        self._rich = RichConsole(file=cast(IO[str], self._words), highlight=False, soft_wrap=True)

    def print(self, text: str = "") -> None:
        """Print a message unless the console is quiet."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning even if the console is quiet."""
        self._print(f"warning: {text}")

    def warn_once(self, text: str) -> None:
        """Print a warning unless this console has printed the same text before."""
        if text not in self._warned:
            self._warned.add(text)
            self.warn(text)

    def _print(self, text: str) -> None:
        if self.silent:
            return
        text = escape_controls(text)  # file names and labels can contain control characters
        if self.live:
            self._rich.print(escape(text))
        else:
            print(text, file=self._words, flush=True)

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Bar]:
        """Context manager that shows a `Bar` of `total` steps, `start` of which are done. `bar.update` moves it."""
        if not self.quiet and (show := in_notebook()) is not None:
            bar = Bar(self, title, total, start)
            bar.show = lambda step, text: show(f"{title} {step}/{total}  {text}")
            yield bar
            return
        if not self.live or self.quiet:
            yield Bar(self, title, total, start)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
        )
        with Progress(*columns, console=self._rich, transient=True) as rich:
            task = rich.add_task(escape(escape_controls(title)), total=total, completed=start, text="")
            bar = Bar(self, title, total, start)
            bar.show = lambda step, text: rich.update(
                task, completed=step, total=bar.total, text=escape(escape_controls(text))
            )
            yield bar

    @contextmanager
    def working(self, title: str) -> Iterator[None]:
        """Context manager that shows how long a task of unknown length has been running."""
        if self.quiet:
            yield
            return
        if self.live:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self._rich, transient=True) as rich:
                rich.add_task(escape(title), total=None)
                yield
            return
        done, began = threading.Event(), time.monotonic()

        def report() -> None:
            while not done.wait(PLAIN_INTERVAL):
                self.print(f"{title}: {duration(time.monotonic() - began)} so far")

        reporter = threading.Thread(target=report, daemon=True)
        reporter.start()
        try:
            yield
        finally:
            done.set()
            reporter.join()


def in_notebook() -> Callable[[str], None] | None:
    """Return a function that replaces the shown line in a Jupyter notebook, or None outside notebooks."""
    if (ipython := sys.modules.get("IPython")) is None or not hasattr(ipython.get_ipython(), "kernel"):
        return None
    handle = ipython.display.display({"text/plain": ""}, raw=True, display_id=True)
    return None if handle is None else lambda text: handle.update({"text/plain": text}, raw=True)


class Bar:
    """Progress of one task, with an estimate of the time left from the mean speed so far.

    rich's TimeRemainingColumn is not used, because plain lines and notebooks need the time left too, and because it
    only uses the last 30 seconds of updates, so it shows nothing if a step takes longer.
    """

    def __init__(self, console: Console, title: str, total: int, start: int) -> None:
        self.console, self.title, self.total, self.last = console, title, total, 0.0
        self.show = self._plain
        self.begin(start)

    def begin(self, step: int) -> None:
        """Start measuring the speed now, when `step` steps are done."""
        self.start, self.began = step, time.monotonic()

    def update(self, step: int, text: str = "") -> None:
        """Update the bar: `step` steps are done, and `text` is shown beside it."""
        self.show(step, "  ".join(part for part in (text, self.left(step)) if part))

    def left(self, step: int) -> str:
        """Return for example '3 min 20 s left', from the mean speed since `begin`, or "" before the first step."""
        done = step - self.start
        if done <= 0:
            return ""
        return f"{duration((time.monotonic() - self.began) / done * (self.total - step))} left"

    def _plain(self, step: int, text: str) -> None:
        now = time.monotonic()
        if now - self.last >= PLAIN_INTERVAL or step == self.total:
            self.last = now
            self.console.print(f"{self.title} {step}/{self.total}  {text}")
