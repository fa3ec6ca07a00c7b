"""The test images of a supervised run, and the measurement of its method on them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

import numpy as np

from unmask.config import Config, ConfigError, task_class
from unmask.console import Console, duration
from unmask.data.annotations.box_annotations import BoxAnnotations
from unmask.data.decode.bad_image import BadImage
from unmask.data.loader import choose_workers
from unmask.data.readable_images import ReadableImages
from unmask.data.sources.source import Source
from unmask.engine.plan import Plan
from unmask.engine.time_budget import now
from unmask.errors import UserError
from unmask.evals.images import MANY_IMAGES, read
from unmask.finetuning.annotated import AnnotatedImages, digest, open_annotated, options_of
from unmask.method import Method
from unmask.metrics import average_precision
from unmask.metrics.measurement import Measurement
from unmask.task import Task

TRIAL_IMAGES = (4, 16)
LONG_TESTS = 10.0  # seconds, below which no warning is given


def shared_files(train: Source, train_rows: np.ndarray, test: Source, test_rows: np.ndarray) -> list[str]:
    """Names of the test images that are byte for byte also training images: only files of equal size are read."""
    both = np.intersect1d(train.sizes[train_rows], test.sizes[test_rows])

    def digests(source: Source, rows: np.ndarray) -> dict[int, bytes]:
        found = {}
        for row in rows[np.isin(source.sizes[rows], both)].tolist():
            with suppress(BadImage):
                found[row] = blake2b(source.read(row), digest_size=16).digest()
        return found

    known = set(digests(train, train_rows).values())
    return [test.names[row] for row, digest in digests(test, test_rows).items() if digest in known]


@dataclass
class TestSet:
    """The test images of a run: `rows` of `images`, with the annotations they are compared with.

    opened: when, on the clock of `time_budget.now`. spent: seconds of tests since. warned: that they take long.
    """

    images: ReadableImages
    rows: np.ndarray
    annotated: AnnotatedImages
    console: Console
    workers: int = 0
    opened: float = field(default_factory=now)
    spent: float = 0.0
    warned: bool = False

    def digest(self, *, labels: bool = True) -> str:
        """`digest` of the test images."""
        return digest(self.annotated, self.rows, labels=labels)

    def __call__(self, method: Method) -> dict[str, float]:
        """Return the headline metrics; warn when tests have taken longer than the training so far."""
        began = now()
        training = began - self.opened - self.spent
        if self.spent > max(training, LONG_TESTS) and not self.warned:
            self.warned = True
            self.console.warn(
                f"tests on {len(self.rows)} images took {duration(self.spent)}, the training between them "
                f"{duration(training)}; to test less often: --set train.test_every=N"
            )
        found = self.headlines(method)
        self.spent += now() - began
        return found

    def estimate_seconds(self, method: Method) -> float:
        """Return the seconds that a test takes, estimated on a few of its images."""
        took, few = 0.0, self
        for count in TRIAL_IMAGES:  # the first pass warms up
            few = replace(self, rows=self.rows[:count], workers=0, console=Console(quiet=True))
            began = now()
            with suppress(UserError):  # few images may have nothing to score: no box, or ignored pixels only
                few.measure(method)
            took = now() - began
        return took / len(few.rows) * len(self.rows)

    def headlines(self, method: Method) -> dict[str, float]:
        """The metrics that are followed during training."""
        found = self.measure(method)
        return {metric.name: float(found.values[metric.name]) for metric in task_of(method).headline}

    def measure(self, method: Method) -> Measurement:
        """All that is measured; the method in eval mode, without gradients, under the caller's autocast."""
        return task_of(method).measure(
            read(self.images, self.rows, self.workers, self.console), self.annotated.annotations
        )


def task_of(method: Method) -> Task[Any, Any]:
    """The method of a supervised run."""
    assert isinstance(method, Task), "only tasks have test images"
    return method


def open_test_set(config: Config, plan: Plan, annotated: AnnotatedImages, console: Console) -> TestSet:
    """Open the test images of a run: those held out of `annotated`, or `data.test`.

    Called before the training. Raises UserError when nothing can be measured on them.
    """
    rows, of, data = np.array(plan.test_rows, np.int64), annotated, config.data
    task = config.method.name
    if data.test is not None:
        of = open_annotated(task, data.test, options_of(config, test=True), look=False, console=console)
        rows = of.rows
    if isinstance(of.annotations, BoxAnnotations):
        average_precision.tools()
        if not any(len(of.annotations.boxes[row]) for row in rows.tolist()):
            raise ConfigError(f"the {len(rows)} test images have no box, so nothing can be measured; give others")
    of.source.reading = plan.reading
    images = ReadableImages(
        of.source, rows, plan.images, data.crop, training=False, whole=task_class(task).whole_images()
    )
    workers = 0
    if plan.cached and len(rows) <= plan.num_images:  # what is known to fit in memory once fits twice
        images.keep_decoded()
    elif len(rows) >= MANY_IMAGES:
        workers = choose_workers(plan.device, cached=False)[0]
    return TestSet(images, rows, of, console, workers)
