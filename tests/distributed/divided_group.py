"""Check and predict images in one of several processes: divided_group.py FOLDER [VERB RANK].

The results of each rank go to FOLDER/N-processes/rank-R.json, with the number of reads of each file. With VERB and
RANK, that rank fails while it checks or predicts.
"""

import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

from unmask import commands
from unmask.data.scan import scan_cache
from unmask.data.sources.image_files import FilesSource
from unmask.data.sources.open_source import open_source
from unmask.engine import check_data, divided_scan
from unmask.engine.measure import Timing
from unmask.engine.world import joined
from unmask.evals import images as evaluated
from unmask.finetuning.prediction_files import MaskFolder

FOLDER = Path(sys.argv[1])
CHECK = {
    "all": ["images"],
    "workers": ["images", "--workers", "1"],
    "sample": ["images", "--sample", "10"],
    "mostly bad": ["bad"],
    "pages": ["pages", "--set", "data.pages=samples"],
}
PREDICT = {
    "csv": ["classify", "images", "--out", "a.csv"],
    "json": ["classify", "images", "--out", "a.json"],
    "masks": ["segment", "images", "--out", "masks"],
    "boxes": ["detect", "images", "--out", "boxes.json"],
}


@contextmanager
def counted(log: Path):
    """Context manager that appends the path of each file that this process or its workers read to `log`."""
    read = FilesSource.read

    def counting(self, i):
        with log.open("a") as file:  # one short line, so that workers can append to the same file
            file.write(f"{self.names[i]}\n")
        return read(self, i)

    with patch.object(FilesSource, "read", counting):
        yield


def called(place: Path, name: str, *arguments: str) -> dict:
    """Call `unmask` and return its exit code and outputs, with times replaced, and how often each file was read."""
    out, err = io.StringIO(), io.StringIO()
    log = place / f"{name}-reads-{os.environ['RANK']}.txt"
    log.touch()
    with counted(log), redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", ["unmask", *arguments]):
        try:
            commands.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
    err = re.sub(r"checked in [^:]*:|\d+ (s|min \d+ s) left", "TIME", err.getvalue())
    return {"code": code, "out": out.getvalue(), "err": err, "reads": Counter(log.read_text().splitlines())}


def check(place: Path, name: str, arguments: list[str]) -> dict:
    """Check images; the scan cache goes to a folder of its own."""
    os.environ["UNMASK_CACHE"] = str(place / name / "cache")
    result = called(place, name, "check", *arguments, "--json")
    os.environ["UNMASK_CACHE"] = "off"
    return result


def rescan(place: Path) -> dict:
    """Scan the images of "check all" with the cache that it left, of which one file is no longer up to date.

    Only the writer has the cache, as on a host of its own.
    """
    name, log = "rescan", place / f"rescan-reads-{os.environ['RANK']}.txt"
    writes = os.environ["RANK"] == "0"
    if writes:
        shutil.copytree(place / "all/cache", place / name)
    os.environ["UNMASK_CACHE"] = str(place / name) if writes else "off"
    log.touch()
    source = open_source("images")
    source.changed[source.names.index("class0/0000.png")] -= 1
    with counted(log):
        found = divided_scan.scan_together(source)
    os.environ["UNMASK_CACHE"] = "off"
    facts = {key: str(value) for key, value in vars(found).items() if key != "seconds"}
    return {"scan": facts, "reads": Counter(log.read_text().splitlines())}


def predict(place: Path, name: str, arguments: list[str]) -> dict:
    """Predict images; the output goes to `place`."""
    run, images, option, out = arguments
    with chdir(place):
        result = called(place, name, "predict", f"../{run}", f"../{images}", option, out, "--device", "cpu", "--json")
    files = [place / out] if (place / out).is_file() else sorted(file for file in place.glob(f"{out}/**/*.*"))
    result["files"] = {str(file.relative_to(place)): sha256(file.read_bytes()).hexdigest() for file in files}
    return result


def fail(verb: str, rank: int) -> None:
    """Call a verb; one rank fails, the writer of predictions while it writes them, others while they read images.

    With the verb "differ", that rank checks other images than the others.
    """

    def failing(*_):
        raise RuntimeError("a fault for this test")

    os.chdir(FOLDER)
    fails = os.environ["RANK"] == str(rank)
    if verb == "differ":
        sys.argv = ["unmask", "check", "bad" if fails else "images"]
        commands.main()
        return
    where = (MaskFolder, "write") if verb == "predict" else (FilesSource, "read")
    how = patch.object(*where, failing) if fails else nullcontext()
    out = str(FOLDER / f"failed-{verb}")
    arguments = ["segment", "images", "--out", out, "--device", "cpu"] if verb == "predict" else ["images"]
    sys.argv = ["unmask", verb, *arguments]
    with how:
        commands.main()


def main() -> None:
    with joined() as world:
        place = FOLDER / f"{world.size}-processes"
        place.mkdir(exist_ok=True)
        os.chdir(FOLDER)
        found = {}
        with (
            patch.object(check_data, "time_steps", lambda *_, **__: [0.5] * 4),
            patch.object(check_data, "batch_seconds", lambda *_, **__: Timing(0.1, 0.1, 0.1)),
            patch.object(scan_cache, "WORTH_KEEPING", -1.0),
            patch.object(scan_cache, "COARSEST_CLOCK", -3600 * 10**9),
            patch("unmask.engine.make_plan.free_memory", lambda _: 1 << 30),
        ):
            for name, arguments in CHECK.items():
                found[f"check {name}"] = check(place, name, arguments)
                world.any(False)  # no process reads images of the next check before all have finished this one
            found["rescan"] = rescan(place)
            world.any(False)
            with patch.object(divided_scan, "share", lambda rows, _: rows):
                found["check control"] = check(place, "control", CHECK["all"])
        with patch.object(evaluated, "EVAL_BATCH", 4):
            for name, arguments in PREDICT.items():
                found[f"predict {name}"] = predict(place, name, arguments)
                world.any(False)
            with patch.object(evaluated, "own_rows", lambda rows, *_: rows):
                found["predict control"] = predict(place, "control", ["classify", "images", "--out", "control.csv"])
            world.any(False)
            found["predict nothing"] = predict(place, "nothing", ["classify", "broken", "--out", "nothing.csv"])
        (place / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    fail(sys.argv[2], int(sys.argv[3])) if sys.argv[2:] else main()
