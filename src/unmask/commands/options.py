"""Options that several verbs share but no function below the verbs declares, and the conversion of their values."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from unmask.commands.declare import Request
from unmask.engine import time_budget
from unmask.option import Option


class _Start:
    """Start of the command on the clock of `time.monotonic`, from which time budgets count."""

    seconds = time.monotonic()


def restart_clock() -> None:
    """Let time budgets count from now on, for a second command in the same process."""
    _Start.seconds = time.monotonic()


def started() -> float:
    """Return the start of the command on the clock of `time.monotonic`."""
    return _Start.seconds


def budget_from_text(text: str) -> time_budget.Budget:
    """Parse '30m', '2h', '90s' or '1.5h' as a time budget that counts from the start of the command."""
    return time_budget.Budget(time_budget.seconds_of(text), started())


def texts(values: str | Path | Sequence[str | Path]) -> list[str]:
    """Return one or several paths or names as a list of strings."""
    return [str(values)] if isinstance(values, str | Path) else [str(each) for each in values]


RunFolder = Annotated[str | Path, Option("A run folder.", metavar="RUN")]
SeveralData = Annotated[
    str | Path | Sequence[str | Path],
    Option(
        "Images: a folder, list file, glob, tar, zip or parquet file, a folder or glob of tar or parquet shards, or a "
        "built-in set: shapes, digits. Several sources are combined into one data set.",
        metavar="DATA...",
        command_line=list[str],
    ),
]
Images = Annotated[
    str | Path | Sequence[str | Path],
    Option("Image files, or a folder or other DATA.", metavar="IMAGE...", command_line=list[str]),
]
Budget = Annotated[
    float | str | time_budget.Budget | None,
    Option(
        "Plan as many steps as fit into this time, e.g. 30m, 2h.",
        metavar="TIME",
        command_line=str,
        from_text=budget_from_text,
    ),
]
NewRun = Annotated[str | Path | None, Option("New run folder.", metavar="RUN", default="runs/DATA-RECIPE")]
Resume = Annotated[
    str,
    Option(
        "Whether to continue the run in --out",
        choices=lambda: {
            "never": "--out must be free",
            "auto": "if this command began it",
        },
    ),
]


@dataclass(frozen=True)
class RunRequest(Request):
    """A request about one run, which is the first positional argument."""

    run: RunFolder
