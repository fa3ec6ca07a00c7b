"""Test the last weights of a supervised run on its test images."""

from __future__ import annotations

import math
from typing import Any

import torch

from unmask.config import task_class
from unmask.console import Console
from unmask.data.annotations.splits import HELD_OUT
from unmask.data.sources.open_source import open_source
from unmask.engine.device import autocast, choose_device
from unmask.engine.load import load, read_plan
from unmask.evals.images import eval_precision
from unmask.finetuning.annotated import (
    reopen,
)
from unmask.finetuning.test_set import TestSet, open_test_set, task_of
from unmask.nn.modes import eval_mode
from unmask.results import SCORE, FinetuneResult, ImageSet, TestIdentity, TestOnTheWay, read_score, to_json
from unmask.run import Run, RunError
from unmask.task import TaskConfig


def measure_run(run: Run, *, console: Console | None = None) -> FinetuneResult:
    """Test the last weights; write the score with its 95 % interval to `SCORE` and return it."""
    console = console or Console()
    loaded = load(run.path, device=choose_device(read_plan(run).device))
    data, settings = loaded.config.data, loaded.config.method
    assert isinstance(settings, TaskConfig), "only supervised runs have a test"
    annotated = reopen(loaded.config, loaded.plan, open_source(data.source, data.exclude), tests_only=data.test is None)
    test_set = open_test_set(loaded.config, loaded.plan, annotated, console)
    with torch.inference_mode(), eval_mode(loaded.method), autocast(eval_precision(loaded), loaded.device):
        measured = test_set.measure(loaded.method)
    metrics = task_of(loaded.method).headline
    headline = metrics[0].name
    tests = tests_during_training(run, headline, console)
    best = max(tests, key=lambda row: row[f"test_{headline}"], default=None)
    result = FinetuneResult(
        task=settings.name,
        metric=headline,
        numbers=measured.values,
        words={metric.name: metric.words for metric in metrics},
        data=ImageSet(name=data.place, digest=annotated.source.fingerprint(), excluded=tuple(data.exclude)),
        test=_identity_of_test(data.test, test_set),
        step=loaded.step,
        low=measured.low,
        high=measured.high,
        correct=measured.correct,
        by_class=measured.by_class,
        confusion=measured.confusion,
        classes=annotated.classes,
        train_images=loaded.plan.num_images,
        test_images=measured.images,
        best=None if best is None else TestOnTheWay(step=best["step"], value=best[f"test_{headline}"]),
        averaged=tests[-1].get(f"test_averaged_{headline}") if tests else None,
        recipe=loaded.config.recipe,
        last_blocks=settings.trained_blocks,
        initial_run=loaded.config.graft[0].run if loaded.config.graft else None,
    )
    run.write(SCORE, to_json(result))
    return result


def tests_during_training(run: Run, headline: str, console: Console) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl that have this test metric.

    If the file is damaged, print a warning and return [].
    """
    try:
        return [row for row in run.metrics() if f"test_{headline}" in row]
    except RunError as error:
        console.warn(f"the best test during training is unknown: {error}")
        return []


def _identity_of_test(test: str | None, test_set: TestSet) -> TestIdentity:
    if test is None:
        return TestIdentity(held_out=HELD_OUT, seed=0)
    return TestIdentity(images=ImageSet(name=test, digest=test_set.annotated.source.fingerprint()))


def report_result(run: Run, console: Console) -> None:
    """Report the result of a finished run."""
    found = read_score(run) if run.finished else None
    if found is None:
        return
    task = task_class(found.task)
    text = f"{task.describe(found.numbers)} on {found.test_images} test images with the last weights"
    if found.low is not None and found.high is not None:
        text += f" (95% interval of {task.headline[0].words}: {found.low:.1%} to {found.high:.1%})"
    if found.averaged is not None:
        text += f"; {found.averaged:.1%} with the moving average of the weights"
    if (best := found.best) is not None and not math.isclose(best.value, found.value, abs_tol=1e-9):
        text += f"; the best test during training: {best.value:.1%} at step {best.step}, chosen on the test images"
    console.print(text)
