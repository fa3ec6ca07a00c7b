"""Results of a measurement on test images, for every task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A quality metric: `name` is its key in metrics.jsonl and in results, `words` follow its value in texts."""

    name: str
    words: str


@dataclass(frozen=True)
class Measurement:
    """Metrics of a task on test images.

    values: the metrics by name, between 0 and 1. low, high: 95 % limits of the first headline metric, None if unknown.
    details: other reported values by their JSON key, such as the metric of each class.
    """

    values: dict[str, float]
    low: float | None = None
    high: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return a flat dictionary, as stored in `evals/fine-tuned.json`."""
        limits = {} if self.low is None else {"low": self.low, "high": self.high}
        return {**self.values, **limits, **self.details}
