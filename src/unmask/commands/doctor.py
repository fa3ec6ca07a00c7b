"""`unmask doctor`: test this machine; with DATA, measure what limits the speed of training."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import DONE, FAILED, Panel, Request, command
from unmask.console import Console
from unmask.errors import UserError
from unmask.option import Option
from unmask.shared_options import Exclude, Settings


@dataclass(frozen=True)
class DoctorRequest(Request):
    """Print versions and devices, and run a short self-test; with DATA, measure what limits the speed of training."""

    data: Annotated[str | None, Option("Images to measure the training speed on.", metavar="DATA")] = None
    _: KW_ONLY
    exclude: Exclude = ()
    recipe: Annotated[str, Option("With DATA: recipe from `unmask recipes`, or auto.")] = "auto"
    tokenizer: Annotated[
        str | Path | None, Option("With DATA: run of the dVAE to use as tokenizer.", metavar="RUN")
    ] = None
    settings: Settings = ()


@dataclass(frozen=True)
class Examined:
    """Result of `unmask doctor`. summary: the object that --json prints. good: whether the self-test passed."""

    good: bool
    summary: dict[str, Any]


@command(
    DoctorRequest,
    panel=Panel.START,
    to_json=lambda examined: examined.summary,
    exit_code=lambda examined: DONE if examined.good else FAILED,
)
def doctor(request: DoctorRequest, console: Console) -> Examined:
    """Return the measurements, and whether the self-test passed."""
    from unmask.engine.bottleneck import find_bottleneck
    from unmask.engine.self_test import run_self_test

    if request.data is not None:
        tokenizer = None if request.tokenizer is None else Path(request.tokenizer)
        summary = find_bottleneck(
            request.data,
            console,
            recipe=request.recipe,
            exclude=request.exclude,
            settings=request.settings,
            tokenizer=tokenizer,
        )
        return Examined(True, summary)
    if request.recipe != "auto" or request.settings or request.exclude or request.tokenizer is not None:
        raise UserError(
            "got --recipe, --set, --exclude or --tokenizer without DATA, where they have no effect; give DATA too"
        )
    return Examined(*run_self_test(console))
