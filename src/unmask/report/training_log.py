"""Summaries of a run's `metrics.jsonl`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def training_seconds(trained: Sequence[dict[str, Any]]) -> float:
    """Time spent training: the logged images at the logged pace, so time between a stop and a resume is not in it."""
    before, seconds = 0, 0.0
    for row in trained:
        seconds += (row["images"] - before) / max(1e-9, row["images_per_second"])
        before = row["images"]
    return seconds


def last_loss(trained: Sequence[dict[str, Any]]) -> float:
    """Mean of the last twentieth of the logged rows."""
    return statistics.mean(row["loss"] for row in trained[-max(1, len(trained) // 20) :])
