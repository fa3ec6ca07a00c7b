"""`unmask pretrain`: pre-train an encoder on images."""

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import Budget, NewRun, Resume, SeveralData
from unmask.commands.trained_run import conclude, run_exit_code, run_json
from unmask.console import Console
from unmask.engine.pretrain_options import PretrainOptions
from unmask.option import After

if TYPE_CHECKING:
    from unmask.run import Run


@dataclass(frozen=True)
class PretrainRequest(PretrainOptions, Request):
    """Pre-train an encoder on images, without labels."""

    data: SeveralData
    _: KW_ONLY
    out: Annotated[NewRun, After("recipe")] = None
    budget: Annotated[Budget, After("out")] = None
    resume: Annotated[Resume, After("out")] = "never"


@command(PretrainRequest, panel=Panel.TRAIN, together=True, to_json=run_json, exit_code=run_exit_code)
def pretrain(request: PretrainRequest, console: Console) -> "Run":
    """Return the run, whose `run.status()` shows whether it finished or was stopped."""
    from unmask.engine.pretraining import pretrain as train

    run = train(
        request.data,
        request,
        out=request.out,
        budget=request.budget,
        resume_auto=request.resume == "auto",
        console=console,
    )
    return conclude(run, console)
