"""Plan a training on several GPUs: engine, micro-batch, memory and traffic of each GPU, and the expected speed.

`unmask plan RECIPE --nodes N --gpus N` prints the plan. It needs no GPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from unmask.batch import ImageSpec
from unmask.config import Config, ConfigError
from unmask.console import Console, duration
from unmask.engine.choose_parallel import USABLE_SHARE, Devices, Engine, size
from unmask.engine.fake_ranks import sharded_bytes
from unmask.engine.flops import Flops, build_unallocated
from unmask.engine.make_plan import largest_micro_batch, wanted_micro_batch
from unmask.engine.parallel_costs import Division, Model, RankMemory, Traffic, pass_sizes, traffic

GPU_MEMORY = 80.0  # GiB of an A100 or H100, the default of `unmask plan`


@dataclass(frozen=True)
class Cluster:
    """The GPUs to plan for. gpus: number in each node. memory: GiB of each GPU. images_per_second, tflops: measured
    training speed of one GPU, in images or in 10^12 FLOPs per second (None: unknown).
    """

    nodes: int = 1
    gpus: int = 1
    memory: float = GPU_MEMORY
    images_per_second: float | None = None
    tflops: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("nodes", self.nodes), ("GPUs", self.gpus)):
            if value < 1:
                raise ConfigError(f"got {value} {name}; expected at least 1")
        if self.images_per_second is not None and self.tflops is not None:
            raise ConfigError("got both --images-per-second and --tflops; leave one of them out")
        for flag, value in (
            ("--memory", self.memory),
            ("--images-per-second", self.images_per_second),
            ("--tflops", self.tflops),
        ):
            if value is not None and value <= 0:
                raise ConfigError(f"got {flag} {value:g}; expected a number above 0")

    @property
    def size(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Throughput:
    """Expected speed of all GPUs if none waits for communication or data.

    step_seconds: duration of an optimiser step. network: bytes per second that a node must send meanwhile.
    """

    images_per_second: float
    step_seconds: float
    network: float


@dataclass(frozen=True)
class ClusterPlan:
    """The plan of a training on a cluster; sizes are bytes of one GPU.

    usable: memory that training may use. images: images per micro-batch and GPU. divide_gradients: whether
    gradients are divided after each micro-batch. largest_images: most images that fit without accumulation. memory,
    activations: bytes without the images of a micro-batch, and of these. exact: result of `verify`, or None if it was
    not asked for. num_blocks: number of transformer blocks. recompute: the setting train.recompute.
    """

    cluster: Cluster
    precision: str
    engine: Engine
    reason: str
    usable: int
    images: int
    accumulation: int
    divide_gradients: bool
    bytes_per_image: int
    largest_images: int
    memory: RankMemory
    activations: int
    traffic: Traffic
    throughput: Throughput | None
    exact: bool | None
    num_blocks: int
    recompute: bool

    @property
    def peak(self) -> int:
        return self.memory.total + self.activations

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable

    def as_json(self) -> dict[str, Any]:
        """Return all numbers as the object that --json prints; sizes in bytes."""
        speed = self.throughput
        return {
            "nodes": self.cluster.nodes,
            "gpus_per_node": self.cluster.gpus,
            "gpu_memory": round(self.cluster.memory * 2**30),
            "usable": self.usable,
            "precision": self.precision,
            "engine": self.engine,
            "reason": self.reason,
            "images_per_micro_batch": self.images,
            "largest_micro_batch": self.largest_images,
            "accumulation": self.accumulation,
            "divide_gradients": self.divide_gradients,
            "bytes_per_image": self.bytes_per_image,
            "memory": {**asdict(self.memory), "activations": self.activations, "peak": self.peak},
            "fits": self.fits,
            "traffic": {**asdict(self.traffic), "total": self.traffic.total},
            "throughput": None
            if speed is None
            else {
                "images_per_second": speed.images_per_second,
                "step_seconds": speed.step_seconds,
                "network_bytes_per_second": speed.network,
            },
            "verified": self.exact,
        }


def plan_cluster(
    config: Config, images: ImageSpec, flops: Flops, cluster: Cluster, *, verify: bool = False
) -> ClusterPlan:
    """Return the plan of a training on a cluster. Raises ConfigError if the batch cannot be divided.

    verify: whether to compare the sizes with those that torch allocates in a simulated group of processes.
    """
    wanted = wanted_micro_batch(config, cluster.size)
    precision = "fp32" if config.train.precision == "fp32" else "bf16"  # what "auto" becomes on a GPU
    sizes = pass_sizes(config, images, precision)
    model = Model.of(build_unallocated(config, images), sizes.cast)
    usable = int(USABLE_SHARE * cluster.memory * 2**30)
    division = Division(config, model, sizes.per_image, precision, Devices(usable, cluster.nodes, cluster.gpus))
    micro = largest_micro_batch(config, cluster.size, division.images_that_fit) if wanted is None else wanted
    accumulation, share = config.train.batch_size // micro, micro // cluster.size
    divide = division.divides_gradients(share, accumulation)
    whole = accumulation > 1 and not divide
    sent = traffic(
        model,
        division.engine,
        division.devices,
        division.kept,
        accumulation=accumulation,
        divide_gradients=divide,
    )
    return ClusterPlan(
        cluster=cluster,
        precision=precision,
        engine=division.engine,
        reason=division.reason,
        usable=usable,
        images=share,
        accumulation=accumulation,
        divide_gradients=divide,
        bytes_per_image=sizes.per_image,
        largest_images=division.images_that_fit(1),
        memory=division.memory(whole_gradients=whole),
        activations=share * sizes.per_image,
        traffic=sent,
        throughput=expected_speed(config, flops, cluster, sent),
        exact=agrees_with_torch(config, images, division) if verify else None,
        num_blocks=len(model.blocks),
        recompute=config.train.recompute,
    )


def expected_speed(config: Config, flops: Flops, cluster: Cluster, sent: Traffic) -> Throughput | None:
    """Return the expected speed from the given rate of one GPU, or None without a rate."""
    rate = cluster.images_per_second
    if cluster.tflops is not None:
        recomputed = flops.forward if config.train.recompute else 0
        rate = cluster.tflops * 1e12 / (flops.training + recomputed)
    if rate is None:
        return None
    seconds = config.train.batch_size / (rate * cluster.size)
    return Throughput(rate * cluster.size, seconds, sent.between_nodes / seconds)


def agrees_with_torch(config: Config, images: ImageSpec, division: Division) -> bool:
    """Return whether torch allocates exactly the parameters, gradients and moments of the division."""
    memory, devices = division.memory(), division.devices
    found = sharded_bytes(build_unallocated(config, images), division.engine, devices.nodes, devices.gpus)
    moments = 2 * memory.gradients  # `sharded_bytes` uses AdamW
    expected = {"parameters": memory.parameters, "gradients": memory.gradients, "moments": moments}
    return found == expected


def print_cluster_plan(plan: ClusterPlan, steps: int, console: Console) -> None:
    """Print the plan as text. steps: number of optimiser steps of the schedule."""
    cluster, memory = plan.cluster, plan.memory
    console.print(
        f"{_count(cluster.nodes, 'node')} x {_count(cluster.gpus, 'GPU')} with {cluster.memory:g} GiB each, "
        f"{plan.usable / 2**30:.1f} GiB of which training may use, in {plan.precision}:"
    )
    console.print(f"  engine {plan.reason}")
    batch = plan.images * plan.accumulation
    console.print(
        f"  batch of each GPU: {_count(batch, 'image')} in {_count(plan.accumulation, 'micro-batch', 'micro-batches')} "
        f"of {plan.images}; at most {plan.largest_images} would fit at once"
    )
    if plan.divide_gradients:
        console.print("  gradients are divided after each micro-batch, because whole gradients do not fit")
    console.print("  memory of each GPU:")
    rows = [
        ("parameters (float32)", memory.parameters, ""),
        ("gradients", memory.gradients, ""),
        ("moments of the optimiser", memory.moments, ""),
        ("moving average of the weights", memory.average, ""),
        ("weights cast to bfloat16", memory.cast, ""),
        ("blocks gathered for a while", memory.gathered, "estimated"),
        ("gradients while accumulating", memory.accumulated, "estimated"),
        ("activations", plan.activations, f"{size(plan.bytes_per_image)} per image"),
        ("peak", plan.peak, f"{plan.peak / plan.usable:.0%} of the usable memory"),
    ]
    for name, number, note in rows:
        if number:
            console.print(f"    {name:31s}{size(number):>10s}" + (f"  {note}" if note else ""))
    if not plan.fits:
        console.print(f"  this does not fit; use {' or '.join(ways_to_fit(plan))}")
    if plan.exact is not None:
        console.print(
            f"  parameters, gradients and moments {'are' if plan.exact else 'ARE NOT'} equal to those of torch in a "
            f"simulated group of {cluster.size:,} processes"
        )
    _print_traffic(plan, console)
    _print_speed(plan, steps, console)


def ways_to_fit(plan: ClusterPlan) -> list[str]:
    """Return changes that reduce the memory, the easiest first."""
    return [
        *(["train.parallel=auto"] if plan.engine == "ddp" and plan.cluster.size > 1 else []),
        *(["train.recompute=true"] if plan.num_blocks and not plan.recompute else []),
        "more GPUs or smaller images",
    ]


def _print_traffic(plan: ClusterPlan, console: Console) -> None:
    sent = plan.traffic
    if not sent.total:
        return
    parts = [
        f"{name} {size(number)}"
        for name, number in (
            ("all-gather", sent.all_gather),
            ("reduce-scatter", sent.reduce_scatter),
            ("all-reduce", sent.all_reduce),
        )
        if number
    ]
    across = f"; each node sends {size(sent.between_nodes)} to other nodes" if plan.cluster.nodes > 1 else ""
    console.print(f"  traffic: each GPU sends {size(sent.total)} per step ({', '.join(parts)}){across}")


def _print_speed(plan: ClusterPlan, steps: int, console: Console) -> None:
    speed, cluster = plan.throughput, plan.cluster
    if speed is None:
        console.print(
            "  images/s: unknown; give the speed of one GPU: --images-per-second (measured) or --tflops (assumed)"
        )
        return
    given = (
        f"{cluster.images_per_second:g} images/s" if cluster.tflops is None else f"{cluster.tflops:g} TFLOP/s"
    ) + " per GPU"
    console.print(
        f"  speed from the given {given}, if no GPU waits: {speed.images_per_second:,.0f} images/s, "
        f"{speed.step_seconds:.3g} s per step, {duration(steps * speed.step_seconds)} for {steps:,} steps"
    )
    if speed.network:
        console.print(
            f"  to keep up, each node must send {speed.network * 8 / 1e9:.1f} Gbit/s to others during the whole step"
        )


def _count(number: int, word: str, words: str | None = None) -> str:
    return f"{number} {word if number == 1 else words or word + 's'}"
