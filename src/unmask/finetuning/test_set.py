"""The test images of a supervised run, and the evaluation of its method on these images."""

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
from unmask.engine.time_budget import now
from unmask.engine.training_plan import Plan
from unmask.errors import UserError
from unmask.evals.images import MANY_IMAGES, read
from unmask.finetuning.annotated import AnnotatedImages, digest, open_annotated, options_of
from unmask.method import Method
from unmask.metrics import average_precision
from unmask.metrics.measurement import Measurement
from unmask.task import Task

TRIAL_IMAGES = (4, 16)
LONG_TESTS = 10.0  # minimum total seconds of tests that cause a warning


def shared_files(train: Source, train_rows: np.ndarray, test: Source, test_rows: np.ndarray) -> list[str]:
    """Return names of test images that are byte-identical to a training image. Only files of equal size are read."""
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
    """The test images of a run, which are `rows` of `images`, with their annotations.

    opened: time of creation, on the clock of `time_budget.now`. spent: seconds that tests have taken since then.
    warned: whether the warning about long tests has been printed.
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
        """Return a digest of the test images and their annotations."""
        return digest(self.annotated, self.rows, labels=labels)

    def __call__(self, method: Method) -> dict[str, float]:
        """Return the headline metrics. Warn once if tests have taken longer than the training so far."""
        began = now()
        training = began - self.opened - self.spent
        if self.spent > max(training, LONG_TESTS) and not self.warned:
            self.warned = True
            self.console.warn(
                f"tests on {len(self.rows)} images took {duration(self.spent)}, and the training between them "
                f"{duration(training)}; to test less often: --set train.test_every=N"
            )
        found = self.headlines(method)
        self.spent += now() - began
        return found

    def estimate_seconds(self, method: Method) -> float:
        """Return the seconds that a test takes, estimated from a few of its images."""
        took, few = 0.0, self
        for count in TRIAL_IMAGES:  # the first pass is a warm-up
            few = replace(self, rows=self.rows[:count], workers=0, console=Console(quiet=True))
            began = now()
            with suppress(UserError):  # a few images may have no box, or only ignored pixels
                few.measure(method)
            took = now() - began
        return took / len(few.rows) * len(self.rows)

    def headlines(self, method: Method) -> dict[str, float]:
        """Return the metrics that are logged during training."""
        found = self.measure(method)
        return {metric.name: float(found.values[metric.name]) for metric in task_of(method).headline}

    def measure(self, method: Method) -> Measurement:
        """Return all metrics. The caller sets eval mode and autocast, and disables gradients."""
        return task_of(method).measure(
            read(self.images, self.rows, self.workers, self.console), self.annotated.annotations
        )


def task_of(method: Method) -> Task[Any, Any]:
    """Return the method of a supervised run as a `Task`."""
    assert isinstance(method, Task), "only supervised methods have test images"
    return method


def open_test_set(config: Config, plan: Plan, annotated: AnnotatedImages, console: Console) -> TestSet:
    """Open the test images of a run: the images held out from `annotated`, or `data.test`.

    Raises UserError if the images cannot be evaluated, which is checked before the training.
    """
    rows, of, data = np.array(plan.test_rows, np.int64), annotated, config.data
    task = config.method.name
    if data.test is not None:
        of = open_annotated(task, data.test, options_of(config, test=True), look=False, console=console)
        rows = of.rows
    if isinstance(of.annotations, BoxAnnotations):
        average_precision.tools()
        if not any(len(of.annotations.boxes[row]) for row in rows.tolist()):
            raise ConfigError(
                f"the {len(rows)} test images have no boxes, so nothing can be measured; give other test images"
            )
    of = replace(of, source=of.source.with_reading(plan.reading))
    images = ReadableImages(
        of.source, rows, plan.images, data.crop, training=False, whole=task_class(task).whole_images()
    )
    workers = 0
    if plan.cached and len(rows) <= plan.num_images:  # at most as many images as the cached training images
        images.keep_decoded()
    elif len(rows) >= MANY_IMAGES:
        workers = choose_workers(plan.device, cached=False)[0]
    return TestSet(images=images, rows=rows, annotated=of, console=console, workers=workers)
