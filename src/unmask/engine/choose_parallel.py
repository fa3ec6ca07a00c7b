"""Choose how training is divided among devices, by arithmetic on sizes alone.

ddp: every rank holds the whole model, and gradients are averaged (DistributedDataParallel). fsdp: parameters, gradients
and moments are divided among all ranks (`fully_shard`). hsdp: they are divided among the ranks of each node, and every
node holds the whole model, so that only gradients cross the network between nodes.
"""

from __future__ import annotations

from typing import Literal

Engine = Literal["ddp", "fsdp", "hsdp"]

FLOAT32 = 4  # bytes
USABLE_SHARE = 0.9  # of a GPU's memory; the rest is for the driver, communication buffers and fragmentation
LEAST_IMAGES = 8  # images per forward pass and rank that must fit; with fewer, a GPU computes slowly
GATHERED_BLOCKS = 2  # blocks whose parameters are whole at the same time under fsdp: one in use, one being gathered


def state_bytes(parameters: int, trainable: int, *, moments: int = 2, average: bool = False) -> int:
    """Return the bytes of a model in float32: parameters, gradients, moments and the moving average of the weights.

    moments: numbers that the optimiser stores per trainable parameter (AdamW: 2, LARS: 1).
    """
    return FLOAT32 * (parameters + trainable * (1 + moments + average))


def num_shards(engine: Engine, ranks: int, ranks_per_node: int) -> int:
    """Return among how many ranks each parameter is divided. On one node, hsdp makes two replicas."""
    if engine == "ddp":
        return 1
    if engine == "fsdp":
        return ranks
    return ranks_per_node if 1 < ranks_per_node < ranks else max(1, ranks // 2)


def choose_parallel(
    *,
    parameters: int,
    trainable: int,
    bytes_per_image: int,
    memory: int,
    ranks: int,
    ranks_per_node: int,
    images: int = LEAST_IMAGES,
    moments: int = 2,
    average: bool = False,
    largest_block: int = 0,
    copies: int = 0,
    root_copies: int = 0,
) -> tuple[Engine, str]:
    """Return (engine, reason) for `train.parallel=auto`: the engine with the least traffic that fits.

    parameters, trainable: number of all and of trainable parameters. bytes_per_image: memory that an image needs in a
    forward and backward pass. memory: bytes of one device that training may use. ranks, ranks_per_node: number of
    processes, one per device, in all and on each node. images: images per forward pass and rank that must fit at least;
    more than LEAST_IMAGES count as LEAST_IMAGES. moments, average: see `state_bytes`. largest_block: parameters of the
    largest transformer block, which are whole in memory while it is computed (0: there are no blocks).
    copies: bytes of the bfloat16 copies of all weights, which ddp keeps. root_copies: bytes of those of the weights
    outside blocks, which fsdp and hsdp keep.
    """
    if ranks == 1:
        return "ddp", "ddp: one process, so nothing is divided"
    images = max(1, min(images, LEAST_IMAGES))
    state, activations = state_bytes(parameters, trainable, moments=moments, average=average), images * bytes_per_image
    gathered = FLOAT32 * GATHERED_BLOCKS * largest_block
    whole = state + copies + activations
    kept = "model, gradients and moments" + (" with bfloat16 copies" if copies else "")
    needs = (
        f"{kept} ({size(state + copies)}) and activations of {images} "
        f"{'image' if images == 1 else 'images'} ({size(activations)})"
    )
    have = f"{size(memory)} usable per device"
    if whole <= memory:
        return "ddp", f"ddp: {needs} fit each device; {have}"
    nodes = ranks // ranks_per_node
    within = -(-state // ranks_per_node) + gathered + root_copies + activations
    if nodes > 1 and ranks_per_node > 1 and within <= memory:
        return "hsdp", (
            f"hsdp: {needs} do not fit one device, but divided among the {ranks_per_node} of a node they need "
            f"{size(within)} each; {have}"
        )
    among = -(-state // ranks) + gathered + root_copies + activations
    if among <= memory:
        place = f"the {ranks} of the node" if nodes <= 1 else f"all {ranks}"
        return (
            "fsdp",
            f"fsdp: {needs} do not fit one device, but divided among {place} they need {size(among)} each; {have}",
        )
    return "fsdp", (
        f"fsdp: {needs} need {size(among)} on each device even if divided among all {ranks}; {have}, so expect to run "
        f"out of memory; use {'train.recompute=true, ' if largest_block else ''}more devices or smaller images"
    )


def size(number: float) -> str:
    """Return bytes as text, such as "9.8 GiB" or "12.5 MiB"."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
