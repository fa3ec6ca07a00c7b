"""Open the annotations of a supervised run: class labels, segmentation masks or boxes, depending on its task.

    classes   the sub-folder of each image                classify, linear_probe
    masks     one file per image (`data/annotations/`)    segment
    boxes     COCO's JSON or VOC's XML                     detect

Test images are a held-out fifth of the images, or a separate set. Classifiers use a centre crop, as probes do. For
masks and boxes, the whole image is resized to the encoder's input size, and predictions are resized to the size of the
file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from unmask.config import Config, ConfigError, task_class
from unmask.console import Console
from unmask.data.annotations.box_annotations import BoxAnnotations, open_boxes
from unmask.data.annotations.box_files import find_files
from unmask.data.annotations.labels import absent_classes, labels_of, renumber_labels, require_labels
from unmask.data.annotations.mask_folders import find_folders
from unmask.data.annotations.open_masks import open_masks
from unmask.data.annotations.segmentation_masks import MaskOptions, SegmentationMasks
from unmask.data.annotations.splits import HOLD_OUT_FOR_TEST, hold_out
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.engine.training_plan import Plan
from unmask.evals.labelled_images import few_shots, require_classes
from unmask.task import TaskConfig


@dataclass(frozen=True)
class AnnotatedImages:
    """Images with their annotations. rows: indices of the annotated images in the source."""

    source: Source
    classes: tuple[str, ...]
    rows: np.ndarray
    annotations: SegmentationMasks | BoxAnnotations | None = None

    @property
    def place(self) -> str | None:
        """The location of the segmentation masks, or None for other tasks."""
        if isinstance(self.annotations, SegmentationMasks):
            return self.annotations.masks.location
        return None

    @property
    def labels(self) -> np.ndarray:
        """The class of each image of the source, or zeros if the annotations are masks or boxes."""
        if self.annotations is not None or self.source.labels is None:
            return np.zeros(len(self.source), np.int64)
        return self.source.labels


@dataclass(frozen=True)
class AnnotationOptions:
    """Location of the annotations and options for reading them. Options that do not fit the task are rejected.

    path: location of masks or boxes (None: search beside the images). split: for boxes, name of a list of images in a
    VOC folder. exclude: for classes, patterns of file names to leave out. ignored: ids in masks to ignore.
    mask_options: other options for reading masks. classes: class names of an existing model, in order (None: read from
    the data).
    """

    path: str | None = None
    split: str | None = None
    exclude: tuple[str, ...] = ()
    ignored: tuple[int, ...] = ()
    mask_options: MaskOptions | None = None
    classes: tuple[str, ...] | None = None


def open_annotated(
    task: str,
    data: str | Sequence[str],
    options: AnnotationOptions | None = None,
    *,
    only: Collection[int] | None = None,
    look: bool = True,
    console: Console | None = None,
) -> AnnotatedImages:
    """Open images with the annotations of a task.

    only: indices of the images that are needed (None: all). look: whether to read every mask, to report faults. Raises
    UserError for missing or invalid annotations, and for options that would have no effect.
    """
    options, kind = options or AnnotationOptions(), task_class(task).annotation
    if options.split is not None and kind != "boxes":
        raise ConfigError(f"got --split {options.split}; only boxes have lists of images; leave it out")
    if options.ignored and kind != "masks":
        raise ConfigError(f"got --ignore {options.ignored[0]}; only masks have ids to ignore; leave it out")
    if options.mask_options is not None and kind != "masks":
        raise ConfigError("got --mask-values or --class-names; only masks have ids; leave it out")
    if kind == "classes":
        if options.path is not None:
            raise ConfigError(
                "got --annotations for --task classify, which reads classes from sub-folders; leave it out, or choose "
                "another --task"
            )
        return _open_classes(data, options, console)
    if options.exclude or not isinstance(data, str):
        raise ConfigError(
            f"got several DATA, or --exclude, for --task {task}; only classify accepts them; give one DATA without "
            "--exclude"
        )
    if kind == "masks":
        maps = open_masks(
            data,
            options.path,
            ignored=options.ignored,
            options=options.mask_options,
            classes=options.classes,
            look=look,
            console=console,
        )
        return AnnotatedImages(maps.source, maps.classes, maps.rows, maps)
    boxes = open_boxes(data, options.path, split=options.split, classes=options.classes, only=only, console=console)
    return AnnotatedImages(boxes.source, boxes.classes, boxes.rows, boxes)


def _open_classes(
    data: str | Sequence[str], options: AnnotationOptions, console: Console | None = None
) -> AnnotatedImages:
    """Open images whose classes are the names of their sub-folders."""
    source = require_labels(open_source(data, options.exclude), options.classes or ())
    if options.classes is not None:
        source = renumber_labels(source, options.classes, "the run")
        if console is not None and (absent := absent_classes(labels_of(source), options.classes)):
            console.warn(f"{data} has no image of {absent}; these classes are not tested")
    require_classes(source.classes)
    return AnnotatedImages(source, tuple(source.classes), np.arange(len(source)))


def annotations_of(task: str, data: str, annotations: str | None, annotated: AnnotatedImages) -> str | None:
    """Return the location of the annotations, which a resumed run opens again."""
    if task_class(task).annotation == "boxes":
        return str(find_files(Path(data), None if annotations is None else Path(annotations))[1])
    return annotated.place


def split_rows(
    annotated: AnnotatedImages, shots: int | None, *, hold: bool, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of (training images, test images).

    hold: whether to hold out a fifth of the images for the test. shots: number of labels per class, or number of images
    for masks and boxes (None: all). A probe with the same seed holds out the same images and chooses the same labels.
    """
    labels, rows, held = annotated.labels, annotated.rows, np.zeros(0, np.int64)
    if hold:
        kept, left = hold_out(labels[rows], rows, seed, HOLD_OUT_FOR_TEST)
        rows, held = rows[kept], rows[left]
        if not len(held):
            raise ConfigError(
                f"{annotated.source.name} has too few images to hold out a fifth; give test images with --test"
            )
    if shots is not None:
        if annotated.annotations is not None and not 0 < shots <= len(rows):
            raise ConfigError(
                f"got --shots {shots}; expected 1 to {len(rows)}, the number of annotated training images"
            )
        names = annotated.classes if annotated.annotations is None else ("annotated images",)
        rows = few_shots(rows, labels[rows], classes=names, shots=shots, seed=seed)
    return rows, held


def options_of(config: Config, *, test: bool = False) -> AnnotationOptions:
    """Return the annotation options for a run's training images, or for its separate test images."""
    settings, data = config.method, config.data
    assert isinstance(settings, TaskConfig), "only supervised runs have annotations"
    return AnnotationOptions(
        path=data.test_annotations if test else data.annotations,
        split=data.test_split if test else None,
        exclude=() if test else tuple(data.exclude),
        ignored=settings.ignored_ids,
        mask_options=settings.mask_options(of_training_images=not test),
        classes=settings.classes,
    )


def reopen(config: Config, plan: Plan, source: Source, *, tests_only: bool = False) -> AnnotatedImages:
    """Open the annotated images of a run again. tests_only: whether to open only the held-out test images."""
    needed = set(plan.test_rows)
    if not tests_only:
        needed |= set(range(len(source))) - set(plan.excluded)
    return open_annotated(config.method.name, config.data.source, options_of(config), only=needed, look=False)


def place_of_annotations(task: str, data: str, annotations: str | None) -> tuple[str, str]:
    """Return the locations of (images, masks or boxes) in DATA. Raises UserError if DATA has no annotations."""
    if task_class(task).annotation == "masks":
        images, masks, _ = find_folders(data, annotations)
        return images, masks
    images, boxes = find_files(Path(data), None if annotations is None else Path(annotations))
    return str(images), str(boxes)


def masks_of(annotated: AnnotatedImages) -> Source | None:
    """Return the source of the mask files, or None for other annotations."""
    return annotated.annotations.masks if isinstance(annotated.annotations, SegmentationMasks) else None


def digest(annotated: AnnotatedImages, rows: np.ndarray, *, labels: bool = True) -> str:
    """Return a digest of the images and annotations in `rows`; mask files count with their names and sizes only.

    labels: whether to include the class labels of the images.
    """
    found = blake2b("\n".join(annotated.classes).encode("utf-8", "surrogateescape"), digest_size=16)
    found.update(annotated.source.fingerprint().encode())
    if isinstance(annotated.annotations, SegmentationMasks):
        found.update(annotated.annotations.masks.fingerprint().encode())
    elif isinstance(annotated.annotations, BoxAnnotations):
        for row in rows.tolist():
            found.update(np.int64(row).tobytes() + annotated.annotations.boxes[row].tobytes())
            found.update(annotated.annotations.labels[row].tobytes())
            for part in annotated.annotations.aside.get(row, ()):
                found.update(part.tobytes())
    elif labels:
        found.update(annotated.labels[rows].tobytes())
    return found.hexdigest()
