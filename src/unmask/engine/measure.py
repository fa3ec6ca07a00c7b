"""Measure the memory per image and the time of a training step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unmask.batch import DTYPES, Batch, ImageSpec
from unmask.config import Config
from unmask.engine.build import build_method
from unmask.engine.compile import BLOCKS, compile_blocks, why_not_compiled
from unmask.engine.device import autocast, wait_for
from unmask.engine.host_memory import memory_kept
from unmask.engine.operation_sizes import recorder
from unmask.method import Clock, Method
from unmask.nn.torch_internals import has_no_values, memory_address
from unmask.optim import make_optimizer, update
from unmask.rng import Draws

TENSORS_AT_A_TIME = 4  # Assumed number of temporary tensors of the largest size that exist at the same time.
FEW_IMAGES, LONGEST_PASS = 8, 2.0  # On a CPU, steps are timed on a part of the batch, see `time_steps`.
MEASUREMENTS = 3  # Number of measurements of the step time, each the mean of several steps.
BUSY = 2.0  # If measurements of a step differ by this factor, another program is probably using the machine.


def example_batch(images: ImageSpec, count: int, device: str) -> Batch:
    """Return a batch of images with the data's mean values, of the right shape and dtype, for measurements.

    The label of every image and pixel is class 0, and each image has one box of class 0 in its upper left quarter.
    """
    mean = torch.tensor(images.mean)[:, None, None].expand(images.channels, *images.size)
    pixels = mean.to(DTYPES[images.dtype])[None].repeat(count, 1, 1, 1)
    zeros = torch.zeros(count, dtype=torch.int64)
    box = torch.tensor([0.0, 0.0, images.size[1] / 2, images.size[0] / 2]).expand(count, 1, 4)
    about: dict[str, Any] = {"labels": zeros, "maps": torch.zeros(count, *images.size, dtype=torch.int64)}
    return Batch(pixels, torch.arange(count), zeros, **about, boxes=box, box_labels=zeros[:, None]).to(device)


def bytes_per_image(method: Method, images: ImageSpec, precision: str, device: str, *, recompute: bool = False) -> int:
    """Return the memory per image of a step in bytes: activations kept for backward, and the largest temporary tensors.

    The result is the difference between batches of four and of two images, so one-off allocations such as weights cast
    to bfloat16 cancel. A frozen encoder keeps no activations, but a few temporary tensors exist at the same time.
    recompute: whether the transformer blocks recompute their activations (`train.recompute`); each then keeps its
    inputs only, and the activations of one block exist at a time.
    """

    def needed(count: int) -> tuple[int, list[int]]:
        kept = KeptTensors(BLOCKS if recompute else ())
        batch = example_batch(images, count, device)
        with kept.recorded(method), autocast(precision, device), recorder() as made:
            loss = method(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index)))
        del loss
        return kept.bytes, made.bytes

    (kept, made), (kept_of_two, made_of_two) = needed(4), needed(2)
    widest = max((more - less for more, less in zip(made, made_of_two, strict=False)), default=0)
    return max(1, (kept - kept_of_two + TENSORS_AT_A_TIME * widest) // 2)


class KeptTensors:
    """Records the bytes of the tensors that autograd keeps for the backward pass.

    Modules of the types `recomputing` keep their inputs only, and recompute the rest one after the other.
    """

    def __init__(self, recomputing: tuple[type[nn.Module], ...] = ()) -> None:
        self.recomputing = recomputing
        self.outside: dict[int, int] = {}
        self.inside: list[dict[int, int]] = []
        self.current = self.outside

    @property
    def bytes(self) -> int:
        return sum(self.outside.values()) + max((sum(kept.values()) for kept in self.inside), default=0)

    def note(self, tensor: Tensor) -> Tensor:
        """Record a kept tensor; each storage counts once."""
        storage = tensor.untyped_storage()
        self.current[memory_address(tensor) if has_no_values(tensor) else storage.data_ptr()] = storage.nbytes()
        return tensor

    @contextmanager
    def recorded(self, method: nn.Module) -> Iterator[None]:
        """Context manager around the forward pass."""

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                for value in inputs:
                    if isinstance(value, Tensor):
                        self.note(value)
                self.inside.append({})
                self.current = self.inside[-1]

        def leave(*_: object) -> None:
            self.current = self.outside

        parts = [part for part in method.modules() if isinstance(part, self.recomputing)]
        hooks = [part.register_forward_pre_hook(enter) for part in parts]
        hooks += [part.register_forward_hook(leave) for part in parts]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()


class Timing(NamedTuple):
    """Seconds of an operation. low, high: fastest and slowest measurement."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Return the median of `times`, and the lowest and highest mean of their `MEASUREMENTS` consecutive parts."""
        parts = min(MEASUREMENTS, len(times))
        edges = [round(part * len(times) / parts) for part in range(parts + 1)]
        means = [sum(times[a:b]) / (b - a) for a, b in pairwise(edges)]
        median = statistics.median(times)
        return cls(median, min(median, *means), max(median, *means))

    def with_loading(self, load: Timing, workers: int) -> Timing:
        """Return the timing of a step that includes loading; see the function `with_loading`."""
        return Timing(*(with_loading(*pair, workers) for pair in zip(self, load, strict=True)))

    def words(self) -> str:
        """Return text such as "0.2 s (0.18 to 0.31 s in 3 measurements)"."""
        return f"{self.median:.3g} s ({self.low:.3g} to {self.high:.3g} s in {MEASUREMENTS} measurements)"

    @property
    def busy(self) -> bool:
        """Whether the measurements differ so much that another program is probably using the machine."""
        return self.high > BUSY * self.low


NO_TIME = Timing(0.0, 0.0, 0.0)


def measure_step_seconds(
    config: Config, images: ImageSpec, micro: int, precision: str, device: str, *, seconds: float = 5.0
) -> float:
    """Return the mean time of one optimiser step; see `time_steps`."""
    times = time_steps(config, images, micro=micro, precision=precision, device=device, seconds=seconds)
    return sum(times) / len(times)


def time_steps(
    config: Config, images: ImageSpec, micro: int, precision: str, device: str, *, seconds: float = 5.0
) -> list[float]:
    """Return the seconds of single optimiser steps of a temporary copy of the method, without waits for data."""
    method = build_method(config, images).to(device)
    if config.train.compile and why_not_compiled(device) is None:
        compile_blocks(method)  # the training that follows can reuse the compiled code
    optimizer = make_optimizer(method, config.optim)
    times: list[float] = []

    def passes(batch: Batch, count: int) -> torch.Tensor:
        """Run `count` forward and backward passes; return the last loss."""
        for _ in range(count):
            with autocast(precision, device):
                loss = method(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index))).value
            loss.backward()
        return loss.detach()

    with memory_kept(device):  # As in training.
        # On a CPU, time is proportional to the number of images. Compiled blocks need the real number of images.
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
                wait_for(loss)  # wait for the device, otherwise `part` would only be the time to launch the kernels
            part = time.perf_counter() - start
            wait_for(update(optimizer, 0.0, loss, config.optim.clip))
            whole = time.perf_counter() - start
            times.append(whole + part * (needed - count) / count)
    return times[1:]  # the first one is a warm-up


def with_loading(compute: float, load: float, workers: int) -> float:
    """Return the seconds of a step with loading, which runs in parallel to the computation if there are workers."""
    return max(compute, load) if workers else compute + load
