"""`unmask demo`: the whole way on the two embedded image sets, with no data and no network.

Pre-trains on `shapes` without their labels, draws, probes with labels beside two controls, does the same on the real
`digits`, and writes one report. Everything goes through the same functions as a run on somebody's own images.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from unmask.console import Console, duration
from unmask.probing import probe_run
from unmask.report import write_report
from unmask.run import Run, free_path
from unmask.start import pretrain

SHAPES_SECONDS = 155.0  # what is left of four minutes after drawing, probing and the digits
SHAPES_LABELS = "shapes:4000"


def run_demo(out: Path | None, console: Console, *, steps: int | None = None) -> dict[str, Any]:
    """Run the demo into `out` (made up when None) and return its summary. `steps` instead of a time budget."""
    began = time.monotonic()
    out = out if out is not None else free_path(Path("demo-run"))
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
        (shapes, "shapes", SHAPES_LABELS, "shapes-test"),
        (digits, "digits", "digits", "digits-test"),
    ):
        for kind in ("linear", "knn"):
            probes[f"{name}-{kind}"] = probe_run(
                run.path, data, test=test, kind=kind, shots=None, controls=True, seed=0, step=None, device="auto",
                console=console,
            )  # fmt: skip
    report = write_report(out)
    console.say(f"done in {duration(time.monotonic() - began)}; open {report}")
    return {"run": str(out), "report": str(report), "state": "finished", "probes": probes}


def _stopped(run: Run, console: Console) -> dict[str, Any] | None:
    """The summary of a demo that was asked to stop; None when the run is finished."""
    status = run.status()
    if status["state"] != "stopped":
        return None
    console.say(
        f"stopped at step {status['step']}; this run goes on with: unmask resume {run.path}; the demo as a whole "
        "starts again with: unmask demo"
    )
    return {"run": str(run.path), "state": "stopped", "step": status["step"]}
