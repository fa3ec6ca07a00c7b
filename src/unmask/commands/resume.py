"""`unmask resume`: continue a run where it stopped."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import RunFolder, texts
from unmask.commands.trained_run import conclude, run_exit_code, run_json
from unmask.console import Console
from unmask.option import Option

if TYPE_CHECKING:
    from unmask.run import Run


@dataclass(frozen=True)
class ResumeRequest(Request):
    """Continue a run exactly where it stopped."""

    run: RunFolder
    _: KW_ONLY
    allow_dataset_change: Annotated[bool, Option("Continue even if the image files have changed.")] = False
    data: Annotated[
        str | Path | Sequence[str | Path],
        Option(
            "New location of the images, if the images have moved; repeatable.", metavar="DATA", command_line=list[str]
        ),
    ] = ()
    test: Annotated[str | None, Option("Fine-tuned runs: new location of the test images.", metavar="DATA")] = None
    annotations: Annotated[str | None, Option("Fine-tuned runs: new location of the annotations.", metavar="PATH")] = (
        None
    )
    test_annotations: Annotated[
        str | None, Option("Fine-tuned runs: new location of the annotations of the test images.", metavar="PATH")
    ] = None


@command(ResumeRequest, panel=Panel.TRAIN, together=True, to_json=run_json, exit_code=run_exit_code)
def resume(request: ResumeRequest, console: Console) -> "Run":
    """Return the run, whose `run.status()` shows whether it finished or was stopped."""
    from unmask.config import task_names
    from unmask.engine import changed_data, continue_run
    from unmask.engine.load import read_config
    from unmask.finetuning import finetune_run
    from unmask.run import Run

    supervised = read_config(Run.open(request.run)).method.name in task_names()
    data = tuple(texts(request.data))
    places = changed_data.DataLocations(data, request.test, request.annotations, request.test_annotations)
    run = (finetune_run if supervised else continue_run).resume(
        request.run,
        allow_dataset_change=request.allow_dataset_change,
        places=None if places == changed_data.DataLocations() else places,
        console=console,
    )
    return conclude(run, console)
