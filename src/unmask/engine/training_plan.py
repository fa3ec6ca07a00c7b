"""The `Plan`: values that are derived once from a `Config`, printed, and stored beside it.

The configuration, the scan, the device and the time budget determine the number of steps and of warm-up steps, the
micro-batch and the number of micro-batches per step, the peak learning rate and the precision. A resumed run reads its
plan and does not make a new one.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import numpy as np
from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from unmask.batch import ImageSpec
from unmask.data.decode.reading import EARLIER, Reading
from unmask.engine.time_budget import Replan, place, require_order
from unmask.method import Clock
from unmask.optim import learning_rate
from unmask.rng import Draws
from unmask.settings import Settings

STORED_NAMES = {"annotations_digest": "taught"}
"""Fields with another name in plan.json, which stays the same so that runs of all versions can be read."""


class Plan(Settings):
    """All derived values of a run.

    processes: number of processes that train. parallel: engine that distributes the training over several processes.
    divide_gradients: whether fsdp and hsdp divide the gradients after each micro-batch of a step, because whole
    gradients do not fit in memory.
    fingerprint: digest of the names and sizes of the files. excluded: rows of the source that are not used for
    training. test_rows: excluded rows on which a supervised run is evaluated. held_out: excluded rows for the held-out
    loss of a pre-training run. test_every: steps between evaluations; 0 evaluates only at the end. annotations_digest:
    digest of the segmentation masks or boxes used for training, and of the test images. reading: how to decode image
    files. budget: seconds for the whole command, or None if there is no time budget. startup: seconds of the budget
    that were used before the run began. replans: changes of `steps` during training, which a resumed run repeats.
    steps: the current number of steps; warmup_steps, picture_every and test_every refer to the original number.
    reasons: sentences that explain the choices. earlier: the plan that applies before step `since`, at which `unmask
    set` changed the schedule. From this step on, the learning rate changes linearly, over `ramp` steps, from `from_lr`
    to the new curve.
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
    processes: int = 1
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    divide_gradients: bool = False
    images: ImageSpec
    fingerprint: str
    excluded: tuple[int, ...] = ()
    test_rows: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()
    test_every: int = 0
    annotations_digest: str = ""
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

    @model_validator(mode="before")
    @classmethod
    def _read_stored_names(cls, tree: Any) -> Any:
        names = {stored: name for name, stored in STORED_NAMES.items()}
        return {names.get(key, key): value for key, value in tree.items()} if isinstance(tree, dict) else tree

    @model_serializer(mode="wrap")
    def _write_stored_names(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        tree: dict[str, Any] = serialize(self)
        return {STORED_NAMES.get(key, key): value for key, value in tree.items()}

    @model_validator(mode="after")
    def _replans_in_order(self) -> Self:
        require_order(self.replans, self.steps)
        return self

    @property
    def first_steps(self) -> int:
        """The number of steps that was planned at first."""
        return self.replans[0].before if self.replans else self.steps

    def place(self, step: int) -> float:
        """Map `step` to a step of the original schedule. Both are equal if the number of steps never changed."""
        return place(step, self.replans) if self.replans else step

    def lr(self, step: int) -> float:
        """Return the learning rate of optimiser step `step` (0-based), which only depends on the step and the plan."""
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

    def clock(self, step: int, draws: Draws, micro: int = 0, place: np.ndarray | None = None) -> Clock:
        """Return the `Clock` to pass to a method at optimiser step `step`. micro, place: see `Clock`."""
        if self.earlier is not None and step < self.since:
            return self.earlier.clock(step, draws, micro, place)
        share = self.place(step) / self.first_steps if self.replans else None
        return Clock(step=step, total=self.steps, rng=draws, micro=micro, share=share, place=place)

    def passed(self, step: int, every: int) -> bool:
        """Return whether step `step` reaches a multiple of `every` steps of the original schedule."""
        return self.times(step, every) > self.times(step - 1, every)

    def times(self, step: int, every: int) -> int:
        """Return how many multiples of `every` steps of the original schedule lie within the first `step` steps."""
        return math.floor(self.place(step) / every + 1e-9)

    def started(self, seconds: float) -> Plan:
        """Return the plan of a run that begins when `seconds` of its budget are used. The length does not change."""
        return self.model_copy(update={"startup": seconds})

    def replanned(self, step: int, steps: int) -> Plan:
        """Return the plan with `steps` steps in all, from optimiser step `step` on."""
        change = Replan(step=step, before=self.steps, steps=steps)
        epochs = steps * self.batch_size / self.num_images
        return self.model_copy(update={"steps": steps, "epochs": epochs, "replans": (*self.replans, change)})
