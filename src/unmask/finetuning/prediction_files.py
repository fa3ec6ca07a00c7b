"""Write predictions to files: a table of classes, a folder of masks, or boxes in COCO's format.

The task determines the writer (`Task.annotation`). Several processes may predict: each of them makes the contents of
its images (`Writer.content`), and one process writes all contents in order.

- classes: a table with `path`, `class`, `probability` of that class, and the probability of every class, as .csv, .json
  or .parquet. In .csv, texts that a spreadsheet would run as a formula get an apostrophe (`data/files/csv_cells.py`).
- masks: one palette PNG per image in the size of the image, with the ids of the training masks, and `classes.txt`. If
  file names had to change (`data/files/safe_names.py`), `files.json` maps images to masks.
- boxes: COCO's `images`, `categories` and `annotations` with a `score`, in pixels of the file.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from unmask.data.annotations.mask_folders import CLASSES_FILE
from unmask.data.files.csv_cells import marked
from unmask.data.files.safe_names import safe_names
from unmask.errors import UserError, name_in_errors
from unmask.system.atomic_files import replace_file
from unmask.task import Annotation, TaskConfig
from unmask.tasks.detect import LEAST_SCORE, Found
from unmask.tasks.segment import colour_table

T = TypeVar("T")

TABLES = (".csv", ".json", ".parquet")
FILES_FILE = "files.json"


class Predicted(NamedTuple):
    """Prediction for one image. row, name: the image's row and name in the source. size: (H, W) of the file."""

    row: int
    name: str
    size: tuple[int, int]
    prediction: Any


class Written(NamedTuple):
    """Result of writing predictions.

    images: number of images. classes: number of images, pixels or boxes of each class.
    """

    images: int
    classes: dict[str, int]


@dataclass(frozen=True)
class PredictionFile:
    """Where and how to write predictions.

    out: file or folder. classes: names of the classes. settings: settings of the task. images: names of all images of
    the source. min_score: minimum score of the written boxes.
    """

    out: Path
    classes: list[str]
    settings: TaskConfig
    images: list[str]
    min_score: float = LEAST_SCORE

    @cached_property
    def mask_ids(self) -> np.ndarray:
        """The id of each class in masks: uint8, or uint16 if an id is larger than 255 (then PNGs have no palette)."""
        numbers = list(self.settings.class_ids)
        return np.array(numbers, np.uint8 if max(numbers) < 256 else np.uint16)

    @cached_property
    def palette(self) -> bytes:
        return mask_palette(self.mask_ids)


class Writer(Protocol[T]):
    """Writes predictions in one format. T: the content of one image; it can be pickled.

    unit: what the class counts refer to, such as "pixels". folder: whether `out` is a folder.
    """

    unit: ClassVar[str]
    folder: ClassVar[bool]
    endings: ClassVar[tuple[str, ...]]

    def content(self, file: PredictionFile, one: Predicted) -> T:
        """Return what is written for one image."""
        ...

    def write(self, file: PredictionFile, contents: Iterable[T]) -> Written:
        """Write the contents of all images. Files are written atomically."""
        ...


@dataclass(frozen=True)
class ClassTable:
    """Writes a table with one row per image. Each prediction is (K,) probabilities."""

    unit: ClassVar[str] = ""
    folder: ClassVar[bool] = False
    endings: ClassVar[tuple[str, ...]] = TABLES

    def content(self, file: PredictionFile, one: Predicted) -> dict[str, Any]:
        share = one.prediction.cpu().numpy()
        best = file.classes[int(share.argmax())]
        each = {f"p({name})": float(value) for name, value in zip(file.classes, share, strict=True)}
        return {"path": one.name, "class": best, "probability": float(share.max()), **each}

    def write(self, file: PredictionFile, contents: Iterable[dict[str, Any]]) -> Written:
        rows = list(contents)
        write_rows(file.out, rows)
        return Written(len(rows), dict(Counter(row["class"] for row in rows)))


class Mask(NamedTuple):
    """The mask of one image. row: the image's row. png: the file. counts: number of pixels of each class."""

    row: int
    png: bytes
    counts: np.ndarray


@dataclass(frozen=True)
class MaskFolder:
    """Writes one PNG per image. Each prediction is (H, W) class numbers."""

    unit: ClassVar[str] = "pixels of "
    folder: ClassVar[bool] = True
    endings: ClassVar[tuple[str, ...]] = ()

    def content(self, file: PredictionFile, one: Predicted) -> Mask:
        found = one.prediction.cpu().numpy()
        picture = Image.fromarray(file.mask_ids[found])
        if file.mask_ids.dtype == np.uint8:
            picture.putpalette(file.palette)
        png = io.BytesIO()
        picture.save(png, "PNG")
        return Mask(one.row, png.getvalue(), np.bincount(found.ravel(), minlength=len(file.classes)))

    def write(self, file: PredictionFile, contents: Iterable[Mask]) -> Written:
        names, ids = file.classes, file.mask_ids
        done, counts = 0, np.zeros(len(names), np.int64)
        places = safe_names(file.images, ".png")
        if renamed := {name: to for name, to in zip(file.images, places, strict=True) if not _plain(name, to)}:
            replace_file(file.out / FILES_FILE, json.dumps(renamed, indent=1).encode())
        for one in contents:
            place = file.out / places[one.row]
            place.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(place, one.png)
            counts += one.counts
            done += 1
        lines = ["(no class)"] * (int(ids.max()) + 1)
        for number, name in zip(ids.tolist(), names, strict=True):
            lines[number] = name
        (file.out / CLASSES_FILE).write_text("\n".join(lines) + "\n", "utf-8")
        return Written(done, {name: int(count) for name, count in zip(names, counts, strict=True) if count})


class Boxes(NamedTuple):
    """The boxes of one image. image: its entry in COCO's `images`. boxes: its annotations, without ids."""

    image: dict[str, Any]
    boxes: list[dict[str, Any]]


@dataclass(frozen=True)
class BoxFile:
    """Writes COCO's JSON. Each prediction is a `tasks.detect.Found` with the best box first."""

    unit: ClassVar[str] = "boxes of "
    folder: ClassVar[bool] = False
    endings: ClassVar[tuple[str, ...]] = (".json",)

    def content(self, file: PredictionFile, one: Predicted) -> Boxes:
        height, width = one.size
        found: Found = one.prediction
        boxes = []
        for (x1, y1, x2, y2), label, score in zip(
            *(part.tolist() for part in (found.boxes, found.labels, found.scores)), strict=True
        ):
            if score < file.min_score:
                break  # best first
            box = {"image_id": one.row, "category_id": label, "score": score}
            boxes.append(box | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        return Boxes({"id": one.row, "file_name": one.name, "height": height, "width": width}, boxes)

    def write(self, file: PredictionFile, contents: Iterable[Boxes]) -> Written:
        counts, images, annotations = Counter[str](), [], list[dict[str, Any]]()
        for one in contents:
            images.append(one.image)
            for box in one.boxes:
                annotations.append({"id": len(annotations), **box})
                counts[file.classes[box["category_id"]]] += 1
        categories = [{"id": number, "name": name} for number, name in enumerate(file.classes)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        replace_file(file.out, json.dumps(content).encode())
        return Written(len(images), dict(counts))


WRITERS: dict[Annotation, Writer[Any]] = {"classes": ClassTable(), "masks": MaskFolder(), "boxes": BoxFile()}


def mask_palette(ids: np.ndarray) -> bytes:
    """Return a PNG palette as RGB bytes, with a colour for each class id and black for other numbers."""
    palette = np.zeros((max(256, int(ids.max()) + 1), 3), np.uint8)
    palette[ids] = (255 * colour_table(len(ids)).numpy()).round().astype(np.uint8)
    return palette.tobytes()


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file, and delete it if that fails."""
    try:
        with name_in_errors(path):
            path.write_bytes(content)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _plain(name: str, file: str) -> bool:
    """Return whether a mask file has the name of its image, except for the ending."""
    return name.rpartition(".")[0] + ".png" == file or name + ".png" == file


def require_out(out: Path, writer: Writer[Any]) -> None:
    """Raise UserError if `out` does not fit the predictions or cannot be written to.

    `unmask predict` calls this before it reads images, because reading may take hours.
    """
    if not writer.folder and out.suffix not in writer.endings:
        raise UserError(
            f"got output file {out}; expected a name that ends in {', '.join(writer.endings)}; choose another --out"
        )
    if writer.folder and out.suffix in (*TABLES, ".png"):
        raise UserError(f"got output {out}; expected the name of a folder for the masks; choose another --out")
    if writer.folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"got output folder {out}, which is not empty; expected a new folder for the masks; choose another --out"
        )
    parent = out.resolve().parent
    if not parent.is_dir():
        raise UserError(f"the folder {parent} does not exist; create it, or choose another --out")
    if not writer.folder and out.is_dir():
        raise UserError(f"got output file {out}, which is a folder; give the name of a file in it")
    try:
        if writer.folder:
            out.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=out if writer.folder else parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table atomically, in the format of the file ending."""
    if out.suffix == ".json":
        content = json.dumps(rows, indent=1).encode()
    elif out.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([marked(name) for name in rows[0]])
        writer.writerows([marked(value) for value in row.values()] for row in rows)
        content = text.getvalue().encode("utf-8", "backslashreplace")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
    replace_file(out, content)
