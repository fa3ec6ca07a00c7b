"""Simulate passes without memory, and one rank of a large group of processes, with private parts of torch.

Nothing is computed or sent. `unmask plan` uses this to measure activations, and to compare the arithmetic of
`parallel_costs.py` with what `sharding.py` does with torch's `fully_shard`. `tests/engine/test_parallel_costs.py` fails
if torch moves one of these parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unmask.engine.choose_parallel import FLOAT32, Engine
from unmask.engine.compile import BLOCKS
from unmask.engine.sharding import mesh_of, shard
from unmask.engine.world import World
from unmask.errors import UserError

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
except ImportError:  # another version of torch
    FakeTensorMode = None


def fake_tensors() -> AbstractContextManager[object]:
    """Return a context manager in which tensors have a shape, a dtype and a device, but no memory.

    Raises NotImplementedError if this version of torch has no such tensors.
    """
    if FakeTensorMode is None:
        raise NotImplementedError("this version of torch has no FakeTensorMode")
    return FakeTensorMode()


def move_to_fake_cpu(module: nn.Module) -> None:
    """Replace the parameters and buffers of a module on the meta device by fake tensors on the CPU.

    Must be called inside `fake_tensors()`.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                if id(value) not in made:
                    new = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    if isinstance(value, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=value.requires_grad)
                    made[id(value)] = (new, value)
                tensors[name] = made[id(value)][0]  # type: ignore[assignment]


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """Context manager in which this process is rank 0 of a group of `ranks` processes that do not exist.

    Raises UserError if this version of torch cannot simulate a group, or if the process belongs to a group already.
    """
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError:
        raise UserError(f"torch {torch.__version__} cannot simulate a group of processes; leave out --verify") from None
    if dist.is_initialized():
        raise UserError("this process belongs to a group of processes already; run unmask plan on its own")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded_bytes(method: nn.Module, engine: Engine, nodes: int, gpus: int) -> dict[str, int]:
    """Return the bytes of parameters, gradients and AdamW's moments of rank 0 as torch's `fully_shard` divides them.

    method: on the meta device; it cannot be used afterwards. Of parameters with the same shape, one is sharded and
    counted several times, because torch creates one tensor per parameter and shard.
    """
    number = _drop_repeated_parameters(method)
    found = {"parameters": 0, "gradients": 0, "moments": 0}
    with fake_group(nodes * gpus):
        if engine != "ddp":
            shard(method, mesh_of(engine, World(size=nodes * gpus, local_size=gpus), "cpu"), "fp32")
        trained = [value for value in method.parameters() if value.requires_grad]
        optimizer = torch.optim.AdamW(trained, foreach=False)  # foreach would create temporary copies of everything
        for value in trained:
            value.grad = torch.zeros_like(value)
        optimizer.step()
        for name, value in method.named_parameters():
            found["parameters"] += number[name] * _local_bytes(value)
            if value.grad is not None:
                found["gradients"] += number[name] * _local_bytes(value.grad)
                moments = (optimizer.state[value][key] for key in ("exp_avg", "exp_avg_sq"))
                found["moments"] += number[name] * sum(_local_bytes(moment) for moment in moments)
    return found


def _drop_repeated_parameters(method: nn.Module) -> dict[str, int]:
    """Remove each parameter if an earlier one has the same shape; return how many there were of each, by name.

    Parameters in blocks and outside are kept apart, and so are trainable and frozen ones.
    """
    inside = {id(value) for part in method.modules() if isinstance(part, BLOCKS) for value in part.parameters()}
    kept, number, seen = dict[object, str](), Counter[str](), set[int]()
    for module, part in method.named_modules():
        for name, value in list(part._parameters.items()):
            if value is None:
                continue
            alike = (value.shape, value.requires_grad, id(value) in inside)
            full = kept.setdefault(alike, f"{module}.{name}".removeprefix("."))
            number[full] += id(value) not in seen  # a parameter that two modules share counts once
            seen.add(id(value))
            if full != f"{module}.{name}".removeprefix("."):
                part._parameters[name] = None
    return dict(number)


def _local_bytes(value: Tensor) -> int:
    """Return the bytes of this rank's part of a tensor or DTensor."""
    local = value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
    assert local.element_size() == FLOAT32, "master weights are float32"
    return local.numel() * FLOAT32
