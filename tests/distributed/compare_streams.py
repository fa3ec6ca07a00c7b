"""Runs of the same settings with different numbers of processes and loader workers, and comparisons of their samples.

As a script: 200 steps with 1, 2 and 4 processes and 0 to 3 workers, and a run that continues with 4, 1 and 2 processes.

    PYTHONPATH=src:tests python tests/distributed/compare_streams.py NEW_FOLDER
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

from command_group import Command, write_commands
from conftest import small, write_images
from group import outputs, start, wait

SCRIPT = Path(__file__).with_name("command_group.py")
IMAGES, BATCH, MICRO = 30, 8, 4
UNREADABLE = 7  # the image that changes after the scan


class Streams:
    """Runs of the same settings with different numbers of processes and loader workers. steps: length of each run."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.images = write_images(folder / "images", IMAGES)

    def command(self, name: str, workers: int, **faults) -> Command:
        settings = small(
            f"train.steps={self.steps}", f"train.batch_size={BATCH}", f"train.micro_batch={MICRO}",
            f"data.workers={workers}", "data.cache_gib=0",
        )  # fmt: skip
        words = ["pretrain", str(self.images), "--recipe", "mae_nano", "--out", str(self.folder / "runs" / name)]
        change = str(self.images / f"{UNREADABLE:04d}.png")
        return Command(name, [*words, "--resume", "auto", *settings], change=change, **faults)

    def run(self, size: int, *commands: Command, seconds: float = 200) -> None:
        """Run commands one after another in `size` processes."""
        folder = self.folder / f"{size}-{commands[0].name}"
        file = write_commands(folder / "commands.json", list(commands))
        (self.folder / "seen").mkdir(exist_ok=True)
        started = start(size, [sys.executable, str(SCRIPT), str(file), str(self.folder / "seen")], folder)
        codes = wait(started, seconds)
        assert codes == [75 if commands[-1].stop_after else 0] * size, outputs(folder)

    def samples(self, name: str) -> dict[int, list[dict]]:
        """Return the samples of each step, by place in the batch, as all processes together have used them."""
        folder, found, crops = self.folder / "seen" / name, {}, {}
        for row in rows(folder, "boxes"):
            for index, epoch, crop in zip(row["index"], row["epoch"], row["crops"], strict=True):
                assert crops.setdefault((index, epoch), crop) == crop, "the crop of a sample depends on the process"
        for row in rows(folder, "samples"):
            for sample in zip(*(row[key] for key in ("place", "index", "epoch", "mask", "pixels")), strict=True):
                found.setdefault(row["step"], []).append((*sample, *crops[sample[1:3]]))
        for step, samples in found.items():
            samples.sort()
            assert [sample[0] for sample in samples] == list(range(BATCH)), f"the places of step {step}"
        return found

    def digests(self, name: str) -> list[str]:
        """Return the digest of (place, index, epoch, mask, pixels, box, flip) of the samples of each step."""
        samples = self.samples(name)
        assert sorted(samples) == list(range(1, self.steps + 1))
        return [hashlib.sha256(json.dumps(samples[step]).encode()).hexdigest() for step in sorted(samples)]

    def require_once(self, name: str) -> None:
        """Require that each complete epoch has each image once, and another one in place of the unreadable image."""
        order = [sample for _, samples in sorted(self.samples(name).items()) for sample in samples]
        for epoch in range(len(order) // IMAGES):
            part = order[epoch * IMAGES : (epoch + 1) * IMAGES]
            assert {sample[2] for sample in part} == {epoch}
            counts = Counter(sample[1] for sample in part)
            replaced = Counter({index: count - 1 for index, count in counts.items() if count > 1})
            assert counts.keys() == set(range(IMAGES)) - {UNREADABLE}, f"images of epoch {epoch} of {name}"
            assert replaced.total() == 1, f"images that occur again in epoch {epoch} of {name}: {replaced}"


def rows(folder: Path, kind: str) -> list[dict]:
    files = sorted(folder.glob(f"{kind}-*.jsonl"))
    assert files, f"{folder} has no {kind}"
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def main(folder: Path) -> None:
    made = Streams(folder, steps=200)
    for size, stop in ((4, 61), (1, 133), (2, None)):
        moved = made.command("moved", 1, rank=0, stop_after=stop)
        made.run(size, *(made.command(f"{size}-{workers}", workers) for workers in range(4)), moved, seconds=1200)
    expected = made.digests("1-0")
    assert len(set(expected)) == made.steps
    for name in ("moved", *(f"{size}-{workers}" for size in (1, 2, 4) for workers in range(4))):
        assert made.digests(name) == expected, name
        made.require_once(name)
        print(f"{name}: the digests of all {made.steps} steps are equal")
    print(hashlib.sha256("".join(expected).encode()).hexdigest())


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
