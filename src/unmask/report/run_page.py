"""`report.html`: what a Run did and what came of it, as one file that opens offline.

Reads the Run folder only, so it works on a run that still trains, was stopped, or came from another machine; and it
loads no torch. A run folder inside the Run (the demo's `digits`) becomes a section of the same page. What it shows is
laid out in `report.html.jinja`; this file gathers it. Nothing is computed here that is not in the folder.
"""

from __future__ import annotations

import base64
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.report.charts import IN_WORDS, budget_chart, loss_chart, tests_chart
from unmask.report.page import page
from unmask.report.probe_titles import probe_title
from unmask.run import EDITS, PROVENANCE, Run, RunError
from unmask.system.atomic_files import replace_file

MOST_PICTURES = 3
NAMED_BAD_FILES = 50
PROBES = ("probe-*", "attentive-*", "curve-*", "targets-*")  # files in evals, in the order of the page


def _to_stderr(text: str) -> None:
    print(f"warning: {text}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


@dataclass(frozen=True)
class Shown:
    """A picture on the page: its caption and the PNG as a data URL."""

    caption: str
    url: str


def write_report(path: str | Path, *, say: Callable[[str], object] = _to_stderr) -> Path:
    """Write `report.html` into the Run and return its path. Raises RunError when the folder is not a Run.

    say: is told of results whose files are damaged; the page names them in the place of their numbers.
    """
    run = Run.open(path)
    inner = [Run(folder.parent) for folder in sorted(run.path.glob("*/config.json"))]
    gathered = [gather(each) for each in (run, *inner)]
    for fault in [fault for each in gathered for fault in each["faults"]]:
        say(f"not shown: {fault}")
    replace_file(run.report_file, page("report.html.jinja", runs=gathered, written=time.strftime("%Y-%m-%d %H:%M")))
    return run.report_file


def gather(run: Run) -> dict[str, Any]:
    """Everything the page shows of one Run, as plain values."""
    config, plan = run.read("config.json"), _optional(run, "plan.json")
    results, faults = run.results(*PROBES, "fine-tuned", "baselines")  # linear before knn
    tuned_result, baselines = results.pop("fine-tuned", {}), _baselines(results.pop("baselines", {}))
    provenance, metrics, quarantine = (
        _or_fault(read, faults) for read in (lambda: _optional(run, PROVENANCE), run.metrics, run.quarantine)
    )
    trained = [row for row in metrics if row.get("loss") is not None]
    status = run.status()
    shown = status.to_json() | {"state": status.shown_state} if status.state else {}
    return {
        "name": run.path.resolve().name,
        "folder": shlex.quote(str(run.path)),
        "recipe": config.get("recipe", ""),
        "method": config.get("method", {}).get("name", ""),
        "source": _place(config.get("data", {}).get("source", "")),
        "plan": plan,
        "status": shown,
        "faults": faults,
        "edits": provenance.get(EDITS, []) if provenance else [],
        "facts": _facts(plan, shown, trained),
        "pictures": _pictures(run),
        "curve": loss_chart(trained, baselines) if len(trained) > 1 else None,
        "curve_note": curve_note(trained, baselines),
        "probes": [_probe(probe) for probe in results.values()],
        "tuned": tuned(tuned_result, metrics),
        "quarantine": quarantine[:NAMED_BAD_FILES],
        "quarantine_count": len(quarantine),
        "skipped_steps": sum("skipped" in row for row in metrics),
        "reasons": plan.get("reasons", []),
        "config": json.dumps(config, indent=2),
        "provenance": {key: value for key, value in (provenance or {}).items() if key != EDITS},
    }


def _place(source: str | list[str]) -> str:
    """`data.source` as one text: some runs have several."""
    return source if isinstance(source, str) else ", ".join(source)


def _optional(run: Run, name: str) -> dict[str, Any]:
    """A file of the Run that may not be there yet: {} then."""
    return run.read(name) if (run.path / name).exists() else {}


def _or_fault(read: Callable[[], Any], faults: list[str]) -> Any:
    """What `read` returns; [] where the file cannot be used, which is added to `faults`."""
    try:
        return read()
    except RunError as error:
        faults.append(str(error))
        return []


def _baselines(found: dict[str, Any]) -> dict[str, Any]:
    """Losses and trivial guesses on the fixed images; {} where there are none, or in the form of an early version."""
    return found if {"losses", "guesses", "images"} <= found.keys() else {}


def _probe(probe: dict[str, Any]) -> dict[str, Any]:
    title, metric = probe_title(probe), probe.get("metric", "accuracy")
    if "draws" in probe:
        return {**probe, "title": title, "chart": budget_chart(probe)}
    rows = [_row(row, metric) for row in probe.get("rows", [])]
    chance = f"chance, {_show(probe['chance'], metric)}" if metric != "R2" else "a constant guess, 0.000"
    return {
        "metric": metric, "task": "classes", "protocol": "", "columns": [], **probe, "rows": rows, "title": title,
        "best": max((row["shown"] for row in rows), default=0.0), "nothing": chance, "chart": None,
    }  # fmt: skip


def _row(row: dict[str, Any], metric: str) -> dict[str, Any]:
    """With what the page writes and draws of it; a bar cannot be shorter than nothing."""
    shown = row["accuracy"] if metric == "accuracy" else row["value"]
    bar = [min(1.0, max(0.0, value)) for value in (shown, row["low"], row["high"])]
    span = f"{_show(row['low'], metric)} to {_show(row['high'], metric)}"
    return {**row, "shown": shown, "text": _show(shown, metric), "span": span, "bar": bar}


def _show(value: float, metric: str) -> str:
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3f}"


def _facts(plan: dict[str, Any], status: dict[str, Any], trained: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(what, how much) pairs for the head of the page."""
    facts = []
    if status:
        facts.append(("state", f"{status.get('state')} at step {status.get('step')} of {plan.get('steps', '?')}"))
    if plan:
        images = plan["images"]
        size = " x ".join(str(side) for side in images["size"])
        facts += [
            ("images", f"{plan['num_images']:,} of {size} pixels, {images['channels']} channels, {images['dtype']}"),
            ("encoder", f"{plan['encoder_parameters'] / 1e6:.2f} M parameters"),
            (
                "training",
                f"batch {plan['batch_size']}, {plan['epochs']:.1f} epochs, {plan['precision']} on {plan['device']}",
            ),
        ]
    if trained:
        speed = statistics.median(row.get("images_per_second", 0.0) for row in trained)
        waited = statistics.median(row.get("data_wait", 0.0) for row in trained)
        facts.append(("speed", f"{speed:,.0f} images/s, {waited:.0%} of the time waiting on data (medians)"))
    return facts


def _pictures(run: Run) -> list[Shown]:
    """Before, during and after: the first picture, the one nearest to half way, and the last."""
    files = sorted(run.pictures.glob("step-*.png"))
    steps = [int(file.stem.removeprefix("step-")) for file in files if file.stem.removeprefix("step-").isdigit()]
    if len(files) != len(steps):
        raise RunError(f"{run.pictures} holds pictures that are not named step-NUMBER.png; move them elsewhere")
    if len(files) > MOST_PICTURES:
        middle = min(range(1, len(files) - 1), key=lambda i: abs(steps[i] - steps[-1] / 2))
        files, steps = [files[0], files[middle], files[-1]], [steps[0], steps[middle], steps[-1]]
    return [
        Shown(
            "before training" if step == 0 else f"after {step:,} steps",
            "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii"),
        )
        for file, step in zip(files, steps, strict=True)
    ]


def tuned(found: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How good a supervised run is on its test images, or None: what to say, each class by itself, the way there."""
    tested = [row for row in metrics if any(key.startswith("test_") for key in row)]
    if not found:
        return None
    metric, names = found["metric"], dict[str, str](mean_iou="mean IoU", ap50="AP50", accuracy="accuracy")
    each = found.get("ious") or found.get("ap50_of_class", {})
    said = f"{names.get(metric, metric)} {100 * found[metric]:.1f} % on {found['test_images']:,} test images"
    if "low" in found:
        said += f" (95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f} %)"
    said += f", with the weights of the last step. Learnt from {found['train_images']:,} images."
    if found["averaged"] is not None:
        said += f" With the running average of the weights {100 * found['averaged']:.1f} %."
    if found["best"] is not None and found["best"]["step"] != found["step"]:
        best = found["best"]
        said += (
            f" The best test on the way had {100 * best[metric]:.1f} % at step {best['step']:,}; the test images chose "
            "it, so it flatters."
        )
    return {"sentence": said, "each": each, "metric": names.get(metric, metric), "chart": tests_chart(tested, metric)}


def curve_note(trained: list[dict[str, Any]], baselines: dict[str, Any]) -> str:
    """Where the loss ended, and how it compares with trivial guesses on the same fixed images."""
    if not trained:
        return "No step has been logged yet."
    end = statistics.mean(row["loss"] for row in trained[-max(1, len(trained) // 20) :])
    said = f"Training loss {end:.3f} at the end (mean of the last twentieth)."
    if not baselines:
        return said
    step, loss = baselines["losses"][-1]
    named = {f"{IN_WORDS.get(name, name)} ({value:.3f})": value for name, value in baselines["guesses"].items()}
    beaten = ", ".join(name for name, value in named.items() if loss < value)
    unbeaten = ", ".join(name for name, value in named.items() if loss >= value)
    said += (
        f" Dots: the loss on {baselines['images']} fixed images without augmentation, on which the guesses are scored "
        f"too; {loss:.3f} at step {step:,}."
    )
    if held_out := baselines.get("held_out_losses"):
        said += (
            f" Squares: the loss on {baselines['held_out_images']} images that are not trained on; "
            f"{held_out[-1][1]:.3f} at step {held_out[-1][0]:,}."
        )
    said += f" Better than: {beaten}." if beaten else ""
    return said + (f" Not better than: {unbeaten}." if unbeaten else "")
