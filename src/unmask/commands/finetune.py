"""`unmask finetune`: train the encoder of a run on a task with labels."""

import pkgutil
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import unmask.tasks
from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import Budget, NewRun, Resume, RunFolder
from unmask.commands.trained_run import conclude, run_exit_code, run_json
from unmask.console import Console
from unmask.errors import UserError
from unmask.option import Option
from unmask.shared_options import Data, Exclude, Settings, TestData
from unmask.system.docstrings import class_constant

if TYPE_CHECKING:
    from unmask.data.annotations.segmentation_masks import MaskOptions
    from unmask.run import Run


def tasks() -> dict[str, str]:
    """Return the tasks, which are the files of `tasks/`, with the annotations that they need (`Task.needs`)."""
    names = (module.name for module in pkgutil.iter_modules(unmask.tasks.__path__))
    needs = {name: class_constant(f"unmask.tasks.{name}", "needs") for name in names}
    return {name: words for name, words in needs.items() if words}


def ids_from_text(text: str) -> tuple[int, ...]:
    """Parse ids such as '0,255'. Raises UserError if the text is not a list of ids."""
    try:
        return tuple(int(value) for value in text.split(","))
    except ValueError:
        raise UserError(f"got --mask-values {text}; expected ids separated by commas, for example 0,255") from None


@dataclass(frozen=True)
class FinetuneRequest(Request):
    """Fine-tune a run's encoder on labelled images and test it: classification, segmentation or detection."""

    run: RunFolder
    data: Data
    _: KW_ONLY
    exclude: Exclude = ()
    task: Annotated[
        str | None, Option("Task to train.", metavar="TASK", default="the task of --recipe, or classify", choices=tasks)
    ] = None
    test: TestData = None
    annotations: Annotated[
        str | None,
        Option(
            "segment: folder of segmentation masks; detect: COCO .json file or folder of VOC .xml files.",
            metavar="PATH",
            default="beside the images",
        ),
    ] = None
    test_annotations: Annotated[
        str | None,
        Option("Annotations of the test images, as for --annotations.", metavar="PATH", default="beside the images"),
    ] = None
    split: Annotated[
        str | None, Option("detect: use only the images listed in ImageSets/Main/NAME.txt.", metavar="NAME")
    ] = None
    test_split: Annotated[
        str | None, Option("detect: use only the test images listed in ImageSets/Main/NAME.txt.", metavar="NAME")
    ] = None
    ignore: Annotated[
        Sequence[int],
        Option("segment: ignore pixels with this id in the segmentation masks, besides 255; repeatable.", metavar="ID"),
    ] = ()
    mask_values: Annotated[
        Sequence[int] | None,
        Option(
            "segment: ids in the segmentation masks that are classes, in order, e.g. 0,255.",
            metavar="ID,ID...",
            command_line=str,
            from_text=ids_from_text,
        ),
    ] = None
    class_names: Annotated[
        str | Path | None,
        Option(
            "segment: file with the class names of the ids (codes.txt, label_colors.txt, ...).",
            metavar="FILE",
            default="classes.txt beside the masks",
        ),
    ] = None
    recipe: Annotated[
        str,
        Option(
            "Fine-tuning recipe from `unmask recipes` (finetune_..., scratch_..., segment_... or detect_...), or auto."
        ),
    ] = "auto"
    out: NewRun = None
    resume: Resume = "never"
    last_blocks: Annotated[
        float | None,
        Option(
            "Train only the head and the last N blocks: 0 is the head alone, 0.5 adds the last MLP.",
            metavar="N",
            default="all",
        ),
    ] = None
    from_scratch: Annotated[bool, Option("Start from random weights, as a baseline.")] = False
    shots: Annotated[
        int | None,
        Option(
            "Number of training labels per class (segment, detect: number of training images).",
            metavar="N",
            default="all",
            at_least=1,
        ),
    ] = None
    budget: Budget = None
    steps_of: Annotated[
        str | Path | None, Option("With --from-scratch: use the steps and batch size of this run.", metavar="RUN")
    ] = None
    settings: Settings = ()


def mask_options(request: FinetuneRequest) -> "MaskOptions | None":
    """Return the options for reading segmentation masks, or None if none was given."""
    if request.mask_values is None and request.class_names is None:
        return None
    from unmask.data.annotations.segmentation_masks import MaskOptions

    names = None if request.class_names is None else Path(request.class_names)
    return MaskOptions(tuple(request.mask_values or ()), names)


@command(FinetuneRequest, panel=Panel.TRAIN, together=True, to_json=run_json, exit_code=run_exit_code)
def finetune(request: FinetuneRequest, console: Console) -> "Run":
    """Return the new run, whose `run.status()` shows whether it finished or was stopped."""
    from unmask.finetuning.finetune_run import FinetuneOptions
    from unmask.finetuning.finetune_run import finetune as run_finetune

    options = FinetuneOptions(
        task=request.task,
        exclude=request.exclude,
        annotations=request.annotations,
        split=request.split,
        test=request.test,
        test_annotations=request.test_annotations,
        test_split=request.test_split,
        ignored=request.ignore,
        mask_options=mask_options(request),
        shots=request.shots,
        recipe=request.recipe,
        last_blocks=request.last_blocks,
        from_scratch=request.from_scratch,
        steps_of=request.steps_of,
        settings=request.settings,
    )
    data = str(request.data)
    run = run_finetune(
        request.run,
        data,
        options,
        out=request.out,
        budget=request.budget,
        resume_auto=request.resume == "auto",
        console=console,
    )
    return conclude(run, console)
