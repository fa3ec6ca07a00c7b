"""Check and predict images in one of several processes: divided_group.py FOLDER, started by test_divided_work.py.

The results of each rank go to FOLDER/N-processes/rank-R.json, with the number of reads of each file.
"""

import io
import json
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from unmask import commands
from unmask.data.scan import scan_cache
from unmask.data.sources.image_files import FilesSource
from unmask.engine import check_data, divided_scan
from unmask.engine.measure import Timing
from unmask.engine.world import joined

FOLDER = Path(sys.argv[1])
CHECK = {
    "all": ["images"],
    "workers": ["images", "--workers", "1"],
    "sample": ["images", "--sample", "10"],
    "mostly bad": ["bad"],
    "pages": ["pages", "--set", "data.pages=samples"],
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
    err = re.sub(r"checked in [^:]*:", "checked in TIME:", err.getvalue())
    return {"code": code, "out": out.getvalue(), "err": err, "reads": Counter(log.read_text().splitlines())}


def check(place: Path, name: str, arguments: list[str]) -> dict:
    """Check images; the scan cache goes to a folder of its own."""
    os.environ["UNMASK_CACHE"] = str(place / name / "cache")
    result = called(place, name, "check", *arguments, "--json")
    os.environ["UNMASK_CACHE"] = "off"
    return result


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
            with patch.object(divided_scan, "share", lambda rows, _: rows):
                found["control"] = check(place, "control", CHECK["all"])
        (place / f"rank-{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
