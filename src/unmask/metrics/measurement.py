"""What a measurement on test images holds, whatever the task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A number that says how good a task is: `name` as a key of metrics.jsonl and of results, `words` after a value."""

    name: str
    words: str


@dataclass(frozen=True)
class Measurement:
    """How good a task is on test images.

    values: the metrics by name, between 0 and 1. low, high: 95 % limits of the first headline metric, None where they
    are not known. details: what else is reported, such as the metric of each class, under the keys of the JSON.
    """

    values: dict[str, float]
    low: float | None = None
    high: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """One flat dictionary, as stored in `evals/fine-tuned.json`."""
        limits = {} if self.low is None else {"low": self.low, "high": self.high}
        return {**self.values, **limits, **self.details}
