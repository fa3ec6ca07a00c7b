"""`unmask ablate`: train and probe every cell of one of the paper's tables, and set the numbers beside the paper's.

A folder holds the whole table: `ablation.json` (what was asked for, and the steps of every cell, decided once), one Run
for each cell and seed, and after every cell `table.json` and `table.html`, which are made from the Runs alone. So the
same command goes on where it was stopped: finished cells are passed over, a half-trained one is resumed exactly, a
missing probe is made. Seeds are the outer loop: the table is full once before the second seed begins.

The cells of fig9 are classifiers instead, fine-tuned from one pre-trained Run, which is trained first or given.

The tables themselves are in `comparison/paper_tables.py`, how numbers are set beside the paper's in
`comparison/table_page.py`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unmask.comparison.cells import AblationRequest, choose_recipe, refuse_settings
from unmask.comparison.paper_tables import SHARED, find_table
from unmask.comparison.schedule import plan_table, require_probe
from unmask.comparison.table_page import write_table
from unmask.comparison.train_cells import make, sigterm_as_interrupt
from unmask.config import ConfigError
from unmask.console import Console
from unmask.data.sources.source import Source
from unmask.engine import training_data
from unmask.run import Run, RunError


def ablate(
    table: str,
    data: str,
    *,
    test: str | None = None,
    recipe: str | None = None,
    out: str | Path | None = None,
    budget: float | None = None,
    seeds: int = 1,
    shots: int | None = None,
    settings: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    from_run: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make the table in `out`, or go on making it, and return what `table.json` holds; "state" says how it ended.

    data, test: labelled images; the labels are used by the probes, and by fine-tuning, only. recipe: the base of every
    cell, mae_nano when None (`family` has its own). budget: seconds for the whole table; None for the recipe's own
    length. shots: labels per class for the probes, None for as many as keep a probe short (for fine-tuning: all).
    tokenizer: a dVAE's Run for the cells that need one; None trains one first. from_run: the pre-trained Run that fig9
    fine-tunes; None trains one first. State "finished", "stopped" (resumable), or "failed" when a cell could not be
    made. Raises ValueError for what a person can mend, before anything is trained.
    """
    console = console or Console()
    which = find_table(table)
    asked = AblationRequest(
        table, str(data), test, choose_recipe(which, recipe, from_run), tuple(settings), budget, seeds, shots,
        None if tokenizer is None else str(tokenizer), None if from_run is None else str(from_run),
    )  # fmt: skip
    refuse_settings(which, asked)
    source, most_shots = require_probe(asked)
    folder = Path(out) if out is not None else default_out(asked, source)
    with claim(folder):
        decided = read_table_plan(folder, asked, source)
        if decided is None:
            decided = plan_table(which, asked, source, min(asked.shots or most_shots, most_shots), console)
            Run(folder).write("ablation.json", decided)
        report_plan(decided, console)
        stopped, said = False, sentences(write_table(folder, "running"))
        try:
            with sigterm_as_interrupt():
                for seed in range(asked.seeds):
                    for cell in decided["cells"]:
                        if cell["name"] not in SHARED or seed == 0:
                            make(folder, decided, cell, seed, console)
                            now = sentences(write_table(folder, "running"))
                            if now[cell["name"]] != said[cell["name"]]:  # what was there before is in the table below
                                console.say(now[cell["name"]])
                            said = now
        except KeyboardInterrupt:
            stopped = True
        summary = write_table(folder, "stopped" if stopped else "finished")
    for row in summary["rows"]:
        console.say("  " + row["sentence"])
    console.say(summary["agreement"]["sentence"])
    if summary["helped"]:
        console.say(summary["helped"])
    for line in summary["not_comparable"]:
        console.warn(line)
    console.say(f"table: {folder / 'table.html'}")
    if stopped:
        console.say(f"stopped; go on with: {shlex.join(['unmask', *sys.argv[1:]])} (the same command)")
    return summary


def sentences(summary: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["sentence"] for row in summary["rows"]}


def default_out(asked: AblationRequest, source: Source) -> Path:
    stem = "".join(letter if letter.isalnum() else "-" for letter in Path(source.name).name.split(".")[0]).strip("-")
    return Path("runs") / f"{stem or 'images'}-table-{asked.table}"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold the folder for one ablation. Raises RunError when something else lies in it."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; a table needs a folder: choose another --out")
    if folder.is_dir() and not (folder / "ablation.json").exists():
        inside = [entry.name for entry in folder.iterdir() if entry.name != ".lock" and entry.suffix != ".partial"]
        if inside:
            raise RunError(
                f"{folder} is not empty ({', '.join(sorted(inside)[:3])}) and holds no ablation.json to go on with; "
                "choose another --out"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder {folder} cannot be made: {error.strerror}; choose another --out") from error
    with Run(folder).lock():
        yield


def read_table_plan(folder: Path, asked: AblationRequest, source: Source) -> dict[str, Any] | None:
    """What was decided when this table was begun; None for a new one. Raises ConfigError when something else is asked.

    More seeds than at first may be asked for; the cells keep their steps.
    """
    if not (folder / "ablation.json").exists():
        return None
    decided = Run(folder).read("ablation.json")
    was = decided["asked"]
    for key, value in asked.saved().items():
        if key != "seeds" and was.get(key) != value:
            raise ConfigError(
                f"{folder} was begun with {key} {was.get(key)!r}, now {value!r} came; a table is one experiment: give "
                "what was given then, or choose another --out"
            )
    if asked.seeds < was["seeds"]:
        raise ConfigError(f"{folder} was begun with {was['seeds']} seeds, now {asked.seeds} came; give as many or more")
    if source.fingerprint() != decided["fingerprint"]:
        raise training_data.DataError(
            f"the images of {asked.data} have changed since this table was begun, so its cells could not be compared; "
            "bring the old files back, or choose another --out"
        )
    if asked.seeds > was["seeds"]:
        decided["asked"] = asked.saved()
        Run(folder).write("ablation.json", decided)
    return decided


def report_plan(decided: dict[str, Any], console: Console) -> None:
    asked = decided["asked"]
    console.say(
        f"{decided['title']}: {len(decided['cells'])} cells, {asked['seeds']} seed{'s' * (asked['seeds'] > 1)}, recipe "
        f"{asked['recipe']}; {decided['reason']}"
        + (f"; probes with {decided['shots']} labels per class" * (decided["measure"] == "linear"))
    )
    if decided["missing"]:
        console.warn(f"not in this version: {', '.join(decided['missing'])}")
