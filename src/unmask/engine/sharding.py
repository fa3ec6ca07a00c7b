"""Distribute a method over processes with PyTorch's engines: DDP, or FSDP2 over one or two dimensions (HSDP).

A method is a plain module that knows nothing of this. `distribute` applies, in this order: recomputed activations,
torch.compile for each block, and DDP or FSDP2. DDP keeps all weights in every process. FSDP2 keeps a share of the
weights, gradients and moments in each (as DTensors), and gathers the weights of a block only while it is computed.

Gradients are averaged over the processes, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unmask.batch import Batch
from unmask.engine.choose_parallel import divided_dimension, num_shards
from unmask.engine.compile import BLOCKS
from unmask.engine.world import ALONE, World
from unmask.method import Clock, Loss, Method
from unmask.nn.batch_sums import part_of_batch
from unmask.nn.whole import whole

Parallel = Literal["none", "ddp", "fsdp", "hsdp"]


@dataclass
class Distributed:
    """A method that the processes of `world` compute together.

    module: what DDP or FSDP2 has wrapped, or None. divide_gradients: whether FSDP2 divides the gradients after each
    micro-batch. recorded: whether DDP has recorded which parameters have gradients.
    """

    method: Method
    world: World = ALONE
    kind: Parallel = "none"
    module: nn.Module | None = None
    divide_gradients: bool = False
    recorded: bool = False

    @property
    def sharded(self) -> bool:
        """Whether each process has only a share of the weights."""
        return self.kind in ("fsdp", "hsdp")

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the loss of this process's part of a micro-batch."""
        if self.module is None:
            return self.method(batch, clock)
        with part_of_batch(self.world.size, self.world.sum):
            return Loss(*self.module(batch, clock))

    def accumulating(self, *, last: bool) -> AbstractContextManager[object]:
        """Context manager around forward and backward of a micro-batch.

        Gradients are averaged over the processes only in the last micro-batch of a step. In the first step DDP averages
        in every micro-batch, while it records the graph; the result is the same. Until they are averaged, FSDP2 keeps
        the whole gradients in every process; with `divide_gradients` each process keeps its share only, and HSDP
        averages the shares over the hosts in the last micro-batch.
        """
        if self.kind == "ddp":
            assert isinstance(self.module, nn.parallel.DistributedDataParallel), "kind is ddp"
            if self.recorded and not last:
                return self.module.no_sync()
            self.recorded |= last
        if self.sharded:
            self.module.set_requires_gradient_sync(last or self.divide_gradients)  # type: ignore[union-attr, operator]
            self.module.set_requires_all_reduce(last)  # type: ignore[union-attr, operator]
        return nullcontext()


class _LossTensors(nn.Module):
    """Return the loss as a tuple, because DDP and FSDP2 look for tensors in tuples and dicts only."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.method(batch, clock)
        return loss.value, loss.logs


def distribute(
    method: Method, kind: Parallel, world: World, *, precision: str, device: str, divide_gradients: bool = False
) -> Distributed:
    """Distribute a method in place, and move it to the device.

    Under FSDP2, parameters on the meta device get memory, but no values; see `hand_out`. divide_gradients: see
    `Distributed`. Raises WorldError under HSDP unless all hosts have the same number of processes.
    """
    if kind == "none":
        return Distributed(method.to(device))
    if kind == "hsdp":  # the mesh depends on this number
        advice = "start as many on each host, or use train.parallel=fsdp"
        world.require_same("the numbers of processes on a host", str(world.local_size), advice)
    if kind == "ddp":
        ddp = nn.parallel.DistributedDataParallel
        earlier = "forward_sync_buffers" not in signature(ddp.__init__).parameters  # torch before 2.12
        buffers_stay: dict[str, Any] = {"broadcast_buffers" if earlier else "forward_sync_buffers": False}
        wrapped = ddp(
            _LossTensors(method.to(device)),
            process_group=world.devices,
            **buffers_stay,
            gradient_as_bucket_view=True,
            static_graph=True,
        )
        return Distributed(method, world, kind, wrapped)
    module = _LossTensors(method)
    shard(module, mesh_of(kind, world, device.partition(":")[0]), precision)
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    if any(parameter.is_meta for parameter in module.parameters()):
        module.to_empty(device=device)
        for name, value in module.named_buffers():
            value.copy_(buffers[name])
    else:
        module.to(device)
    return Distributed(method, world, kind, module, divide_gradients)


def mesh_of(kind: Parallel, world: World, device: str) -> Any:
    """Return the mesh of processes: one dimension (fsdp), or replicas x shards, where a host is a replica (hsdp)."""
    from torch.distributed.device_mesh import init_device_mesh

    if kind == "fsdp":
        return init_device_mesh(device, (world.size,), mesh_dim_names=("shard",))
    shards = num_shards("hsdp", world.size, world.local_size)
    return init_device_mesh(device, (world.size // shards, shards), mesh_dim_names=("replicate", "shard"))


def shard(module: nn.Module, mesh: Any, precision: str) -> None:
    """Shard each transformer block, and the rest of the module as one group.

    With bf16, the blocks gather their weights in bf16 on a GPU; the master weights and all reductions are float32.
    Activations stay as in a single process, where autocast decides on their precision.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    plain = MixedPrecisionPolicy(cast_forward_inputs=False)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    halves = precision == "bf16" and mesh.device_type != "cpu"  # a CPU's layer norm needs float32 weights
    shards = mesh.size(mesh.ndim - 1)

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(divided_dimension(parameter.shape, shards))

    for block in [part for part in module.modules() if isinstance(part, BLOCKS)]:
        fully_shard(block, mesh=mesh, mp_policy=half if halves else plain, shard_placement_fn=place)
    fully_shard(module, mesh=mesh, mp_policy=plain, shard_placement_fn=place)


def recompute_blocks(method: nn.Module) -> int:
    """Make each transformer block recompute its activations in the backward pass; return the number of blocks."""
    blocks = [part for part in method.modules() if isinstance(part, BLOCKS)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    return len(blocks)


def fill(target: Tensor, value: Tensor | None, world: World) -> None:
    """Set a tensor in all processes to the value that the writer has. target: a tensor or DTensor of the same shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if value is None:
        sent = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    else:
        sent = value.detach().to(target.device, target.dtype).contiguous()
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.to_local().copy_(distribute_tensor(sent, target.device_mesh, target.placements).to_local())
        else:
            dist.broadcast(sent, src=0, group=world.devices)
            target.copy_(sent)


def hand_out(targets: Mapping[str, Tensor], values: Mapping[str, Tensor] | None, world: World) -> None:
    """Set tensors in all processes to the writer's values, by name. values: None in the other processes."""
    for name, target in targets.items():
        fill(target, None if values is None else values[name], world)


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Return whole copies on the CPU in the writer, {} in the other processes. All processes must call this."""
    found = {}
    for name, value in tensors.items():
        full = whole(value.detach())
        if world.is_writer:
            found[name] = full.cpu()
    return found


@contextmanager
def whole_method(distributed: Distributed, build: Callable[[], Method], device: str) -> Iterator[Method]:
    """Context manager that yields the method with all its weights in the writer, for pictures and evaluations.

    In the other processes it yields the method as it is, which must not be called. build: builds another method.
    """
    if not distributed.sharded:
        yield distributed.method
        return
    weights = gathered(distributed.method.state_dict(), distributed.world)
    if not distributed.world.is_writer:
        yield distributed.method
        return
    copy = build()
    copy.load_state_dict(weights)
    yield copy.to(device)
