"""Boxes around objects, for detection, from COCO's JSON or Pascal VOC's XML (one file for each image).

Annotations are found automatically (`box_files.py`) in these layouts; otherwise pass the file or folder:

- VOC: DATA/JPEGImages with DATA/Annotations, or an .xml beside each image.
- COCO: the only .json in DATA, DATA/annotations or DATA/images, or beside DATA if DATA is named `images`.

With a split, the images are those listed in DATA/ImageSets/Main/SPLIT.txt.

Boxes are (x1, y1, x2, y2) in pixels of the displayed image; (0, 0) is the upper left corner of the first pixel. COCO's
(x, y, width, height) are converted to corners. VOC numbers pixels from 1, and its x2 and y2 are inclusive, so 1 is
subtracted from x1 and y1 only.

Annotated images without objects are used for training. COCO's crowds and VOC's difficult objects are not used for
training, and detections of them count neither for nor against a model, as in published results. Boxes without area, and
boxes with less than half of their area inside the image, are left out. The summary reports how many boxes are not used.
Boxes drawn on the stored pixels of images with an EXIF orientation are rotated with the image (`orientation.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unmask.batch import NO_BOX
from unmask.console import Console
from unmask.data import augment
from unmask.data.annotations.box_files import VOC_SPLITS, find_files, pair, read_split, stem_name
from unmask.data.annotations.box_objects import BoxError, Objects, corners_written_as_sizes
from unmask.data.annotations.class_names import class_name
from unmask.data.annotations.coco import read_coco
from unmask.data.annotations.orientation import DrawnOn, drawn_on, turned_boxes
from unmask.data.annotations.voc import read_voc
from unmask.data.decode import decode
from unmask.data.decode.bad_image import BadImage
from unmask.data.decode.image_header import Header
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.errors import listed

ROUNDING = 1.0  # Pixels that a box may extend outside its image without being reported.
CORNERS = 0.8  # Add a note if more than this share of the out-of-image boxes would fit if read as corners.
LEAST_INSIDE = 0.5  # Boxes with less than this share of their area inside the image are left out.
OUTSIDE, CUT, EMPTY, ASIDE = "outside", "cut", "empty", "aside"
REASONS = {
    OUTSIDE: "boxes lie mostly outside their image and are left out",
    CUT: "boxes extend outside their image and are clipped to it",
    EMPTY: "boxes without area are left out",
    ASIDE: "boxes of crowds or difficult objects are used neither for training nor for evaluation",
}


@dataclass
class BoxAnnotations:
    """The annotated images of `source` and their objects. Implements `image_reader.Annotations`.

    boxes, labels, sizes: by row, the boxes (n, 4) float32 and classes (n,) int64 of an image, and its size (H, W).
    aside: boxes and labels used neither for training nor for evaluation, by row.
    faults, faulty: for each reason in REASONS, the number of boxes and the names of their images.
    missing: names in the annotations, or in the split list, for which there is no annotated image.
    """

    source: Source
    classes: tuple[str, ...]
    boxes: dict[int, np.ndarray] = field(default_factory=dict)
    labels: dict[int, np.ndarray] = field(default_factory=dict)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    aside: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    faulty: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    split: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> np.ndarray:
        """Rows of the annotated images, sorted."""
        return np.array(sorted(self.boxes), np.int64)

    @property
    def most(self) -> int:
        """Largest number of boxes in one image, at least 1; the arrays of all images are padded to this length."""
        return max(1, *map(len, self.boxes.values()))

    def cut(
        self, row: int, size: tuple[int, int], box: np.ndarray, target: tuple[int, int], flip: bool
    ) -> dict[str, np.ndarray]:
        """Return `boxes` (most, 4) and `box_labels` (most,) of one image; see `image_reader.Annotations`."""
        if tuple(size) != self.sizes[row]:
            raise BadImage("CORRUPT", f"got {size[0]} x {size[1]} pixels; its boxes are for {self.sizes[row]}")
        moved, keep = augment.cut_boxes(self.boxes[row], box, target, flip)
        count = int(keep.sum())
        boxes, labels = np.zeros((self.most, 4), np.float32), np.full(self.most, NO_BOX, np.int64)
        boxes[:count], labels[:count] = moved[keep], self.labels[row][keep]
        return {"boxes": boxes, "box_labels": labels}

    def lines(self) -> list[str]:
        """Return a summary as text: counts, what was left out, and one line for each class."""
        total = sum(map(len, self.boxes.values()))
        lines = [
            f"{len(self.boxes)} annotated images, {total} boxes (at most {self.most} in an image), "
            f"{len(self.classes)} classes"
        ]
        if without := [name for row, name in enumerate(self.source.names) if row not in self.boxes]:
            why = (
                "without annotation" if self.split is None else f"that are not annotated or not in split {self.split!r}"
            )
            lines.append(f"{len(without)} images {why} are left out: {listed(without)}")
        if self.missing:
            lines.append(f"{len(self.missing)} images that are annotated or listed are missing: {listed(self.missing)}")
        lines += [f"{count} {REASONS[reason]}: {listed(self.faulty[reason])}" for reason, count in self.faults.items()]
        lines += self.notes
        labels = np.concatenate([np.zeros(0, np.int64), *self.labels.values()])
        number = np.bincount(labels, minlength=len(self.classes))
        images = np.zeros(len(self.classes), np.int64)
        for one in self.labels.values():
            images[np.unique(one)] += 1
        for name, boxes, there in zip(self.classes, number.tolist(), images.tolist(), strict=True):
            lines.append(f"  {boxes:6d} boxes in {there} images  {name}")
        return lines


def open_boxes(
    data: str | Path,
    annotations: str | Path | None = None,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    only: Collection[int] | None = None,
    console: Console | None = None,
) -> BoxAnnotations:
    """Open the images of DATA and the boxes around their objects; images without annotation are left out of `rows`.

    annotations: a COCO file or a folder of VOC files, or None to search the layouts in the module docstring.
    split: name of a list in ImageSets/Main.
    classes: names, in order, of the model evaluated on these images, or None to use the classes of the annotations.
    only: the rows to open, None for all.
    Raises BoxError, SourceError.
    """
    root = Path(data)
    images, found = find_files(root, None if annotations is None else Path(annotations))
    source = open_source(str(images))
    objects, names = read_coco(found) if found.is_file() else read_voc(found)
    rows, missing = pair(source, objects, found)
    every = rows
    if only is not None:
        rows = {row: key for row, key in rows.items() if row in only}
    if split is not None:
        selected = read_split(root / VOC_SPLITS / f"{split}.txt")
        rows = {row: key for row, key in rows.items() if stem_name(source.names[row]) in selected}
        missing = sorted(selected - {stem_name(source.names[row]) for row in rows})
        if not rows:
            raise BoxError(
                f"no annotated image of {source.name} is in the split {split!r}, which lists {listed(missing)}; "
                "expected file names without folder and extension"
            )
    if classes is None:
        used = {name for key in rows.values() for name in objects[key].names}
        names = [name for name in names if name in used] if found.is_dir() else names
    known = names if classes is None else [class_name(name) for name in classes]
    boxes = BoxAnnotations(source, tuple(known), missing=missing, split=split)
    heads: dict[int, Header] = {}
    with (console or Console(quiet=True)).progress("boxes", len(rows)) as bar:
        for done, row in enumerate(rows, 1):
            if (head := _header(source, row)) is not None:  # the scan reports unreadable images
                heads[row] = head
            bar.update(done)
    stored = _drawn_on_stored(boxes, heads, {row: objects[key] for row, key in every.items()})
    for row, head in heads.items():
        _add(boxes, row, objects[rows[row]], head, turn=row in stored)
    if corners_written_as_sizes((objects[rows[row]], head.full_size) for row, head in heads.items()) > CORNERS:
        boxes.notes.append(
            "the boxes outside their image would fit if they were corners (x1, y1, x2, y2), but COCO's bbox is x, y, "
            "width, height; convert them"
        )
    if not sum(map(len, boxes.boxes.values())):
        raise BoxError(f"{found} has no box for the {len(rows)} images of {source.name}; expected at least one")
    return boxes


def _header(source: Source, row: int) -> Header | None:
    try:
        return decode.header(source.read(row), source.reading)
    except BadImage:
        return None


def _drawn_on(objects: Objects, head: Header) -> DrawnOn | None:
    return drawn_on(
        objects.size, head, (float(objects.boxes[:, 3].max(initial=0)), float(objects.boxes[:, 2].max(initial=0)))
    )


def _drawn_on_stored(boxes: BoxAnnotations, heads: Mapping[int, Header], objects: Mapping[int, Objects]) -> set[int]:
    """Return the rows whose boxes refer to the stored pixels, and add a note about them.

    heads: headers of the images to open, by row. objects: annotations of all images by row; images that are not opened
    are consulted if the sizes of the opened ones do not decide. Raises BoxError if some boxes refer to displayed and
    others to stored pixels, and an image fits both.
    """
    found = {row: _drawn_on(objects[row], head) for row, head in heads.items()}
    stored = {row for row, where in found.items() if where is DrawnOn.STORED}
    unknown = [row for row, where in found.items() if where is DrawnOn.UNKNOWN]
    if unknown:
        others = (_header(boxes.source, row) for row in objects if row not in heads)
        every_kind = {*found.values()} | {
            _drawn_on(one, head)
            for one, head in zip((objects[row] for row in objects if row not in heads), others, strict=True)
            if head is not None
        }
        if {DrawnOn.SHOWN, DrawnOn.STORED} <= every_kind:
            raise BoxError(
                f"some boxes of {boxes.source.name} were drawn on the displayed images, others on the stored pixels; "
                f"for {boxes.source.names[unknown[0]]}, which has an EXIF orientation, this cannot be decided: save "
                "images upright, without an orientation tag, and annotate those"
            )
        if DrawnOn.STORED in every_kind:
            stored |= set(unknown)
        else:
            boxes.notes.append(
                f"{len(unknown)} images have an EXIF orientation that does not change their size; their boxes are "
                f"assumed to refer to the displayed image: {listed(boxes.source.names[row] for row in unknown)}"
            )
    if stored:
        boxes.notes.append(
            f"{len(stored)} images have an EXIF orientation, and their boxes, which refer to the stored pixels, are "
            f"rotated with them: {listed(boxes.source.names[row] for row in sorted(stored))}"
        )
    return stored


def _add(boxes: BoxAnnotations, row: int, objects: Objects, head: Header, *, turn: bool) -> None:
    """Add the objects of one image, and count those left out.

    turn: whether the boxes refer to the stored pixels and must be rotated. Raises BoxError for an unknown class, or if
    the image does not have the size that its annotation states.
    """
    name = boxes.source.names[row]
    size = head.full_size
    if turn:
        objects = objects._replace(size=size, boxes=turned_boxes(objects.boxes, head.orientation, size))
    if objects.size not in (None, size):
        raise BoxError(
            f"{name} has {size[0]} x {size[1]} pixels as displayed, but its annotation expects {objects.size[0]} x "
            f"{objects.size[1]}; use the images that were annotated, not resized or rotated copies"
        )
    if unknown := sorted({one for one in objects.names if one not in boxes.classes}):
        raise BoxError(
            f"{name} has an object of the unknown class {unknown[0]!r}; expected one of {len(boxes.classes)} classes "
            f"({listed(boxes.classes)}): remove it from the annotations, or train on data that contain it"
        )
    inside = objects.boxes.clip(0, [size[1], size[0]] * 2)
    out = np.abs(inside - objects.boxes).max(1, initial=0)
    area, left = _area(objects.boxes), _area(inside)
    fault = np.select(
        [area <= 0, left < LEAST_INSIDE * area, out > ROUNDING], [EMPTY, OUTSIDE, CUT], default=""
    )  # (n,) of text
    keep = (fault == "") | (fault == CUT)
    aside = keep & objects.aside
    met = Counter(fault[fault != ""].tolist()) + Counter({ASIDE: int(aside.sum())})
    for reason in met:
        boxes.faulty.setdefault(reason, []).append(name)
    boxes.faults.update(met)
    number = {one: i for i, one in enumerate(boxes.classes)}
    corners, labels = inside.astype(np.float32), np.array([number[one] for one in objects.names], np.int64)
    learned = keep & ~aside
    boxes.boxes[row], boxes.labels[row], boxes.sizes[row] = corners[learned], labels[learned], size
    if aside.any():
        boxes.aside[row] = corners[aside], labels[aside]


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)
