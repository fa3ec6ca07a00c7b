"""Summarise the training steps in a run's `metrics.jsonl`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Row = Mapping[str, Any]
"""A row of metrics.jsonl that has a loss."""
MOST_POINTS = 60


def trained_rows(metrics: Sequence[Row]) -> list[Row]:
    """Return the rows that have a loss, without skipped steps."""
    return [row for row in metrics if row.get("loss") is not None]


def training_seconds(trained: Sequence[Row]) -> float:
    """Return the seconds of training without pauses, computed from the numbers of images and the images per second."""
    before, seconds = 0, 0.0
    for row in trained:
        seconds += (row["images"] - before) / max(1e-9, row["images_per_second"])
        before = row["images"]
    return seconds


def last_loss(trained: Sequence[Row]) -> float:
    """Return the mean loss of the last 5 % of the logged rows."""
    return statistics.mean(row["loss"] for row in trained[-max(1, len(trained) // 20) :])


def smooth(steps: Sequence[int], losses: Sequence[float]) -> tuple[list[float], list[float]]:
    """Smooth the losses: return the means of steps and of losses in at most MOST_POINTS intervals of equal length."""
    pieces = min(MOST_POINTS, len(steps))
    edges = [round(i * len(steps) / pieces) for i in range(pieces + 1)]
    spans = [slice(a, b) for a, b in pairwise(edges)]
    return [statistics.mean(steps[s]) for s in spans], [statistics.mean(losses[s]) for s in spans]
