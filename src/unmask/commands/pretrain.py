"""`unmask pretrain`: pre-train an encoder on images."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import Budget, NewRun, SeveralData
from unmask.commands.trained_run import conclude, run_exit_code, run_json
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Exclude, Recipe, Settings

if TYPE_CHECKING:
    from unmask.run import Run


@dataclass(frozen=True)
class PretrainRequest(Request):
    """Pre-train an encoder on images, without labels."""

    data: SeveralData
    _: KW_ONLY
    exclude: Exclude = ()
    recipe: Recipe = "auto"
    out: NewRun = None
    budget: Budget = None
    config: Annotated[
        str | Path | None,
        Option("Use the settings of another run (its folder or config.json) instead of a recipe.", metavar="FILE"),
    ] = None
    from_run: Annotated[
        str | Path | None,
        Option(
            "Start from the weights of this run, with its settings; with --recipe, from its encoder alone.",
            metavar="RUN",
            flag="--from",
        ),
    ] = None
    tokenizer: Annotated[
        str | Path | None,
        Option("beit, and mae with target=tokens: run of the dVAE whose codes the method predicts.", metavar="RUN"),
    ] = None
    palette: Annotated[
        str | Path | None,
        Option("igpt: use the palette of a file from `unmask palette`, or of a run.", metavar="PATH"),
    ] = None
    masks: Annotated[
        str | Path | None,
        Option("mae: patch mask file; hidden patches are # in .txt, true in .npy, black in .png.", metavar="FILE"),
    ] = None
    settings: Settings = ()


@command(PretrainRequest, panel=Panel.TRAIN, trains=True, to_json=run_json, exit_code=run_exit_code)
def pretrain(request: PretrainRequest, console: Console) -> "Run":
    """Return the run, whose `run.status()` shows whether it finished or was stopped."""
    from unmask.engine.pretraining import PretrainOptions
    from unmask.engine.pretraining import pretrain as train

    options = PretrainOptions(
        exclude=request.exclude,
        recipe=request.recipe,
        config=request.config,
        settings=request.settings,
        from_run=request.from_run,
        tokenizer=request.tokenizer,
        palette=request.palette,
        masks=request.masks,
    )
    run = train(request.data, options, out=request.out, budget=request.budget, console=console)
    return conclude(run, console)
