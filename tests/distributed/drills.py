"""Kill and stop groups of training processes, continue with the same command, and compare with an undisturbed run.

    scripts/kill-drills [--rounds 20] [--seed 0] [--only KIND] [--keep FOLDER]

Kinds of drills; the moment of each is random:
    one     SIGKILL to one process; then continued with another number of processes
    all     SIGKILL to all processes and their launcher; continued likewise
    save    SIGKILL to one or all while a checkpoint is written; continued likewise
    stop    SIGTERM or SIGUSR1 to one process or all, with two loader workers in each: during start-up, training, a
            picture or a save; then continued with the same number of processes

The processes are started by torchrun, by `unmask launch`, or directly with the variables that torchrun sets. They train
with DDP (dense checkpoints) and with FSDP2 (checkpoints in shards). Prints a line for each drill and a summary; the
exit code is 0 if all requirements are met. On two cores a drill takes about 30 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from conftest import small, write_images
from group import free_port

HERE = Path(__file__).parent
STEPS, EVERY, PICTURES, BATCH, IMAGES = 30, 5, 15, 8, 28
LIMIT = 180.0  # seconds for a command that is not stopped
STOP_SECONDS = 20.0  # from a stop request to the end of all processes
DEAD_SECONDS = 45.0  # from a kill to the end of all other processes; torchrun waits 30 s before it kills them
PEER_SECONDS = 8
CLOSE = 1e-5  # relative difference of losses that sums in another order may have
SIZES = ((2, 1), (2, 4), (4, 2))
LAUNCHERS = ("direct", "torchrun", "launch")
KINDS = ("one", "all", "save", "stop")
STARTING, TRAINING, PICTURE, SAVE = "start-up", "training", "picture", "save"
LEFTOVERS = ("*.partial", ".tmp-*", "*.old", "*.corrupt*")
LAUNCH = "from unmask.engine import torchrun; torchrun.MODULE = 'drilled'; from unmask.commands import main; main()"


class Failed(AssertionError):
    """Raised if a requirement of a drill is not met."""


def require(condition: object, message: object) -> None:
    if not condition:
        raise Failed(str(message))


@dataclass
class Group:
    """A command that several processes run. mark: value of an environment variable of all of them.

    started: the launcher, or the processes if there is none.
    """

    folder: Path
    size: int
    launcher: str
    mark: str
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def record(self) -> Path:
        return self.folder / "record"

    def start(self, words: list[str], slow: dict[str, float]) -> None:
        self.record.mkdir(parents=True, exist_ok=True)
        common = {
            **os.environ, "OMP_NUM_THREADS": "1", "DRILL_RECORD": str(self.record), "DRILL_SLOW": json.dumps(slow),
            "DRILL_MARK": self.mark, "UNMASK_PEER_SECONDS": str(PEER_SECONDS), "TORCH_CPP_LOG_LEVEL": "ERROR",
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        python, script = sys.executable, str(HERE / "drilled.py")
        if self.launcher == "torchrun":
            options = ["--standalone", "--nproc-per-node", str(self.size)]
            commands = [[python, "-m", "torch.distributed.run", *options, script, *words]]
        elif self.launcher == "launch":
            options = ["launch", "--processes", str(self.size), "--timeout", str(PEER_SECONDS)]
            commands = [[python, "-c", LAUNCH, *options, *words]]
        else:
            commands = [[python, script, *words]] * self.size
        port = str(free_port())
        for rank, command in enumerate(commands):
            environment = dict(common)
            if self.launcher == "direct":
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size)}
                environment |= {"LOCAL_WORLD_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with (self.folder / f"output-{rank}.txt").open("ab") as output:
                self.started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))

    def processes(self) -> list[psutil.Process]:
        """Return all living processes of this command, also those that have lost their parent."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("DRILL_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, int]:
        """Return {rank: process id} of the processes that have begun."""
        return {row["rank"]: row["pid"] for row in self.events("begin")}

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of these kinds, in the order of each process."""
        files = sorted(self.record.glob("*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_bytes().splitlines()]
        return [row for row in rows if row["event"] in kinds]

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.started)

    def send(self, number: signal.Signals, rank: int | None) -> str:
        """Send a signal to one process or (None) to all; return to whom.

        `unmask launch` forwards stop requests. SIGKILL ends the launcher too. Loader workers get no signal.
        """
        if rank is None and self.launcher != "direct" and (number == signal.SIGKILL or self.launcher == "launch"):
            self.started[0].send_signal(number)
        if rank is not None or self.launcher != "launch" or number == signal.SIGKILL:
            for each, pid in self.ranks().items():
                if rank in (None, each):
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
        return "all" if rank is None else f"rank {rank}"

    def wait(self, seconds: float, *, launcher: bool = True) -> float:
        """Wait until no process is left, and return the seconds. launcher: whether it must end too. Raises Failed."""
        began, ignored = time.monotonic(), [] if launcher else [self.started[0].pid]
        while True:
            left = [process for process in self.processes() if process.pid not in ignored]
            if not left and (self.ended() or not launcher):
                return time.monotonic() - began
            if time.monotonic() - began > seconds:
                raise Failed(f"still running after {seconds:g} s: {left}\n{self.output()}")
            time.sleep(0.1)

    def codes(self) -> list[int]:
        return [process.wait() for process in self.started]

    def output(self) -> str:
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("output-*.txt")))

    def kill(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        for process in self.started:
            process.wait()


@contextmanager
def running(folder: Path, size: int, launcher: str, words: list[str], **slow: float) -> Iterator[Group]:
    """Context manager that starts a command in several processes; whatever is left of it at the end is killed."""
    group = Group(folder, size, launcher, f"{folder}-{time.monotonic_ns()}")
    try:
        group.start(words, slow)
        yield group
    finally:
        group.kill()


@dataclass(frozen=True)
class Moment:
    """When a drill strikes: `seconds` after the event number `count` of this kind.

    The events are the step with that number, the beginning of that picture, or a file of a checkpoint.
    """

    kind: str
    count: int = 0
    seconds: float = 0.0

    @classmethod
    def drawn(cls, kind: str, draw: random.Random) -> Moment:
        last, seconds = {STARTING: (1, 8), TRAINING: (STEPS - 3, 0.05), PICTURE: (4, 1), SAVE: (12, 0.5)}[kind]
        return cls(kind, draw.randrange(last), draw.uniform(0, seconds))

    def __str__(self) -> str:
        return f"{self.kind} {self.count} + {self.seconds:.2f} s"

    def slow(self, *, writes: float) -> dict[str, float]:
        """Return the seconds that are added so that the moment does not pass too early."""
        return {
            "step": 0.02, "write": writes if self.kind == SAVE else 0.0,
            "picture": 60.0 if self.kind == PICTURE else 0.0, "first": self.count,
        }  # fmt: skip

    def wait(self, group: Group, *, connected: bool = False) -> None:
        """Wait until this moment. connected: at least until the processes know of one another. Raises Failed."""
        if connected:
            until(group, lambda: len(group.events("connected")) == group.size)
        until(group, lambda: self._has_come(group))
        time.sleep(self.seconds)

    def _has_come(self, group: Group) -> bool:
        if self.kind == STARTING:
            return len(group.ranks()) == group.size
        if self.kind == TRAINING:
            return any(row["step"] > self.count for row in group.events("step"))
        return len(group.events({PICTURE: "picture", SAVE: "write"}[self.kind])) > self.count


@dataclass
class Result:
    """What an undisturbed run has, and others must have too.

    rows: step and names of numbers of each row of metrics.jsonl. losses: by step. samples: by step and place.
    baselines: steps of the losses in evals/baselines.json.
    """

    rows: list[tuple[int, tuple[str, ...]]]
    losses: dict[int, float]
    samples: dict[tuple[int, int], list[Any]]
    baselines: list[int]
    files: set[str]


class Drills:
    """Drills that train on the same images. folder: has the images, and a folder for each drill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_images(folder / "images", IMAGES)
        self._whole: Result | None = None

    def words(self, run: Path, parallel: str, *settings: str) -> list[str]:
        values = small(
            f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", f"train.picture_every={PICTURES}",
            f"train.batch_size={BATCH}", f"train.parallel={parallel}", "data.cache_gib=0",
            "train.precision=fp32", "data.held_out=4", *settings,
        )  # fmt: skip
        return ["pretrain", str(self.folder / "images"), "--recipe", "mae_nano", "--out", str(run), "--resume", "auto",
                *values]  # fmt: skip

    def whole(self) -> Result:
        """Return the result of an undisturbed run in one process."""
        if self._whole is None:
            place = self.folder / "whole"
            group = self.finished(place, self.words(place / "run", "auto"), 1, "direct")
            self._whole = result(place / "run", group)
            require(len(self._whole.samples) == STEPS * BATCH, "the undisturbed run has recorded all samples")
        return self._whole

    def kill(
        self, name: str, *, victim: int | None, moment: Moment, sizes: tuple[int, int], launcher: str, parallel: str
    ) -> str:
        """Kill one process or all, continue in another number of processes, and compare. Raises Failed."""
        place = self.folder / name
        words = self.words(place / "run", parallel, f"data.workers={moment.count % 3}")
        group, did = self.killed(place / "killed", words, sizes[0], launcher, victim=victim, moment=moment)
        after = self.finished(place / "continued", words, sizes[1], launcher)
        return f"{did}; went on from {self.require_equal(place / 'run', group, after)} with {sizes[1]}"

    def stop(
        self, name: str, *, number: signal.Signals, target: int | None, moment: Moment, launcher: str, parallel: str
    ) -> str:
        """Stop one of two processes or both with a signal, continue, and compare. Raises Failed."""
        place = self.folder / name
        words = self.words(place / "run", parallel, "data.workers=2")
        group, did = self.stopped(place / "stopped", words, launcher, number=number, target=target, moment=moment)
        after = self.finished(place / "continued", words, 2, launcher)
        return f"{did}; went on from {self.require_equal(place / 'run', group, after)}"

    def killed(
        self, folder: Path, words: list[str], size: int, launcher: str, *, victim: int | None, moment: Moment
    ) -> tuple[Group, str]:
        """Start a command and kill one process or (None) all; return what ran and what happened. Raises Failed."""
        with running(folder, size, launcher, words, **moment.slow(writes=0.2)) as group:
            moment.wait(group, connected=victim is not None and launcher == "direct")
            chosen = group.send(signal.SIGKILL, victim)
            seconds = group.wait(DEAD_SECONDS)
            require(any(group.codes()), f"nobody has noticed the kill\n{group.output()}")
        return group, f"{moment}: killed {chosen} of {size}, ended after {seconds:.1f} s"

    def stopped(
        self, folder: Path, words: list[str], launcher: str, *, number: signal.Signals, target: int | None,
        moment: Moment,
    ) -> tuple[Group, str]:  # fmt: skip
        """Start a command in two processes and stop them; return what ran and what happened. Raises Failed."""
        with running(folder, 2, launcher, words, **moment.slow(writes=0.2)) as group:
            moment.wait(group, connected=target is not None)
            trained = {row["rank"] for row in group.events("training")}
            chosen = group.send(number, target)
            seconds = group.wait(STOP_SECONDS, launcher=launcher == "direct")
            group.wait(DEAD_SECONDS)
        did = f"{moment}: {number.name} to {chosen}, ended after {seconds:.1f} s"
        if len(trained) == group.size:  # the training loop begins or has begun in all
            did += f" at step {self.require_stopped(Path(words[words.index('--out') + 1]), group)}"
        return group, did

    def finished(self, folder: Path, words: list[str], size: int, launcher: str) -> Group:
        """Run a command to its end. Raises Failed."""
        with running(folder, size, launcher, words) as group:
            group.wait(LIMIT)
            require(set(group.codes()) == {0}, group.output())
        return group

    def require_stopped(self, run: Path, group: Group) -> int:
        """Require exit code 75 everywhere, and a verified checkpoint of the step that all have reached; return it."""
        from unmask.engine import checkpoint
        from unmask.run import Run

        expected = [0 if group.launcher == "launch" else 75] * group.size  # what torchrun sees
        codes = [row["code"] for row in group.events("end")]
        require(codes == expected, f"exit codes {codes}\n{group.output()}")
        if group.launcher != "torchrun":
            require(set(group.codes()) == {75}, f"exit codes {group.codes()}\n{group.output()}")
        steps = dict.fromkeys(range(group.size), 0)
        for row in group.events("step"):
            steps[row["rank"]] = row["step"]
        status = Run.open(run).status()
        require(status.state == "stopped", status)
        require(set(steps.values()) == {status.step}, f"steps {steps} of the processes, {status.step} in status.json")
        newest = checkpoint.newest_step(Run.open(run))
        require((newest or 0) == status.step, f"the newest checkpoint is {newest}; stopped at {status.step}")
        require(newest is None or checkpoint.is_complete(Run.open(run), newest), f"checkpoint {newest} is not intact")
        require(group.output().count("continue with") == 1, f"one process prints\n{group.output()}")
        return status.step

    def require_equal(self, run: Path, *groups: Group) -> str:
        """Require that a run equals an undisturbed one; return from where its last part went on.

        groups: what has trained it, one after another.
        """
        whole, found = self.whole(), result(run, *groups)
        rows, expected = Counter(found.rows), Counter(whole.rows)
        require(rows == expected, f"rows of metrics.jsonl too many: {rows - expected}, missing: {expected - rows}")
        require(found.rows == whole.rows, "the order of the rows of metrics.jsonl")
        for step, loss in whole.losses.items():
            require(abs(found.losses[step] - loss) <= CLOSE * abs(loss), f"step {step}: {found.losses[step]}, {loss}")
        require(found.samples == whole.samples, "the samples of all steps")
        require(found.baselines == whole.baselines, f"pictures of steps {found.baselines}; not {whole.baselines}")
        require(found.files == whole.files, f"files {sorted(found.files)}; expected {sorted(whole.files)}")
        saved: set[tuple[int, str]] = set()
        for group in groups:
            restored = {(row["step"], row["state"]) for row in group.events("restored")}
            require(restored <= saved and len(restored) <= 1, f"the state restored, {restored}, is none of {saved}")
            saved |= {(row["step"], row["state"]) for row in group.events("saved")}
        return f"step {next(iter(restored))[0]}" if restored else "the start"


def result(run: Path, *groups: Group) -> Result:
    """Return what a run has, from its files and from the record of all processes."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    samples: dict[tuple[int, int], list[Any]] = {}
    for group in groups:
        for row in group.events("samples"):
            for place, *sample in row["samples"]:
                before = samples.setdefault((row["step"], place), sample)
                require(before == sample, f"step {row['step']}, place {place}: {before} before, then {sample}")
    left = [path.relative_to(run).as_posix() for pattern in LEFTOVERS for path in run.rglob(pattern)]
    require(not left, f"files are left: {left}")
    own = {path.name for path in run.iterdir()} - {"faults.jsonl"}
    return Result(
        rows=[(row["step"], tuple(sorted(row))) for row in rows],
        losses={row["step"]: row["loss"] for row in rows if "loss" in row},
        samples=samples,
        baselines=[step for step, _ in json.loads((run / "evals/baselines.json").read_bytes())["losses"]],
        files={name for name in own if not name.startswith("faults-rank-")} | {
            path.name for folder in ("checkpoints", "pictures") for path in (run / folder).iterdir()
        },
    )  # fmt: skip


def until(group: Group, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        require(not group.ended(), f"ended too early: {group.codes()}\n{group.output()}" if group.ended() else "")
        require(time.monotonic() < end, f"the moment has not come\n{group.output()}")
        time.sleep(0.02)


def planned(kind: str, number: int, draw: random.Random) -> dict[str, Any]:
    """Return the arguments of a drill. number: of the drill among those of its kind; sizes and engines alternate."""
    chosen = {"parallel": ("ddp", "fsdp")[number % 2], "launcher": LAUNCHERS[number // 2 % 3]}
    if kind == "stop":
        when = (STARTING, TRAINING, PICTURE, SAVE, TRAINING)[number % 5]
        signals = (signal.SIGTERM, signal.SIGUSR1)[number // 2 % 2]
        return {"number": signals, "target": draw.choice((None, 0, 1)), "moment": Moment.drawn(when, draw), **chosen}
    sizes = SIZES[number % 3]
    when = SAVE if kind == "save" else draw.choice((STARTING, TRAINING, TRAINING, TRAINING))
    one, everyone = draw.randrange(sizes[0]), {"one": False, "all": True, "save": draw.random() < 0.5}[kind]
    return {"victim": None if everyone else one, "moment": Moment.drawn(when, draw), "sizes": sizes, **chosen}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="drills of each kind (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, victims and signals (0)")
    parser.add_argument("--only", choices=KINDS, action="append", help="kind of drills; may be repeated (all kinds)")
    parser.add_argument("--first", type=int, default=0, help="number of the first drill of each kind (0)")
    parser.add_argument("--keep", type=Path, help="new folder that keeps all runs (a temporary folder)")
    asked = parser.parse_args()
    failed, count, began = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-drills-") as temporary:
        folder = (asked.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        drills = Drills(folder)
        for number in range(asked.first, asked.first + asked.rounds):
            for kind in asked.only or KINDS:
                name, draw = f"{kind}-{number}", random.Random(f"{asked.seed} {kind} {number}")
                chosen = planned(kind, number, draw)
                about = f"{name} ({chosen['parallel']}, {chosen['launcher']})"
                start = time.monotonic()
                try:
                    did = (drills.stop if kind == "stop" else drills.kill)(name, **chosen)
                    print(f"ok      {about}: {did} [{time.monotonic() - start:.0f} s]", flush=True)
                except Failed as error:
                    failed += 1
                    print(f"FAILED  {about}: {error}", flush=True)
                count += 1
    minutes = (time.monotonic() - began) / 60
    print(f"{count - failed} of {count} drills met all requirements, in {minutes:.0f} min; seed {asked.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
