"""One of several processes that run `unmask` commands together, with faults: `command_group.py COMMANDS FOLDER`.

COMMANDS is a JSON list of `Command`. FOLDER/NAME gets what each process has seen: samples-RANK.jsonl, the samples of
each micro-batch; boxes-RANK-PID.jsonl, the crops of each process that loads images; steps-RANK.jsonl, the digest of the
weights after each step; code-RANK, the exit code.
"""

import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

SMALL_FILE = 40_000  # bytes; larger than messages, smaller than checkpoints
CHANGED = b"this is not an image any more"


@dataclass(frozen=True)
class Command:
    """A command and the faults of rank `rank`, or of all processes for those that say so.

    words: the command line after `unmask`. instead: the one of the process, if it differs. change: an image that is
    replaced in all processes after the scan, and restored after the command. stop_after: step after which the process
    gets SIGUSR1. not_finite: steps in which its loss is NaN, once each. full_disk: steps [first, last] in which it can
    write small files only. same_stream: whether all processes train on the images of rank 0. versions: what the process
    reports. folder: its current directory.
    """

    name: str
    words: list[str]
    rank: int = 1
    change: str | None = None
    stop_after: int | None = None
    not_finite: tuple[int, ...] = ()
    full_disk: tuple[int, int] | None = None
    same_stream: bool = False
    versions: str | None = None
    folder: str | None = None
    instead: tuple[str, ...] = ()


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a row in one call, because the process may be killed at any time."""
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")


def digest(*tensors) -> str:
    """Return the SHA-256 of the bytes of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


@contextmanager
def recorded(folder: Path, command: Command, here: bool) -> Iterator[None]:
    """Context manager that records what each loss is computed of; `here` adds the NaN of `command`."""
    from unmask.data.image_reader import ImageReader
    from unmask.engine import stream
    from unmask.engine.sharding import Distributed
    from unmask.nn import masks

    rank, hidden, done = os.environ["RANK"], [], set()
    plain_loss, plain_boxes, plain_mask = Distributed.loss, ImageReader._boxes, masks.mask_from_noise
    plain_batches = stream.training_batches

    def mask_from_noise(noise, ratio):
        hidden.append(plain_mask(noise, ratio))
        return hidden[-1]

    def boxes(self, sizes, index, epoch):
        found = plain_boxes(self, sizes, index, epoch)
        if self.training:
            crops = [[box.tobytes().hex(), bool(flip)] for box, flip in zip(*found, strict=True)]
            row = {"index": index.tolist(), "epoch": epoch.tolist(), "crops": crops}
            append(folder / f"boxes-{rank}-{os.getpid()}.jsonl", row)
        return found

    def loss(self, batch, clock):
        hidden.clear()
        found = plain_loss(self, batch, clock)
        row = {
            "step": clock.step + 1,
            "place": clock.places(len(batch)).tolist(),
            "index": batch.index.tolist(),
            "epoch": batch.epoch.tolist(),
            "mask": [digest(one) for one in hidden[-1].hidden()],
            "pixels": [digest(one) for one in batch.images],
        }
        append(folder / f"samples-{rank}.jsonl", row)
        bad = here and clock.step + 1 in command.not_finite and clock.step + 1 not in done
        if bad:
            done.add(clock.step + 1)
        return replace(found, value=found.value * float("nan")) if bad else found

    def batches(images, wanted, **kwargs):
        return plain_batches(images, replace(wanted, rank=0) if command.same_stream else wanted, **kwargs)

    with (
        patch.object(Distributed, "loss", loss),
        patch.object(ImageReader, "_boxes", boxes),
        patch.object(masks, "mask_from_noise", mask_from_noise),
        patch.object(stream, "training_batches", batches),
    ):
        yield


@contextmanager
def faulty(folder: Path, command: Command, here: bool) -> Iterator[None]:
    """Context manager with the faults of `command`; `here` is whether this process has them."""
    from unmask.engine import shared_run, world
    from unmask.engine.fault_points import FaultPoints, injected
    from unmask.nn.whole import whole

    steps = folder / f"steps-{os.environ['RANK']}.jsonl"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    first, last = command.full_disk or (0, 0)
    image = None if command.change is None else Path(command.change)
    before = None if image is None else image.read_bytes()
    found: dict[str, str] = {}

    def before_training(run):
        world.current().gather(None)  # another process may compare the images with those of the run
        if image is not None:
            write(image, CHANGED)

    def weights(job):
        return digest(*(whole(value) for value in job.method.state_dict().values()))

    def before_step(job, at):
        found["before"] = weights(job)
        if here and at.step + 1 == first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_FILE, unlimited[1]))
        if here and at.step + 1 > last:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    def after_step(job, step):
        append(steps, {"step": step.number, "consumed": step.consumed, **found, "after": weights(job)})
        if here and step.number == command.stop_after:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step

    points = FaultPoints(before_training=before_training, before_step=before_step, after_step=after_step)
    plain = world._versions()
    version = command.versions if here and command.versions else plain
    try:
        with (
            injected(points),
            patch.object(world, "_versions", lambda: version),
            patch.object(shared_run, "VISIBLE_SECONDS", 1.0),
        ):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        if image is not None and os.environ["RANK"] == "0":
            write(image, before)


def write(path: Path, content: bytes) -> None:
    """Replace a file at once, because other processes read it."""
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.write_bytes(content)
    made.replace(path)


def run(command: Command, folder: Path) -> int:
    from unmask import commands
    from unmask.engine import world

    rank = int(os.environ["RANK"])
    here = rank == command.rank
    folder = folder / command.name
    folder.mkdir(parents=True, exist_ok=True)
    sys.argv = ["unmask", *(command.instead if here and command.instead else command.words)]
    os.chdir(command.folder if here and command.folder else folder)
    with recorded(folder, command, here), faulty(folder, command, here):
        try:
            commands.main()
        except SystemExit as end:
            (folder / f"code-{rank}").write_text(str(end.code or 0))
            if end.code not in (None, 0, 75):  # the next command begins as if no command had failed
                world._pulse = None
            return int(end.code or 0)
    raise AssertionError("the command always exits")


def write_commands(file: Path, commands: list[Command]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(command) for command in commands]))
    return file


if __name__ == "__main__":
    file, seen = map(Path, sys.argv[1:])
    for each in json.loads(file.read_bytes()):
        code = run(Command(**each), seen)
        print(f"--- end of {each['name']}", flush=True)
    sys.exit(code)
