"""`unmask check`: what is in a folder of images, and what training on it would take."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from unmask.commands.declare import Option, Panel, Request, command
from unmask.commands.options import Exclude, Settings, SeveralData, texts
from unmask.console import Console


@dataclass(frozen=True)
class CheckRequest(Request):
    """Check images before training: counts, sizes, channels, broken files, and a recipe with a forecast of its time."""

    data: SeveralData
    _: KW_ONLY
    exclude: Exclude = ()
    sample: Annotated[
        int | None, Option("Check this many files, evenly spread.", metavar="N", default="all", at_least=1)
    ] = None
    workers: Annotated[
        int | None,
        Option("Number of processes that check.", metavar="N", at_least=0, default="by number of files"),
    ] = None
    settings: Settings = ()


@dataclass(frozen=True)
class Checked:
    """What was found; exit code 2 when these images cannot be trained on."""

    code: int
    summary: dict[str, Any]


@command(
    CheckRequest, panel=Panel.START, to_json=lambda checked: checked.summary, exit_code=lambda checked: checked.code
)
def check(request: CheckRequest, console: Console) -> Checked:
    """Return what was found, and the exit code."""
    from unmask.engine.check import check_data

    code, summary = check_data(
        texts(request.data),
        console,
        sample=request.sample,
        workers=request.workers or 0,
        settings=request.settings,
        exclude=request.exclude,
    )
    return Checked(code, summary)
