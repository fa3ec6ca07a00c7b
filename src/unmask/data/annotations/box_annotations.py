"""Boxes around objects, for detection, from COCO's JSON or Pascal VOC's XML (one file for each image).

Found automatically (`box_files.py`): VOC as DATA/JPEGImages with DATA/Annotations, or an .xml beside each image; COCO
as the only .json of DATA, DATA/annotations or DATA/images, or beside DATA where it is called images. Otherwise the file
or folder is given. With a split, the images are those listed in DATA/ImageSets/Main/SPLIT.txt.

Boxes are (x1, y1, x2, y2) in pixels of the displayed image, with (0, 0) at the upper left corner of the first pixel:
COCO's (x, y, width, height) converted, and VOC's corners, which count from 1 and are inclusive, less 1 at the upper
left. Annotated images without objects are training images too. COCO's crowds and VOC's difficult objects are not
trained on, and detections of them count neither for nor against a model, as in published results. Boxes outside their
image or without area are left out; all of these are counted. Boxes on the stored pixels of images with an EXIF
orientation are rotated with the image (`orientation.py`).
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
from unmask.errors import some

ROUNDING = 1.0  # pixels that a box may extend beyond its image unreported
CORNERS = 0.8  # share of the boxes outside their image from which they are reported as corners
LEAST_INSIDE = 0.5  # share of a box's area that lies in the image; boxes with less are left out
OUTSIDE, CUT, EMPTY, ASIDE = "outside", "cut", "empty", "aside"
REASONS = {
    OUTSIDE: "boxes lie mostly outside their image and are left out",
    CUT: "boxes extend beyond their image and are clipped at its edge",
    EMPTY: "boxes without area are left out",
    ASIDE: "boxes of crowds or difficult objects are used neither for training nor for evaluation",
}


@dataclass
class BoxAnnotations:
    """The annotated images of `source` and their objects. Implements `image_reader.Annotations`.

    `boxes`: for each such row (n, 4) float32, with `labels` (n,) int64 and `sizes` (H, W). `aside`: boxes and labels
    used neither for training nor for evaluation, by row. `faults`, `faulty`: number of boxes, and names of the images,
    for each of REASONS.
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
        """Rows of images that are annotated, sorted."""
        return np.array(sorted(self.boxes), np.int64)

    @property
    def most(self) -> int:
        """The largest number of boxes of an image, at least 1: all images are padded to it."""
        return max(1, *map(len, self.boxes.values()))

    def cut(
        self, row: int, size: tuple[int, int], box: np.ndarray, target: tuple[int, int], flip: bool
    ) -> dict[str, np.ndarray]:
        """Return `boxes` (most, 4) and `box_labels` (most,) of one image; see `image_reader.Annotations`."""
        if tuple(size) != self.sizes[row]:
            raise BadImage("CORRUPT", f"{size[0]} x {size[1]} pixels, its boxes are for {self.sizes[row]}")
        moved, keep = augment.cut_boxes(self.boxes[row], box, target, flip)
        count = int(keep.sum())
        boxes, labels = np.zeros((self.most, 4), np.float32), np.full(self.most, NO_BOX, np.int64)
        boxes[:count], labels[:count] = moved[keep], self.labels[row][keep]
        return {"boxes": boxes, "box_labels": labels}

    def lines(self) -> list[str]:
        """Return a summary as text: counts, what was left out, and one line for each class."""
        total = sum(map(len, self.boxes.values()))
        said = [f"{len(self.boxes)} annotated images, {total} boxes ({self.most} at most), {len(self.classes)} classes"]
        if without := [name for row, name in enumerate(self.source.names) if row not in self.boxes]:
            why = "without annotation" if self.split is None else f"outside the split {self.split!r}, or not annotated,"
            said.append(f"{len(without)} images {why} are left out: {some(without)}")
        if self.missing:
            said.append(f"{len(self.missing)} images that are annotated or listed are missing: {some(self.missing)}")
        said += [f"{count} {REASONS[reason]}: {some(self.faulty[reason])}" for reason, count in self.faults.items()]
        said += self.notes
        labels = np.concatenate([np.zeros(0, np.int64), *self.labels.values()])
        number = np.bincount(labels, minlength=len(self.classes))
        images = np.zeros(len(self.classes), np.int64)
        for one in self.labels.values():
            images[np.unique(one)] += 1
        for name, boxes, there in zip(self.classes, number.tolist(), images.tolist(), strict=True):
            said.append(f"  {boxes:6d} boxes in {there} images  {name}")
        return said


def open_boxes(
    data: str | Path,
    annotations: str | Path | None = None,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    only: Collection[int] | None = None,
    console: Console | None = None,
) -> BoxAnnotations:
    """Return the images of DATA and the boxes around their objects; images without annotation are left out of `rows`.

    annotations: a COCO file or a folder of VOC files, None where DATA is laid out as the module says. split: a list
    of ImageSets/Main. classes: names in order, of a model evaluated on these images; None takes those that
    occur. only: the rows to open, None for all. Raises BoxError, SourceError.
    """
    root = Path(data)
    images, found = find_files(root, None if annotations is None else Path(annotations))
    source = open_source(str(images))
    said, names = read_coco(found) if found.is_file() else read_voc(found)
    rows, missing = pair(source, said, found)
    every = rows
    if only is not None:
        rows = {row: key for row, key in rows.items() if row in only}
    if split is not None:
        listed = read_split(root / VOC_SPLITS / f"{split}.txt")
        rows = {row: key for row, key in rows.items() if stem_name(source.names[row]) in listed}
        missing = sorted(listed - {stem_name(source.names[row]) for row in rows})
        if not rows:
            raise BoxError(
                f"no annotated image of {source.name} is in the split {split!r}, which lists {some(missing)}; expected "
                "names without folder and ending"
            )
    if classes is None:
        used = {name for key in rows.values() for name in said[key].names}
        names = [name for name in names if name in used] if found.is_dir() else names
    known = names if classes is None else [class_name(name) for name in classes]
    boxes = BoxAnnotations(source, tuple(known), missing=missing, split=split)
    heads: dict[int, Header] = {}
    with (console or Console(quiet=True)).progress("boxes", len(rows)) as bar:
        for done, row in enumerate(rows, 1):
            if (head := _header(source, row)) is not None:  # the scan reports bad images
                heads[row] = head
            bar.update(done)
    stored = _drawn_on_stored(boxes, heads, {row: said[key] for row, key in every.items()})
    for row, head in heads.items():
        _add(boxes, row, said[rows[row]], head, turn=row in stored)
    if corners_written_as_sizes((said[rows[row]], head.full_size) for row, head in heads.items()) > CORNERS:
        boxes.notes.append(
            "the boxes that leave their image would fit if they were corners (x1, y1, x2, y2); COCO's bbox is x, y, "
            "width, height: convert them"
        )
    if not sum(map(len, boxes.boxes.values())):
        raise BoxError(f"{found} has no box for any of {len(rows)} images of {source.name}; expected at least one")
    return boxes


def _header(source: Source, row: int) -> Header | None:
    try:
        return decode.header(source.read(row), source.reading)
    except BadImage:
        return None


def _drawn_on(said: Objects, head: Header) -> DrawnOn | None:
    return drawn_on(said.size, head, (float(said.boxes[:, 3].max(initial=0)), float(said.boxes[:, 2].max(initial=0))))


def _drawn_on_stored(boxes: BoxAnnotations, heads: Mapping[int, Header], said: Mapping[int, Objects]) -> set[int]:
    """Return the rows whose boxes refer to stored pixels, and add a note. Raises BoxError where that is undecidable.

    heads: headers of the rows to open. said: objects of all annotated rows, which decide where those rows do not.
    """
    found = {row: _drawn_on(said[row], head) for row, head in heads.items()}
    stored = {row for row, where in found.items() if where is DrawnOn.STORED}
    unknown = [row for row, where in found.items() if where is DrawnOn.UNKNOWN]
    if unknown:
        others = (_header(boxes.source, row) for row in said if row not in heads)
        told = {*found.values()} | {
            _drawn_on(one, head)
            for one, head in zip((said[row] for row in said if row not in heads), others, strict=True)
            if head is not None
        }
        if {DrawnOn.SHOWN, DrawnOn.STORED} <= told:
            raise BoxError(
                f"some boxes of {boxes.source.name} were drawn on images as shown, others on their stored pixels, and "
                f"of {boxes.source.names[unknown[0]]}, which has an EXIF orientation, it cannot be decided; write "
                "upright images without orientation, and their boxes"
            )
        if DrawnOn.STORED in told:
            stored |= set(unknown)
        else:
            boxes.notes.append(
                f"{len(unknown)} images have an EXIF orientation that does not change their size; their boxes are "
                f"taken as drawn on the image as shown: {some(boxes.source.names[row] for row in unknown)}"
            )
    if stored:
        boxes.notes.append(
            f"{len(stored)} images have an EXIF orientation, and their boxes were drawn on the stored pixels: they "
            f"are rotated with their image: {some(boxes.source.names[row] for row in sorted(stored))}"
        )
    return stored


def _add(boxes: BoxAnnotations, row: int, said: Objects, head: Header, *, turn: bool) -> None:
    """Add the objects of one image, or count why not. Raises BoxError for a wrong size or an unknown class.

    turn: the boxes are in stored pixels.
    """
    name = boxes.source.names[row]
    size = head.full_size
    if turn:
        said = said._replace(size=size, boxes=turned_boxes(said.boxes, head.orientation, size))
    if said.size not in (None, size):
        raise BoxError(
            f"{name} is shown with {size[0]} x {size[1]} pixels, but its annotation is for {said.size[0]} x "
            f"{said.size[1]}; give the images that were annotated, not resized or rotated ones"
        )
    if strange := sorted({one for one in said.names if one not in boxes.classes}):
        raise BoxError(
            f"{name} has an object of class {strange[0]!r}, which is not among the {len(boxes.classes)} known "
            f"({some(boxes.classes)}); remove it from the annotations, or train on data that contain it"
        )
    inside = said.boxes.clip(0, [size[1], size[0]] * 2)
    out = np.abs(inside - said.boxes).max(1, initial=0)
    area, left = _area(said.boxes), _area(inside)
    fault = np.select(
        [area <= 0, left < LEAST_INSIDE * area, out > ROUNDING], [EMPTY, OUTSIDE, CUT], default=""
    )  # (n,) of text
    keep = (fault == "") | (fault == CUT)
    aside = keep & said.aside
    met = Counter(fault[fault != ""].tolist()) + Counter({ASIDE: int(aside.sum())})
    for reason in met:
        boxes.faulty.setdefault(reason, []).append(name)
    boxes.faults.update(met)
    number = {one: i for i, one in enumerate(boxes.classes)}
    corners, labels = inside.astype(np.float32), np.array([number[one] for one in said.names], np.int64)
    learned = keep & ~aside
    boxes.boxes[row], boxes.labels[row], boxes.sizes[row] = corners[learned], labels[learned], size
    if aside.any():
        boxes.aside[row] = corners[aside], labels[aside]


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)
