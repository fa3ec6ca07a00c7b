"""Draw pictures and measure losses on fixed images during training."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from unmask.batch import Batch
from unmask.data.decode.bad_image import BadImage
from unmask.data.device_crops import to_device
from unmask.data.image_reader import ImageReader
from unmask.data.order import SampleIndices
from unmask.engine.compile import uncompiled
from unmask.engine.device import autocast
from unmask.engine.job import Job, Position, log_row, report_failure
from unmask.engine.pacing import picture_due
from unmask.engine.training_plan import Plan
from unmask.errors import TrainingFailed, UserError
from unmask.method import Method
from unmask.nn.modes import eval_mode
from unmask.report.pictures import draw
from unmask.results import BaselineLosses, from_json, to_json
from unmask.rng import Draws
from unmask.run import Run
from unmask.system.stop_requests import StopRequest

BASELINES = "evals/baselines.json"
PICTURE_SAMPLE = 64


@dataclass
class Samples:
    """Fixed images that show the progress of training. Every run on the same data uses the same images.

    pictures: training images for the pictures and for the comparison with baselines. held_out: images that are held out
    of training, or None. losses: numbers for the progress line: the newest loss on the held-out images, and the loss of
    the best baseline that uses visible patches only.
    """

    pictures: Batch
    held_out: Batch | None
    losses: dict[str, float] = field(default_factory=dict)

    @classmethod
    def nothing(cls) -> Samples:
        """Return samples without images, for processes that draw no pictures."""
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(Batch(torch.zeros(0, 1, 1, 1), empty, empty), None)

    @classmethod
    def of(cls, images: ImageReader, plan: Plan) -> Samples:
        held_out = fixed_images(images, plan, np.array(plan.held_out, np.int64)) if plan.held_out else None
        return cls(fixed_images(images, plan, evenly_spaced(images.rows, PICTURE_SAMPLE)), held_out)


def evenly_spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """Return up to `count` of the rows (N,), evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def fixed_images(images: ImageReader, plan: Plan, rows: np.ndarray) -> Batch:
    """Load images without augmentation onto the device of `plan`. Unreadable images are left out.

    Raises TrainingFailed if none can be read.
    """
    fixed = replace(images, training=False)
    drawn: list[Batch] = []
    for row in rows:
        with suppress(BadImage):  # the training loop itself records unreadable images and replaces them
            drawn.append(fixed[SampleIndices(np.array([row]), np.zeros(1, np.int64))].batch)
    if not drawn:
        raise TrainingFailed(f"none of {len(rows)} images of {images.source.name} can be read; restore them and resume")
    return to_device(Batch.join(drawn), plan.device)


def draw_and_score(job: Job, samples: Samples, at: Position, stop: StopRequest) -> None:
    """Draw a picture of the method's predictions, and record the losses of the method and of baselines on these images.

    evals/baselines.json is a `BaselineLosses`, with one (step, loss) pair per call. Raises StopRequested before
    anything is written.
    """
    with job.whole_method() as method:
        job.world.unless_stopped(stop, lambda: _draw_and_score(job, method, samples, at, stop))


@torch.no_grad()
def _draw_and_score(job: Job, method: Method, samples: Samples, at: Position, stop: StopRequest) -> None:
    plan, train, sample = job.plan, job.config.train, samples.pictures
    clock = plan.clock(at.step, Draws(train.seed, sample.epoch, sample.index))
    with eval_mode(method), uncompiled(), autocast(plan.precision, plan.device), stop.interruptible():
        picture = method.picture(sample, clock)._replace(valid=sample.valid)
        held_out = None if samples.held_out is None else mean_loss(job, method, samples.held_out, at)
    file, title = job.run.pictures / f"step-{at.step:08d}.png", f"step {at.step} of {plan.steps}"
    numbers = {name: float(value) for name, value in picture.numbers.items()}
    loss = numbers.pop("loss")
    samples.losses = {} if held_out is None else {"held out": held_out}
    if fair := {name: value for name, value in numbers.items() if not name.startswith("true_")}:
        name = min(fair, key=lambda name: fair[name])
        samples.losses[f"baseline ({name.replace('_', ' ')})"] = fair[name]
    if held_out is not None:
        log_row(job, {"step": at.step, "held_out_loss": held_out})
    with report_failure(job, job.run.pictures):
        draw(picture.sampled(train.picture_images), plan.images.dtype, file, title)
    before = None
    if at.step > 0:
        with report_failure(job, job.run.path / BASELINES):
            before = read_baselines(job.run)
    record = BaselineLosses(
        images=len(sample), guesses=numbers, losses=_append(before.losses if before else (), at.step, loss)
    )
    if held_out is not None and samples.held_out is not None:
        losses = _append(before.held_out_losses if before else (), at.step, held_out)
        record = replace(record, held_out_images=len(samples.held_out), held_out_losses=losses)
    with report_failure(job, job.run.path / BASELINES):
        job.run.write(BASELINES, to_json(record))


def picture_missing(job: Job, at: Position) -> bool:
    """Return whether a stop request interrupted the picture that was due after the last step."""
    if at.step == 0 or not picture_due(job, at.step):
        return False

    def missing() -> bool:
        try:
            return all(step != at.step for step, _ in read_baselines(job.run).losses)
        except (OSError, UserError):  # the run is older than the file, or the file is damaged
            return False

    return job.world.from_writer(missing)


def read_baselines(run: Run) -> BaselineLosses:
    """Return the losses that have been recorded so far.

    Raises UserError if the file is missing, damaged or another kind of result.
    """
    record = from_json(run.read(BASELINES))
    if not isinstance(record, BaselineLosses):
        raise UserError(f"got another kind of result in {run.path / BASELINES}; expected losses of baselines")
    return record


def _append(before: tuple[tuple[int, float], ...], step: int, loss: float) -> tuple[tuple[int, float], ...]:
    return (*(pair for pair in before if pair[0] < step), (step, loss))


def mean_loss(job: Job, method: Method, batch: Batch, at: Position) -> float:
    """Return the mean loss of the method in evaluation mode, with the same patch masks at every step of training."""
    plan, total = job.plan, torch.zeros((), device=job.plan.device)
    for start in range(0, len(batch), plan.micro_batch):
        part = batch[start : start + plan.micro_batch]
        clock = plan.clock(at.step, Draws(job.config.train.seed, part.epoch, part.index))
        total += method(part, clock).value.detach() * len(part)
    return float(total / len(batch))
