"""The parts that a supervised run adds to the training loop: annotations, an evaluator, and a final result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from unmask.config import Config
from unmask.data.image_reader import Annotations
from unmask.data.sources.source import Source
from unmask.engine.training_plan import Plan
from unmask.method import Method
from unmask.run import Run


class Evaluator(Protocol):
    """Evaluates a supervised method on its test images.

    The caller switches the method to evaluation mode and disables gradients.
    """

    def __call__(self, method: Method) -> dict[str, float]:
        """Return the metrics by name."""
        ...

    def estimate_seconds(self, method: Method) -> float:
        """Estimate the seconds of one evaluation from a few images."""
        ...


class Supervision(NamedTuple):
    """The parts of the training loop that only supervised runs have.

    annotations: segmentation masks or boxes, or None for class labels. evaluator: evaluates the method on the test
    images. write_result: function that evaluates the final weights and writes the result; the run is finished only
    after this call.
    """

    annotations: Annotations | None
    evaluator: Evaluator
    write_result: Callable[[Run], object]


Supervise = Callable[[Run, Config, Plan, Source], Supervision]
"""Function that makes the `Supervision` of a run from its configuration, plan and images."""


@dataclass(frozen=True)
class SupervisedSplit:
    """The training and test images of a supervised run.

    held_out: rows of the source that are excluded from training. test_rows: held-out rows used for evaluation, or None
    if the test images are from another source. num_test: number of test images. annotations_digest: see `Plan`.
    supervise: makes the run's `Supervision`.
    """

    held_out: np.ndarray
    test_rows: np.ndarray | None
    num_test: int
    annotations_digest: str
    supervise: Supervise
