"""`unmask ls`: list the runs below a folder, newest last. This module does not load torch."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console, duration
from unmask.errors import UserError
from unmask.option import Option
from unmask.run import Run

if TYPE_CHECKING:
    from unmask.run_summary import RunSummary

DEEPEST = 4  # how many levels of folders to search


@dataclass(frozen=True)
class LsRequest(Request):
    """List the runs in a folder and below, with state, step, image size, loss, newest probe and size on disk."""

    folder: Annotated[str | Path, Option("Folder to list the runs of.", metavar="FOLDER", default="this folder")] = "."


@command(
    LsRequest,
    panel=Panel.FILES,
    to_json=lambda found: [asdict(each) for each in found],
    text=lambda found: "\n".join(table(found)),
)
def ls(request: LsRequest, console: Console) -> "list[RunSummary]":
    """Return a summary of every run, the most recently changed one last."""
    return list_runs(Path(request.folder))


def list_runs(folder: Path) -> "list[RunSummary]":
    """Return summaries of the runs in `folder` and below, the most recently changed one last.

    Raises UserError for a missing folder.
    """
    from unmask.run_summary import summarise

    if not folder.is_dir():
        raise UserError(f"got {folder}, which is not a folder; give a folder with runs in it, such as runs")
    return sorted((summarise(run) for run in find_runs(folder)), key=lambda each: each.changed)


def find_runs(folder: Path) -> Iterator[Run]:
    """Yield every Run in `folder` and below, except runs inside other runs. Links are not followed."""
    if _is_run(folder):
        yield Run(folder)
        return
    yield from _below(folder, DEEPEST)


def _is_run(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def _below(folder: Path, depth: int) -> Iterator[Run]:
    try:
        inside = sorted(child for child in folder.iterdir() if child.is_dir() and not child.is_symlink())
    except OSError:
        return
    for child in inside:
        if child.name.startswith("."):
            continue
        if _is_run(child):
            yield Run(child)
        elif depth > 1:
            yield from _below(child, depth - 1)


def table(found: "list[RunSummary]") -> list[str]:
    """Return the lines of a table for a terminal, or one sentence if there are no runs."""
    if not found:
        return ["no runs here; start one with `unmask pretrain DATA`"]
    now = time.time()
    lines = [("run", "state", "recipe", "step", "size", "loss", "newest probe", "disk", "changed")]
    for each in found:
        size = "" if each.size is None else f"{each.size[0]}x{each.size[1]}"
        loss = "" if each.loss is None else f"{each.loss:.4f}"
        lines.append((
            each.path, each.state, each.recipe or each.method, each.progress, size, loss, each.probe,
            f"{each.bytes / 1e6:,.0f} MB", f"{duration(now - each.changed)} ago",
        ))  # fmt: skip
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
