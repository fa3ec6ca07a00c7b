"""The `Plan`: what is derived from a `Config`, once; printed, and saved beside it.

From (config, what the scan found, device, time budget) follow the total and warm-up steps, the micro-batch and
accumulation, the peak learning rate and the precision. A resumed run reads its plan and does not make a new one.
"""

from __future__ import annotations

import math
from typing import Self

from pydantic import model_validator

from unmask.batch import ImageSpec
from unmask.data.decode.reading import EARLIER, Reading
from unmask.engine.time_budget import Replan, place, require_order
from unmask.method import Clock
from unmask.optim import learning_rate
from unmask.rng import Draws
from unmask.settings import Settings


class Plan(Settings):
    """What a run will do. reasons: why each choice was made, as sentences.

    excluded: rows of the source that are not trained on. test_rows: those of them used to evaluate a supervised run.
    held_out: those of them on which the loss of a pre-training is reported. test_every: steps between evaluations, 0
    for one at the end only. taught: digest of the segmentation masks or boxes used for training, and of the test
    images. reading: how image files of this data set are decoded. budget: seconds for the whole command, None where the
    length was set. startup: seconds of it used when the run began. replans: changes of `steps` during training, which a
    resumed run repeats; `steps` is the newest number, while warmup_steps, picture_every and test_every count in the
    steps that were planned first. earlier: the plan before a change of the schedule at step `since`, for the steps
    before it; after it the learning rate goes linearly, over `ramp` steps, from `from_lr` to the new curve.
    """

    steps: int
    warmup_steps: int
    batch_size: int
    micro_batch: int
    accumulation: int
    peak_lr: float
    final_lr: float
    epochs: float
    num_images: int
    images: ImageSpec
    fingerprint: str
    excluded: tuple[int, ...] = ()
    test_rows: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()
    test_every: int = 0
    taught: str = ""
    precision: str
    device: str
    workers: int
    cached: bool
    reading: Reading = EARLIER
    picture_every: int
    parameters: int
    encoder_parameters: int
    budget: float | None = None
    startup: float = 0.0
    replans: tuple[Replan, ...] = ()
    reasons: tuple[str, ...] = ()
    earlier: Plan | None = None
    since: int = 0
    ramp: int = 0
    from_lr: float = 0.0

    @model_validator(mode="after")
    def _replans_in_order(self) -> Self:
        require_order(self.replans, self.steps)
        return self

    @property
    def first_steps(self) -> int:
        """The steps that were planned at first."""
        return self.replans[0].before if self.replans else self.steps

    def place(self, step: int) -> float:
        """Where `step` stands on the schedule that was planned first; `step` itself where nothing was replanned."""
        return place(step, self.replans) if self.replans else step

    def lr(self, step: int) -> float:
        """Learning rate of optimiser step `step` (0-based), a function of the step and of the plan alone."""
        if self.earlier is not None and step < self.since:
            return self.earlier.lr(step)
        rate = learning_rate(
            self.place(step),
            steps=self.first_steps,
            warmup_steps=self.warmup_steps,
            peak=self.peak_lr,
            final=self.final_lr,
        )
        done = (step - self.since + 1) / (self.ramp + 1)
        return rate if self.earlier is None or done >= 1 else self.from_lr + (rate - self.from_lr) * done

    def clock(self, step: int, draws: Draws, micro: int = 0) -> Clock:
        """The clock of optimiser step `step` for a method."""
        if self.earlier is not None and step < self.since:
            return self.earlier.clock(step, draws, micro)
        share = self.place(step) / self.first_steps if self.replans else None
        return Clock(step, self.steps, draws, micro, share)

    def passed(self, step: int, every: int) -> bool:
        """Whether `step` steps reach a multiple of `every` steps of the schedule that was planned first."""
        return self.times(step, every) > self.times(step - 1, every)

    def times(self, step: int, every: int) -> int:
        """How many multiples of `every` steps of the schedule that was planned first lie within `step` steps."""
        return math.floor(self.place(step) / every + 1e-9)

    def replanned(self, step: int, steps: int) -> Plan:
        """The plan with `steps` steps in all from optimiser step `step` on."""
        change = Replan(step=step, before=self.steps, steps=steps)
        epochs = steps * self.batch_size / self.num_images
        return self.model_copy(update={"steps": steps, "epochs": epochs, "replans": (*self.replans, change)})
