"""Choose how training is divided among devices, by arithmetic on sizes alone.

ddp: every rank holds the whole model, and gradients are averaged (DistributedDataParallel). fsdp: parameters, gradients
and moments are divided among all ranks (`fully_shard`). hsdp: they are divided among the ranks of each node, and every
node holds the whole model, so that only gradients cross the network between nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Engine = Literal["ddp", "fsdp", "hsdp"]

FLOAT32 = 4  # bytes
USABLE_SHARE = 0.9  # of a GPU's memory; the rest is for the driver, communication buffers and fragmentation
LEAST_IMAGES = 8  # images per forward pass and rank that must fit; with fewer, a GPU computes slowly
GATHERED_BLOCKS = 2  # blocks whose parameters are whole at the same time under fsdp: one in use, one being gathered


@dataclass(frozen=True)
class Devices:
    """Devices with one rank each. usable: bytes of each that training may use. nodes, gpus: number of nodes, and of
    devices in each node.
    """

    usable: int
    nodes: int
    gpus: int

    @property
    def count(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Needs:
    """Bytes that a device needs in training.

    state: by engine, everything but activations, including what is gathered for a while. activations: those of a pass
    over `images` images. copies: whether ddp keeps bfloat16 copies of the weights. blocks: whether there are
    transformer blocks, which could recompute their activations.
    """

    state: Mapping[Engine, int]
    images: int
    activations: int
    copies: bool = False
    blocks: bool = False

    def total(self, engine: Engine) -> int:
        return self.state[engine] + self.activations


def num_shards(engine: Engine, ranks: int, ranks_per_node: int) -> int:
    """Return among how many ranks each parameter is divided. On one node, hsdp makes two replicas."""
    if engine == "ddp":
        return 1
    if engine == "fsdp":
        return ranks
    return ranks_per_node if 1 < ranks_per_node < ranks else max(1, ranks // 2)


def divided_dimension(shape: Sequence[int], shards: int) -> int:
    """Return the dimension along which a parameter is divided: the first, unless it is too short for all ranks.

    torch pads the first dimension to a multiple of `shards`, so some ranks would hold a whole position embedding (1,
    197, 768) or token (1, 1, 768), and gather it `shards` times. It divides other dimensions without padding only.
    """
    if shape and shape[0] >= shards:
        return 0
    even = [dimension for dimension in range(1, len(shape)) if shape[dimension] % shards == 0]
    return max(even, key=lambda dimension: shape[dimension], default=0)


def choose_parallel(needs: Needs, devices: Devices) -> tuple[Engine, str]:
    """Return (engine, reason) for `train.parallel=auto`: the engine with the least traffic that fits.

    If none fits, it is the one that needs the least memory.
    """
    if devices.count == 1:
        return "ddp", "ddp: one process, so nothing is divided"
    kept = "model, gradients and moments" + (" with bfloat16 copies" if needs.copies else "")
    what = (
        f"{kept} ({size(needs.state['ddp'])}) and activations of {needs.images} "
        f"{'image' if needs.images == 1 else 'images'} ({size(needs.activations)})"
    )
    have = f"{size(devices.usable)} usable per device"
    if needs.total("ddp") <= devices.usable:
        return "ddp", f"ddp: {what} fit each device; {have}"
    places: dict[Engine, str] = {
        "fsdp": f"all {devices.count}" if devices.nodes > 1 else f"the {devices.gpus} of the node"
    }
    if devices.nodes > 1 and devices.gpus > 1:
        places = {"hsdp": f"the {devices.gpus} of a node", **places}
    for engine, place in places.items():
        if (need := needs.total(engine)) <= devices.usable:
            return engine, (
                f"{engine}: {what} do not fit one device, but divided among {place} they need {size(need)} each; {have}"
            )
    engine = min(places, key=needs.total)
    return engine, (
        f"{engine}: {what} need {size(needs.total(engine))} on each device even if divided among {places[engine]}; "
        f"{have}, so expect to run out of memory; use {'train.recompute=true, ' if needs.blocks else ''}more devices "
        "or smaller images"
    )


def size(number: float) -> str:
    """Return bytes as text, such as "9.8 GiB" or "12.5 MiB"."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
