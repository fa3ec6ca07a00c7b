"""Measure training in several processes, beside Lightning's DDP with lightly's MAE in the same run.

    python benchmarks/scaling.py [--parts processes overhead saving start checkpoint] [--json] [--keep]
    python benchmarks/scaling.py --gpus 8 [--recipe mae_large --batch 256]

processes: images/s of complete trainings (loading, step, logging) in one process with all cores, and in several
processes that share them. Every training runs in processes of its own, in turns; the mean of its timed steps is
taken. `cpu_s` is the processor time of a step, of all processes together, the minimum over rounds, which other programs
disturb less than `images_per_s`. `first_loss` shows that the same work is done. With --gpus, 1, 2, 4 ... N GPUs get a
batch of --batch each, so the batch grows with them; without, the batch stays the same.

overhead: a step under DDP in a group of one process, against a step without. A single process of unmask does not use
DDP, so this is the cost of its parts alone. Three methods with the same weights and images take their steps in
turns: without DDP, with it, and once more without, whose ratio shows the precision of the measurement.

saving: every few steps of a training, the next of three modes is taken: no checkpoint, one that is written in the
background (as usual), one for which training waits. `pause_ms` is the time from the end of a step to the beginning of
the next one; `pause_share` is its excess over "no checkpoint", divided by the time of a step. `lost_s` is the excess of
all steps up to the next mode, which on a CPU contains the processor time of writing; `longest_step_ms` is the longest
of these steps. Lightning's checkpoints are written while training waits.

start: seconds from the command to the end of the first step.

checkpoint: bytes and seconds of a checkpoint of --large, for which training waits. unmask computes SHA-256 digests,
flushes all files to disk, and verifies the checkpoints that it keeps; Lightning does none of these.

--tiny uses very small sizes, for the test of this script.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from measure import command_line, keep_rows, origin, print_rows
from scale import picture

from unmask.config import Config, override
from unmask.recipes.catalogue import find

PARTS = ("processes", "overhead", "saving", "start", "checkpoint")
WARM_UP = 2  # steps before the timed ones
MODES = ("none", "background", "foreground")
LIMIT = 240.0  # seconds after which a measurement is ended
GRACE = 10.0  # seconds for which other processes may go on after one has failed
IMAGES = 1024
TINY = ["data.size=[32,32]", "method.encoder.depth=2", "method.encoder.width=48"]


@dataclass(frozen=True)
class Task:
    """One training.

    who: unmask or lightning. threads: of each process (None: not set). batch: images per step, over all processes.
    every, modes: take the next of these modes of saving after every `every` steps ((): do not save). data, folder: of
    the images, and of the results.
    """

    who: str
    processes: int
    engine: str
    recipe: str
    batch: int
    precision: str
    threads: int | None = None
    gpu: bool = False
    workers: int = 0
    steps: int = 8
    every: int = 0
    modes: Sequence[str] = ()
    form: str = "auto"
    tiny: bool = False
    data: str = ""
    folder: str = ""

    @property
    def config(self) -> Config:
        config = find(self.recipe)
        return override(config, TINY) if self.tiny else config

    @property
    def last_step(self) -> int:
        """The number of the last step: warm-up and timed steps, or one window for each mode."""
        return self.every * (len(self.modes) + 1) if self.modes else WARM_UP + self.steps

    @property
    def settings(self) -> list[str]:
        return [
            *(TINY if self.tiny else ()),
            f"train.steps={self.last_step}",
            f"train.batch_size={self.batch}",
            f"train.micro_batch={self.batch}",
            f"train.precision={self.precision}",
            f"train.parallel={'auto' if self.engine == 'none' else self.engine}",
            f"train.checkpoint_every={self.every or self.last_step}",
            f"train.checkpoint_format={self.form}",
            f"train.picture_every={10 * self.last_step}",
            f"data.workers={self.workers}",
        ]

    @property
    def about(self) -> dict[str, Any]:
        """The fields that all rows of this training have."""
        return {
            "who": self.who, "processes": self.processes, "threads": self.threads, "engine": self.engine,
            "recipe": self.recipe, "batch": self.batch, "precision": self.precision,
        }  # fmt: skip


def mode_of(task: Task, step: int) -> str:
    """Return the mode of saving after this step, "none" after most steps."""
    number, rest = divmod(step, task.every or step + 1)
    return task.modes[number - 1] if task.modes and not rest and 1 <= number <= len(task.modes) else "none"


class Clocks:
    """The wall-clock and processor time of one process before and after each step, by number."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.begun, self.ended, self.used = dict[int, float](), dict[int, float](), dict[int, float]()

    def before(self, step: int) -> None:
        self.begun[step] = self._now(step)

    def after(self, step: int) -> None:
        self.ended[step] = self._now(step)
        self.used[step] = time.process_time()

    def _now(self, step: int) -> float:
        """Return the time. The device is waited for only where a measurement begins or ends, or at every save."""
        if self.task.gpu and (self.task.modes or step in (WARM_UP, self.task.last_step)):
            torch.cuda.synchronize()
        return time.perf_counter()

    def write(self, rank: int, **more: Any) -> None:
        found = {"begun": self.begun, "ended": self.ended, "used": self.used, **more}
        Path(self.task.folder, f"rank-{rank}.json").write_text(json.dumps(found))


# In the child processes


def train_unmask(task: Task) -> None:
    """Run one process of a training of unmask, and write the times of its steps."""
    import unmask
    from unmask.engine import train
    from unmask.engine.fault_points import FaultPoints, injected

    clocks, saves, losses, own = Clocks(task), list[dict[str, Any]](), dict[int, float](), train.save
    waited: dict[int, float] = {}

    def after(job: Any, taken: Any) -> Any:
        clocks.after(taken.number)
        waited[taken.number] = taken.waited
        if taken.number == 1:
            losses[1] = float(taken.loss)
        return taken

    def save(job: Any, at: Any, stopwatch: Any, writer: Any) -> None:
        """Save as the mode of this step states; the last step is always saved."""
        if saves:
            saves[-1].setdefault("write", writer.seconds)
        mode = "foreground" if at.step == task.last_step else mode_of(task, at.step)
        if mode == "none":
            return
        start = time.perf_counter()
        own(job, at, stopwatch, writer)
        saves.append({"step": at.step, "pause": time.perf_counter() - start})
        if mode == "foreground":
            writer.wait()
            files = [file for file in newest(job.run.checkpoints).rglob("*") if file.is_file()]
            sizes = {"bytes": sum(file.stat().st_size for file in files), "files": len(files)}
            saves[-1] |= {"write": writer.seconds, **sizes}

    points = FaultPoints(before_step=lambda job, at: clocks.before(at.step + 1), after_step=after)
    with injected(points), patch.object(train, "save", save):
        unmask.pretrain(
            task.data, recipe=task.recipe, settings=task.settings, out=Path(task.folder) / "run", console=quiet()
        )
    clocks.write(int(os.environ.get("RANK", "0")), saves=saves, waited=waited, losses=losses)


def quiet() -> Any:
    from unmask.console import Console

    return Console(quiet=True)


def newest(checkpoints: Path) -> Path:
    return max(checkpoints.glob("step-*"))


def overhead(task: Task) -> None:
    """Take steps without DDP, with it in a group of one process, and without, in turns; write their times."""
    import torch.distributed as dist

    from unmask.batch import Batch, ImageSpec
    from unmask.console import Console
    from unmask.engine.build import build_method
    from unmask.engine.job import Job, Position
    from unmask.engine.sharding import distribute
    from unmask.engine.train import step
    from unmask.engine.world import ALONE, World
    from unmask.method import Clock
    from unmask.optim import make_optimizer

    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    device = "cuda:0" if task.gpu else "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if task.gpu else "gloo", store=store, rank=0, world_size=1)
    one = World(group=dist.group.WORLD, devices=dist.group.WORLD)
    spec = ImageSpec(3, task.config.data.size, "uint8", (127.0,) * 3, (60.0,) * 3)
    plan: Any = SimpleNamespace(
        accumulation=1, micro_batch=task.batch, batch_size=task.batch, device=device, precision=task.precision,
        images=spec, lr=lambda number: 1e-4,
        clock=lambda number, draws, micro, place: Clock(number, task.last_step, draws, micro, place=place),
    )  # fmt: skip
    index = torch.arange(task.batch)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (task.batch, 3, *task.config.data.size), dtype=torch.uint8)
    batch = Batch(images, index, index * 0)
    jobs: dict[str, Job] = {}
    for name in ("none", "ddp", "none again"):
        torch.manual_seed(0)
        method = build_method(task.config, spec)
        kind, world = ("ddp", one) if name == "ddp" else ("none", ALONE)
        shared = distribute(method, kind, world, precision=task.precision, device=device)  # type: ignore[arg-type]
        nothing: Any = None
        jobs[name] = Job(
            run=nothing, config=task.config, plan=plan, images=nothing, console=Console(silent=True),
            distributed=shared, optimizer=make_optimizer(method, task.config.optim),
        )  # fmt: skip
    found: dict[str, Any] = {name: {"seconds": [], "cpu": []} for name in jobs}
    losses: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for number in range(task.last_step):
        for name in names[number % 3 :] + names[: number % 3]:
            start, used = time.perf_counter(), time.process_time()
            taken = step(jobs[name], itertools.repeat(batch), Position(number, number * task.batch))
            losses[name].append(taken.loss.item())  # waits for the device
            if number >= WARM_UP:
                found[name]["seconds"].append(time.perf_counter() - start)
                found[name]["cpu"].append(time.process_time() - used)
    same = losses["ddp"] == losses["none"] == losses["none again"]
    Path(task.folder, "rank-0.json").write_text(json.dumps({**found, "same_losses": same}))
    dist.destroy_process_group()


# In the parent process


def run_in_processes(task: Task, what: str = "train") -> list[dict[str, Any]] | str:
    """Run one measurement; return what each process has written, in the order of ranks, or why it failed."""
    with tempfile.TemporaryDirectory(prefix="unmask-scaling-") as folder:
        task = replace(task, folder=folder)
        words = json.dumps(asdict(task))
        alone = task.who == "lightning" or task.processes == 1
        command = [sys.executable, script("lightning_mae.py"), words] if task.who == "lightning" else [
            sys.executable, script("scaling.py"), "--child", what, words
        ]  # fmt: skip
        started = []
        port = str(free_port())
        for rank in range(1 if alone else task.processes):
            place = {} if alone else {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(task.processes),
                "LOCAL_WORLD_SIZE": str(task.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
            with Path(folder, f"output-{rank}.txt").open("wb") as output:
                started.append(
                    subprocess.Popen(
                        command,
                        env={**environment(task), **place},
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
        ended = wait(started)
        if ended != [0] * len(started):
            text = "\n".join(file.read_text(errors="replace") for file in sorted(Path(folder).glob("output-*.txt")))
            log(text[-2000:])
            return (text.strip().splitlines() or ["no output"])[-1][:200]
        return [json.loads(Path(folder, f"rank-{rank}.json").read_text()) for rank in range(task.processes)]


def environment(task: Task) -> dict[str, str]:
    """Return the environment of a measurement: the threads of each process, and unmask's setting for GNU OpenMP."""
    threads = {} if task.threads is None else {"OMP_NUM_THREADS": str(task.threads)}
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return {"GOMP_SPINCOUNT": "2000", **inherited, **threads}


def script(name: str) -> str:
    return str(Path(__file__).with_name(name))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait(started: Sequence[subprocess.Popen]) -> list[int]:
    """Return the exit codes; when one process fails or the time is over, the others are ended with their children."""
    deadline = time.monotonic() + LIMIT
    try:
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            if any(process.poll() for process in started):
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.02)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [process.wait() for process in started]


def timed_steps(task: Task, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return seconds, processor seconds and share of waiting of a step, from the times of all ranks."""
    first, last = str(WARM_UP), str(task.last_step)
    count = task.last_step - WARM_UP
    seconds = statistics.mean(rank["ended"][last] - rank["ended"][first] for rank in ranks) / count
    cpu = sum(rank["used"][last] - rank["used"][first] for rank in ranks) / count
    numbers = range(WARM_UP + 1, task.last_step + 1)
    if "waited" in ranks[0]:
        loading = statistics.mean(sum(rank["waited"][str(number)] for number in numbers) for rank in ranks)
    else:
        loading = statistics.mean(
            sum(rank["begun"][str(number)] - rank["ended"][str(number - 1)] for number in numbers) for rank in ranks
        )
    losses = ranks[0].get("losses", {})
    return {"seconds": seconds, "cpu": cpu, "loading": loading / count / seconds, "first_loss": losses.get("1")}


def process_rows(tasks: Sequence[Task], rounds: int, tell: Callable[[list[dict[str, Any]]], None]) -> None:
    found: dict[Task, list[dict[str, Any]]] = {task: [] for task in tasks}
    failed: dict[Task, str] = {}
    for number in range(rounds):
        for task in tasks:
            if task in failed:
                continue
            log(f"processes: round {number + 1} of {rounds}, {task.who} {task.engine} {task.processes}")
            ranks = run_in_processes(task)
            if isinstance(ranks, str):
                failed[task] = ranks
            else:
                found[task].append(timed_steps(task, ranks))
    rows = []
    for task, results in found.items():
        about = {"part": "processes", **task.about}
        if task in failed:
            rows.append({**about, "failed": failed[task]})
            continue
        each = [result["seconds"] for result in results]
        rows.append({
            **about, "images_per_s": task.batch / statistics.median(each), "ms": 1e3 * statistics.median(each),
            "fastest_ms": 1e3 * min(each), "slowest_ms": 1e3 * max(each),
            "cpu_s": min(result["cpu"] for result in results),
            "loading": statistics.median(result["loading"] for result in results),
            "first_loss": results[0]["first_loss"],
        })  # fmt: skip
    tell(rows + process_ratios(rows))


def process_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the images/s of several processes over those of one, and those of unmask over Lightning's.

    `cpu_ratio` is the inverse ratio of processor time per image.
    """
    good = {(row["who"], row["engine"], row["processes"]): row for row in rows if "failed" not in row}
    pairs = [(row, good.get((who, "none", 1)), f"{count} processes ({engine}) over 1, {who}")
             for (who, engine, count), row in good.items() if engine != "none"]  # fmt: skip
    pairs += [(row, good.get(("lightning", engine, count)), f"unmask over lightning, {count} processes ({engine})")
              for (who, engine, count), row in good.items() if who == "unmask"]  # fmt: skip
    return [
        {"part": "processes", "who": name, "ratio": one["images_per_s"] / two["images_per_s"],
         "cpu_ratio": (two["cpu_s"] / two["batch"]) / (one["cpu_s"] / one["batch"])}
        for one, two, name in pairs if two is not None
    ]  # fmt: skip


def overhead_rows(task: Task, tell: Callable[[list[dict[str, Any]]], None]) -> None:
    log("overhead: steps without and with DDP")
    ranks = run_in_processes(task, "overhead")
    about = {"part": "overhead", **task.about}
    if isinstance(ranks, str):
        tell([{**about, "failed": ranks}])
        return
    (found,) = ranks
    base = found["none"]
    rows = []
    for name in ("none", "none again", "ddp"):
        own = found[name]
        pairs = [mine / its for mine, its in zip(own["seconds"], base["seconds"], strict=True)]
        used = [mine / its for mine, its in zip(own["cpu"], base["cpu"], strict=True)]
        rows.append({
            **about, "engine": name, "ms": 1e3 * statistics.median(own["seconds"]),
            "cpu_s": statistics.median(own["cpu"]), "overhead": statistics.median(pairs) - 1,
            "cpu_overhead": statistics.median(used) - 1, "pairs": len(pairs), "same_losses": found["same_losses"],
        })  # fmt: skip
    tell(rows)


def saving_rows(task: Task, tell: Callable[[list[dict[str, Any]]], None]) -> None:
    log(f"saving: {task.who} {task.engine} {task.processes}")
    ranks = run_in_processes(task)
    about = {"part": "saving", **task.about, "form": task.form, "every": task.every}
    if isinstance(ranks, str):
        tell([{**about, "failed": ranks}])
        return
    windows: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES if mode in task.modes}
    plain: list[float] = []
    for number, mode in enumerate(task.modes, start=1):
        step = number * task.every
        first, last = str(step), str(step + task.every)
        times = range(step + 1, step + task.every + 1)
        pauses = [rank["begun"][str(step + 1)] - rank["ended"][first] for rank in ranks]
        windows[mode].append({
            "pause": max(pauses), "seconds": max(rank["ended"][last] - rank["ended"][first] for rank in ranks),
            "cpu": sum(rank["used"][last] - rank["used"][first] for rank in ranks),
            "longest": max(ranks[0]["ended"][str(one)] - ranks[0]["begun"][str(one)] for one in times),
        })  # fmt: skip
        if mode == "none":
            plain += [ranks[0]["ended"][str(one)] - ranks[0]["begun"][str(one)] for one in times]
    middle = {
        mode: {key: statistics.median(one[key] for one in found) for key in found[0]} for mode, found in windows.items()
    }
    base, one_step = middle["none"], statistics.median(plain)
    written = {save["step"]: save for save in ranks[0]["saves"]}
    rows = []
    for mode, its in middle.items():
        steps = [number * task.every for number, name in enumerate(task.modes, start=1) if name == mode]
        write = [written[step]["write"] for step in steps if "write" in written.get(step, {})]
        sizes = [written[step]["bytes"] for step in steps if "bytes" in written.get(step, {})]
        pause = its["pause"] - base["pause"]
        rows.append({
            **about, "mode": mode, "step_ms": 1e3 * one_step, "pause_ms": 1e3 * its["pause"],
            "pause_share": pause / one_step, "longest_step_ms": 1e3 * its["longest"],
            "window_s": its["seconds"], "lost_s": its["seconds"] - base["seconds"],
            "cpu_lost_s": its["cpu"] - base["cpu"], "write_s": statistics.median(write) if write else None,
            "mib": sizes[0] / 2**20 if sizes else None, "windows": len(steps),
        })  # fmt: skip
    tell(rows)


def checkpoint_rows(task: Task, tell: Callable[[list[dict[str, Any]]], None]) -> None:
    log(f"checkpoint: {task.who} {task.engine} {task.processes} {task.form}")
    ranks = run_in_processes(task)
    about = {"part": "checkpoint", **task.about, "form": task.form}
    if isinstance(ranks, str):
        tell([{**about, "failed": ranks}])
        return
    saves = [save for save in ranks[0]["saves"] if "bytes" in save]
    tell([{
        **about, "mib": saves[0]["bytes"] / 2**20, "files": saves[0]["files"],
        "pause_s": statistics.median(save["pause"] for save in saves),
        "write_s": statistics.median(save["write"] for save in saves),
        "fastest_write_s": min(save["write"] for save in saves), "saves": len(saves),
    }])  # fmt: skip


def first_step(task: Task) -> float | str:
    """Return the seconds from the command to the end of the first step, or why it failed."""
    with tempfile.TemporaryDirectory(prefix="unmask-scaling-") as folder:
        task = replace(task, folder=folder, steps=1 - WARM_UP if task.who == "unmask" else 1)
        if task.who == "lightning":
            command = [sys.executable, script("lightning_mae.py"), json.dumps(asdict(task))]
        else:
            launch = ["launch", "--gpus" if task.gpu else "--processes", str(task.processes)]
            settings = [word for setting in task.settings for word in ("--set", setting)]
            command = [sys.executable, "-m", "unmask", *(launch if task.processes > 1 else ()), "pretrain", task.data]
            command += ["--recipe", task.recipe, "--out", str(Path(folder, "run")), *settings]
        output = Path(folder, "output.txt")
        start, clock = time.time(), time.perf_counter()
        with output.open("wb") as file:
            process = subprocess.Popen(command, env=environment(task), stdout=file, stderr=file, start_new_session=True)
        if wait([process]) != [0]:
            return (output.read_text(errors="replace").strip().splitlines() or ["no output"])[-1][:200]
        if task.who == "unmask":
            return json.loads(Path(folder, "run", "metrics.jsonl").read_text().splitlines()[0])["time"] - start
        found = json.loads(Path(folder, "rank-0.json").read_text())
        return found["ended"]["1"] - clock  # perf_counter is the same clock in all processes of a Linux machine


def start_rows(tasks: Sequence[Task], rounds: int, tell: Callable[[list[dict[str, Any]]], None]) -> None:
    found: dict[Task, list[float | str]] = {task: [] for task in tasks}
    for number in range(rounds):
        for task in tasks:
            log(f"start: round {number + 1} of {rounds}, {task.who} {task.processes}")
            found[task].append(first_step(task))
    rows = []
    for task, results in found.items():
        about = {"part": "start", **task.about}
        seconds = [one for one in results if isinstance(one, float)]
        if len(seconds) < len(results):
            rows.append({**about, "failed": next(one for one in results if isinstance(one, str))})
        else:
            rows.append({**about, "median_s": statistics.median(seconds), "fastest_s": min(seconds),
                         "slowest_s": max(seconds)})  # fmt: skip
    tell(rows)


def make_images(folder: Path, count: int, side: int) -> None:
    """Write JPEG images in two class folders."""
    contents = [picture((side, side), "JPEG", seed) for seed in range(16)]
    for number in range(count):
        place = folder / f"class-{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(contents[number % len(contents)])


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def counts_of(total: int) -> list[int]:
    """Return 1, 2, 4, ... up to `total`, and `total`."""
    return sorted({*(1 << bit for bit in range(total.bit_length())), total} - {0})


def options_of(arguments: Sequence[str] | None = None) -> Any:
    parser = command_line(__doc__, rounds=3, result="scaling")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--gpus", type=int, help="use this many GPUs (default: the cores, without GPUs)")
    parser.add_argument("--processes", type=int, nargs="+", help="numbers of processes (default: 1 and 2)")
    parser.add_argument("--recipe", help="default: mae_small, with --gpus mae_large")
    parser.add_argument("--batch", type=int, help="images per step (default 32); with --gpus per GPU (default 256)")
    parser.add_argument("--large", default="mae_base", help="recipe of the part `checkpoint` (default mae_base)")
    parser.add_argument("--steps", type=int, help="timed steps per training")
    parser.add_argument("--every", type=int, default=3, help="steps between two modes of `saving` (default 3)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: as unmask chooses")
    options = parser.parse_args(arguments)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.gpus is not None and not 1 <= options.gpus <= found:
        parser.error(
            f"got --gpus {options.gpus}; this machine has {found or 'no'} GPUs that torch can use; "
            + (f"give --gpus 1 to {found}" if found else "leave --gpus out to measure with the cores")
        )
    return options


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        task = Task(**json.loads(sys.argv[3]))
        {"train": train_unmask, "overhead": overhead}[sys.argv[2]](task)
        return
    options = options_of()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes of a measurement are ended too
    from unmask.engine.device import choose_precision

    gpu, tiny = options.gpus is not None, options.tiny
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = options.processes or (counts_of(options.gpus) if gpu else [1, 2])
    precision = options.precision or choose_precision("auto", "cuda" if gpu else "cpu")[0]
    batch = options.batch or (8 if tiny else 256 if gpu else 32)
    rounds = 1 if tiny else options.rounds
    rivals = ["unmask", *(["lightning"] if find_spec("pytorch_lightning") and find_spec("lightly") else [])]
    base = Task(
        "unmask", 1, "none", options.recipe or ("mae_nano" if tiny else "mae_large" if gpu else "mae_small"), batch,
        precision, gpu=gpu, tiny=tiny, steps=options.steps or (2 if tiny else 20 if gpu else 6),
    )  # fmt: skip

    def task_of(who: str, count: int, engine: str | None = None, **more: Any) -> Task:
        threads, per_gpu = (None, count) if gpu else (max(1, cores // count), 1)
        return replace(
            base, who=who, processes=count, engine=engine or ("none" if count == 1 else "ddp"), threads=threads,
            workers=min(12, max(1, cores // count - 1)) if gpu else 0, batch=batch * per_gpu, **more,
        )  # fmt: skip

    data = tempfile.mkdtemp(prefix="unmask-scaling-images-")
    base = replace(base, data=data)
    about = origin(("torch", "lightly", "pytorch_lightning", "timm", "torchvision", "numpy"))
    about |= {"cores": cores, "gpus": options.gpus or 0, "load": os.getloadavg()[0]}
    rows: list[dict[str, Any]] = []
    if not options.json:
        print(about["device"], *(f"{name} {version}" for name, version in about["versions"].items()), sep="  ")

    def tell(found: list[dict[str, Any]]) -> None:
        """Add rows, print them, and write all rows so far, because a long measurement may be interrupted."""
        rows.extend(found)
        if not options.json:
            print_rows(found)
            sys.stdout.flush()
        if options.keep:
            keep_rows("scaling", rows, about)

    try:
        make_images(Path(data), 32 if tiny else IMAGES * (options.gpus or 1), 40 if tiny else 256)
        both = [task_of(who, count) for count in counts for who in rivals]
        several = max(counts)
        if "processes" in options.parts:
            alone = [task_of("lightning", 1, "ddp")] if "lightning" in rivals else []
            process_rows([*both, *alone], rounds, tell)
        if "overhead" in options.parts:
            overhead_rows(task_of("unmask", 1, steps=2 if tiny else 6 * rounds), tell)
        if "saving" in options.parts:
            for task in [task_of("unmask", count) for count in sorted({1, several})]:
                saving_rows(replace(task, every=2 if tiny else options.every, modes=MODES * rounds), tell)
            if "lightning" in rivals:
                modes = ("none", "foreground") * rounds
                saving_rows(task_of("lightning", 1, every=2 if tiny else options.every, modes=modes), tell)
        if "start" in options.parts:
            start_rows([task for task in both if task.processes in (1, several)], rounds, tell)
        if "checkpoint" in options.parts:
            modes = ("foreground",) * min(2, rounds)
            large = partial(task_of, recipe="mae_nano" if tiny else options.large, every=1, modes=modes)
            kinds = [(1, "none", "dense"), (1, "none", "dcp")]
            kinds += [(several, "ddp", "dense"), (several, "ddp", "dcp"), (several, "fsdp", "dcp")] * (several > 1)
            for count, engine, form in kinds:
                task = large("unmask", count, engine, form=form)
                checkpoint_rows(task if gpu else replace(task, batch=4 * count), tell)
            if "lightning" in rivals:
                task = large("lightning", 1)
                checkpoint_rows(task if gpu else replace(task, batch=4), tell)
    finally:
        shutil.rmtree(data, ignore_errors=True)
    if options.json:
        print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
