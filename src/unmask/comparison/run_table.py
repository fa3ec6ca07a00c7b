"""`unmask ablate`: train and probe the cells of a table of the MAE paper, and show the results beside the paper's.

The folder of a table contains `ablation.json` (the request and the steps of every cell, decided once), one run per cell
and seed, and `table.json` and `table.html`, which are rewritten after every cell. Repeating the command therefore
continues the table: finished cells are skipped, an interrupted run is resumed exactly, and missing probes are measured.
All cells are trained with the first seed before any cell is trained with the second.

The cells of fig9 are classifiers that are fine-tuned from the same pre-trained run, which the user gives or the table
trains first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from unmask.comparison.cells import choose_recipe, refuse_settings
from unmask.comparison.paper_tables import find_table
from unmask.comparison.schedule import Experiment, plan_table, require_probe
from unmask.comparison.table_page import write_table
from unmask.comparison.table_plan import PLAN_FILE, TablePlan, TableRequest, continue_plan, has_plan, write_plan
from unmask.comparison.table_results import TableResults
from unmask.comparison.train_cells import make_cell, sigterm_as_interrupt
from unmask.console import Console
from unmask.data.sources.source import Source
from unmask.run import Run, RunError
from unmask.system.plain_names import default_folder
from unmask.system.shell_command import shell_command


def ablate(request: TableRequest, *, out: str | Path | None = None, console: Console | None = None) -> dict[str, Any]:
    """Train a table in the folder `out`, or continue it, and return the content of `table.json`.

    The value of its key "state" is "finished", "stopped" (repeat the command to continue), or "failed" if a cell could
    not be trained. Raises UserError, before any training, if the request is invalid.
    """
    console = console or Console()
    table = find_table(request.table)
    request = replace(request, recipe=choose_recipe(table, request.recipe, request.from_run))
    refuse_settings(table, request)
    source, shots = require_probe(request)
    folder = Path(out) if out is not None else default_out(request, source)
    with hold(folder):
        if has_plan(folder):
            plan = continue_plan(folder, request, source)
        else:
            plan = plan_table(Experiment(table, request, source, shots), console)
            write_plan(folder, plan)
        report_plan(plan, console)
        try:
            with sigterm_as_interrupt():
                make_cells(folder, plan, console)
            results = write_table(folder, "finished")
        except KeyboardInterrupt:
            results = write_table(folder, "stopped")
    report_results(results, folder, console)
    return results.to_json()


def make_cells(folder: Path, plan: TablePlan, console: Console) -> None:
    """Train and measure every cell, seed by seed; after each run, rewrite the table and print its row if it changed."""
    before = {row.cell.name: row.sentence for row in write_table(folder, "running").rows}
    for seed in range(plan.asked.seeds):
        for cell in plan.cells:
            if seed not in plan.runs_of(cell):
                continue
            make_cell(folder, plan, cell=cell, seed=seed, console=console)
            now = {row.cell.name: row.sentence for row in write_table(folder, "running").rows}
            if now[cell.name] != before[cell.name]:
                console.print(now[cell.name])
            before = now


def default_out(request: TableRequest, source: Source) -> Path:
    """Return the folder of a table that is used without --out."""
    return default_folder(source.name, f"table-{request.table}")


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Context manager that creates and locks the folder of a table. Raises RunError if it contains anything else."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"got {folder}, which is a file; expected a folder; choose another --out")
    if folder.is_dir() and not has_plan(folder):
        inside = [entry.name for entry in folder.iterdir() if entry.name != ".lock" and entry.suffix != ".partial"]
        if inside:
            raise RunError(
                f"{folder} is not empty ({', '.join(sorted(inside)[:3])}) and has no {PLAN_FILE} to continue; choose "
                "another --out"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the folder {folder}: {error.strerror}; choose another --out") from error
    with Run(folder).lock():
        yield


def report_plan(plan: TablePlan, console: Console) -> None:
    """Print the number of cells, seeds and steps before training."""
    request = plan.asked
    console.print(
        f"{plan.title}: {len(plan.cells)} cells, {request.seeds} seed{'s' * (request.seeds > 1)}, "
        f"recipe {request.recipe}; {plan.reason}"
        + f"; probes with {plan.shots} labels per class"
        * (plan.measure == "linear")
    )
    if plan.missing:
        console.warn(f"cells not available in this version: {', '.join(plan.missing)}")


def report_results(results: TableResults, folder: Path, console: Console) -> None:
    """Print every row, the agreement with the paper, and the path of the page."""
    for row in results.rows:
        console.print("  " + row.sentence)
    console.print(results.agreement.sentence)
    if results.helped:
        console.print(results.helped)
    for line in results.not_comparable:
        console.warn(line)
    console.print(f"table: {folder / 'table.html'}")
    if results.state == "stopped":
        command = shell_command()
        again = (
            "repeat the same call to continue" if command is None else f"continue with: {command} (the same command)"
        )
        console.print(f"stopped; {again}")
