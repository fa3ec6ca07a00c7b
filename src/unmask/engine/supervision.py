"""What a supervised run adds to the loop: annotations, an evaluator, and a final result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from unmask.config import Config
from unmask.data.image_reader import Annotations
from unmask.data.sources.source import Source
from unmask.engine.plan import Plan
from unmask.method import Method
from unmask.run import Run


class Evaluator(Protocol):
    """Measures a supervised method on its test images.

    Both functions are called with the method in evaluation mode and without gradients.
    """

    def __call__(self, method: Method) -> dict[str, float]:
        """Return the metrics by name."""
        ...

    def estimate_seconds(self, method: Method) -> float:
        """Return how long one evaluation takes, estimated from a few images."""
        ...


class Supervision(NamedTuple):
    """What a supervised run adds to its images.

    annotations: other than class labels, such as segmentation masks; None where labels suffice. evaluator: the test
    set. write_result: evaluates the final weights and writes the result; the run is finished only after it.
    """

    annotations: Annotations | None
    evaluator: Evaluator
    write_result: Callable[[Run], object]


Supervise = Callable[[Run, Config, Plan, Source], Supervision]
"""Make the `Supervision` of a run, once its configuration, plan and images are known."""


@dataclass(frozen=True)
class SupervisedSplit:
    """What a supervised run trains on, what it is tested on, and how.

    held_out: rows of the source excluded from training. test_rows: those of them used for evaluation, None where the
    test images are others. num_test: number of test images, from whichever source. taught: see `Plan`.
    """

    held_out: np.ndarray
    test_rows: np.ndarray | None
    num_test: int
    taught: str
    supervise: Supervise
