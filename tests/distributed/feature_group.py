"""Embed and probe images in one of several processes: feature_group.py FOLDER, started by test_divided_features.py.

The outputs go to FOLDER/N-processes, and what each rank printed and read to rank-R.json in it. With a further argument,
a verb is called in which rank 1 fails: `embed`, which reads a broken disk there, or `probe`, whose table differs there.
"""

import json
import os
import shutil
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

from unmask import commands
from unmask.console import Console
from unmask.data.readable_images import ReadableImages
from unmask.data.scan import scan_cache
from unmask.engine.world import joined
from unmask.evals import images as images_module
from unmask.evals.embed_images import embed_images
from unmask.evals.probe_options import ProbeOptions
from unmask.evals.run_probe import run_probes

FOLDER = Path(sys.argv[1])
BATCH = 4


class RecordingConsole(Console):
    """A console that records its messages."""

    def __init__(self):
        super().__init__(quiet=True)
        self.messages = []

    def print(self, text=""):
        if not text.endswith(" s left"):  # progress, whose times differ
            self.messages.append(text)

    def warn(self, text):
        self.messages.append(f"warning: {text}")


@contextmanager
def counted(counts: Counter):
    """Context manager that counts how often this process reads each row."""
    read = ReadableImages.__getitem__

    def counting(self, taken):
        counts.update(taken.index.tolist())
        return read(self, taken)

    with patch.object(ReadableImages, "__getitem__", counting):
        yield


def embed(place: Path, name: str, **more) -> dict:
    counts, console = Counter(), RecordingConsole()
    with counted(counts):
        result = embed_images(
            place / "run", str(FOLDER / "data"), place / name, step=None, device="cpu", console=console, **more
        )
    messages = [line.replace(str(place), "PLACE") for line in console.messages]
    return {"counts": dict(counts), "messages": messages, "images": result.images}


def probe(place: Path, run: str, kinds: tuple[str, ...], **more) -> dict:
    console = RecordingConsole()
    options = ProbeOptions(data=str(FOLDER / more.pop("data", "data")), device="cpu", **more)
    with joined() as world:
        results = run_probes(place / run, kinds, options, world.console(console))
    return {"results": {name: repr(result) for name, result in results.items()}, "messages": console.messages}


def fail(verb: str) -> None:
    def failing(*_):
        raise RuntimeError("a fault for this test")

    os.chdir(FOLDER)
    rank = os.environ["RANK"]
    broken = verb == "embed" and rank == "1"
    more = ["--out", "failed.npz"] if verb == "embed" else ["--targets", f"targets-{rank}.csv"]
    sys.argv = ["unmask", verb, "run", "data", "--device", "cpu", *more]
    with (
        patch.object(images_module, "EVAL_BATCH", BATCH),
        patch.object(ReadableImages, "__getitem__", failing) if broken else nullcontext(),
    ):
        commands.main()


def main() -> None:
    with joined() as world:
        place = FOLDER / f"{world.size}-processes"
        if world.is_writer:
            for run in ("run", "pixels"):
                shutil.copytree(FOLDER / run, place / run)
        world.any(False)
        with (
            patch.object(images_module, "EVAL_BATCH", BATCH),
            patch.object(scan_cache, "WORTH_KEEPING", -1.0),
        ):
            found = {"npz": embed(place, "all.npz"), "parquet": embed(place, "all.parquet")}
            found["cached"] = embed(place, "cached.npz", exclude=("*broken*",))
            found["again"] = embed(place, "again.npz", exclude=("*broken*",))
            found["pooled"] = probe(place, "run", ("knn", "linear"), controls=True)
            found["tokens"] = probe(place, "run", ("attentive",), controls=True)
            found["curve"] = probe(place, "run", ("linear",), shots=(1, 3), label_draws=2)
            found["ranks"] = probe(place, "run", ("rankme",))
            found["layers"] = probe(place, "pixels", ("linear",), layer="best", mask_votes=2, against=(FOLDER / "run",))
            with patch.object(images_module, "own_rows", lambda rows, *_: rows):
                found["control"] = embed(place, "control.npz")
        (place / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    fail(sys.argv[2]) if sys.argv[2:] else main()
