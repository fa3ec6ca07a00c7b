"""Derive the `Plan` from a configuration, the scan, the device and the time budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from unmask.batch import ImageSpec
from unmask.config import Config, ConfigError
from unmask.console import duration
from unmask.data.decode.reading import EARLIER, Reading
from unmask.engine.build import build_method
from unmask.engine.choose_parallel import FLOAT32, USABLE_SHARE, Devices, size
from unmask.engine.device import choose_precision, free_memory
from unmask.engine.flops import build_unallocated
from unmask.engine.measure import NO_TIME, Timing, bytes_per_image, time_steps
from unmask.engine.parallel_costs import Division, Model, pass_sizes
from unmask.engine.time_budget import AIM, FEWEST_STEPS, USEFUL_STEPS, Budget
from unmask.engine.training_plan import Plan
from unmask.optim import peak_lr

DEFAULT_EPOCHS = 100
MEMORY_SHARE = 0.6
BUDGET_SHARE = 0.9  # Share of a budget for training; the rest is reserved for pictures, checkpoints and the report.
TESTS = 10  # Number of evaluations during a supervised run, unless train.test_every is set.
TEST_IMAGE = 0.5  # Time to load and evaluate an image, divided by the time of a training step per image.
TEST_SHARE = 0.15  # Maximum share of a budget for evaluations.
MEASURING_SHARE = 0.03  # Maximum share of a budget for measuring the time of a step.


@dataclass(frozen=True)
class DatasetFacts:
    """The properties of the images that the plan depends on.

    spec: shape, dtype and statistics. num_images: number of training images. fingerprint: fingerprint of the source.
    excluded: rows of the source that are not used for training. num_test: number of test images of a supervised run.
    test_rows, held_out, annotations_digest, reading: see `Plan`.
    """

    spec: ImageSpec
    num_images: int
    fingerprint: str
    excluded: tuple[int, ...] = ()
    num_test: int = 0
    test_rows: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()
    annotations_digest: str = ""
    reading: Reading = EARLIER


@dataclass(frozen=True)
class LoadingPlan:
    """How images are loaded. workers: number of loader workers. cached: whether decoded images are kept in memory.
    batch_seconds: function that measures the time to load one global batch (None: the loading time is neglected).
    """

    workers: int
    cached: bool
    batch_seconds: Callable[[], Timing] | None = None


class Processes(NamedTuple):
    """The number of training processes in all, and of those that share the memory of this host."""

    count: int = 1
    on_this_host: int = 1


ONE_PROCESS = Processes()

Fit = Callable[[int], int]
"""Function from the number of micro-batches per step to the number of images that fit in the memory of a process."""


@dataclass(frozen=True)
class ModelFacts:
    """The properties of the method that the plan depends on. groups: its parameters, for several processes.
    bytes_per_image: memory per image in a training step.
    """

    groups: Model
    parameters: int
    encoder_parameters: int
    bytes_per_image: int


def unit_of_batch(config: Config, processes: int) -> int:
    """Return the number of which batch and micro-batch must be multiples, so that every process gets the same share.

    Mixup and cutmix mix pairs of images, and both images of a pair must be in the same process.
    """
    return processes * config.data.repeats * (2 if config.method.mixes_pairs and processes > 1 else 1)


def require_divisible(config: Config, processes: int) -> None:
    """Raise ConfigError unless the batch can be divided evenly among `processes`."""
    batch, unit = config.train.batch_size, unit_of_batch(config, processes)
    if processes > 1 and batch % unit:
        below, above = batch // unit * unit, -(-batch // unit) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"got train.batch_size={batch} for {processes} processes; expected a multiple of {unit}; use "
            f"--set train.batch_size={near}, or another number of processes"
        )


def require_micro_batch(config: Config) -> None:
    """Raise ConfigError if train.micro_batch does not divide the batch, or data.repeats does not divide both."""
    batch, wanted, repeats = config.train.batch_size, config.train.micro_batch, config.data.repeats
    for name, given in (("batch_size", batch), ("micro_batch", wanted)):
        if given is not None and given % repeats:
            raise ConfigError(
                f"train.{name}={given} is not a multiple of data.repeats={repeats}, the number of samples per image; "
                f"use {-(-given // repeats) * repeats}, or change data.repeats"
            )
    if wanted is not None and batch % wanted:
        near = min((d for d in range(1, batch + 1) if batch % d == 0), key=lambda d: abs(d - wanted))
        raise ConfigError(
            f"train.micro_batch={wanted} does not divide train.batch_size={batch}; use {near}, or change the batch"
        )


def choose_micro_batch(
    config: Config, bytes_per_image: int, device: str, processes: Processes = ONE_PROCESS, fit: Fit | None = None
) -> tuple[int, str]:
    """Return (micro-batch, reason): the largest divisor of the batch that fits in memory, unless train.micro_batch is
    set.

    The micro-batch is that of all processes together, and each gets the same share of it. fit: see `Fit` (None: the
    images that fit in the memory for activations). Raises ConfigError.
    """
    batch, count = config.train.batch_size, processes.count
    if (wanted := wanted_micro_batch(config, count)) is not None:
        return wanted, f"micro-batch {wanted}: the setting train.micro_batch"
    usable = usable_memory(device, processes)
    micro = largest_micro_batch(config, count, fit or (lambda _: usable // max(1, bytes_per_image)))
    need = f"{bytes_per_image / 2**20:.1f} MiB of activations per image"
    if micro == batch:
        return micro, f"the whole batch of {batch} in one pass: {need}, {usable / 2**30:.1f} GiB usable"
    return micro, f"micro-batches of {micro}, {batch // micro} per step: {need}, {usable / 2**30:.1f} GiB usable"


def wanted_micro_batch(config: Config, processes: int) -> int | None:
    """Return the setting train.micro_batch. Raises ConfigError if it or the batch cannot be divided evenly."""
    require_micro_batch(config)
    require_divisible(config, processes)
    wanted, unit = config.train.micro_batch, unit_of_batch(config, processes)
    if processes > 1 and wanted is not None and wanted % unit:
        raise ConfigError(
            f"got train.micro_batch={wanted} for {processes} processes; expected a multiple of {unit} that divides "
            "train.batch_size; leave it out to choose one automatically"
        )
    return wanted


def largest_micro_batch(config: Config, processes: int, fit: Fit) -> int:
    """Return the largest micro-batch of all processes whose share fits in the memory of each."""
    batch, unit = config.train.batch_size, unit_of_batch(config, processes)
    if batch <= fit(1) * processes:
        return batch
    most = max(1, fit(2)) * processes
    return max((d for d in range(unit, batch + 1, unit) if batch % d == 0 and d <= most), default=unit)


def usable_memory(device: str, processes: Processes) -> int:
    """Return how many bytes of its device a process may use: for activations, or for everything if there are several
    processes.
    """
    if processes.count > 1 and device.startswith("cuda"):
        return int(free_memory(device) * USABLE_SHARE)
    sharing = processes.on_this_host if device == "cpu" else 1
    return int(free_memory(device) * MEMORY_SHARE) // sharing


def divide(config: Config, model: ModelFacts, precision: str, device: str, processes: Processes) -> Division | None:
    """Return how several processes divide the training, or None if there is only one."""
    if processes.count == 1:
        return None
    nodes = max(1, processes.count // processes.on_this_host)
    devices = Devices(usable_memory(device, processes), nodes, processes.count // nodes)
    return Division(config, model.groups, model.bytes_per_image, precision, devices)


def fit_of(division: Division | None, model: ModelFacts, device: str, processes: Processes) -> Fit:
    """Return how many images fit in the memory of a process; see `Fit`."""
    if division is not None:
        return division.images_that_fit
    usable = usable_memory(device, processes)
    return lambda _: usable // max(1, model.bytes_per_image)


def division_of_steps(division: Division | None, batch: int, micro: int) -> dict[str, Any]:
    """Return the fields of a `Plan` that state how its steps are divided into micro-batches and among processes."""
    accumulation = batch // micro
    fields: dict[str, Any] = {"micro_batch": micro, "accumulation": accumulation}
    if division is None:
        return fields | {"processes": 1, "parallel": "ddp", "divide_gradients": False}
    count = division.devices.count
    divided = division.divides_gradients(micro // count, accumulation)
    return fields | {"processes": count, "parallel": division.engine, "divide_gradients": divided}


def require_state_memory(plan: Plan, division: Division, processes: Processes, *, read: int) -> None:
    """Raise ConfigError if the state of each process does not fit its device, or rank 0 is unable to read a checkpoint.

    division: how the processes divide the training. read: bytes of the checkpoint that rank 0 reads as a whole.
    """
    state = division.memory().total
    on_host = state * processes.on_this_host if plan.device == "cpu" else 0
    for device, needed in ((plan.device, state), ("cpu", on_host + read)):
        if needed > (free := free_memory(device)):
            count = "1 process" if processes.count == 1 else f"{processes.count} processes"
            raise ConfigError(
                f"got {count} for a run of {plan.processes}; expected {size(needed)} of free memory for model, "
                f"gradients and moments{' and the checkpoint' if read else ''}, but {size(free)} are free; continue "
                "with as many processes as before, or on a machine with more memory"
            )


def choose_steps(
    config: Config,
    num_images: int,
    *,
    budget: Budget | None,
    step_seconds: Callable[[], Timing],
    num_test: int = 0,
) -> tuple[int, int, str]:
    """Return (number of optimiser steps, steps between evaluations of a supervised run, reason).

    A `budget` overrides `train.steps`, which overrides `train.epochs`, because a recipe may set any of them. If the
    user sets two of them, `engine/resolve.py` raises an error. Raises ConfigError for a budget with no time to train.
    """
    train = config.train
    if budget is not None:
        each = step_seconds()  # measure before `budget.used()` is called, because measuring takes time too
        return fill_budget(config, budget.seconds, used=budget.used(), timing=each, num_test=num_test)
    if train.steps is not None:
        steps, why = train.steps, f"{train.steps} steps: the setting train.steps"
    else:
        epochs = train.epochs if train.epochs is not None else DEFAULT_EPOCHS
        steps = max(1, math.ceil(epochs * num_images / train.batch_size))
        why = f"{steps} steps: {epochs:g} epochs of {num_images} images in batches of {train.batch_size}"
    return steps, train.test_every or math.ceil(steps / TESTS), why


def fill_budget(config: Config, budget: float, used: float, timing: Timing, num_test: int) -> tuple[int, int, str]:
    """Return the result of `choose_steps` for a budget of `budget` seconds, `used` of which have passed.

    The budget includes the evaluations during training and one at the end. Unless their interval is set, there are ten
    evaluations, or as many as fit into TEST_SHARE of the budget. Raises ConfigError if no time is left to train.
    """
    train, each = config.train, timing.median
    test = TEST_IMAGE * each / train.batch_size * num_test * (1 if config.optim.average is None else 2)
    tests = TESTS if not test else max(1, min(TESTS, int(TEST_SHARE * budget / test) - 1))
    left = BUDGET_SHARE * budget - used
    if train.test_every:  # evaluations at this interval, one after the last step, and the final test
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
        f"{steps} steps at first: each step takes {timing.words()}, in a budget of {duration(budget)}, of which "
        f"{duration(used)} are used; the number is adapted to the speed of training"
    )
    if test:
        spent = (1 + math.ceil(steps / every)) * test
        why += f"; tests on {num_test} images take about {duration(spent)}"
    return steps, every, why


def few_steps(plan: Plan) -> str | None:
    """Return a warning if a budget allows too few steps to learn much, else None."""
    if plan.budget is None or plan.steps >= USEFUL_STEPS:
        return None
    need = plan.startup + (plan.budget - plan.startup) * USEFUL_STEPS / plan.steps
    return (
        f"a budget of {duration(plan.budget)} has time for about {plan.steps} steps, too few to learn much; "
        f"{USEFUL_STEPS} steps would take about {duration(need / AIM)}"
    )


def make_plan(
    config: Config,
    dataset: DatasetFacts,
    loading: LoadingPlan,
    device: str,
    *,
    budget: Budget | None = None,
    reasons: tuple[str, ...] = (),
    processes: Processes = ONE_PROCESS,
) -> Plan:
    """Derive the plan of a run.

    budget: time for the whole command, or None if the settings determine the length. reasons: sentences about choices
    made before, which are stored in the plan.
    """
    precision, why_precision = choose_precision(config.train.precision, device)
    require_divisible(config, processes.count)
    model = model_facts(config, dataset.spec, precision, device, processes)
    division = divide(config, model, precision, device, processes)
    if division is not None and division.engine != "ddp":
        require_host_memory(FLOAT32 * model.parameters)
    fit = fit_of(division, model, device, processes)
    micro, why_micro = choose_micro_batch(config, model.bytes_per_image, device, processes, fit)
    share = micro // processes.count

    def step_seconds() -> Timing:
        patience = 5.0 if budget is None else min(5.0, MEASURING_SHARE * budget.seconds)
        compute = Timing.of(
            time_steps(config, dataset.spec, micro=share, precision=precision, device=device, seconds=patience)
        )
        return compute.with_loading(loading.batch_seconds() if loading.batch_seconds else NO_TIME, loading.workers)

    steps, test_every, why_steps = choose_steps(
        config, dataset.num_images, budget=budget, step_seconds=step_seconds, num_test=dataset.num_test
    )
    batch_size, peak = config.train.batch_size, peak_lr(config.optim, config.train.batch_size)
    return Plan(
        steps=steps,
        warmup_steps=round(config.optim.warmup * steps),
        batch_size=batch_size,
        **division_of_steps(division, batch_size, micro),
        peak_lr=peak,
        final_lr=config.optim.final_lr * peak,
        epochs=steps * batch_size / dataset.num_images,
        num_images=dataset.num_images,
        images=dataset.spec,
        fingerprint=dataset.fingerprint,
        excluded=dataset.excluded,
        test_rows=dataset.test_rows,
        held_out=dataset.held_out,
        annotations_digest=dataset.annotations_digest,
        reading=dataset.reading,
        precision=precision,
        device=device,
        workers=loading.workers,
        cached=loading.cached,
        picture_every=config.train.picture_every or max(1, math.ceil(steps / 4)),
        test_every=test_every,
        parameters=model.parameters,
        encoder_parameters=model.encoder_parameters,
        budget=None if budget is None else budget.seconds,
        reasons=(
            *reasons,
            *few_epochs(steps * batch_size, dataset.num_images, batch_size),
            *(() if any(why.startswith(f"{steps} steps:") for why in reasons) else (why_steps,)),
            why_micro,
            *(() if division is None else (division.reason,)),
            why_precision,
            f"peak learning rate {peak:.3g}: base {config.optim.base_lr:.3g} x batch {batch_size} / 256",
        ),
    )


def model_facts(
    config: Config, spec: ImageSpec, precision: str, device: str, processes: Processes = ONE_PROCESS
) -> ModelFacts:
    """Build the method once, count its parameters, and measure the memory that its activations need.

    For several GPUs nothing is allocated, because the model may be too large for one of them.
    """
    if processes.count > 1 and device.startswith("cuda"):
        method, sizes = build_unallocated(config, spec), pass_sizes(config, spec, precision)
        groups, each = Model.of(method, sizes.cast), sizes.per_image
    else:
        method = build_method(config, spec).to(device)
        groups = Model.in_bfloat16(method) if precision == "bf16" else Model.of(method)
        each = bytes_per_image(method, spec, precision, device, recompute=config.train.recompute)
    return ModelFacts(
        groups=groups,
        parameters=sum(p.numel() for p in method.parameters()),
        encoder_parameters=sum(p.numel() for p in method.encoder.parameters()),
        bytes_per_image=each,
    )


def require_host_memory(needed: int) -> None:
    """Raise ConfigError unless this process, which builds the initial weights, has `needed` bytes of main memory."""
    free = free_memory("cpu")
    if needed > free:
        raise ConfigError(
            f"got a model of {size(needed)}, but rank 0 has {size(free)} of main memory free; expected enough for the "
            "initial weights of the whole model, which rank 0 draws and hands out; run rank 0 on a host with more "
            "memory, or choose a smaller recipe"
        )


def few_epochs(samples: int, num_images: int, batch_size: int) -> tuple[str, ...]:
    """Return a tuple with one warning if the training lasts only a few epochs, else ()."""
    if samples >= 20 * num_images or num_images < batch_size:
        return ()
    return (f"only {samples / num_images:.3g} epochs: expect the loss to be far above its minimum",)


def for_processes(plan: Plan, config: Config, processes: Processes, *, read: int = 0) -> Plan:
    """Return the plan of a run that continues with this number of processes.

    The micro-batch stays the same if it can be divided among them and each share fits in memory, so that results change
    by rounding at most. read: bytes of a checkpoint that a single process reads. Raises ConfigError, also if there is
    not enough memory for the state and the checkpoint.
    """
    require_divisible(config, processes.count)
    unit = unit_of_batch(config, processes.count)
    model = model_facts(config, plan.images, plan.precision, plan.device, processes)
    division = divide(config, model, plan.precision, plan.device, processes)
    automatic = config.model_copy(update={"train": config.train.model_copy(update={"parallel": "auto"})})
    alone = Division(automatic, model.groups, model.bytes_per_image, plan.precision, Devices(0, 1, 1))
    require_state_memory(plan, division or alone, processes, read=read)
    micro = plan.micro_batch
    fit = fit_of(division, model, plan.device, processes)
    most = max(1, fit(plan.batch_size // micro)) * processes.count
    if micro % unit or (micro > most and config.train.micro_batch is None):
        free = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": None})})
        micro, _ = choose_micro_batch(free, model.bytes_per_image, plan.device, processes, fit)
    return plan.model_copy(update=division_of_steps(division, plan.batch_size, micro))
