"""`unmask ablate`: reproduce a table of the MAE paper on your own images."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import DONE, FAILED, STOPPED, Panel, Request, command
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Data, Settings, TestData


def _seconds(text: str) -> float:
    from unmask.engine.time_budget import seconds_of

    return seconds_of(text)


def tables() -> dict[str, str]:
    """Return the tables with their titles."""
    from unmask.comparison.paper_tables import TABLES

    return {name: table.title for name, table in TABLES.items()}


@dataclass(frozen=True)
class AblateRequest(Request):
    """Train and probe every cell of a table of the MAE paper, and show the paper's numbers beside the results.

    Running the same command again continues an unfinished table.
    """

    table: Annotated[str, Option("Table or figure of the MAE paper to reproduce.", metavar="TABLE", choices=tables)]
    data: Data
    _: KW_ONLY
    test: TestData = None
    recipe: Annotated[str | None, Option("Base recipe of all cells.", default="mae_nano")] = None
    out: Annotated[
        str | Path | None,
        Option(
            "Folder to write the table to; an unfinished table in this folder is continued.",
            metavar="FOLDER",
            default="runs/DATA-table-TABLE",
        ),
    ] = None
    budget: Annotated[
        float | None, Option("Time for the whole table, e.g. 1h.", metavar="TIME", command_line=str, from_text=_seconds)
    ] = None
    seeds: Annotated[int, Option("Train every cell with this many seeds.", metavar="N", at_least=1)] = 1
    shots: Annotated[
        int | None,
        Option("Number of training labels per class for the probes.", metavar="N", at_least=1, default="5000 in all"),
    ] = None
    tokenizer: Annotated[
        str | Path | None,
        Option("Run of a dVAE, for the cells whose method needs a tokenizer.", metavar="RUN", default="train one"),
    ] = None
    from_run: Annotated[
        str | Path | None, Option("Run that fig9 fine-tunes.", metavar="RUN", flag="--from", default="train one")
    ] = None
    settings: Settings = ()


def _exit_code(summary: dict[str, Any]) -> int:
    return {"finished": DONE, "stopped": STOPPED}.get(summary["state"], FAILED)


@command(AblateRequest, panel=Panel.MEASURE, exit_code=_exit_code)
def ablate(request: AblateRequest, console: Console) -> dict[str, Any]:
    """Return the contents of table.json, in which "state" is finished, stopped or failed."""
    from unmask.comparison.run_table import ablate
    from unmask.comparison.table_plan import TableRequest

    table_request = TableRequest(
        table=request.table,
        data=str(request.data),
        test=request.test,
        recipe=request.recipe,
        settings=tuple(request.settings),
        budget=request.budget,
        seeds=request.seeds,
        shots=request.shots,
        tokenizer=None if request.tokenizer is None else str(request.tokenizer),
        from_run=None if request.from_run is None else str(request.from_run),
    )
    return ablate(table_request, out=request.out, console=console)
