"""Time one MAE pre-training step (forward, backward, AdamW) of unmask and of other libraries, and its matrix products
alone.

    python benchmarks/step.py [--recipes mae_base mae_large] [--batch 16] [--official FOLDER] [--json] [--keep]

Rivals: transformers' ViTMAE, lightly's modules if lightly is installed, and the published code if --official names a
checkout of facebookresearch/mae (with a timm version that it works with). "compiled" means train.compile in unmask and
torch.compile in the rivals. Every measurement runs in its own process, which gives its peak memory. The processes run
in turns; for each rival, the median step and the fastest and slowest round are reported. On a machine that runs other
programs, the CPU seconds of a step (`cpu_s`, the minimum over rounds) are the more reliable number.

All implementations use the same sizes, mask 75 % of the patches, predict normalised pixels, and use a fused AdamW,
except for the published code in float32, which is used as shipped. The rivals get normalised images on the device.
unmask gets uint8 images, draws its patch masks, checks for non-finite numbers and computes the gradient norm, as in
training.

`products`: time of only the forward and backward matrix products of all linear layers, in the same shapes and
precision. `share`: the model's FLOPs per second divided by the FLOPs per second of `products`. `loss`: largest relative
difference between the losses of the rival and of unmask in float32, with the same weights, images and masks.

--tiny times one step of a small model, for the test of this script.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import command_line, conclude, origin
from rivals import RIVALS, renamed
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.config import Config, override
from unmask.engine.compile import compile_blocks
from unmask.engine.device import autocast, choose_device, choose_precision
from unmask.engine.flops import count_flops
from unmask.engine.host_memory import memory_kept
from unmask.method import Clock
from unmask.nn.masks import mask_from_noise
from unmask.nn.patches import normalise, take
from unmask.optim import make_optimizer, update
from unmask.recipes.catalogue import find
from unmask.rng import Draws

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TINY = ["data.size=[32,32]", "method.encoder.depth=2", "method.encoder.width=48"]
SQUARE = 4096  # size of the square matrices that measure the highest rate of the device

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Task:
    """One measurement: rival, recipe, precision, device and number of steps."""

    rival: str
    recipe: str
    batch: int
    precision: str
    device: str
    steps: int
    official: str | None
    tiny: bool

    @property
    def config(self) -> Config:
        config = find(self.recipe)
        return override(config, TINY) if self.tiny else config

    @property
    def spec(self) -> ImageSpec:
        return ImageSpec(3, self.config.data.size, "uint8", MEAN, STD)

    def images(self) -> Tensor:
        torch.manual_seed(0)
        return torch.randint(0, 256, (self.batch, 3, *self.config.data.size), dtype=torch.uint8).to(self.device)

    def normalised(self) -> Tensor:
        return normalise(self.images(), *(torch.tensor(part, device=self.device) for part in (MEAN, STD)))


# In the child process


def our_step(task: Task, *, compiled: bool) -> Step:
    config = task.config
    method = config.build(task.spec).to(task.device)
    if compiled:
        compile_blocks(method)
    optimizer = make_optimizer(method, config.optim)
    index = torch.arange(task.batch, device=task.device)
    batch = Batch(task.images(), index, index * 0)

    def step() -> Tensor:
        with autocast(task.precision, task.device):
            loss = method(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index))).value
        loss.backward()
        update(optimizer, 1e-4, loss.detach(), config.optim.clip)
        return loss

    return step


def their_step(task: Task, name: str, *, compiled: bool) -> Step:
    model, loss_of = RIVALS[name](task.config, task.official)
    model.to(task.device).train()
    if compiled:
        model.compile()
    shipped = name == "official" and task.precision == "fp32"
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, betas=(0.9, 0.95), fused=None if shipped else True)
    images = task.normalised()

    def step() -> Tensor:
        with autocast(task.precision, task.device):
            loss = loss_of(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def linear_shapes(task: Task) -> list[tuple[int, int, int]]:
    """Return (rows, input width, output width) of every call of a linear layer, for the whole batch."""
    seen: list[tuple[int, int, int]] = []
    linear = nn.functional.linear

    def note(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((x.shape[:-1].numel(), weight.shape[1], weight.shape[0]))
        return linear(x, weight, bias)

    with torch.device("meta"):
        method = task.config.build(task.spec)
        images = torch.empty(task.batch, 3, *task.config.data.size, dtype=torch.uint8)
        noise = torch.empty(task.batch, method.encoder.grid[0] * method.encoder.grid[1])
        with patch.object(nn.functional, "linear", note):
            method.guess(method.encoder.patches(images), mask_from_noise(noise, 0.75))  # type: ignore[operator]
    return seen


def products(task: Task) -> tuple[Step, float]:
    """Return (function that computes the forward and backward products of all linear layers, its FLOPs)."""
    shapes = linear_shapes(task)
    dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
    made = {shape: torch.randn(shape[0] * shape[1]).to(task.device, dtype).view(shape[:2]) for shape in set(shapes)}
    held = {
        (rows, inside, outside): (
            x,
            torch.randn(outside, inside).to(task.device, dtype),
            torch.randn(rows, outside).to(task.device, dtype),
        )
        for (rows, inside, outside), x in made.items()
    }

    def step() -> Tensor:
        for shape in shapes:
            x, weight, gradient = held[shape]
            done = x @ weight.T, gradient @ weight, gradient.T @ x
        return done[0].flatten()[0]

    return step, 6.0 * sum(rows * inside * outside for rows, inside, outside in shapes)


def square(task: Task) -> tuple[Step, float]:
    """Return (function that computes one large matrix product, its FLOPs), for the device's highest rate."""
    side = 256 if task.tiny else SQUARE
    a, b = torch.randn(2, side, side).to(task.device, torch.bfloat16 if task.precision == "bf16" else torch.float32)
    return lambda: (a @ b)[0, 0], 2.0 * side**3


def measured(task: Task) -> dict[str, Any]:
    """Measure the seconds of each step after two warm-up steps, page faults per step, and peak memory.

    On a CPU, memory after the imports is subtracted. On a GPU, all steps are queued before synchronising, and their
    mean is reported.
    """
    name, _, compiled = task.rival.partition(" ")
    before, flops = resident(), 0.0
    with memory_kept("not asked for" if name in RIVALS else task.device):
        if name in ("products", "square"):
            step, flops = products(task) if name == "products" else square(task)
        elif name == "unmask":
            step = our_step(task, compiled=bool(compiled))
        else:
            step = their_step(task, name, compiled=bool(compiled))
        warm_up, faults, used = timed(step, 2), page_faults(), time.process_time()
        if task.device == "cpu":
            seconds = [timed(step, 1) for _ in range(task.steps)]
        else:
            seconds = [timed(step, task.steps) / task.steps]
        faults, used = (page_faults() - faults) / task.steps, (time.process_time() - used) / task.steps
    peak = torch.cuda.max_memory_allocated() if task.device.startswith("cuda") else peak_resident() - before
    return {"seconds": seconds, "warm_up": warm_up, "peak": peak, "flops": flops, "page_faults": faults, "cpu": used}


def timed(step: Step, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        last = step()
    last.item()  # waits for the device
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident() -> int:
    """Return the bytes of memory that this process uses now."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def agreement(task: Task) -> dict[str, Any]:
    """Return the float32 losses of unmask's model and of a rival with the same weights, images and masks."""
    torch.manual_seed(0)
    method = task.config.build(task.spec).to(task.device)
    noise = torch.rand(task.batch, method.encoder.grid[0] * method.encoder.grid[1]).to(task.device)
    mask = mask_from_noise(noise, 0.75)
    patches = method.encoder.patches(task.images())
    truth = take(method.target(patches, task.images()), mask.drop)  # type: ignore[operator]
    ours = method.target.loss(method.guess(patches, mask), truth)  # type: ignore[operator,union-attr]
    model, loss_of = RIVALS[task.rival](task.config, task.official)
    missing = model.to(task.device).load_state_dict(renamed(method.state_dict(), task.rival), strict=False)
    unknown = [name for name in missing.missing_keys if not name.endswith("mask_token")]
    assert not unknown, f"{task.rival} has weights that ours do not cover: {unknown}"
    theirs = loss_of(task.normalised(), noise)
    return {"ours": float(ours), "theirs": float(theirs)}


# In the parent process


def in_child(task: Task, what: str) -> dict[str, Any]:
    """Run the measurement `what` in its own process; if it fails, return {"failed": reason}."""
    environment = {"GOMP_SPINCOUNT": "2000", **os.environ}  # the setting of unmask's command line, for all rivals
    done = subprocess.run(
        [sys.executable, __file__, "--child", what, json.dumps(asdict(task))],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows_of(task: Task, rivals: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return one row of results per candidate. `products` must come first: shares are relative to its rate."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rivals}
    for number in range(rounds):
        for name in rivals:
            if number and "failed" in found[name][-1]:
                continue
            log(f"{task.recipe} {task.precision}: round {number + 1} of {rounds}, {name}")
            found[name].append(in_child(replace(task, rival=name), "measured"))
    model = count_flops(task.config, task.spec).training * task.batch
    rate, rows = None, []
    for name, results in found.items():
        about: dict[str, Any] = {"recipe": task.recipe, "batch": task.batch, "precision": task.precision, "who": name}
        if "failed" in results[-1]:
            rows.append({**about, "failed": results[-1]["failed"]})
            continue
        each = [statistics.median(result["seconds"]) for result in results]
        median, flops = statistics.median(each), results[0]["flops"] or model
        row = {**about, "ms": 1e3 * median, "fastest_ms": 1e3 * min(each), "slowest_ms": 1e3 * max(each)}
        row["cpu_s"] = min(result["cpu"] for result in results)
        if results[0]["flops"]:
            row |= {"tflop_per_s": flops / median / 1e12}
            rate = row["tflop_per_s"] if name == "products" else rate
        else:
            row |= {
                "images_per_s": task.batch / median,
                "model_gflop_per_image": model / task.batch / 1e9,
                "share": model / median / 1e12 / rate if rate else None,
                "peak_mib": max(result["peak"] for result in results) / 2**20,
                "page_faults": statistics.median(result["page_faults"] for result in results),
                "warm_up_s": statistics.median(result["warm_up"] for result in results),
            }
        rows.append(row)
    return rows + ratios(rows)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each rival's time divided by unmask's (compiled by compiled); `cpu_ratio` uses CPU seconds instead."""
    fast = {row["who"]: row for row in rows if "images_per_s" in row}
    found = []
    for name, row in fast.items():
        kind, _, compiled = name.partition(" ")
        mine = "unmask compiled" if compiled and "unmask compiled" in fast else "unmask"
        if kind != "unmask" and mine in fast:
            about = {key: row[key] for key in ("recipe", "batch", "precision")}
            about |= {"who": f"{mine} over {name}", "ratio": row["ms"] / fast[mine]["ms"]}
            found.append({**about, "cpu_ratio": row["cpu_s"] / fast[mine]["cpu_s"]})
    return found


def agreements(task: Task, rivals: list[str]) -> list[dict[str, Any]]:
    rows = []
    for name in rivals:
        log(f"{task.recipe}: loss of {name} with the same weights")
        found = in_child(replace(task, rival=name, precision="fp32", batch=min(task.batch, 8)), "agreement")
        about = {"recipe": task.recipe, "precision": "fp32", "who": f"loss of {name}", **found}
        if "failed" not in found:
            about["loss"] = abs(found["ours"] - found["theirs"]) / abs(found["ours"])
        rows.append(about)
    return rows


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        what, task = {"measured": measured, "agreement": agreement}[sys.argv[2]], Task(**json.loads(sys.argv[3]))
        print(json.dumps(what(task)))
        return
    parser = command_line(__doc__, rounds=5, result="step")
    parser.add_argument("--recipes", nargs="+", default=["mae_base", "mae_large"])
    parser.add_argument(
        "--batch", type=int, help="batch size of mae_base; mae_large uses half of it, mae_huge a quarter"
    )
    parser.add_argument("--steps", type=int, help="timed steps per process")
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"])
    parser.add_argument("--rivals", nargs="+", help="rivals to time (default: all that are installed)")
    parser.add_argument("--compiled", action="store_true", help="also time with torch.compile (always done on a GPU)")
    parser.add_argument("--official", metavar="FOLDER", help="folder of a checkout of facebookresearch/mae")
    options = parser.parse_args()
    device = choose_device("auto")
    there = [name for name in ("transformers", "lightly") if find_spec(name)] + ["official"] * bool(options.official)
    named = [name for name in there if not options.rivals or name in options.rivals]
    rivals = ["products", "square", "unmask", *named]
    if options.compiled or device.startswith("cuda"):
        rivals += ["unmask compiled", *(f"{name} compiled" for name in named if name != "official")]
    precisions = options.precisions or list(dict.fromkeys([choose_precision("auto", device)[0], "fp32"]))
    rounds = 1 if options.tiny else options.rounds
    batch, steps = (4, 1) if options.tiny else (16, 3) if device == "cpu" else (256, 20)
    official = str(Path(options.official).resolve()) if options.official else None
    rows = []
    for recipe in ["mae_nano"] if options.tiny else options.recipes:
        smaller = {"mae_large": 2, "mae_huge": 4}.get(recipe, 1)
        images = max(1, (options.batch or batch) // smaller)
        task = Task("", recipe, images, "", device, options.steps or steps, official, options.tiny)
        for precision in precisions[:1] if options.tiny else precisions:
            rows += rows_of(replace(task, precision=precision), rivals, rounds)
        rows += agreements(task, named)
    about = origin(("torch", "transformers", "lightly", "timm", "numpy"))
    if options.official:
        about["command"] = about["command"].replace(options.official, "FOLDER")
    conclude("step", rows, about, as_json=options.json, keep=options.keep)


if __name__ == "__main__":
    main()
