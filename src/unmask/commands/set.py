"""`unmask set`: change settings of a run that has begun."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import Option, Panel, Request, command
from unmask.commands.options import RunFolder
from unmask.console import Console


@dataclass(frozen=True)
class SetRequest(Request):
    """Change settings of an existing run, such as its length, and record the change; then resume the run."""

    run: RunFolder
    settings: Annotated[Sequence[str], Option("Settings, e.g. train.steps=20000.", metavar="KEY=VALUE...")]


@command(SetRequest, panel=Panel.TRAIN)
def set_values(request: SetRequest, console: Console) -> dict[str, Any]:
    """Return what was changed, and at which step."""
    from unmask.engine.edit_run import set_values

    return {"run": str(request.run), **set_values(Path(request.run), request.settings, console=console)}
