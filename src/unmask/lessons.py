"""What a supervised run learns from, and how it is examined: labels, masks or boxes of images, by the name of its task.

    classify   a class for each image, from its sub-folder         accuracy (and so `linear_probe`)
    segment    a mask for each image (`data/maps.py`)              mean intersection over union, at the file's own size
    detect     boxes for each image (`data/boxes.py`)              average precision (COCO), in the file's own pixels

Test images are a fifth that is held out, or others. A classifier sees them as a probe does (the centred crop); for
masks and boxes the whole image is squeezed or stretched to the size the method sees, so that every pixel counts, and
what is found is brought back to the size of the file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask.budget import now
from unmask.config import Config, ConfigError
from unmask.console import Console
from unmask.data.boxes import Boxes, find_files, open_boxes
from unmask.data.decode import BadImage
from unmask.data.loader import choose_workers
from unmask.data.maps import Maps, MaskOptions, find_folders, open_maps
from unmask.data.sources import Source, open_source, require_labels
from unmask.evals import detection, segmentation
from unmask.evals.probe import few_shots, require_classes
from unmask.evals.scores import wilson
from unmask.evals.splits import HOLD_OUT_FOR_TEST, hold_out
from unmask.method import Method
from unmask.plan import Plan
from unmask.tasks import classify, detect, linear_probe, segment
from unmask.use import MANY_IMAGES, Readable, absent_classes, labels_of, read, with_classes

TASKS = ("classify", "segment", "detect")
LABELLED = ("classify", "linear_probe")
HEADLINES = {
    "classify": ("accuracy",), "linear_probe": ("accuracy",), "segment": ("mean_iou", "pixel_accuracy"),
    "detect": ("ap50", "ap"),
}  # fmt: skip
"""What is measured on test images, the first the one that counts."""
TRIAL_IMAGES = (4, 16)
IN_WORDS = {
    "accuracy": "right", "mean_iou": "mean IoU", "pixel_accuracy": "of all pixels right", "ap50": "AP50", "ap": "AP",
}  # fmt: skip


@dataclass(frozen=True)
class Lessons:
    """Images and what people said of them. `rows`: of the source, those of which something was said."""

    source: Source
    classes: tuple[str, ...]
    rows: np.ndarray
    annotations: Maps | Boxes | None = None

    @property
    def place(self) -> str | None:
        """Where masks or boxes lie, to open them again."""
        if isinstance(self.annotations, Maps):
            return self.annotations.masks.location
        return None

    @property
    def labels(self) -> np.ndarray:
        """(all rows,) the class of each image; where there are masks or boxes all are alike."""
        if self.annotations is not None or self.source.labels is None:
            return np.zeros(len(self.source), np.int64)
        return self.source.labels


def open_lessons(
    task: str,
    data: str | Sequence[str],
    annotations: str | None = None,
    *,
    split: str | None = None,
    exclude: Sequence[str] = (),
    ignored: Sequence[int] = (),
    mask_options: MaskOptions | None = None,
    classes: Sequence[str] | None = None,
    only: Collection[int] | None = None,
    look: bool = True,
    console: Console | None = None,
) -> Lessons:
    """Images with what the task learns from. classes: names in order, where a model has them already; else found here.

    only: the rows that are wanted, None for all. look: at every mask, which finds what is wrong with it.
    Raises ValueError when there is nothing of that kind, or something that cannot be used, or would be ignored.
    """
    if split is not None and task != "detect":
        raise ConfigError(f"--split {split} came, but only boxes have lists of images; leave it out")
    if task in LABELLED:
        if annotations is not None:
            raise ConfigError("--annotations came, but classes are read from sub-folders; leave it out, or give --task")
        source = require_labels(open_source(data, exclude), classes or ())
        if classes is not None:
            source = with_classes(source, classes, "the run")
            if console is not None and (absent := absent_classes(labels_of(source), classes)):
                console.warn(f"{data} has no image of {absent}: those classes are not tested")
        require_classes(source.classes)
        return Lessons(source, tuple(source.classes), np.arange(len(source)))
    if exclude or not isinstance(data, str):
        raise ConfigError(
            f"got several DATA, or --exclude, for task {task}; they are for classes from sub-folders only"
        )
    if task == "segment":
        maps = open_maps(
            data, annotations, ignored=ignored, options=mask_options, classes=classes, look=look, console=console
        )
        return Lessons(maps.source, maps.classes, maps.rows, maps)
    boxes = open_boxes(data, annotations, split=split, classes=classes, only=only, console=console)
    return Lessons(boxes.source, boxes.classes, boxes.rows, boxes)


def annotations_of(task: str, data: str, annotations: str | None, lessons: Lessons) -> str | None:
    """Where what was found lies, so that a resumed run opens the same."""
    if task == "detect":
        return str(find_files(Path(data), None if annotations is None else Path(annotations))[1])
    return lessons.place


def split_rows(lessons: Lessons, shots: int | None, *, hold: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows): with `hold` a fifth is kept for tests.

    shots: labels per class, or so many images where masks or boxes are learnt; None for all. The same fifth and the
    same shots as in a probe with this seed.
    """
    labels, rows, held = lessons.labels, lessons.rows, np.zeros(0, np.int64)
    if hold:
        kept, left = hold_out(labels[rows], rows, seed, HOLD_OUT_FOR_TEST)
        rows, held = rows[kept], rows[left]
        if not len(held):
            raise ConfigError(f"{lessons.source.name} has too few images to hold some out; give others with --test")
    if shots is not None:
        if lessons.annotations is not None and not 0 < shots <= len(rows):
            raise ConfigError(
                f"--shots {shots} came, but there are {len(rows)} annotated images to learn from; use 1 to {len(rows)}"
            )
        names = lessons.classes if lessons.annotations is None else ("annotated images",)
        rows = few_shots(rows, labels[rows], names, shots, seed)
    return rows, held


def mask_options_of(config: Config, *, test: bool = False) -> MaskOptions | None:
    """How a Run reads masks; None for other tasks. test: for other images, whose masks may be drawn otherwise."""
    settings = config.method
    if not isinstance(settings, segment.Config):
        return None
    return MaskOptions(settings.values or (), stored=None if test else settings.stored_pixels)


def reopen(config: Config, plan: Plan, source: Source, *, tests_only: bool = False) -> Lessons:
    """What a Run learns from, or the part of it that it is tested on, opened once more."""
    settings: Any = config.method
    wanted = set(plan.test_rows)
    if not tests_only:
        wanted |= set(range(len(source))) - set(plan.excluded)
    return open_lessons(
        settings.name, config.data.source, config.data.annotations, exclude=config.data.exclude,
        ignored=getattr(settings, "ignored", ()),
        mask_options=mask_options_of(config), classes=settings.classes, only=wanted, look=False,
    )  # fmt: skip


def place_of_annotations(task: str, data: str, annotations: str | None) -> tuple[str, str]:
    """(images, masks or boxes) of DATA for a segmentation or detection. Raises UserError where there are none."""
    if task == "segment":
        images, masks, _ = find_folders(data, annotations)
        return images, masks
    images, boxes = find_files(Path(data), None if annotations is None else Path(annotations))
    return str(images), str(boxes)


def masks_of(lessons: Lessons) -> Source | None:
    """The files of masks that belong to the images; None where there are none."""
    return lessons.annotations.masks if isinstance(lessons.annotations, Maps) else None


def digest(lessons: Lessons, rows: np.ndarray, *, labels: bool = True) -> str:
    """Changes when the images, or what is said of these rows of them, become others (of masks: names and sizes).

    labels: with the class labels of the images.
    """
    found = blake2b("\n".join(lessons.classes).encode("utf-8", "surrogateescape"), digest_size=16)
    found.update(lessons.source.fingerprint().encode())
    if isinstance(lessons.annotations, Maps):
        found.update(lessons.annotations.masks.fingerprint().encode())
    elif isinstance(lessons.annotations, Boxes):
        for row in rows.tolist():
            found.update(np.int64(row).tobytes() + lessons.annotations.boxes[row].tobytes())
            found.update(lessons.annotations.labels[row].tobytes())
            for part in lessons.annotations.aside.get(row, ()):
                found.update(part.tobytes())
    elif labels:
        found.update(lessons.labels[rows].tobytes())
    return found.hexdigest()


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


# ---------------------------------------------------------------------------------------------------------- the exam


@dataclass
class Exam:
    """The test images of a run, and what is true of them."""

    images: Readable
    rows: np.ndarray
    classes: tuple[str, ...]
    annotations: Maps | Boxes | None
    device: str
    console: Console
    lessons: Lessons
    workers: int = 0

    def digest(self, *, labels: bool = True) -> str:
        """`digest` of the test images."""
        return digest(self.lessons, self.rows, labels=labels)

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
            scores = segmentation.measure(
                method.logits, batches, self.annotations.read, self.classes, device=self.device
            )
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
        precision = detection.average_precision(truth, found, self.classes)
        numbers = {"ap": precision.ap, "ap50": precision.ap50, "ap75": precision.ap75}
        return {**numbers, "ap50_of_class": precision.classes, "images": len(truth)}


def truth_of(annotations: Boxes, row: int) -> detection.ImageBoxes:
    """The true boxes of an image; those set aside count as crowds, which cost nothing and gain nothing."""
    boxes, labels = annotations.boxes[row], annotations.labels[row]
    more, theirs = annotations.aside.get(row, (boxes[:0], labels[:0]))
    crowd = np.arange(len(boxes) + len(more)) >= len(boxes)
    return detection.ImageBoxes(np.concatenate([boxes, more]), np.concatenate([labels, theirs]), crowd=crowd)


def as_numpy(found: detect.Found, seen: tuple[int, int], size: tuple[int, int]) -> detection.ImageBoxes:
    """Boxes found in an image seen at one size (H, W), in the pixels of the file, whose size is another."""
    scale = np.array([size[1] / seen[1], size[0] / seen[0]] * 2)
    boxes = found.boxes.float().cpu().numpy() * scale
    return detection.ImageBoxes(boxes, found.labels.cpu().numpy(), found.scores.float().cpu().numpy())


def task_of(method: Method) -> str:
    return type(method).__module__.rpartition(".")[2]


def open_exam(config: Config, plan: Plan, lessons: Lessons, console: Console) -> Exam:
    """The images a run is tested on: those held out of `lessons`, or `data.test`.

    Raises ValueError when they cannot be judged, which had better be known before the training.
    """
    rows, of, data = np.array(plan.test_rows, np.int64), lessons, config.data
    task = config.method.name
    if data.test is not None:
        of = open_lessons(
            task, data.test, data.test_annotations, split=data.test_split,
            ignored=getattr(config.method, "ignored", ()), mask_options=mask_options_of(config, test=True),
            classes=lessons.classes, look=False, console=console,
        )  # fmt: skip
        rows = of.rows
    if isinstance(of.annotations, Boxes):
        detection.tools()
        if not any(len(of.annotations.boxes[row]) for row in rows.tolist()):
            raise ConfigError(f"the {len(rows)} test images have no box, so nothing can be judged; give others")
    of.source.reading = plan.reading
    images = Readable(of.source, rows, plan.images, data.crop, training=False, whole=task not in LABELLED)
    workers = 0
    if plan.cached and len(rows) <= plan.num_images:  # what is known to fit in memory once fits twice
        images.keep_decoded()
    elif len(rows) >= MANY_IMAGES:
        workers = choose_workers(plan.device, cached=False)[0]
    return Exam(images, rows, lessons.classes, of.annotations, plan.device, console, of, workers)
