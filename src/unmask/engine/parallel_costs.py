"""The memory and the traffic of one rank under DDP, FSDP2 and HSDP, by arithmetic on the shapes of the parameters.

torch's `fully_shard` divides each parameter along one dimension (`divided_dimension`) into parts of equal size, the
last ones padded or empty. It gathers the parameters of a transformer block while the block is computed, and all other
parameters, the "root", from the forward pass to the end of the backward pass. Master weights, gradients, moments and
all reductions are float32; in bf16, blocks are gathered in bfloat16.

Persistent sizes are exact (`fake_ranks.py` compares them with torch). Temporary sizes assume that one block is computed
while the next is gathered. Traffic is that of ring algorithms, in bytes that one rank sends per optimiser step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from unmask.batch import ImageSpec
from unmask.config import Config
from unmask.engine.build import build_method
from unmask.engine.choose_parallel import (
    FLOAT32,
    GATHERED_BLOCKS,
    LEAST_IMAGES,
    Devices,
    Engine,
    Needs,
    choose_parallel,
    divided_dimension,
    num_shards,
)
from unmask.engine.compile import BLOCKS
from unmask.engine.device import autocast
from unmask.engine.fake_ranks import fake_tensors, move_to_fake_cpu
from unmask.engine.flops import build_unallocated
from unmask.engine.measure import bytes_per_image, example_batch
from unmask.engine.operation_sizes import CastSizes
from unmask.method import Clock, Method
from unmask.nn.blocks import fused_attention
from unmask.rng import Draws

BFLOAT16 = 2  # bytes


@dataclass(frozen=True)
class ParameterFacts:
    """One parameter. shape, trainable; cast: bytes of the bfloat16 copy that autocast makes of it."""

    shape: tuple[int, ...]
    trainable: bool
    cast: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def part(self, shards: int) -> int:
        """Return how many numbers the first of `shards` ranks holds, which is the most that any rank holds."""
        if not self.shape:
            return 1
        length = self.shape[divided_dimension(self.shape, shards)]
        return -(-length // shards) * (self.numel // length)


@dataclass(frozen=True)
class Model:
    """The parameters of a method as `fully_shard` groups them. blocks: those of each block. root: all others."""

    blocks: tuple[tuple[ParameterFacts, ...], ...]
    root: tuple[ParameterFacts, ...]

    @classmethod
    def of(cls, method: nn.Module, cast: Mapping[str, int] | None = None) -> Model:
        """Return the groups of a method. cast: bytes of the bfloat16 copies by name; see `cast_bytes`."""
        names = {id(value): name for name, value in method.named_parameters()}

        def group(values: list[nn.Parameter]) -> tuple[ParameterFacts, ...]:
            return tuple(
                ParameterFacts(tuple(value.shape), value.requires_grad, (cast or {}).get(names[id(value)], 0))
                for value in values
            )

        blocks = [list(part.parameters()) for part in method.modules() if isinstance(part, BLOCKS)]
        inside = {id(value) for block in blocks for value in block}
        root = [value for value in method.parameters() if id(value) not in inside]
        return cls(tuple(group(block) for block in blocks), group(root))

    @classmethod
    def in_bfloat16(cls, method: nn.Module) -> Model:
        """Return the groups of a method, with a bfloat16 copy of every trainable parameter."""
        return cls.of(
            method, {n: BFLOAT16 * value.numel() for n, value in method.named_parameters() if value.requires_grad}
        )

    @cached_property
    def all(self) -> tuple[ParameterFacts, ...]:
        return (*self.root, *(each for block in self.blocks for each in block))

    @property
    def trainable(self) -> int:
        return sum(each.numel for each in self.all if each.trainable)


@dataclass(frozen=True)
class Kept:
    """What a training keeps of each trainable parameter.

    precision: "bf16" or "fp32". moments: numbers that the optimiser stores per parameter (AdamW: 2, LARS: 1). average:
    whether there is a moving average of the weights.
    """

    precision: str = "bf16"
    moments: int = 2
    average: bool = False

    @classmethod
    def of(cls, config: Config, precision: str) -> Kept:
        return cls(precision, 2 if config.optim.name == "adamw" else 1, config.optim.average is not None)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of each number of a block that is gathered."""
        return BFLOAT16 if self.precision == "bf16" else FLOAT32


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank without activations.

    parameters, gradients, moments, average (of the weights): float32 tensors that exist throughout. cast: bfloat16
    copies of weights during a pass. gathered: parameters that are whole for a while under fsdp and hsdp, with their
    gradients. accumulated: undivided gradients of all blocks between the micro-batches of a step.
    """

    parameters: int
    gradients: int
    moments: int
    average: int
    cast: int
    gathered: int
    accumulated: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends per optimiser step, by operation. between_nodes: bytes that a node sends to others."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int
    between_nodes: int

    @property
    def total(self) -> int:
        return self.all_gather + self.reduce_scatter + self.all_reduce


def rank_memory(
    model: Model, engine: Engine, devices: Devices, kept: Kept, *, whole_gradients: bool = False
) -> RankMemory:
    """Return the memory of rank 0, which holds the most.

    whole_gradients: whether gradients stay undivided between the micro-batches of a step under fsdp and hsdp.
    """
    shards = num_shards(engine, devices.count, devices.gpus)
    held = FLOAT32 * sum(each.part(shards) for each in model.all)
    trained = FLOAT32 * sum(each.part(shards) for each in model.all if each.trainable)
    cast = model.all if engine == "ddp" else model.root
    gathered = accumulated = 0
    if engine != "ddp":
        number = kept.gathered_bytes

        def whole(group: tuple[ParameterFacts, ...], *, trainable: bool = False) -> int:
            return sum(shards * each.part(shards) for each in group if each.trainable or not trainable)

        # The root: whole parameters and gradients, and the copy of the gradients that is divided among the ranks.
        gathered = FLOAT32 * (whole(model.root) + 2 * whole(model.root, trainable=True))
        # Blocks: whole parameters, gradients of one block, and their float32 copy.
        gathered += max(
            (
                GATHERED_BLOCKS * number * whole(block) + (number + FLOAT32) * whole(block, trainable=True)
                for block in model.blocks
            ),
            default=0,
        )
        if whole_gradients:
            accumulated = FLOAT32 * sum(each.numel for block in model.blocks for each in block if each.trainable)
    return RankMemory(
        parameters=held,
        gradients=trained,
        moments=kept.moments * trained,
        average=trained if kept.average else 0,
        cast=sum(each.cast for each in cast),
        gathered=gathered,
        accumulated=accumulated,
    )


def traffic(
    model: Model,
    engine: Engine,
    devices: Devices,
    kept: Kept,
    *,
    accumulation: int = 1,
    divide_gradients: bool = False,
) -> Traffic:
    """Return the traffic of one optimiser step of `accumulation` micro-batches.

    Gradients are reduced once per step. With divide_gradients, fsdp and hsdp divide them after each micro-batch (hsdp
    still averages them over the nodes once). Parameters are gathered in each micro-batch: those of blocks for the
    forward and for the backward pass, the others once. In a ring over all ranks, one rank per node sends to another
    node.
    """
    ranks, nodes, gpus = devices.count, devices.nodes, devices.gpus
    shards = num_shards(engine, ranks, gpus)
    if engine == "ddp":
        sent = 2 * (ranks - 1) * FLOAT32 * model.trainable // ranks
        return Traffic(0, 0, sent, sent if nodes > 1 else 0)
    gather = FLOAT32 * sum(each.part(shards) for each in model.root)
    for block in model.blocks:
        passes = 2 if any(each.trainable for each in block) else 1
        gather += passes * kept.gathered_bytes * sum(each.part(shards) for each in block)
    gather *= accumulation * (shards - 1)
    gradients = FLOAT32 * sum(each.part(shards) for each in model.all if each.trainable)
    scatter = (shards - 1) * gradients * (accumulation if divide_gradients else 1)
    replicas = ranks // shards
    reduce = 2 * (replicas - 1) * gradients // replicas
    between = 0
    if nodes > 1:
        between = gather + scatter if engine == "fsdp" else gpus * reduce
    return Traffic(gather, scatter, reduce, between)


@dataclass(frozen=True)
class Division:
    """The division of a method among several devices, for `unmask plan` and for training."""

    config: Config
    model: Model
    bytes_per_image: int
    precision: str
    devices: Devices

    @property
    def engine(self) -> Engine:
        return self._choice[0]

    @property
    def reason(self) -> str:
        """The reason for the engine, as a sentence that begins with its name."""
        return self._choice[1]

    @cached_property
    def _choice(self) -> tuple[Engine, str]:
        """The setting, or the engine with the least traffic that fits."""
        if (wanted := self.config.train.parallel) != "auto":
            return wanted, f"{wanted}: the setting train.parallel"
        engines: tuple[Engine, ...] = ("ddp", "hsdp", "fsdp")
        needs = Needs(
            state={engine: rank_memory(self.model, engine, self.devices, self.kept).total for engine in engines},
            images=self.least_images,
            activations=self.least_images * self.bytes_per_image,
            copies=any(each.cast for each in self.model.all),
            blocks=bool(self.model.blocks),
        )
        return choose_parallel(needs, self.devices)

    @property
    def kept(self) -> Kept:
        return Kept.of(self.config, self.precision)

    @property
    def least_images(self) -> int:
        """Images of a micro-batch that must fit each device."""
        return max(1, min(self.config.train.batch_size // self.devices.count, LEAST_IMAGES))

    def memory(self, *, whole_gradients: bool = False) -> RankMemory:
        """Return the memory of one rank without activations; see `rank_memory`."""
        return rank_memory(self.model, self.engine, self.devices, self.kept, whole_gradients=whole_gradients)

    def images_that_fit(self, accumulation: int) -> int:
        """Return the number of images of a micro-batch that fit one rank, if a step has this many micro-batches.

        Gradients stay whole between them, which needs the least traffic, unless too few images fit beside them.
        """
        beside_whole = self._images_beside(self.memory(whole_gradients=accumulation > 1))
        return beside_whole if beside_whole >= self.least_images else self._images_beside(self.memory())

    def divides_gradients(self, images: int, accumulation: int) -> bool:
        """Return whether gradients are divided after each micro-batch of `images` images of one rank, because whole
        gradients would not fit.
        """
        if self.engine == "ddp" or accumulation == 1:
            return False
        return images > self._images_beside(self.memory(whole_gradients=True))

    def _images_beside(self, memory: RankMemory) -> int:
        return max(0, (self.devices.usable - memory.total) // self.bytes_per_image)


@dataclass(frozen=True)
class PassSizes:
    """What a training step of a method keeps. per_image: bytes per image. cast: see `cast_bytes`."""

    per_image: int
    cast: dict[str, int]


def pass_sizes(config: Config, images: ImageSpec, precision: str) -> PassSizes:
    """Return the sizes of a step on a GPU, measured on tensors without memory.

    If the loss depends on the values of tensors, which such tensors do not have, torch raises RuntimeError or
    NotImplementedError, and the step runs on the CPU. An error with another cause is raised again there.
    """
    try:
        method = build_unallocated(config, images)
        with fake_tensors(), fused_attention():
            move_to_fake_cpu(method)
            return _pass_sizes(config, method, images, precision)
    except (RuntimeError, NotImplementedError):
        with fused_attention():
            return _pass_sizes(config, build_method(config, images), images, precision)


def _pass_sizes(config: Config, method: Method, images: ImageSpec, precision: str) -> PassSizes:
    each = bytes_per_image(method, images, precision, "cpu", recompute=config.train.recompute)
    return PassSizes(each, cast_bytes(method, images) if precision == "bf16" else {})


def cast_bytes(method: Method, images: ImageSpec) -> dict[str, int]:
    """Return the bytes of the bfloat16 copies of trainable parameters that autocast makes and keeps, by name."""
    trained = [(name, value) for name, value in method.named_parameters() if value.requires_grad]
    batch = example_batch(images, 2, str(method.device))
    with autocast("bf16", str(method.device)), CastSizes(trained) as made, torch.enable_grad():
        method(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index)))
    return dict(made.bytes)
