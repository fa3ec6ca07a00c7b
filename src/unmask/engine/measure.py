"""Measure what a training step needs: memory per image and seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from unmask.batch import DTYPES, Batch, ImageSpec
from unmask.config import Config
from unmask.engine.build import build_method
from unmask.engine.compile import compile_blocks, why_not_compiled
from unmask.engine.device import autocast, wait_for
from unmask.engine.host_memory import memory_kept
from unmask.engine.operation_sizes import recorder
from unmask.method import Clock, Method
from unmask.optim import make_optimizer, update
from unmask.rng import Draws

TENSORS_AT_A_TIME = 4  # of the largest, in the widest place of a network
FEW_IMAGES, LONGEST_PASS = 8, 2.0  # images, and seconds, of a pass that is long enough to tell what a longer one takes
MEASUREMENTS = 3  # of the time of a step, each the mean of several
BUSY = 2.0  # times as long between two measurements of one step: another program uses the machine


def example_batch(images: ImageSpec, count: int, device: str) -> Batch:
    """Return a batch of mid-gray images of the right shape and dtype, for measuring.

    All of them, and every pixel, are of the first class, and a box around such an object fills the upper left quarter.
    """
    mean = torch.tensor(images.mean)[:, None, None].expand(images.channels, *images.size)
    pixels = mean.to(DTYPES[images.dtype])[None].repeat(count, 1, 1, 1)
    zeros = torch.zeros(count, dtype=torch.int64)
    box = torch.tensor([0.0, 0.0, images.size[1] / 2, images.size[0] / 2]).expand(count, 1, 4)
    about: dict[str, Any] = {"labels": zeros, "maps": torch.zeros(count, *images.size, dtype=torch.int64)}
    return Batch(pixels, torch.arange(count), zeros, **about, boxes=box, box_labels=zeros[:, None]).to(device)


def bytes_per_image(method: Method, images: ImageSpec, precision: str, device: str) -> int:
    """Return the bytes that one more image needs in a step: activations kept for backward, and the largest in passing.

    Measured as the difference between four images and two, so one-off allocations such as weights cast to bfloat16
    cancel. A frozen encoder keeps no activations; a few tensors of the largest size exist in it at a time.
    """

    def needed(count: int) -> tuple[int, list[int]]:
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        batch = example_batch(images, count, device)
        kept = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with kept, autocast(precision, device), recorder() as made:
            loss = method(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index)))
        del loss
        return sum(seen.values()), made.bytes

    (kept, made), (kept_of_two, made_of_two) = needed(4), needed(2)
    widest = max((more - less for more, less in zip(made, made_of_two, strict=False)), default=0)
    return max(1, (kept - kept_of_two + TENSORS_AT_A_TIME * widest) // 2)


class Timing(NamedTuple):
    """Seconds of an operation: the median of several measurements, the fastest and the slowest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        """Return the median of `times`, and the range of the means of consecutive parts."""
        parts = min(MEASUREMENTS, len(times))
        edges = [round(part * len(times) / parts) for part in range(parts + 1)]
        means = [sum(times[a:b]) / (b - a) for a, b in pairwise(edges)]
        median = statistics.median(times)
        return cls(median, min(median, *means), max(median, *means))

    def with_loading(self, load: Timing, workers: int) -> Timing:
        """Seconds of a whole step; see `with_loading`."""
        return Timing(*(with_loading(*pair, workers) for pair in zip(self, load, strict=True)))

    def words(self) -> str:
        """Return the numbers as text, e.g. "0.2 s (0.18 to 0.31 s)"."""
        return f"{self.median:.3g} s ({self.low:.3g} to {self.high:.3g} s in {MEASUREMENTS} measurements)"

    @property
    def busy(self) -> bool:
        """Whether the measurements differ so much that another program must be using the machine."""
        return self.high > BUSY * self.low


NO_TIME = Timing(0.0, 0.0, 0.0)


def measure_step_seconds(
    config: Config, images: ImageSpec, micro: int, precision: str, device: str, *, seconds: float = 5.0
) -> float:
    """Return the mean time of one optimiser step; see `time_steps`."""
    times = time_steps(config, images, micro, precision, device, seconds=seconds)
    return sum(times) / len(times)


def time_steps(
    config: Config, images: ImageSpec, micro: int, precision: str, device: str, *, seconds: float = 5.0
) -> list[float]:
    """Return the seconds of single optimiser steps of a temporary copy of the method, without waits for data."""
    method = build_method(config, images).to(device)
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
