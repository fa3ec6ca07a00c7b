"""`unmask set`: change settings of an existing run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import RunFolder
from unmask.console import Console
from unmask.option import Option


@dataclass(frozen=True)
class SetRequest(Request):
    """Change settings of an existing run, such as its length, and record the change.

    `unmask resume` then continues the run with the new settings.
    """

    run: RunFolder
    settings: Annotated[Sequence[str], Option("Settings, e.g. train.steps=20000.", metavar="KEY=VALUE...")]


@command(SetRequest, panel=Panel.TRAIN)
def set_values(request: SetRequest, console: Console) -> dict[str, Any]:
    """Return the changed settings and the step at which they changed."""
    from unmask.engine.edit_run import set_values

    return {"run": str(request.run), **set_values(Path(request.run), request.settings, console=console)}
