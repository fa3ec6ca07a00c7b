"""Train every method and task for a few steps in the processes of one group; the writer stores losses and digests.

python train_all.py RESULT KIND: KIND is none, ddp, fsdp or hsdp.
"""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from test_golden_curves import PEAK, RECIPES, SIDE, clipped_normal, drawn, shrunk
from torch import nn

from unmask.batch import Batch, ImageSpec
from unmask.config import override
from unmask.console import Console
from unmask.data.order import places
from unmask.engine.build import build_method
from unmask.engine.job import Job, Position
from unmask.engine.sharding import distribute, gathered, hand_out
from unmask.engine.train import step
from unmask.engine.world import joined
from unmask.method import Clock
from unmask.nn.ema import MovingAverage
from unmask.optim import make_optimizer, peak_lr

SPEC = ImageSpec(3, (SIDE, SIDE), "uint8", (127.5,) * 3, (63.75,) * 3)
STEPS = 5
nn.init.trunc_normal_ = clipped_normal


def absent_and_ignored(batch: Batch) -> Batch:
    """Return the batch with absent pixels in the first image, ignored pixels in the second, no boxes in the third."""
    valid = torch.ones(len(batch), SIDE, SIDE, dtype=torch.bool)
    valid[0, :8, :12] = False
    maps, labels = batch.maps.clone(), batch.box_labels.clone()
    maps[1, 3:], labels[2] = 255, -1
    return replace(batch, valid=valid, maps=maps, box_labels=labels)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def curve(
    recipe,
    kind,
    world,
    *,
    accumulation: int,
    clip: float | None,
    average: bool = False,
    bad: int = -1,
    divide: bool = False,
) -> dict:
    """Return the losses, gradient norms and digests of weights. bad: step in which the last rank gets NaN.

    divide: see `Distributed.divide_gradients`.
    """
    settings = [f"optim.clip={'none' if clip is None else clip}", f"optim.average={0.9 if average else 'none'}"]
    config = override(shrunk(recipe), settings)
    sharded = kind in ("fsdp", "hsdp")
    method = build_method(config, SPEC, empty=sharded)
    first = build_method(config, SPEC)
    batch = absent_and_ignored(drawn())
    if first.num_prepare:
        first.prepare(batch.images)
    distributed = distribute(method, kind, world, precision="fp32", device="cpu", divide_gradients=divide)
    hand_out(method.state_dict(), first.state_dict(), world) if not world.alone else method.load_state_dict(
        first.state_dict()
    )
    start = digest(gathered(method.state_dict(), world)) if world.is_writer else gathered(method.state_dict(), world)
    micro, peak = 8 // accumulation, max(PEAK, peak_lr(config.optim, config.train.batch_size))
    plan = SimpleNamespace(
        accumulation=accumulation, device="cpu", precision="fp32", batch_size=8, micro_batch=micro, images=SPEC,
        lr=lambda number: peak * (number + 1) / STEPS, clock=None,
    )  # fmt: skip
    plan.clock = lambda number, draws, part, place: Clock(number, STEPS, draws, part, place=place)
    optimizer = make_optimizer(method, config.optim)
    job = Job(
        run=None, config=config, plan=plan, images=SimpleNamespace(repeats=1), console=Console(silent=True),
        distributed=distributed, optimizer=optimizer, average=MovingAverage(method, 0.9) if average else None,
    )  # fmt: skip
    own = places(micro, world.rank, world.size)
    losses, norms = [], []
    for number in range(STEPS):
        parts = [batch[slice(part * micro, (part + 1) * micro)] for part in range(accumulation)]
        mine = [Batch.join([one[slice(place, place + 1)] for place in own.tolist()]) for one in parts]
        if number == bad and world.rank == world.size - 1:
            mine[0] = replace(mine[0], images=mine[0].images.float().fill_(float("nan")))
        taken = step(job, iter(mine), Position(number, number * 8))
        losses.append(float(taken.loss))
        norms.append(float(taken.norm))
    whole = gathered(method.state_dict() | ({} if job.average is None else job.average.values), world)
    return {"start": start, "losses": losses, "norms": norms, "end": digest(whole) if world.is_writer else ""}


def main() -> None:
    result, kind = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    found = {}
    with joined() as world:
        for recipe in RECIPES:
            cases = {
                "whole": {"accumulation": 1, "clip": None},
                "accumulated, clipped": {"accumulation": 2, "clip": 0.5},
            }
            for name, case in cases.items():
                if 8 // case["accumulation"] % (2 * world.size):
                    continue
                found[f"{recipe}, {name}"] = curve(recipe, kind, world, **case, average=name != "whole")
        found["mae_nano, divided"] = curve("mae_nano", kind, world, accumulation=2, clip=0.5, average=True, divide=True)
        found["mae_nano, again"] = curve("mae_nano", kind, world, accumulation=1, clip=None)
        found["mae_nano, not finite"] = curve("mae_nano", kind, world, accumulation=1, clip=None, bad=2)
        if world.is_writer:
            result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
