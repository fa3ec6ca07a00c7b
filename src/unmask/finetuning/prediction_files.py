"""Write predictions to files: a table of classes, a folder of masks, or boxes in COCO's format.

The task determines the writer (`Task.annotation`):

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
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

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


class Writer(Protocol):
    """Writes predictions in one format.

    unit: what the class counts refer to, such as "pixels". folder: whether `out` is a folder.
    """

    unit: ClassVar[str]
    folder: ClassVar[bool]
    endings: ClassVar[tuple[str, ...]]

    def write(self, file: PredictionFile, predictions: Iterable[Predicted]) -> Written:
        """Write all predictions. Files are written atomically."""
        ...


@dataclass(frozen=True)
class ClassTable:
    """Writes a table with one row per image. Each prediction is (K,) probabilities."""

    unit: ClassVar[str] = ""
    folder: ClassVar[bool] = False
    endings: ClassVar[tuple[str, ...]] = TABLES

    def write(self, file: PredictionFile, predictions: Iterable[Predicted]) -> Written:
        rows, counts = [], Counter[str]()
        for one in predictions:
            share = one.prediction.cpu().numpy()
            best = file.classes[int(share.argmax())]
            each = {f"p({name})": float(value) for name, value in zip(file.classes, share, strict=True)}
            rows.append({"path": one.name, "class": best, "probability": float(share.max()), **each})
            counts[best] += 1
        write_rows(file.out, rows)
        return Written(len(rows), dict(counts))


@dataclass(frozen=True)
class MaskFolder:
    """Writes one PNG per image. Each prediction is (H, W) class numbers."""

    unit: ClassVar[str] = "pixels of "
    folder: ClassVar[bool] = True
    endings: ClassVar[tuple[str, ...]] = ()

    def write(self, file: PredictionFile, predictions: Iterable[Predicted]) -> Written:
        names = file.classes
        numbers = list(file.settings.class_ids)
        ids = np.array(numbers, np.uint8 if max(numbers) < 256 else np.uint16)  # 16-bit PNGs have no palette
        palette = mask_palette(ids)
        done, counts = 0, np.zeros(len(names), np.int64)
        places = safe_names(file.images, ".png")
        if renamed := {name: to for name, to in zip(file.images, places, strict=True) if not _plain(name, to)}:
            replace_file(file.out / FILES_FILE, json.dumps(renamed, indent=1).encode())
        for one in predictions:
            found = one.prediction.cpu().numpy()
            picture = Image.fromarray(ids[found])
            if ids.dtype == np.uint8:
                picture.putpalette(palette)
            place = file.out / places[one.row]
            place.parent.mkdir(parents=True, exist_ok=True)
            with name_in_errors(place):
                picture.save(place)
            counts += np.bincount(found.ravel(), minlength=len(names))
            done += 1
        lines = ["(no class)"] * (int(ids.max()) + 1)
        for number, name in zip(ids.tolist(), names, strict=True):
            lines[number] = name
        (file.out / CLASSES_FILE).write_text("\n".join(lines) + "\n", "utf-8")
        return Written(done, {name: int(count) for name, count in zip(names, counts, strict=True) if count})


@dataclass(frozen=True)
class BoxFile:
    """Writes COCO's JSON. Each prediction is a `tasks.detect.Found` with the best box first."""

    unit: ClassVar[str] = "boxes of "
    folder: ClassVar[bool] = False
    endings: ClassVar[tuple[str, ...]] = (".json",)

    def write(self, file: PredictionFile, predictions: Iterable[Predicted]) -> Written:
        counts, images, annotations = Counter[str](), [], list[dict[str, Any]]()
        for one in predictions:
            height, width = one.size
            images.append({"id": one.row, "file_name": one.name, "height": height, "width": width})
            found: Found = one.prediction
            for (x1, y1, x2, y2), label, score in zip(
                *(part.tolist() for part in (found.boxes, found.labels, found.scores)), strict=True
            ):
                if score < file.min_score:
                    break  # best first
                box = {"id": len(annotations), "image_id": one.row, "category_id": label, "score": score}
                annotations.append(box | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
                counts[file.classes[label]] += 1
        categories = [{"id": number, "name": name} for number, name in enumerate(file.classes)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        replace_file(file.out, json.dumps(content).encode())
        return Written(len(images), dict(counts))


WRITERS: dict[Annotation, Writer] = {"classes": ClassTable(), "masks": MaskFolder(), "boxes": BoxFile()}


def mask_palette(ids: np.ndarray) -> bytes:
    """Return a PNG palette as RGB bytes, with a colour for each class id and black for other numbers."""
    palette = np.zeros((max(256, int(ids.max()) + 1), 3), np.uint8)
    palette[ids] = (255 * colour_table(len(ids)).numpy()).round().astype(np.uint8)
    return palette.tobytes()


def _plain(name: str, file: str) -> bool:
    """Return whether a mask file has the name of its image, except for the ending."""
    return name.rpartition(".")[0] + ".png" == file or name + ".png" == file


def require_out(out: Path, writer: Writer) -> None:
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
