"""`unmask demo`: the whole way on the two embedded image sets, with no data and no network.

Pre-trains on `shapes` without their labels, draws, probes with labels beside two controls, does the same on the real
`digits`, and writes one report. Everything goes through the same functions as a run on somebody's own images.
"""

import time
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unmask.commands.declare import DONE, STOPPED, Option, Panel, Request, command
from unmask.console import Console, duration

if TYPE_CHECKING:
    from unmask.run import Run

SHAPES_SECONDS = 155.0  # what is left of four minutes after drawing, probing and the digits
SHAPES_LABELS, SHAPES_TEST = "shapes:4000", "shapes-test"
ENOUGH_STEPS = 3000  # what fits on two free cores; with a few hundred steps the features are near random ones


@dataclass(frozen=True)
class DemoRequest(Request):
    """No data needed: pre-train on drawn shapes, look, probe, report. About four minutes on two cores."""

    _: KW_ONLY
    out: Annotated[str | Path | None, Option("New run folder.", metavar="RUN", default="demo-run")] = None
    steps: Annotated[int | None, Option("Train for fewer steps, for a quick look; the features will be weaker.")] = None


@command(
    DemoRequest,
    panel=Panel.START,
    trains=True,
    exit_code=lambda summary: STOPPED if summary["state"] == "stopped" else DONE,
)
def demo(request: DemoRequest, console: Console) -> dict[str, Any]:
    """Return the run, its report, and what the probes measured."""
    from unmask.engine.pretrain import pretrain
    from unmask.evals.probe_options import ProbeOptions
    from unmask.evals.run_probe import run_probes
    from unmask.report.run_page import write_report
    from unmask.results import to_json
    from unmask.system.atomic_files import free_path

    steps, began = request.steps, time.monotonic()
    out = Path(request.out) if request.out is not None else free_path(Path("demo-run"))
    console.say("1 of 3: pre-training on drawn shapes, without their labels")
    shapes = pretrain(
        "shapes",
        recipe="demo_shapes",
        out=out,
        budget=SHAPES_SECONDS if steps is None else None,
        settings=[] if steps is None else [f"train.steps={steps}"],
        console=console,
    )
    if (stopped := _stopped(shapes, console)) is not None:
        return stopped
    console.say("2 of 3: the same on scikit-learn's handwritten digits")
    short = [f"train.steps={min(steps, 800)}"] if steps is not None else []
    digits = pretrain("digits", recipe="demo_digits", out=out / "digits", settings=short, console=console)
    if (stopped := _stopped(digits, console)) is not None:
        return stopped
    console.say("3 of 3: probing with labels, beside raw pixels and the untrained encoder")
    probes = {}
    for run, name, data, test in (
        (shapes, "shapes", SHAPES_LABELS, SHAPES_TEST),
        (digits, "digits", "digits", "digits-test"),
    ):
        options = ProbeOptions(data=data, test=test, controls=True)
        for kind, result in run_probes(run.path, ("linear", "knn"), options, console).items():
            probes[f"{name}-{kind}"] = to_json(result)
    report = write_report(out)
    if steps is None and (done := shapes.status().step) < ENOUGH_STEPS:
        console.warn(
            f"only {done} steps fitted into the time on this machine, and these results are weak for that reason: "
            f"{ENOUGH_STEPS} steps are enough to see pre-training help on shapes. Go on with: unmask set {out} "
            f"train.steps={ENOUGH_STEPS}; unmask resume {out}; unmask probe {out} {SHAPES_LABELS} --test {SHAPES_TEST} "
            "--kind linear --controls"
        )
    console.say(f"done in {duration(time.monotonic() - began)}; open {report}")
    return {"run": str(out), "report": str(report), "state": "finished", "probes": probes}


def _stopped(run: "Run", console: Console) -> dict[str, Any] | None:
    """Return the summary of a demo that was asked to stop; None when the run is finished."""
    status = run.status()
    if status.state != "stopped":
        return None
    console.say(
        f"stopped at step {status.step}; this run goes on with: unmask resume {run.path}; the demo as a whole "
        "starts again with: unmask demo"
    )
    return {"run": str(run.path), "state": "stopped", "step": status.step}
