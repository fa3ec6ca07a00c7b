"""The `Plan`: what the machine derived from a `Config`, decided once, printed, and saved beside it.

From (config, what the scan found, device, time budget) follow the total and warm-up steps, the micro-batch and
accumulation, the peak learning rate and the precision. A resumed run reads its plan; it does not make a new one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Self

import torch
from pydantic import model_validator
from torch.utils._python_dispatch import TorchDispatchMode

from unmask.batch import DTYPES, Batch, ImageSpec
from unmask.config import Config, ConfigError
from unmask.console import duration
from unmask.data.decode.reading import EARLIER, Reading
from unmask.engine.compile import compile_blocks, why_not_compiled
from unmask.engine.device import autocast, choose_precision, free_memory, wait_for
from unmask.engine.host_memory import memory_kept
from unmask.engine.time_budget import AIM, FEWEST_STEPS, USEFUL_STEPS, Budget, Replan, place, require_order
from unmask.method import Clock, Method
from unmask.nn.default_dtype import float32_default
from unmask.optim import learning_rate, make_optimizer, peak_lr, update
from unmask.rng import Draws
from unmask.settings import Settings

DEFAULT_EPOCHS = 100
MEMORY_SHARE = 0.6
TENSORS_AT_A_TIME = 4  # of the largest, in the widest place of a network
BUDGET_SHARE = 0.9  # the rest: pictures, checkpoints, the report
FEW_IMAGES, LONGEST_PASS = 8, 2.0  # images, and seconds, of a pass that is long enough to tell what a longer one takes
TESTS = 10  # of what learns from labels, unless it is said how often
TEST_IMAGE = 0.5  # time to load and judge an image, as a share of that to learn from it
TEST_SHARE = 0.15  # of a budget, at most
MEASUREMENTS = 3  # of the time of a step, each the mean of several
MEASURING_SHARE = 0.03  # of a budget
BUSY = 2.0  # times as long between two measurements of one step: another program uses the machine


class Plan(Settings):
    """What a run will do. `reasons` are sentences for people: why each choice was made.

    excluded: rows of the source that are not trained on; test_rows: those of them that a supervised run is tested on;
    held_out: those of them on which the loss of a pre-training is reported.
    test_every: steps after which it is tested, 0 at the end only. taught: digest of the masks or boxes that it learns
    from, and of its test images. reading: how image files are decoded, with what was settled for this data set.
    budget: seconds for the whole command, None where the length was set; startup: those of them that were gone when the
    run began. replans: changes of `steps` while it trained, which a resumed run repeats; `steps` is the newest number.
    warmup_steps, picture_every and test_every count in the steps that were planned first.
    earlier: the plan before a change of the schedule at step `since`, for the steps before it; after the change the
    learning rate goes linearly, over `ramp` steps, from `from_lr` to the new curve.
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


def fresh_method(config: Config, images: ImageSpec) -> Method:
    """The method at its random start, from `train.seed`, on the CPU.

    Only initialisation uses torch's generator (data order, crops and masks have their own, `rng.py`), and the caller's
    is not touched.
    """
    with torch.random.fork_rng(devices=[]), float32_default():
        torch.manual_seed(config.train.seed)
        return config.build(images)


def example_batch(images: ImageSpec, count: int, device: str) -> Batch:
    """A batch of mid-gray images of the right shape and dtype, for measuring.

    All of them, and every pixel, are of the first class, and a box around such an object fills the upper left quarter.
    """
    mean = torch.tensor(images.mean)[:, None, None].expand(images.channels, *images.size)
    pixels = mean.to(DTYPES[images.dtype])[None].repeat(count, 1, 1, 1)
    zeros = torch.zeros(count, dtype=torch.int64)
    box = torch.tensor([0.0, 0.0, images.size[1] / 2, images.size[0] / 2]).expand(count, 1, 4)
    about: dict[str, Any] = {"labels": zeros, "maps": torch.zeros(count, *images.size, dtype=torch.int64)}
    return Batch(pixels, torch.arange(count), zeros, **about, boxes=box, box_labels=zeros[:, None]).to(device)


class _Made(TorchDispatchMode):
    """Notes the bytes of what each operation makes, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        several = out if isinstance(out, tuple | list) else (out,)
        self.bytes.append(sum(tensor.nbytes for tensor in several if isinstance(tensor, torch.Tensor)))
        return out


def bytes_per_image(method: Method, images: ImageSpec, precision: str, device: str) -> int:
    """Bytes that one more image needs in a step: what is kept for the backward pass, and the widest place on the way.

    The difference between four images and two: what is made once, such as weights cast to bfloat16, is no image's. A
    frozen encoder keeps nothing; of what passes through it a few tensors as large as the largest are there at a time.
    """

    def needed(count: int) -> tuple[int, list[int]]:
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = example_batch(images, count, device)
        kept = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with kept, autocast(precision, device), _Made() as made:
            loss = method(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index)))
        del loss
        return sum(seen.values()), made.bytes

    (kept, made), (kept_of_two, made_of_two) = needed(4), needed(2)
    widest = max((more - less for more, less in zip(made, made_of_two, strict=False)), default=0)
    return max(1, (kept - kept_of_two + TENSORS_AT_A_TIME * widest) // 2)


def require_micro_batch(config: Config) -> None:
    """Raises ConfigError when the micro-batch that was asked for does not divide the batch, or splits data.repeats."""
    batch, wanted, repeats = config.train.batch_size, config.train.micro_batch, config.data.repeats
    for name, size in (("batch_size", batch), ("micro_batch", wanted)):
        if size is not None and size % repeats:
            raise ConfigError(
                f"train.{name}={size} is not a multiple of data.repeats={repeats}, the samples that each image gives; "
                f"use {-(-size // repeats) * repeats}, or change data.repeats"
            )
    if wanted is not None and batch % wanted:
        near = min((d for d in range(1, batch + 1) if batch % d == 0), key=lambda d: abs(d - wanted))
        raise ConfigError(
            f"train.micro_batch={wanted} does not divide train.batch_size={batch}; use {near}, or change the batch"
        )


def choose_micro_batch(config: Config, bytes_per_image: int, device: str) -> tuple[int, str]:
    """Largest divisor of the batch that fits, and why. Raises ConfigError when one asked for does not divide."""
    batch, repeats = config.train.batch_size, config.data.repeats
    require_micro_batch(config)
    if (wanted := config.train.micro_batch) is not None:
        return wanted, f"micro-batch {wanted}: asked for"
    room = int(free_memory(device) * MEMORY_SHARE)
    most = max(1, room // max(1, bytes_per_image))
    micro = max((d for d in range(repeats, batch + 1, repeats) if batch % d == 0 and d <= most), default=repeats)
    need = f"{bytes_per_image / 2**20:.1f} MiB of activations an image"
    if micro == batch:
        return micro, f"the whole batch of {batch} in one pass: {need}, {room / 2**30:.1f} GiB to use"
    return micro, f"micro-batches of {micro}, {batch // micro} to a step: {need}, {room / 2**30:.1f} GiB to use"


class Timing(NamedTuple):
    """Seconds that something takes: the median of several measurements, the fastest and the slowest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """From single times in their order: the median of them, and the range of the means of consecutive parts."""
        parts = min(MEASUREMENTS, len(times))
        edges = [round(part * len(times) / parts) for part in range(parts + 1)]
        means = [sum(times[a:b]) / (b - a) for a, b in pairwise(edges)]
        median = statistics.median(times)
        return cls(median, min(median, *means), max(median, *means))

    def with_loading(self, load: Timing, workers: int) -> Timing:
        """Seconds of a whole step; see `with_loading`."""
        return Timing(*(with_loading(*pair, workers) for pair in zip(self, load, strict=True)))

    def words(self) -> str:
        """For people, e.g. "0.2 s (0.18 to 0.31 s)"."""
        return f"{self.median:.3g} s ({self.low:.3g} to {self.high:.3g} s in {MEASUREMENTS} measurements)"

    @property
    def busy(self) -> bool:
        """Whether the measurements differ so much that another program must be using the machine."""
        return self.high > BUSY * self.low


NO_TIME = Timing(0.0, 0.0, 0.0)


def measure_step_seconds(
    config: Config, images: ImageSpec, micro: int, precision: str, device: str, *, seconds: float = 5.0
) -> float:
    """Mean time of one optimiser step; see `time_steps`."""
    times = time_steps(config, images, micro, precision, device, seconds=seconds)
    return sum(times) / len(times)


def time_steps(
    config: Config, images: ImageSpec, micro: int, precision: str, device: str, *, seconds: float = 5.0
) -> list[float]:
    """Times of single optimiser steps on a throw-away copy of the method, data waits not included."""
    method = fresh_method(config, images).to(device)
    if config.train.compile and why_not_compiled(device) is None:
        compile_blocks(method)  # the run finds them compiled
    optimizer = make_optimizer(method, config.optim)
    times: list[float] = []

    def passes(batch: Batch, count: int) -> torch.Tensor:
        """So many times forward and backward; the last loss."""
        for _ in range(count):
            with autocast(precision, device):
                loss = method(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index))).value
            loss.backward()
        return loss.detach()

    with memory_kept(device):  # as in training
        # On a CPU twice as many take twice as long; what is compiled is compiled for a number of images.
        if device == "cpu" and micro > FEW_IMAGES and not config.train.compile:
            few = example_batch(images, FEW_IMAGES, device)
            passes(few, 1)
            start = time.perf_counter()
            passes(few, 1)
            most = LONGEST_PASS * FEW_IMAGES / max(1e-9, time.perf_counter() - start)
            micro = int(min(micro, max(FEW_IMAGES, most)))
        batch, needed = example_batch(images, micro, device), config.train.batch_size / micro
        count = min(2, math.ceil(needed))
        begin = time.perf_counter()
        while len(times) < 3 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            loss = passes(batch, count)
            if needed > count:
                wait_for(loss)  # or `part` would be the time it takes to launch the work
            part = time.perf_counter() - start
            wait_for(update(optimizer, 0.0, loss, config.optim.clip))
            whole = time.perf_counter() - start
            times.append(whole + part * (needed - count) / count)
    return times[1:]  # the first pass also warms up


def with_loading(compute: float, load: float, workers: int) -> float:
    """Seconds of a step from those of its computation and of loading its images: beside each other, or in turn."""
    return max(compute, load) if workers else compute + load


def choose_steps(
    config: Config,
    num_images: int,
    *,
    budget: Budget | None,
    step_seconds: Callable[[], Timing],
    num_test: int = 0,
) -> tuple[int, int, str]:
    """Total optimiser steps, after how many a supervised run is tested, and why so many.

    A `budget` wins over `train.steps`, and that over epochs: a recipe may have any of them; that a person gives two is
    refused in `engine/pretrain.py`. num_test: images of each test. Raises ConfigError for a budget with no time to
    train.
    """
    train = config.train
    if budget is not None:
        each = step_seconds()  # before the clock is read, because measuring takes time too
        return fill_budget(config, budget.seconds, budget.used(), each, num_test)
    if train.steps is not None:
        steps, why = train.steps, f"{train.steps} steps: the setting train.steps"
    else:
        epochs = train.epochs if train.epochs is not None else DEFAULT_EPOCHS
        steps = max(1, math.ceil(epochs * num_images / train.batch_size))
        why = f"{steps} steps: {epochs:g} epochs of {num_images} images in batches of {train.batch_size}"
    return steps, train.test_every or math.ceil(steps / TESTS), why


def fill_budget(config: Config, budget: float, used: float, timing: Timing, num_test: int) -> tuple[int, int, str]:
    """`choose_steps` for a budget in seconds, of which `used` are gone.

    Tests count, with one more at the end; unless it is set how often, there are ten, or as many as TEST_SHARE of the
    budget has time for.
    """
    train, each = config.train, timing.median
    test = TEST_IMAGE * each / train.batch_size * num_test * (1 if config.optim.average is None else 2)
    tests = TESTS if not test else max(1, min(TESTS, int(TEST_SHARE * budget / test) - 1))
    left = BUDGET_SHARE * budget - used
    if train.test_every:  # one on the way after so many steps, the last of them perhaps sooner, and one at the end
        steps, ends = (left - 2 * test) / (each + test / train.test_every), 2 * test
    else:
        steps, ends = (left - (tests + 1) * test) / each, (tests + 1) * test
    if steps < FEWEST_STEPS:
        need = (used + ends + USEFUL_STEPS * each) / BUDGET_SHARE
        raise ConfigError(
            f"got a budget of {duration(budget)}, which has time for {max(0, int(steps))} steps: "
            f"{duration(used)} were used before training, a step takes {each:.3g} s"
            + (f", tests on {num_test} images take about {duration(ends)}" if test else "")
            + f"; expected time for {USEFUL_STEPS} steps or more: give a budget of {duration(need)}, or a smaller "
            "batch, image size or recipe"
        )
    steps = int(steps)
    every = train.test_every or math.ceil(steps / tests)
    why = (
        f"{steps} steps at first: {timing.words()} each, in a budget of {duration(budget)}, of which "
        f"{duration(used)} are used; the number follows the pace while training"
    )
    if test:
        spent = (1 + math.ceil(steps / every)) * test
        why += f"; tests on {num_test} images take about {duration(spent)}"
    return steps, every, why


def few_steps(plan: Plan) -> str | None:
    """A warning where a budget gives fewer steps than are of use, with the time that these would take."""
    if plan.budget is None or plan.steps >= USEFUL_STEPS:
        return None
    need = plan.startup + (plan.budget - plan.startup) * USEFUL_STEPS / plan.steps
    return (
        f"a budget of {duration(plan.budget)} has time for about {plan.steps} steps, too few to learn much; "
        f"{USEFUL_STEPS} steps would take about {duration(need / AIM)}"
    )


def make_plan(
    config: Config,
    images: ImageSpec,
    *,
    num_images: int,
    fingerprint: str,
    excluded: tuple[int, ...] = (),
    device: str,
    workers: int,
    cached: bool,
    budget: Budget | None = None,
    reasons: tuple[str, ...] = (),
    batch_seconds: Callable[[], Timing] | None = None,
    num_test: int = 0,
) -> Plan:
    """Decide everything that follows from the configuration; see the module docstring.

    batch_seconds: time to load one global batch, for a budget on a machine that waits on its data. num_test: images
    that a supervised run is tested on.
    """
    precision, why_precision = choose_precision(config.train.precision, device)
    method = fresh_method(config, images).to(device)
    micro, why_micro = choose_micro_batch(config, bytes_per_image(method, images, precision, device), device)
    parameters = sum(p.numel() for p in method.parameters())
    encoder_parameters = sum(p.numel() for p in method.encoder.parameters())
    del method

    def step_seconds() -> Timing:
        seconds = 5.0 if budget is None else min(5.0, MEASURING_SHARE * budget.seconds)
        compute = Timing.of(time_steps(config, images, micro, precision, device, seconds=seconds))
        return compute.with_loading(batch_seconds() if batch_seconds else NO_TIME, workers)

    batch_size = config.train.batch_size
    steps, test_every, why_steps = choose_steps(
        config, num_images, budget=budget, step_seconds=step_seconds, num_test=num_test
    )
    peak = peak_lr(config.optim, batch_size)
    if steps * batch_size < 20 * num_images and num_images >= batch_size:
        reasons += (f"only {steps * batch_size / num_images:.3g} epochs: expect the loss to be far from its floor",)
    return Plan(
        steps=steps,
        warmup_steps=round(config.optim.warmup * steps),
        batch_size=batch_size,
        micro_batch=micro,
        accumulation=batch_size // micro,
        peak_lr=peak,
        final_lr=config.optim.final_lr * peak,
        epochs=steps * batch_size / num_images,
        num_images=num_images,
        images=images,
        fingerprint=fingerprint,
        excluded=excluded,
        precision=precision,
        device=device,
        workers=workers,
        cached=cached,
        picture_every=config.train.picture_every or max(1, math.ceil(steps / 4)),
        test_every=test_every,
        parameters=parameters,
        encoder_parameters=encoder_parameters,
        budget=None if budget is None else budget.seconds,
        startup=0.0 if budget is None else budget.used(),
        reasons=(
            *reasons,
            why_steps,
            why_micro,
            why_precision,
            f"peak learning rate {peak:.3g}: base {config.optim.base_lr:.3g} x batch {batch_size} / 256",
        ),
    )
