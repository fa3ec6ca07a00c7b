"""Write `report.html`, a single file that shows the training of a run and the quality of its features.

Only the run folder is read, so reports can be written for runs that are training, were stopped, or were copied from
another machine. Loads no torch. A run inside the run folder (the demo's `digits`) becomes a section of the same page.
The layout is in `templates/report.html.jinja`.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from unmask.report.charts import BASELINES, loss_chart, tests_chart
from unmask.report.page import png_url, render
from unmask.report.probe_section import ProbeSection, probe_section
from unmask.report.training_log import Row, last_loss, trained_rows
from unmask.results import BaselineLosses, FinetuneResult, Results, read_results
from unmask.run import EDITS, PROVENANCE, Run, RunError
from unmask.run_status import RunStatus
from unmask.system.atomic_files import replace_file

MOST_PICTURES = 3
MOST_BAD_FILES = 50


@dataclass(frozen=True)
class Picture:
    """A picture of the page: caption, and PNG as a data URL."""

    caption: str
    url: str


@dataclass(frozen=True)
class FinetuneSection:
    """Contents of the page for supervised runs only: the score in words and per class, and a chart of tests."""

    sentence: str
    metric: str
    by_class: Mapping[str, float | None]
    chart: Markup | None


@dataclass(frozen=True)
class RunSection:
    """Contents of the page for one run. state: as in `unmask ls`. error: why the run failed. faults: messages about
    files that are not shown.
    """

    name: str
    folder: str
    recipe: str
    method: str
    source: str
    state: str
    error: str
    faults: Sequence[str]
    facts: Sequence[tuple[str, str]]
    finetuned: FinetuneSection | None
    probes: Sequence[ProbeSection]
    pictures: Sequence[Picture]
    loss_chart: Markup | None
    loss_note: str
    quarantine: Sequence[Mapping[str, Any]]
    quarantine_count: int
    skipped_steps: int
    reasons: Sequence[str]
    edits: Sequence[Mapping[str, Any]]
    config: str
    provenance: Mapping[str, Any]


def warn(text: str) -> None:
    """Print a warning to stderr in any encoding."""
    print(f"warning: {text}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


def write_report(path: str | Path, *, log: Callable[[str], object] = warn) -> Path:
    """Write `report.html` into the run and return its path. Raises RunError if the folder is not a run.

    log: function that prints a message for each damaged file; the page shows the message instead of the numbers.
    """
    run = Run.open(path)
    inner = [Run(folder.parent) for folder in sorted(run.path.glob("*/config.json"))]
    sections = [run_section(each) for each in (run, *inner)]
    for section in sections:
        for fault in section.faults:
            log(f"not shown: {fault}")
    replace_file(run.report_file, render("report.html.jinja", runs=sections, written=time.strftime("%Y-%m-%d %H:%M")))
    return run.report_file


def run_section(run: Run) -> RunSection:
    """Read the contents of the page for one run."""
    config, plan = run.read("config.json"), run.read_if_present("plan.json")
    results = read_results(run)
    faults = list(results.damaged)
    provenance = _or_fault(lambda: run.read_if_present(PROVENANCE), {}, faults)
    metrics, quarantine = (_or_fault(read, [], faults) for read in (run.metrics, run.quarantine))
    trained, status = trained_rows(metrics), run.status()
    return RunSection(
        name=run.path.resolve().name,
        folder=shlex.quote(str(run.path)),
        recipe=config.get("recipe", ""),
        method=config.get("method", {}).get("name", ""),
        source=_source(config.get("data", {}).get("source", "")),
        state=status.shown_state,
        error=status.error or "",
        faults=faults,
        facts=_facts(plan, status, trained),
        finetuned=finetune_section(results.finetuned, metrics),
        probes=probe_sections(results),
        pictures=_pictures(run),
        loss_chart=loss_chart(trained, results.baselines) if len(trained) > 1 else None,
        loss_note=loss_note(trained, results.baselines),
        quarantine=quarantine[:MOST_BAD_FILES],
        quarantine_count=len(quarantine),
        skipped_steps=sum("skipped" in row for row in metrics),
        reasons=plan.get("reasons", []),
        edits=provenance.get(EDITS, []),
        config=json.dumps(config, indent=2),
        provenance={key: value for key, value in provenance.items() if key != EDITS},
    )


def probe_sections(results: Results) -> list[ProbeSection]:
    """Return a section for every probe and label-budget curve, beginning with results on class labels."""
    records = [*results.probes, *results.curves]
    return [probe_section(record) for record in sorted(records, key=lambda record: record.targets is not None)]


def _source(source: str | Sequence[str]) -> str:
    return source if isinstance(source, str) else ", ".join(source)


T = TypeVar("T")


def _or_fault(read: Callable[[], T], otherwise: T, faults: list[str]) -> T:
    """Return the result of `read`. If the file cannot be used, add the error to `faults` and return `otherwise`."""
    try:
        return read()
    except RunError as error:
        faults.append(str(error))
        return otherwise


def _facts(plan: Mapping[str, Any], status: RunStatus, trained: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (name, value) pairs for the head of the page."""
    facts = []
    if status.state:
        slow = ": the process is alive, but has finished no step for minutes" if status.health() == "slow" else ""
        facts.append(("state", f"{status.shown_state} at step {status.step:,} of {plan.get('steps', '?')}{slow}"))
    if plan:
        images = plan["images"]
        size = " x ".join(str(side) for side in images["size"])
        kind = f"{images['channels']} channels, {images['dtype']}"
        facts += [
            (
                "images",
                f"{plan['num_images']:,}, trained at {size} pixels, {kind}",
            ),
            ("encoder", f"{plan['encoder_parameters'] / 1e6:.2f} M parameters"),
            (
                "training",
                f"batch {plan['batch_size']}, {plan['epochs']:.1f} epochs, {plan['precision']} on {plan['device']}",
            ),
        ]
    if trained:
        speed = statistics.median(row.get("images_per_second", 0.0) for row in trained)
        wait = statistics.median(row.get("data_wait", 0.0) for row in trained)
        facts.append(("speed", f"{speed:,.0f} images/s, {wait:.0%} of the time waiting for data (medians)"))
    return facts


def _pictures(run: Run) -> list[Picture]:
    """Return the first picture, the picture nearest to the middle of training, and the last picture."""
    files = sorted(run.pictures.glob("step-*.png"))
    steps = [int(file.stem.removeprefix("step-")) for file in files if file.stem.removeprefix("step-").isdigit()]
    if len(files) != len(steps):
        raise RunError(f"got pictures in {run.pictures} that are not named step-NUMBER.png; move them elsewhere")
    if len(files) > MOST_PICTURES:
        middle = min(range(1, len(files) - 1), key=lambda i: abs(steps[i] - steps[-1] / 2))
        files, steps = [files[0], files[middle], files[-1]], [steps[0], steps[middle], steps[-1]]
    return [
        Picture("before training" if step == 0 else f"after {step:,} steps", png_url(file))
        for file, step in zip(files, steps, strict=True)
    ]


def finetune_section(result: FinetuneResult | None, metrics: Sequence[Row]) -> FinetuneSection | None:
    """Describe the test result of a supervised run, or return None if the run has not been tested."""
    if result is None:
        return None
    name = result.metric_words[result.metric]
    text = f"{name} {100 * result.value:.1f}% on {result.test_images:,} test images"
    if result.low is not None and result.high is not None:
        text += f" (95% interval {100 * result.low:.1f} to {100 * result.high:.1f}%)"
    text += f", with the weights of the last step. Trained on {result.train_images:,} images."
    if result.averaged is not None:
        text += f" With the moving average of the weights: {100 * result.averaged:.1f}%."
    if result.best is not None and result.best.step != result.step:
        text += (
            f" The best test during training was {100 * result.best.value:.1f}% at step {result.best.step:,}; it was "
            "chosen on the test images, so it is optimistic."
        )
    tested = [row for row in metrics if any(key.startswith("test_") for key in row)]
    return FinetuneSection(text, name, result.by_class, tests_chart(tested, result.metric))


def loss_note(trained: Sequence[Row], baselines: BaselineLosses | None) -> str:
    """Describe the final loss, and compare the loss on fixed images with the baselines on the same images."""
    if not trained:
        return "No step has been logged yet."
    text = f"Final training loss {last_loss(trained):.3f} (mean of the last 5 % of the logged steps)."
    if baselines is None:
        return text
    step, loss = baselines.losses[-1]
    text += (
        f" Dots: loss on the {baselines.images} fixed images of the baselines, without augmentation; "
        f"{loss:.3f} at step {step:,}."
    )
    if baselines.held_out_losses:
        last_step, held_out = baselines.held_out_losses[-1]
        text += f" Squares: loss on {baselines.held_out_images} held-out images; {held_out:.3f} at step {last_step:,}."
    named = {f"{BASELINES.get(name, name)} ({value:.3f})": value for name, value in baselines.guesses.items()}
    better = ", ".join(name for name, value in named.items() if loss < value)
    worse = ", ".join(name for name, value in named.items() if loss >= value)
    return text + (f" Better than: {better}." if better else "") + (f" Not better than: {worse}." if worse else "")
