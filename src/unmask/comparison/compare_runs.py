"""`unmask compare`: compare several runs on one page and in one JSON file.

The page shows the settings and cost of each run, and the results of probes that all runs have: same images, split, kind
of probe, labels per class and seed. Probes that only some of the runs have are listed, but not compared. If `data` is
given, runs without the requested probe are probed; otherwise run folders are only read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from unmask.comparison.probe_wanted import ProbeWanted
from unmask.comparison.run_facts import RunFacts, caveat, differences, run_facts
from unmask.comparison.shared_probes import SharedProbe, latest_probes, not_shared, shared_probes
from unmask.console import Console
from unmask.data.annotations.splits import HELD_OUT
from unmask.engine import checkpoint
from unmask.errors import UserError
from unmask.evals.probe_options import ProbeOptions
from unmask.evals.run_probe import run_probe
from unmask.report.page import png_url, render
from unmask.results import CLASSES, UNLABELLED, ImageSet, ProbeResult, TestIdentity, read_results
from unmask.run import Run
from unmask.system.atomic_files import replace_file

LOSSES = (
    "Losses with different targets, masks or normalisations are not comparable, and a lower loss does not mean a "
    "better encoder."
)


@dataclass(frozen=True)
class Comparison:
    """The content of the comparison page and its JSON file.

    not_comparable: sentences about probes that only some runs have, differences between the runs, and damaged results.
    """

    runs: tuple[RunFacts, ...]
    probes: tuple[SharedProbe, ...]
    not_comparable: tuple[str, ...]
    note: str
    written: str

    def to_json(self) -> dict[str, Any]:
        return TypeAdapter(Comparison).dump_python(self, mode="json")


def is_measured(wanted: ProbeWanted, probes: Sequence[ProbeResult], data: str, step: int | None) -> bool:
    """Return whether one of these results is the wanted probe, measured on the checkpoint of this step."""
    test, task = TestIdentity(held_out=HELD_OUT, seed=0), CLASSES
    if wanted.is_label_free:
        test, task = TestIdentity(images=ImageSet(name=data)), UNLABELLED
    elif wanted.test is not None:
        test = TestIdentity(images=ImageSet(name=wanted.test))
    return any(
        (probe.kind, probe.shots, probe.seed, probe.step) == (wanted.kind, wanted.shots, 0, step)
        and (probe.layer, probe.mask_votes, probe.targets, probe.task) == (None, None, None, task)
        and probe.data.matches(ImageSet(name=data))
        and probe.test.matches(test)
        for probe in probes
    )


def compare(
    runs: Sequence[str | Path],
    wanted: ProbeWanted | None = None,
    *,
    out: str | Path = "comparison.html",
    console: Console | None = None,
) -> Comparison:
    """Compare runs, and write the page to `out` and a JSON file beside it.

    wanted: a probe; runs that lack it are probed first. Raises UserError for fewer than two runs, a run given twice, a
    folder that is not a run, or an `out` that cannot be written.
    """
    console, wanted, out = console or Console(), wanted or ProbeWanted(), Path(out)
    require_page(out)
    wanted.check()
    opened = open_runs(runs)
    if wanted.data is not None:
        add_missing_probes(opened.values(), wanted, wanted.data, console)
    comparison = compare_folders(opened)
    pictures = {name: url for name, run in opened.items() if (url := last_picture(run)) is not None}
    replace_file(out.with_suffix(".json"), json.dumps(comparison.to_json(), indent=2).encode("ascii") + b"\n")
    replace_file(out, render("compare.html.jinja", comparison=comparison, pictures=pictures))
    for probe in comparison.probes:
        console.print(f"{probe.title}: {probe.sentence}")
    for line in comparison.not_comparable:
        console.print(f"not comparable: {line}")
    console.print(f"comparison: {out}")
    return comparison


def compare_folders(runs: Mapping[str, Run]) -> Comparison:
    """Compare runs from the content of their folders. runs: the runs by their names on the page."""
    results = {name: read_results(run) for name, run in runs.items()}
    probes = {name: latest_probes(each) for name, each in results.items()}
    facts = tuple(run_facts(name, run) for name, run in runs.items())
    differing = differences(facts)
    damaged = [fault for each in results.values() for fault in each.damaged]
    return Comparison(
        runs=facts,
        probes=tuple(shared_probes(probes, caveat(differing))),
        not_comparable=(*not_shared(probes), *differing.values(), *damaged),
        note=LOSSES,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def add_missing_probes(runs: Iterable[Run], wanted: ProbeWanted, data: str, console: Console) -> None:
    """Measure the wanted probe for every run whose newest checkpoint lacks it."""
    for run in runs:
        if not is_measured(wanted, read_results(run).probes, data, checkpoint.newest_step(run)):
            options = ProbeOptions(data=data, test=wanted.test, shots=wanted.shots, device=wanted.device)
            run_probe(run.path, wanted.kind, options, console)


def require_page(out: Path) -> None:
    """Raise UserError unless `out` is an .html file in an existing folder."""
    if out.suffix != ".html":
        raise UserError(f"got output file {out}; expected a name that ends in .html; change --out")
    if not out.resolve().parent.is_dir():
        raise UserError(f"the folder {out.resolve().parent} does not exist; create it, or choose another --out")


def open_runs(runs: Sequence[str | Path]) -> dict[str, Run]:
    """Open the runs; the keys are their folder names, or whole paths if folder names are the same."""
    if len(runs) < 2:
        raise UserError(f"got {len(runs)} run; expected at least two: unmask compare RUN RUN ...")
    opened = [Run.open(run) for run in runs]
    places = [run.path.resolve() for run in opened]
    if twice := [str(run.path) for run, place in zip(opened, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"got {twice[0]} twice; name every run once")
    names = [place.name for place in places]
    return {name if names.count(name) == 1 else str(run.path): run for name, run in zip(names, opened, strict=True)}


def last_picture(run: Run) -> str | None:
    """Return the newest picture of a run as a data URL, or None."""
    files = sorted(run.pictures.glob("step-*.png"))
    return png_url(files[-1]) if files else None
