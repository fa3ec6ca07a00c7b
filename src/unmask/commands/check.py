"""`unmask check`: examine images before training, and forecast the training time."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import SeveralData, texts
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Exclude, Settings


@dataclass(frozen=True)
class CheckRequest(Request):
    """Check images before training, and forecast the training time."""

    data: SeveralData
    _: KW_ONLY
    exclude: Exclude = ()
    sample: Annotated[
        int | None, Option("Check only this many files, evenly spaced.", metavar="N", default="all", at_least=1)
    ] = None
    workers: Annotated[
        int | None,
        Option("Number of worker processes.", metavar="N", at_least=0, default="chosen by the number of files"),
    ] = None
    settings: Settings = ()


@dataclass(frozen=True)
class Checked:
    """Summary of a check. code: exit code; 2 if these images cannot be used for training."""

    code: int
    summary: dict[str, Any]


@command(
    CheckRequest,
    panel=Panel.START,
    together=True,
    to_json=lambda checked: checked.summary,
    exit_code=lambda checked: checked.code,
)
def check(request: CheckRequest, console: Console) -> Checked:
    """Return the summary and the exit code."""
    from unmask.engine.check_data import check_data

    code, summary = check_data(
        texts(request.data),
        console,
        sample=request.sample,
        workers=request.workers or 0,
        settings=request.settings,
        exclude=request.exclude,
    )
    return Checked(code, summary)
