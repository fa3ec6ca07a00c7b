"""What a supervised run adds to the loop: annotations, an evaluator, and a final result."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from unmask.config import Config
from unmask.data.image_reader import Annotations
from unmask.data.sources.source import Source
from unmask.engine.plan import Plan
from unmask.method import Method
from unmask.run import Run


class Judge(Protocol):
    """The test images of a supervised run (`tasks/`). Both get the method in eval mode, without gradients."""

    def __call__(self, method: Method) -> dict[str, float]:
        """Return how good the method is, by name."""
        ...

    def trial(self, method: Method) -> float:
        """Return the seconds that a test takes, estimated on a few images."""
        ...


class Supervision(NamedTuple):
    """What a supervised run has beside its images: annotations other than labels, its tests, and its result.

    conclude: measures the last weights and writes the result; a run is not finished before.
    """

    annotations: Annotations | None
    judge: Judge
    conclude: Callable[[Run], object]


Supervise = Callable[[Run, Config, Plan, Source], Supervision]
"""Make the `Supervision` of a run, once its configuration, plan and images are known."""
