"""`unmask predict RUN IMAGES --out`: predict classes, masks or boxes of images with a fine-tuned run.

Images are prepared as in the tests, without random augmentation. Files that cannot be read are reported and skipped.
The output formats are in `prediction_files.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from unmask.batch import Batch
from unmask.console import Bar, Console
from unmask.data.annotations.class_names import class_name
from unmask.data.decode import decode
from unmask.data.decode.bad_image import BadImage
from unmask.data.readable_images import ReadableImages
from unmask.data.sources.source import Source
from unmask.engine.device import autocast, choose_device
from unmask.engine.divided_scan import read_as, require_same_files
from unmask.engine.load import Loaded, load
from unmask.engine.world import joined
from unmask.errors import UserError
from unmask.evals.images import each_batch, eval_precision
from unmask.evals.reconstruct_images import open_images
from unmask.finetuning.configure import settings_of
from unmask.finetuning.prediction_files import WRITERS, Predicted, PredictionFile, Writer, Written, require_out
from unmask.results import PredictResult
from unmask.task import Task
from unmask.tasks.detect import LEAST_SCORE

T = TypeVar("T")

MOST_NAMED = 6


@dataclass(frozen=True)
class PredictOptions:
    """step: step of the checkpoint (None: the newest).

    device: "auto", "cpu", "cuda" ... min_score: smallest box score.
    """

    step: int | None = None
    device: str = "auto"
    min_score: float = LEAST_SCORE


def predict(
    run: Path, images: Sequence[str], out: Path, options: PredictOptions | None = None, console: Console | None = None
) -> PredictResult:
    """Write predictions for all images to `out`. Several processes divide the images among them.

    Raises UserError if the run has not been fine-tuned, or if `out` does not fit the run's task.
    """
    options = options or PredictOptions()
    with joined() as world:
        console = world.console(console)
        loaded = load(run, device=choose_device(options.device), step=options.step)
        task = loaded.method
        if not isinstance(task, Task):
            raise UserError(
                f"got {run}, a run of {loaded.config.method.name}; expected a fine-tuned run; fine-tune it first: "
                f"unmask finetune {run} DATA"
            )
        writer = WRITERS[task.annotation]
        require_score(task, options.min_score)
        world.on_writer(lambda: require_out(out, writer))
        source = read_as(open_images(images), loaded.plan.reading)
        require_same_files(source, world)
        file = PredictionFile(
            out=out,
            classes=names_of(task),
            settings=settings_of(loaded.config),
            images=list(source.names),
            min_score=options.min_score,
        )
        with (
            torch.inference_mode(),
            autocast(eval_precision(loaded), loaded.device),
            console.progress("predicting", len(source)) as bar,
        ):
            found = predictions(
                loaded, task, source=source, content=partial(writer.content, file), console=console, bar=bar
            )
            # In other processes `found` is empty, but to exhaust it computes their part of the predictions.
            written = writer.write(file, found) if world.is_writer else Written(len(list(found)), {})
        return world.from_writer(lambda: report(written, file, task, writer, console))


def report(
    written: Written, file: PredictionFile, task: Task[Any, Any], writer: Writer[Any], console: Console
) -> PredictResult:
    """Print what was written, and return the result."""
    done, found = written
    commonest = sorted(found.items(), key=lambda pair: -pair[1])[:MOST_NAMED]
    counts = ", ".join(f"{number:,} {writer.unit}{label}" for label, number in commonest)
    console.print(f"{file.out}: {done} images: {counts}")
    if task.annotation == "boxes" and file.min_score == LEAST_SCORE:
        console.print(
            f"  the file includes all boxes with a score of at least {LEAST_SCORE}, as average precision needs them; "
            "--min-score 0.3 drops uncertain boxes"
        )
    return PredictResult(out=str(file.out), images=done, left_out=len(file.images) - done, classes=found)


def require_score(task: Task[Any, Any], least: float) -> None:
    """Raise UserError if --min-score does not fit the task or is out of range."""
    if least != LEAST_SCORE and task.annotation != "boxes":
        raise UserError(f"got --min-score {least:g}; only boxes have scores; leave it out")
    if not LEAST_SCORE <= least <= 1:
        raise UserError(f"got --min-score {least:g}; expected a score from {LEAST_SCORE} to 1")


def predictions(
    loaded: Loaded,
    task: Task[Any, Any],
    source: Source,
    content: Callable[[Predicted], T],
    console: Console,
    bar: Bar | None,
) -> Iterator[T]:
    """Yield the contents of all readable images in order. Masks and boxes are in pixels of the files.

    Several processes divide the images among them, and the contents are yielded in the writer only.
    """
    rows = np.arange(len(source))
    plan, crop = loaded.plan, loaded.config.data.crop
    whole = task.whole_images()
    seen = ReadableImages(source, rows, plan.images, crop, training=False, whole=whole)

    def predicted(batch: Batch) -> list[T]:
        numbers = batch.index.tolist()
        sizes = [size_of(source, row) if whole else plan.images.size for row in numbers]
        found = task.predict(batch.images.to(loaded.device), [size or plan.images.size for size in sizes])
        return [
            content(Predicted(row, source.names[row], size, one))
            for row, size, one in zip(numbers, sizes, found, strict=True)
            if size is not None
        ]

    for contents in each_batch(predicted, seen, rows, 0, console, bar):
        yield from contents


def names_of(task: Task[Any, Any]) -> list[str]:
    """Return class names with control characters escaped, and with the class number appended to names that occur twice,
    such as ImageNet's "crane".
    """
    names = [class_name(name) for name in task.classes]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def size_of(source: Source, row: int) -> tuple[int, int] | None:
    """Return (H, W) of an image file, or None if the file has become unreadable."""
    try:
        header = decode.header(source.read(row), source.reading)
    except BadImage:
        return None
    return header.height, header.width
