"""`unmask demo`: pre-train, probe and report on generated images, without data or network.

Pre-trains on `shapes` without labels, draws reconstructions, probes the features with labels and two baselines, and
writes the report. The demo uses the same functions as a run on other images.
"""

import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unmask.commands.declare import DONE, STOPPED, Panel, Request, command
from unmask.console import Console, duration
from unmask.option import Option

if TYPE_CHECKING:
    from unmask.results import ProbeResult

SECONDS = 180.0  # time for pre-training; with the probes and the report, the demo takes four minutes
LABELLED, TEST = "shapes:4000", "shapes-test"
ENOUGH_STEPS = (
    3000  # fit into SECONDS on two free cores; after a few hundred, features are hardly better than random ones
)


@dataclass(frozen=True)
class DemoRequest(Request):
    """Pre-train on drawn shapes, probe the features and write a report, in about four minutes on two cores.

    The demo needs no data and no network.
    """

    _: KW_ONLY
    out: Annotated[str | Path | None, Option("New run folder.", metavar="RUN", default="demo-run")] = None
    steps: Annotated[
        int | None,
        Option("Number of training steps; a few hundred give weak features.", metavar="N", at_least=1),
    ] = None


@dataclass(frozen=True)
class DemoResult:
    """Result of the demo.

    Report, picture: paths, None if the demo was stopped. probes: {kind: result}, empty if it was stopped.
    """

    run: str
    state: str
    step: int
    report: str | None = None
    picture: str | None = None
    probes: "dict[str, ProbeResult]" = field(default_factory=dict)


def demo_json(result: DemoResult) -> dict[str, Any]:
    """Return the object that --json prints."""
    from unmask.results import to_json

    probes = {kind: to_json(probe) for kind, probe in result.probes.items()}
    return {**vars(result), "probes": probes}


@command(
    DemoRequest,
    panel=Panel.START,
    to_json=demo_json,
    exit_code=lambda result: STOPPED if result.state == "stopped" else DONE,
)
def demo(request: DemoRequest, console: Console) -> DemoResult:
    """Return the run, its report and the results of the probes."""
    from unmask.engine.pretraining import PretrainOptions, pretrain
    from unmask.evals.probe_options import ProbeOptions
    from unmask.evals.run_probe import run_probes
    from unmask.report.run_page import write_report
    from unmask.results import ProbeResult
    from unmask.system.atomic_files import free_path

    steps, began = request.steps, time.monotonic()
    out = Path(request.out) if request.out is not None else free_path(Path("demo-run"))
    console.print("1 of 2: pre-training on drawn shapes, without their labels")
    run = pretrain(
        "shapes",
        PretrainOptions(recipe="demo_shapes", settings=[] if steps is None else [f"train.steps={steps}"]),
        out=out,
        budget=SECONDS if steps is None else None,
        console=console,
    )
    status = run.status()
    if status.state == "stopped":
        console.print(
            f"stopped at step {status.step}; continue this run with: unmask resume {out}; start the whole demo "
            "again with: unmask demo"
        )
        return DemoResult(str(out), status.state, status.step)
    console.print("2 of 2: probing with labels, beside raw pixels and the untrained encoder")
    options = ProbeOptions(data=LABELLED, test=TEST, controls=True)
    found = run_probes(run.path, ("linear", "knn"), options, console)
    probes = {kind: result for kind, result in found.items() if isinstance(result, ProbeResult)}  # not curves
    report = write_report(out)
    picture = max(run.pictures.glob("step-*.png"), default=None)
    if steps is None and status.step < ENOUGH_STEPS:
        warn_of_few_steps(out, status.step, console)
    console.print(f"done in {duration(time.monotonic() - began)}")
    for line in closing_lines(probes["linear"], report, picture):
        console.print(line)
    return DemoResult(
        run=str(out),
        state=status.state,
        step=status.step,
        report=str(report),
        picture=None if picture is None else str(picture),
        probes=probes,
    )


def warn_of_few_steps(out: Path, done: int, console: Console) -> None:
    """Warn that the results are weak because few steps fitted into the time, and print how to train for longer."""
    console.warn(
        f"only {done} steps fitted into the time on this machine, and these results are weak for that reason: "
        f"{ENOUGH_STEPS} steps are enough to see pre-training help on shapes. Continue with: unmask set {out} "
        f"train.steps={ENOUGH_STEPS}; unmask resume {out}; unmask probe {out} {LABELLED} --test {TEST} "
        "--kind linear --controls"
    )


def closing_lines(linear: "ProbeResult", report: Path, picture: Path | None) -> Iterator[str]:
    """Yield the messages at the end: the result, the path of the picture, and the next command."""
    from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS

    rows = (linear.row(name) for name in (PRETRAINED, RANDOM_INIT, RAW_PIXELS))
    trained, untrained, pixels = ("not measured" if row is None else f"{row.value:.1%}" for row in rows)
    yield (
        f"result: a linear probe classifies {trained} of {TEST} with the pre-trained features, {untrained} with the "
        f"same encoder untrained, and {pixels} with raw pixels"
    )
    yield f"picture: {report}" if picture is None else f"picture: {picture}; all results: {report}"
    yield "next, on a folder of your own images: unmask pretrain PHOTOS --budget 30m"
