"""One of several processes that save or load a checkpoint together: `checkpoint_group.py STAGE RUN REPORT`.

Each process writes what it has seen to REPORT-RANK.json. The tests are in test_sharded_checkpoints.py.
"""

import errno
import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from unmask.engine import checkpoint
from unmask.engine.checkpoint_formats import read_shards
from unmask.engine.checkpoint_writer import CheckpointWriter, Snapshot
from unmask.engine.fault_points import FaultPoints, injected
from unmask.engine.optimizer_state import optimizer_to_tensors
from unmask.engine.sharding import hand_out
from unmask.engine.world import World, joined
from unmask.nn.whole import whole
from unmask.run import Run


class Toy(nn.Module):
    """Layers whose sizes are not divisible by the number of processes, and a buffer without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(33, 17), nn.Linear(17, 5), nn.Linear(5, 3))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x):
        return self.layers(x)


def digest(tensors) -> dict[str, str]:
    """Return {name: digest of dtype, shape and bytes} of whole tensors; all processes must call this."""
    found = {}
    for name, value in sorted(tensors.items()):
        full = whole(value.detach()).cpu().contiguous()
        text = f"{full.dtype} {tuple(full.shape)}".encode()
        found[name] = hashlib.sha256(text + full.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def train(world: World, steps: int, seed: int = 0):
    """Return a sharded module and an optimiser after some steps."""
    torch.manual_seed(seed)
    module = Toy()
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in module.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for step in range(steps):
        module(torch.ones(4, 33) * (world.rank + step + 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def state_of(module, optimizer):
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors, numbers = optimizer_to_tensors(optimizer, names)
    return module.state_dict(), tensors, {"position": {"step": 1}, "optimizer": numbers}


def save_stage(world: World, run: Run) -> dict:
    """Save in shards: plainly, while the weights change, and with a disk that is full in one process."""
    module, optimizer = train(world, 2)
    model, optim, state = state_of(module, optimizer)
    seen: dict = {"digests": digest(model | optim)}
    checkpoint.save(run, 1, model, optim, state, world=world, kind="dcp")

    writer = CheckpointWriter(run, world.channel(), "dcp", keep=2)
    changed = threading.Event()

    def after_the_change(path: Path) -> None:
        assert changed.wait(60), "the weights were not changed"

    with injected(FaultPoints(before_write=after_the_change)):
        snapshot = Snapshot(2, writer.copied(model), writer.copied(optim), state)
        writer.start(snapshot)
        with torch.no_grad():
            for value in [*module.parameters(), *module.buffers()]:
                value.zero_()
        for _ in range(3):  # collectives of the training go on beside those of the thread
            assert world.gather(world.rank) == list(range(world.size))
        seen["zero"] = digest(module.state_dict())
        changed.set()
        seen["outcome"] = writer.finish()

    for broken in range(world.size):

        def full(path: Path, broken: int = broken) -> None:
            if world.rank == broken and path.suffix == ".safetensors":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with injected(FaultPoints(before_write=full)):
            try:
                checkpoint.save(run, 3, model, optim, state, world=world, kind="dcp")
            except checkpoint.CheckpointFull as error:
                seen[f"full {broken}"] = str(error)
        world.gather(0)
        seen[f"left {broken}"] = sorted(path.name for path in run.checkpoints.iterdir())

    bad = {"w": torch.full((3,), float("nan") if world.rank == world.size - 1 else 1.0)}
    try:
        checkpoint.save(run, 3, bad, {}, {}, world=world, kind="dcp")
    except checkpoint.CheckpointRefused as error:
        seen["refused"] = str(error)
    return seen


def load_stage(world: World, run: Run) -> dict:
    """Read the newest intact checkpoint, which may be in either format, and save it again in shards."""
    warnings: list[str] = []
    module, optimizer = train(world, 1, seed=5)
    model, optim, _ = state_of(module, optimizer)
    path = checkpoint.latest_in_shards(run, world, log=warnings.append)
    if path is None:
        found = world.on_writer(lambda: checkpoint.load_latest(run, log=warnings.append))
        hand_out(model, None if found is None else found.model, world)
        hand_out(optim, None if found is None else found.optim, world)
    else:
        targets = {f"model/{name}": value.detach() for name, value in model.items()}
        read_shards(path / "dcp", targets | {f"optim/{name}": value for name, value in optim.items()})
    seen = {"path": path and path.name, "warnings": warnings, "digests": digest(model | optim)}
    checkpoint.save(run, 9, model, optim, {}, world=world, kind="dcp", keep=9)
    return seen


if __name__ == "__main__":
    stage, folder, report = sys.argv[1:]
    with joined() as processes:
        result = {"save": save_stage, "load": load_stage}[stage](processes, Run.open(folder))
        Path(f"{report}-{processes.rank}.json").write_text(json.dumps(result))
