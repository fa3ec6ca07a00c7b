"""Results of a measurement on test images, for every task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Metric(NamedTuple):
    """A quality metric: `name` is its key in metrics.jsonl and in results, `words` its name in texts ("mean IoU")."""

    name: str
    words: str


@dataclass(frozen=True)
class Measurement:
    """Metrics of a task on test images.

    values: the metrics by name, between 0 and 1. low, high: 95 % limits of the first headline metric, None if unknown.
    images: number of test images that were measured. correct: number of images with a correct prediction, where this is
    defined. by_class: a metric of every class by the name of the class, None where it is undefined. confusion: number
    of test units by true class (row) and predicted class (column), or () if they were not counted.
    """

    values: dict[str, float]
    low: float | None = None
    high: float | None = None
    images: int = 0
    correct: int | None = None
    by_class: dict[str, float | None] = field(default_factory=dict)
    confusion: tuple[tuple[int, ...], ...] = ()
