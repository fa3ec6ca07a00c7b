"""The result of a supervised run: its last weights on its test images."""

from __future__ import annotations

import math
from typing import Any

import torch

from unmask.config import task_class
from unmask.console import Console
from unmask.data.sources.open_source import open_source
from unmask.engine.device import autocast, choose_device
from unmask.engine.load import load, read_plan
from unmask.evals.images import eval_precision
from unmask.finetuning.annotated import (
    reopen,
)
from unmask.finetuning.test_set import open_test_set, task_of
from unmask.nn.modes import eval_mode
from unmask.results import SCORE, find_score
from unmask.run import Run, RunError


def measure_run(run: Run, *, console: Console | None = None) -> dict[str, Any]:
    """Measure the last weights on the test images, with a 95 % interval; store the result in `SCORE` and return it."""
    console = console or Console()
    loaded = load(run.path, device=choose_device(read_plan(run).device))
    data, settings = loaded.config.data, loaded.config.method
    found: dict[str, Any] = settings.model_dump()
    annotated = reopen(loaded.config, loaded.plan, open_source(data.source, data.exclude), tests_only=data.test is None)
    test_set = open_test_set(loaded.config, loaded.plan, annotated, console)
    with torch.inference_mode(), eval_mode(loaded.method), autocast(eval_precision(loaded), loaded.device):
        measured = test_set.measure(loaded.method).as_json()
    headline = task_of(loaded.method).headline[0].name
    try:
        tested = [row for row in run.metrics() if f"test_{headline}" in row]
    except RunError as error:
        console.warn(f"the best test on the way is not known: {error}")
        tested = []
    best = max(tested, key=lambda row: row[f"test_{headline}"], default=None)
    summary = measured | {
        "task": settings.name, "metric": headline, "step": loaded.step, "classes": list(annotated.classes),
        "best": None if best is None else {headline: best[f"test_{headline}"], "step": best["step"]},
        "averaged": tested[-1].get(f"test_averaged_{headline}") if tested else None,
        "data": data.place, "test": data.test or f"a held-out fifth of {data.place}",
        "test_images": measured.get("total", measured.get("images", len(test_set.rows))),
        "train_images": loaded.plan.num_images, "recipe": loaded.config.recipe,
        "last_blocks": found.get("last_blocks"), "from": loaded.config.graft[0].run if loaded.config.graft else None,
    }  # fmt: skip
    run.write(SCORE, summary)
    return summary


def report_result(run: Run, console: Console) -> None:
    """Report the result of a finished Run."""
    found = find_score(run) if run.finished else None
    if found is None:
        return
    task = task_class(found["task"])
    first = task.headline[0].name
    said = f"{task.describe(found)} on {found['test_images']} test images with the last weights"
    if "low" in found:
        said += f" (95% interval of {first.replace('_', ' ')}: {found['low']:.1%} to {found['high']:.1%})"
    if found["averaged"] is not None:
        said += f"; {found['averaged']:.1%} with the moving average of the weights"
    if (best := found["best"]) is not None and not math.isclose(best[first], found[first], abs_tol=1e-9):
        said += f"; the best test during training: {best[first]:.1%} at step {best['step']}, chosen on the test images"
    console.say(said)
