"""`unmask prune`: free disk space in a run folder."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import RunFolder
from unmask.console import Console
from unmask.option import Option


@dataclass(frozen=True)
class PruneRequest(Request):
    """Delete older checkpoints and cached features of a run. The run can still be used and resumed."""

    run: RunFolder
    _: KW_ONLY
    keep_checkpoints: Annotated[int, Option("Number of newest checkpoints to keep.", metavar="N", at_least=1)] = 1
    dry_run: Annotated[bool, Option("Only list the folders that would be deleted, and delete nothing.")] = False


@command(PruneRequest, panel=Panel.FILES)
def prune(request: PruneRequest, console: Console) -> dict[str, Any]:
    """Return the deleted folders and their size in bytes."""
    from unmask.engine.prune_run import prune_run

    return prune_run(
        Path(request.run), keep_checkpoints=request.keep_checkpoints, dry_run=request.dry_run, console=console
    )
