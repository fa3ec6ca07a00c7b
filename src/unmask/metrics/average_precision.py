"""Mean average precision of boxes, computed by COCO's own code (the package pycocotools, described in Lin et al. 2014,
"Microsoft COCO").

AP is the mean over ten thresholds of the IoU, 0.50 to 0.95; AP50 and AP75 use a single threshold. Average precision is
the area under the curve of precision over recall (101 points) for at most 100 boxes per image, averaged over the
classes that have true boxes. Boxes are in pixels of the ORIGINAL images, and all true boxes count: a crop has fewer and
smaller boxes, so numbers measured on crops are not comparable with published ones.

Boxes are predicted in `tasks/detect.py`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from unmask.data.annotations.box_annotations import BoxAnnotations
from unmask.errors import UserError


class ImageBoxes(NamedTuple):
    """Boxes of one image: `boxes` (n, 4), (x1, y1, x2, y2) in pixels of the original; `labels` (n,), class numbers.

    `scores` (n,) is set for predictions only. `crowd` (n,) bool is set for true boxes only: True for boxes around a
    group of objects (COCO) or marked difficult (VOC). The metric does not depend on detections of crowd boxes.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    crowd: np.ndarray | None = None


def true_boxes(annotations: BoxAnnotations, row: int) -> ImageBoxes:
    """Return the true boxes of an image; ignored boxes become crowds, which count neither as hits nor as misses."""
    boxes, labels = annotations.boxes[row], annotations.labels[row]
    more, theirs = annotations.aside.get(row, (boxes[:0], labels[:0]))
    crowd = np.arange(len(boxes) + len(more)) >= len(boxes)
    return ImageBoxes(np.concatenate([boxes, more]), np.concatenate([labels, theirs]), crowd=crowd)


@dataclass(frozen=True)
class Precision:
    """Average precisions, 0 to 1; `classes` maps each class to its AP50, None for a class without true boxes."""

    ap: float
    ap50: float
    ap75: float
    classes: dict[str, float | None]


def average_precision(truth: Sequence[ImageBoxes], found: Sequence[ImageBoxes], classes: Sequence[str]) -> Precision:
    """Measure the detections `found` against `truth`, both with one entry per image in the same order.

    Raises UserError without pycocotools, and if there are no true boxes.
    """
    coco, evaluation = tools()
    if len(truth) != len(found):
        raise ValueError(
            f"got predictions for {len(found)} images and true boxes for {len(truth)}; expected equal numbers"
        )
    if not any((~crowds(image)).any() for image in truth):
        raise UserError(
            f"got {len(truth)} test images without any true box; average precision needs at least one; use images "
            "with objects"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluator = evaluation(as_coco(coco, truth, classes), as_coco(coco, found, classes), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    # (threshold, recall, class) for all sizes and 100 boxes; -1 for a class without true boxes
    table = evaluator.eval["precision"][..., 0, -1]
    thresholds = evaluator.params.iouThrs
    at50, at75 = (int(np.abs(thresholds - t).argmin()) for t in (0.5, 0.75))

    def mean(part: np.ndarray) -> float | None:
        return float(part[part > -1].mean()) if (part > -1).any() else None

    ap, ap50, ap75 = (mean(table[rows]) for rows in (slice(None), at50, at75))
    assert ap is not None, "some class has a true box, as checked above"
    assert ap50 is not None
    assert ap75 is not None
    return Precision(ap, ap50, ap75, {name: mean(table[at50, :, k]) for k, name in enumerate(classes)})


def tools() -> tuple[Any, Any]:
    """Import pycocotools' COCO and COCOeval. Raises UserError if pycocotools is not installed."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise UserError(
            "average precision needs the package pycocotools, which is not installed: pip install pycocotools"
        ) from None
    return COCO, COCOeval


def crowds(image: ImageBoxes) -> np.ndarray:
    """Return (n,) bool, True for crowd boxes."""
    return np.zeros(len(image.boxes), bool) if image.crowd is None else np.asarray(image.crowd, bool)


def as_coco(coco: Any, images: Sequence[ImageBoxes], classes: Sequence[str]) -> Any:
    """Return a COCO object as if read from a file; ids start at 1, because pycocotools uses 0 for "no match"."""
    rows: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        scores = np.zeros(len(image.boxes)) if image.scores is None else image.scores
        for box, label, score, crowd in zip(image.boxes, image.labels, scores, crowds(image), strict=True):
            x1, y1, x2, y2 = (float(value) for value in box)
            rows.append({
                "id": len(rows) + 1, "image_id": number, "category_id": int(label) + 1, "score": float(score),
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": int(crowd),
            })  # fmt: skip
    made = coco()
    made.dataset = {
        "images": [{"id": number} for number in range(len(images))],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(classes)],
        "annotations": rows,
    }
    made.createIndex()
    return made
