"""`unmask compare`: several Runs beside one another, as one page and one JSON file.

Shows what each is and costs, and those probes that all of them share: the same labelled images, split, kind, labels per
class and seed. Numbers that are not of one measurement are named and not set beside one another. Reads the Run folders;
only with `data` does it measure, those Runs that lack the probe.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.comparison.run_facts import about, caveat, differences
from unmask.comparison.shared_probes import SAME, damaged, not_shared, probes, shared
from unmask.console import Console
from unmask.engine import checkpoint
from unmask.errors import UserError
from unmask.evals.probe_kind import require_kind
from unmask.evals.probe_options import ProbeOptions
from unmask.evals.run_probe import run_probe
from unmask.report.page import page
from unmask.run import Run
from unmask.system.atomic_files import replace_file

LOSSES = (
    "Losses of different targets, masks or normalisations are not comparable, and a lower one is not a better encoder."
)


def compare(
    runs: Sequence[str | Path],
    *,
    data: str | None = None,
    test: str | None = None,
    kind: str = "linear",
    shots: int | None = None,
    out: str | Path = "comparison.html",
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Write `out` and the same as data beside it (.json), and return that.

    data: probe the Runs that lack this probe, on these labelled images, as `unmask probe` would. Raises ValueError for
    fewer than two Runs, one given twice, a folder that is no Run, or nowhere to write.
    """
    console = console or Console()
    out = Path(out)
    if out.suffix != ".html":
        raise UserError(f"output file {out} came; a name that ends in .html was expected")
    if not out.resolve().parent.is_dir():
        raise UserError(f"the folder {out.resolve().parent} does not exist; make it first, or choose another --out")
    if data is None and (test is not None or shots is not None):
        raise UserError("--test or --shots came without --data, so there is nothing to probe; give --data too")
    require_kind(kind)
    opened = open_runs(runs)
    if data is not None:
        want = dict(zip(SAME, (kind, data, test or f"a held-out fifth of {data}", shots, 0, None, None), strict=True))
        for run in opened.values():
            newest = checkpoint.newest_step(run)  # a probe from before more training measured another encoder
            if not any(
                probe["step"] == newest and all(probe[key] == value for key, value in want.items())
                for probe in probes(run)
            ):
                run_probe(run.path, kind, ProbeOptions(data=data, test=test, shots=shots, device=device), console)
    found = {name: probes(run) for name, run in opened.items()}
    rows = [about(name, run) for name, run in opened.items()]
    differing = differences(rows)
    summary = {
        "runs": rows,
        "probes": [probe | {"sentence": probe["sentence"] + caveat(differing)} for probe in shared(found)],
        "not_comparable": [*not_shared(found), *differing.values(), *damaged(opened.values())],
        "note": LOSSES,
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    pictures = {name: url for name, run in opened.items() if (url := last_picture(run)) is not None}
    replace_file(out.with_suffix(".json"), json.dumps(summary, indent=2).encode("ascii") + b"\n")
    replace_file(out, page("compare.html.jinja", **summary, pictures=pictures))
    for probe in summary["probes"]:
        console.say(f"{probe['title']}: {probe['sentence']}")
    for line in summary["not_comparable"]:
        console.say(f"not comparable: {line}")
    console.say(f"comparison: {out}")
    return summary


def open_runs(runs: Sequence[str | Path]) -> dict[str, Run]:
    """By the name each has on the page: of its folder, or the whole path where two have the same."""
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run came; at least two were expected: unmask compare RUN RUN ...")
    opened = [Run.open(run) for run in runs]
    places = [run.path.resolve() for run in opened]
    if twice := [str(run.path) for run, place in zip(opened, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"{twice[0]} came twice; name every run once")
    names = [place.name for place in places]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, opened, strict=True)}


def last_picture(run: Run) -> str | None:
    """The newest picture as a data URL."""
    files = sorted(run.pictures.glob("step-*.png"))
    return "data:image/png;base64," + base64.b64encode(files[-1].read_bytes()).decode("ascii") if files else None
