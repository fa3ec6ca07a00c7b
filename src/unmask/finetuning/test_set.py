"""The test images of a supervised run, and how good its method is on them."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from unmask.config import Config, ConfigError
from unmask.console import Console
from unmask.data.box_annotations import Boxes
from unmask.data.decode.decode import BadImage
from unmask.data.loader import choose_workers
from unmask.data.segmentation_masks import Maps
from unmask.data.sources.open_source import Source
from unmask.engine.plan import Plan
from unmask.engine.time_budget import now
from unmask.evals.images import MANY_IMAGES, Readable, read
from unmask.finetuning.annotated import (
    LABELLED,
    TRIAL_IMAGES,
    AnnotatedImages,
    digest,
    mask_options_of,
    open_annotated,
    task_of,
)
from unmask.method import Method
from unmask.metrics import average_precision, mean_iou
from unmask.metrics.intervals import wilson
from unmask.tasks import classify, detect, linear_probe, segment

HEADLINES = {
    "classify": ("accuracy",), "linear_probe": ("accuracy",), "segment": ("mean_iou", "pixel_accuracy"),
    "detect": ("ap50", "ap"),
}  # fmt: skip


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


# ---------------------------------------------------------------------------------------------------------- the
# test_set


@dataclass
class TestSet:
    """The test images of a run, and what is true of them."""

    images: Readable
    rows: np.ndarray
    classes: tuple[str, ...]
    annotations: Maps | Boxes | None
    device: str
    console: Console
    annotated: AnnotatedImages
    workers: int = 0

    def digest(self, *, labels: bool = True) -> str:
        """`digest` of the test images."""
        return digest(self.annotated, self.rows, labels=labels)

    def __call__(self, method: Method) -> dict[str, float]:
        return self.headlines(method)

    def trial(self, method: Method) -> float:
        """Return the seconds that a test takes, estimated on a few of its images."""
        for count in TRIAL_IMAGES:  # the first pass warms up
            few = replace(self, rows=self.rows[:count], workers=0, console=Console(quiet=True))
            began = now()
            if isinstance(method, detect.Detector):  # found boxes are not scored: few images may have none
                for batch in read(few.images, few.rows, 0, few.console):
                    method.predict(batch.images.to(self.device))
            else:
                few.measure(method)
            took = now() - began
        return took / len(few.rows) * len(self.rows)

    def headlines(self, method: Method) -> dict[str, float]:
        """The numbers that are followed while it trains."""
        found = self.measure(method)
        return {name: float(found[name]) for name in HEADLINES[task_of(method)]}

    def measure(self, method: Method) -> dict[str, Any]:
        """Everything that is known of the result; the method in eval mode, gradients off, autocast set."""
        if isinstance(method, classify.Classifier | linear_probe.LinearProbe):
            return self._classes(method)
        if isinstance(method, segment.Segmenter):
            assert isinstance(self.annotations, Maps)
            batches = read(self.images, self.rows, self.workers, self.console)
            scores = mean_iou.measure(method.logits, batches, self.annotations.read, self.classes, device=self.device)
            return scores.as_json()
        assert isinstance(method, detect.Detector)
        return self._boxes(method)

    def _classes(self, method: classify.Classifier | linear_probe.LinearProbe) -> dict[str, Any]:
        correct, total = torch.zeros((), dtype=torch.int64, device=self.device), 0
        for batch in read(self.images, self.rows, self.workers, self.console):
            labels = classify.require_labels(batch).to(self.device)
            correct += (method.logits(batch.images.to(self.device)).argmax(1) == labels).sum()
            total += len(batch)
        low, high = wilson(int(correct), total)
        return {"accuracy": int(correct) / total, "low": low, "high": high, "correct": int(correct), "total": total}

    def _boxes(self, method: detect.Detector) -> dict[str, Any]:
        assert isinstance(self.annotations, Boxes)
        truth, found = [], []
        for batch in read(self.images, self.rows, self.workers, self.console):
            for row, one in zip(batch.index.tolist(), method.predict(batch.images.to(self.device)), strict=True):
                truth.append(truth_of(self.annotations, row))
                found.append(as_numpy(one, self.images.spec.size, self.annotations.sizes[row]))
        precision = average_precision.average_precision(truth, found, self.classes)
        numbers = {"ap": precision.ap, "ap50": precision.ap50, "ap75": precision.ap75}
        return {**numbers, "ap50_of_class": precision.classes, "images": len(truth)}


def truth_of(annotations: Boxes, row: int) -> average_precision.ImageBoxes:
    """The true boxes of an image; those set aside count as crowds, which cost nothing and gain nothing."""
    boxes, labels = annotations.boxes[row], annotations.labels[row]
    more, theirs = annotations.aside.get(row, (boxes[:0], labels[:0]))
    crowd = np.arange(len(boxes) + len(more)) >= len(boxes)
    return average_precision.ImageBoxes(np.concatenate([boxes, more]), np.concatenate([labels, theirs]), crowd=crowd)


def as_numpy(found: detect.Found, seen: tuple[int, int], size: tuple[int, int]) -> average_precision.ImageBoxes:
    """Boxes found in an image seen at one size (H, W), in the pixels of the file, whose size is another."""
    scale = np.array([size[1] / seen[1], size[0] / seen[0]] * 2)
    boxes = found.boxes.float().cpu().numpy() * scale
    return average_precision.ImageBoxes(boxes, found.labels.cpu().numpy(), found.scores.float().cpu().numpy())


def open_test_set(config: Config, plan: Plan, annotated: AnnotatedImages, console: Console) -> TestSet:
    """The images a run is tested on: those held out of `annotated`, or `data.test`.

    Raises ValueError when they cannot be judged, which had better be known before the training.
    """
    rows, of, data = np.array(plan.test_rows, np.int64), annotated, config.data
    task = config.method.name
    if data.test is not None:
        of = open_annotated(
            task, data.test, data.test_annotations, split=data.test_split,
            ignored=getattr(config.method, "ignored", ()), mask_options=mask_options_of(config, test=True),
            classes=annotated.classes, look=False, console=console,
        )  # fmt: skip
        rows = of.rows
    if isinstance(of.annotations, Boxes):
        average_precision.tools()
        if not any(len(of.annotations.boxes[row]) for row in rows.tolist()):
            raise ConfigError(f"the {len(rows)} test images have no box, so nothing can be judged; give others")
    of.source.reading = plan.reading
    images = Readable(of.source, rows, plan.images, data.crop, training=False, whole=task not in LABELLED)
    workers = 0
    if plan.cached and len(rows) <= plan.num_images:  # what is known to fit in memory once fits twice
        images.keep_decoded()
    elif len(rows) >= MANY_IMAGES:
        workers = choose_workers(plan.device, cached=False)[0]
    return TestSet(images, rows, annotated.classes, of.annotations, plan.device, console, of, workers)
