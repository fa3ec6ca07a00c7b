"""Options shared by several verbs, and the conversion of their values."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import Option


class _Start:
    """Start of the command on the clock of `time.monotonic`, from which time budgets count."""

    seconds = time.monotonic()


def restart_clock() -> None:
    """Count time budgets from now on, for a second command in one process."""
    _Start.seconds = time.monotonic()


def started() -> float:
    """Return the start of the command on the clock of `time.monotonic`."""
    return _Start.seconds


def budget_from_text(text: str) -> Any:
    """Parse '30m', '2h', '90s' or '1.5h' as a time budget that counts from the start of the command."""
    from unmask.engine.time_budget import Budget, seconds_of

    return Budget(seconds_of(text), started())


def texts(values: str | Path | Sequence[str | Path]) -> list[str]:
    """Return one or several paths or names as a list of strings."""
    return [str(values)] if isinstance(values, str | Path) else [str(each) for each in values]


RunFolder = Annotated[str | Path, Option("A run folder.", metavar="RUN")]
Data = Annotated[
    str | Path,
    Option(
        "Images: a folder, list file, glob, tar, zip or parquet file, or a built-in set: shapes, digits.",
        metavar="DATA",
        command_line=str,
    ),
]
SeveralData = Annotated[
    str | Path | Sequence[str | Path],
    Option(
        "Images: a folder, list file, glob, tar, zip or parquet file, a folder or glob of tar or parquet shards, or a "
        "built-in set: shapes, digits. Several are read as one.",
        metavar="DATA...",
        command_line=list[str],
    ),
]
Images = Annotated[
    str | Path | Sequence[str | Path],
    Option("Image files, or a folder or other DATA.", metavar="IMAGE...", command_line=list[str]),
]
Exclude = Annotated[
    Sequence[str],
    Option(
        "Exclude images whose file name, folder name or path matches, e.g. thumbs or '*_mask.png'; repeatable.",
        metavar="PATTERN",
    ),
]
Settings = Annotated[
    Sequence[str],
    Option("Change any setting of the recipe, e.g. train.steps=1000; repeatable.", metavar="KEY=VALUE", flag="--set"),
]
TestData = Annotated[str | None, Option("Test images.", metavar="DATA", default="a fifth of DATA")]
Step = Annotated[int | None, Option("Step of the checkpoint to use.", metavar="N", default="the newest")]
Budget = Annotated[
    float | str | None,
    Option(
        "Plan as many steps as fit into this time, e.g. 30m, 2h.",
        metavar="TIME",
        command_line=str,
        from_text=budget_from_text,
    ),
]
NewRun = Annotated[str | Path | None, Option("New run folder.", metavar="RUN", default="runs/DATA-RECIPE")]
Device = Annotated[str, Option("Device: auto, cpu, cuda, cuda:N or mps.")]
Recipe = Annotated[str, Option("Recipe from `unmask recipes`, or auto, which chooses one for the images.")]
