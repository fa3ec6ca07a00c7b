"""Boxes around objects, for detection: COCO's JSON, or Pascal VOC's XML (one file for each image).

Found by themselves: VOC as DATA/JPEGImages with DATA/Annotations, or an .xml beside each image; COCO as the only .json
of DATA, DATA/annotations or DATA/images, or, where DATA is called images, beside it. Otherwise the file or the folder
is named. With a split, the images are those that DATA/ImageSets/Main/SPLIT.txt lists.

Boxes are (x1, y1, x2, y2) in pixels of the image as it is shown, x1 and y1 at the left and upper edge of the first
pixel: COCO's (x, y, width, height) as they are, VOC's corners, which count from 1 and are themselves inside, less 1 at
the upper left. An image that is annotated and has no object stays, for there is something to learn from it. COCO's
crowds, which are no single object, and what VOC calls difficult are not learned from, and in a test it counts neither
for nor against a model whether it finds them, as in the published numbers. What lies outside its image or has no area
does not come in. All of it is counted.

Not here: what is learned from boxes (`tasks/detect.py`) and how well (`evals/`).
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from unmask.batch import NO_BOX
from unmask.console import Console
from unmask.data import augment, decode
from unmask.data.decode import BadImage
from unmask.data.sources import Source, open_source
from unmask.errors import UserError, some

VOC_IMAGES, VOC_BOXES, VOC_SPLITS = "JPEGImages", "Annotations", os.path.join("ImageSets", "Main")
COCO_IMAGES = "images"
COCO_FOLDERS, COCO_BESIDE = ("", "annotations", COCO_IMAGES), ("", "annotations")
ROUNDING = 1.0  # pixels that a box may stick out of its image without a word
LEAST_INSIDE = 0.5  # share of a box's area that lies in the image; boxes with less are left out
OUTSIDE, CUT, EMPTY, ASIDE = "outside", "cut", "empty", "aside"
REASONS = {
    OUTSIDE: "boxes lie for the most part outside their image and are left out",
    CUT: "boxes stick out of their image and are cut at its edge",
    EMPTY: "boxes without area are left out",
    ASIDE: "crowds of objects, or difficult ones, are neither learned from nor judged",
}


class BoxError(UserError):
    """Annotations that cannot be used; the message says what came, what was expected, and what to do."""


class Objects(NamedTuple):
    """What the annotations say of one image: its size (H, W), or None; (n, 4) float64 boxes, n names; which are set
    aside, (n,) bool."""

    size: tuple[int, int] | None
    boxes: np.ndarray
    names: list[str]
    aside: np.ndarray


@dataclass
class Boxes:
    """The images of `source` that are annotated, and their objects. Keeps the contract of `loader.Annotations`.

    `boxes`: for each such row (n, 4) float32, with `labels` (n,) int64 and `sizes` (H, W). `aside`: boxes and labels
    that are neither learned from nor judged, for rows that have such. `faults`: how many boxes were met for each of
    REASONS, and the images they were met in.
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

    @property
    def rows(self) -> np.ndarray:
        """Rows of images that are annotated, sorted."""
        return np.array(sorted(self.boxes), np.int64)

    @property
    def most(self) -> int:
        """Boxes of the image that has most; at least 1. What all are padded to."""
        return max(1, *map(len, self.boxes.values()))

    def cut(
        self, row: int, size: tuple[int, int], box: np.ndarray, target: tuple[int, int], flip: bool
    ) -> dict[str, np.ndarray]:
        """`boxes` (most, 4) and `box_labels` (most,) of one image; see `loader.Annotations`."""
        if tuple(size) != self.sizes[row]:
            raise BadImage("CORRUPT", f"{size[0]} x {size[1]} pixels, its boxes are for {self.sizes[row]}")
        moved, keep = augment.cut_boxes(self.boxes[row], box, target, flip)
        count = int(keep.sum())
        boxes, labels = np.zeros((self.most, 4), np.float32), np.full(self.most, NO_BOX, np.int64)
        boxes[:count], labels[:count] = moved[keep], self.labels[row][keep]
        return {"boxes": boxes, "box_labels": labels}

    def lines(self) -> list[str]:
        """What was found, for people: counts, what was left out, and one line for each class."""
        total = sum(map(len, self.boxes.values()))
        said = [f"{len(self.boxes)} annotated images, {total} boxes ({self.most} at most), {len(self.classes)} classes"]
        if without := [name for row, name in enumerate(self.source.names) if row not in self.boxes]:
            why = "without annotation" if self.split is None else f"outside the split {self.split!r}, or not annotated,"
            said.append(f"{len(without)} images {why} are left out: {some(without)}")
        if self.missing:
            said.append(f"{len(self.missing)} images that are annotated or listed are not there: {some(self.missing)}")
        said += [f"{count} {REASONS[reason]}: {some(self.faulty[reason])}" for reason, count in self.faults.items()]
        labels = np.concatenate([np.zeros(0, np.int64), *self.labels.values()])
        number = np.bincount(labels, minlength=len(self.classes))
        images = np.zeros(len(self.classes), np.int64)
        for one in self.labels.values():
            images[np.unique(one)] += 1
        for name, boxes, there in zip(self.classes, number.tolist(), images.tolist(), strict=True):
            said.append(f"  {boxes:6d} boxes in {there} images  {name}")
        return said


# ------------------------------------------------------------------------------------------------------------- opening


def open_boxes(
    data: str | Path,
    annotations: str | Path | None = None,
    *,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    only: Collection[int] | None = None,
    console: Console | None = None,
) -> Boxes:
    """The images of DATA and the boxes around their objects; images that are not annotated are left out of `rows`.

    annotations: a COCO file or a folder of VOC files, None where DATA is laid out as the module says. split: a list
    of ImageSets/Main. classes: names in order, of a model that is asked about these images; None takes those that
    occur. only: the rows that are wanted, None for all. Raises BoxError, SourceError.
    """
    root = Path(data)
    images, found = find_files(root, None if annotations is None else Path(annotations))
    source = open_source(str(images))
    said, names = read_coco(found) if found.is_file() else read_voc(found)
    rows, missing = pair(source, said, found)
    if only is not None:
        rows = {row: key for row, key in rows.items() if row in only}
    if split is not None:
        listed = read_split(root / VOC_SPLITS / f"{split}.txt")
        rows = {row: key for row, key in rows.items() if _name(source.names[row]) in listed}
        missing = sorted(listed - {_name(source.names[row]) for row in rows})
        if not rows:
            raise BoxError(
                f"no annotated image of {source.name} is in the split {split!r}, which lists {some(missing)}; names "
                "without folder and ending were expected"
            )
    if classes is None:
        used = {name for key in rows.values() for name in said[key].names}
        names = [name for name in names if name in used] if found.is_dir() else names
    boxes = Boxes(source, tuple(names if classes is None else classes), missing=missing, split=split)
    with (console or Console(quiet=True)).progress("boxes", len(rows)) as bar:
        for done, (row, key) in enumerate(rows.items(), 1):
            _add(boxes, row, said[key])
            bar.update(done)
    if not sum(map(len, boxes.boxes.values())):
        raise BoxError(f"{found} has no box for any of {len(rows)} images of {source.name}; at least one was expected")
    return boxes


def find_files(root: Path, annotations: Path | None) -> tuple[Path, Path]:
    """(images, COCO file or folder of XML). Raises BoxError where there is none, or more than one to choose from."""
    if annotations is not None:
        if not annotations.exists():
            raise BoxError(f"annotations {annotations} do not exist; a COCO .json or a folder of VOC .xml was expected")
        inside = root / VOC_IMAGES
        return inside if inside.is_dir() else root, annotations
    if (root / VOC_IMAGES).is_dir() and (root / VOC_BOXES).is_dir():
        return root / VOC_IMAGES, root / VOC_BOXES
    found = [file for folder in COCO_FOLDERS for file in sorted((root / folder).glob("*.json"))]
    if not found and root.name == COCO_IMAGES:
        found = [file for folder in COCO_BESIDE for file in sorted((root.parent / folder).glob("*.json"))]
    if len(found) > 1:
        raise BoxError(
            f"{len(found)} JSON files lie with {root}: {some([str(file) for file in found])}; one was expected, name "
            "it with --annotations"
        )
    if found:
        return root, found[0]
    if root.is_dir() and next(root.rglob("*.xml"), None) is not None:
        return root, root
    raise BoxError(
        f"no boxes were found for {root}; {root / VOC_BOXES} beside {root / VOC_IMAGES}, an .xml beside each image, or "
        f"one COCO .json in {root} or its folder annotations was expected, or a file or folder named with --annotations"
    )


def read_split(file: Path) -> set[str]:
    """The names, without ending, in a list of ImageSets/Main: the first word of each line. Raises BoxError."""
    try:
        words = [line.split() for line in file.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError):
        there = sorted(path.stem for path in file.parent.glob("*.txt")) if file.parent.is_dir() else []
        raise BoxError(
            f"the split list {file} does not exist or cannot be read; "
            + (f"choose one of {', '.join(there)}" if there else "a text file with an image name a line was expected")
        ) from None
    return {line[0] for line in words if line and line[1:] != ["-1"]}  # -1: VOC's word for images without that class


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _name(path: str) -> str:
    """Without folders and ending."""
    return _stem(path).rsplit("/", 1)[-1]


def pair(source: Source, said: Mapping[str, Objects], where: Path) -> tuple[dict[int, str], list[str]]:
    """(row of images -> key in `said`, keys without an image); by path, or else by name alone. Raises BoxError."""
    by_path = {_stem(name): row for row, name in enumerate(source.names)}
    by_name: dict[str, list[int]] = {}
    for row, name in enumerate(source.names):
        by_name.setdefault(_name(name), []).append(row)
    rows: dict[int, str] = {}
    missing: list[str] = []
    for key in said:
        row = by_path.get(_stem(key))
        if row is None:
            alike = by_name.get(_name(key), [])
            if len(alike) > 1:
                could = some((source.names[one] for one in alike), between=" or ")
                raise BoxError(
                    f"{key} of {where} could be {could}; point at the folder of one of them, or write their paths into "
                    "the annotations"
                )
            row = alike[0] if alike else None
        if row is None:
            missing.append(key)
        elif row in rows:
            raise BoxError(f"{rows[row]} and {key} of {where} are both for {source.names[row]}; take one away")
        else:
            rows[row] = key
    if not rows:
        raise BoxError(
            f"none of {len(said)} annotated images of {where} is in {source.name}: it speaks of {some(list(said))}, "
            f"there are {some(source.names)}"
        )
    return dict(sorted(rows.items())), missing


def _add(boxes: Boxes, row: int, said: Objects) -> None:
    """Take the objects of one image in, or note why not. Raises BoxError for another size or class than there is."""
    name = boxes.source.names[row]
    try:
        head = decode.header(boxes.source.read(row))
    except BadImage:  # for whoever scans the images to say
        return
    size = head.full_size
    if said.size not in (None, size):
        raise BoxError(
            f"{name} is shown with {size[0]} x {size[1]} pixels, but its annotation is for {said.size[0]} x "
            f"{said.size[1]}; the images that were annotated were expected, not resized or turned"
        )
    if strange := sorted({one for one in said.names if one not in boxes.classes}):
        raise BoxError(
            f"{name} has an object of class {strange[0]!r}, which is not among the {len(boxes.classes)} known "
            f"({some(boxes.classes)}); take it out of the annotations, or train on data that have it"
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


# --------------------------------------------------------------------------------------------------------- the formats


def read_coco(file: Path) -> tuple[dict[str, Objects], list[str]]:
    """(objects by the image's file name, names of the categories in the order of their ids). Raises BoxError."""
    expected = (
        "COCO's object detection was expected: {images: [{id, file_name}], categories: [{id, name}], annotations: "
        "[{image_id, category_id, bbox: [x, y, width, height]}]}"
    )
    try:
        read = json.loads(file.read_bytes())
        images = {one["id"]: one for one in read["images"]}
        categories = {one["id"]: str(one["name"]) for one in sorted(read["categories"], key=lambda one: one["id"])}
        found = [(one["image_id"], one["category_id"], one["bbox"], one.get("iscrowd")) for one in read["annotations"]]
        files = [str(one["file_name"]).replace("\\", "/") for one in images.values()]
    except KeyError as error:
        raise BoxError(f"{file} has no {error}; {expected}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BoxError(f"{file} cannot be read ({type(error).__name__}: {error}); {expected}") from None
    if len(set(categories.values())) < len(categories) or len(images) < len(read["images"]):
        raise BoxError(f"{file} has two categories of one name, or two images of one id; {expected}")
    if double := [name for name, count in Counter(files).items() if count > 1]:
        raise BoxError(f"{file} lists {double[0]} more than once; one entry for each image was expected")
    boxes: dict[Any, list[tuple[float, float, float, float]]] = {one: [] for one in images}
    names: dict[Any, list[str]] = {one: [] for one in images}
    crowds: dict[Any, list[bool]] = {one: [] for one in images}
    for image, category, box, crowd in found:
        if image not in images or category not in categories:
            raise BoxError(
                f"{file} has an object of image {image}, category {category}, which it does not list; {expected}"
            )
        x, y, width, height = _four(box, f"{file}: {images[image]['file_name']}")
        boxes[image].append((x, y, x + width, y + height))
        names[image].append(categories[category])
        crowds[image].append(bool(crowd))
    said = {
        name: Objects(
            _size(one.get("height"), one.get("width")), _array(boxes[key]), names[key], np.array(crowds[key], bool)
        )
        for name, (key, one) in zip(files, images.items(), strict=True)
    }
    return said, list(categories.values())


def read_voc(folder: Path) -> tuple[dict[str, Objects], list[str]]:
    """(objects by the XML file's path in the folder, names of the classes in alphabetical order). Raises BoxError."""
    said: dict[str, Objects] = {}
    for file in sorted(folder.rglob("*.xml")):
        try:
            said[file.relative_to(folder).as_posix()] = _voc(_parse(file), file)
        except (OSError, ElementTree.ParseError, UnicodeDecodeError, LookupError) as error:
            raise BoxError(f"{file} cannot be read: {error}; an XML file of Pascal VOC was expected") from None
    if not said:
        raise BoxError(f"{folder} holds no .xml; a folder of Pascal VOC's XML was expected, a file for each image")
    return said, sorted({name for one in said.values() for name in one.names})


def _parse(file: Path) -> ElementTree.Element:
    """The tree of an XML file. A document type is refused: its entities can make gigabytes of a few lines."""
    content = file.read_bytes()
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise BoxError(f"{file} declares a document type or entities, which VOC's files have not; take them out")
    return ElementTree.fromstring(content)


def _voc(root: ElementTree.Element, file: Path) -> Objects:
    boxes, names, difficult = [], [], []
    for one in root.iter("object"):
        name = (one.findtext("name") or "").strip()
        corners = [one.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
        if not name or None in corners:
            raise BoxError(f"{file} has an object without name or bndbox; VOC's xmin, ymin, xmax, ymax were expected")
        x1, y1, x2, y2 = _four(corners, str(file))
        boxes.append((x1 - 1, y1 - 1, x2, y2))
        names.append(name)
        difficult.append((one.findtext("difficult") or "0").strip() == "1")
    size = _size(root.findtext("size/height"), root.findtext("size/width"))
    return Objects(size, _array(boxes), names, np.array(difficult, bool))


def _four(values: Any, where: str) -> tuple[float, float, float, float]:
    try:
        a, b, c, d = map(float, values)
    except (TypeError, ValueError):
        a = b = c = d = math.nan
    if not all(map(math.isfinite, (a, b, c, d))):
        raise BoxError(f"{where} has the box {values}; four numbers were expected")
    return a, b, c, d


def _size(height: Any, width: Any) -> tuple[int, int] | None:
    """(H, W), or None where it is not said: some tools write nothing or zeros."""
    try:
        size = int(height), int(width)
    except (TypeError, ValueError):
        return None
    return size if min(size) > 0 else None


def _array(boxes: Iterable[tuple[float, float, float, float]]) -> np.ndarray:
    return np.array(list(boxes), np.float64).reshape(-1, 4)
