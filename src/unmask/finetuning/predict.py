"""`unmask predict RUN IMAGES --out`: what a fine-tuned Run says of images, with the names that it learnt.

Classes: one row for each image, in a .csv, .json or .parquet file: `path`, `class`, `probability` of it, and the
probability of every class. In .csv a text that a spreadsheet would run as a formula is marked with an apostrophe
(`data/csv_cells.py`). Masks: a folder with a palette PNG for each image, of its own size, whose stored numbers are the
ids of the masks it learnt from, and `classes.txt`; where a mask cannot have its image's name (`data/safe_names.py`),
`files.json` says which is whose. Boxes: one .json in COCO's format (`images`, `categories`, and
`annotations` with a `score`), in pixels of the file; the many with low scores serve to measure precision, for people
`least` leaves them out.

Images are seen as in the tests, with nothing random. What cannot be read is named and left out.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unmask.console import Console
from unmask.data.class_names import class_name
from unmask.data.csv_cells import marked
from unmask.data.decode import decode
from unmask.data.decode.decode import BadImage
from unmask.data.safe_names import safe_names
from unmask.data.segmentation_masks import CLASSES_FILE, first_ids
from unmask.data.sources.open_source import Source
from unmask.data.sources.pages import read_as
from unmask.engine.device import autocast, choose_device
from unmask.engine.load import Loaded, load
from unmask.errors import UserError, naming
from unmask.evals.images import Readable, eval_precision, read
from unmask.evals.reconstruct import open_images
from unmask.finetuning.test_set import as_numpy
from unmask.metrics.mean_iou import classes_at
from unmask.run import replace_file
from unmask.tasks import classify, detect, segment
from unmask.tasks.detect import LEAST_SCORE

TABLES = (".csv", ".json", ".parquet")
FILES_FILE = "files.json"


def predict(
    run: Path,
    images: Sequence[str],
    out: Path,
    *,
    step: int | None,
    device: str,
    console: Console,
    least: float = LEAST_SCORE,
) -> dict[str, Any]:
    """Write `out` and return what --json prints. least: score of a box below which it is left out.

    Raises ValueError for a Run that has not been fine-tuned.
    """
    loaded = load(run, device=choose_device(device), step=step)
    if not isinstance(loaded.method, classify.Classifier | segment.Segmenter | detect.Detector):
        raise UserError(
            f"{run} is a run of {loaded.config.method.name}, which does not predict; fine-tune it first: unmask "
            f"finetune {run} DATA"
        )
    endings = {classify.Classifier: TABLES, detect.Detector: (".json",)}.get(type(loaded.method), ())
    if endings and out.suffix not in endings:
        raise UserError(f"output file {out} came; a name that ends in {', '.join(endings)} was expected")
    if not endings and out.suffix in (*TABLES, ".png"):
        raise UserError(f"output {out} came; the name of a folder for the masks was expected")
    if least != LEAST_SCORE and not isinstance(loaded.method, detect.Detector):
        raise UserError(f"--min-score {least:g} came, but only boxes have scores to leave out by; leave it out")
    if not LEAST_SCORE <= least <= 1:
        raise UserError(f"--min-score {least:g} came; a score from {LEAST_SCORE} to 1 was expected")
    if not endings and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output folder {out} is not empty; name a new folder for the masks")
    require_writable(out, folder=not endings)
    source = read_as(open_images(images), loaded.plan.reading)
    whole = not isinstance(loaded.method, classify.Classifier)
    seen = Readable(
        source, np.arange(len(source)), loaded.plan.images, loaded.config.data.crop, training=False, whole=whole
    )
    with (
        torch.inference_mode(),
        autocast(eval_precision(loaded), loaded.device),
        console.progress("predicting", len(source)) as bar,
    ):
        batches = read(seen, np.arange(len(source)), 0, console, bar)
        write = {
            classify.Classifier: classes, segment.Segmenter: masks, detect.Detector: partial(boxes, least=least),
        }[type(loaded.method)]  # fmt: skip
        done, found = write(loaded, source, batches, out)
    commonest = sorted(found.items(), key=lambda pair: -pair[1])[:6]
    what = {classify.Classifier: "", segment.Segmenter: "pixels of ", detect.Detector: "boxes of "}[type(loaded.method)]
    console.say(f"{out}: {done} images: " + ", ".join(f"{number:,} {what}{label}" for label, number in commonest))
    if isinstance(loaded.method, detect.Detector) and least == LEAST_SCORE:
        console.say(
            "  all boxes down to a score of 0.05, as average precision needs them; for the surest: --min-score 0.3"
        )
    return {"out": str(out), "images": done, "left_out": len(source) - done, "classes": found}


def names_of(loaded: Loaded) -> list[str]:
    """The classes, safe to write anywhere; names of several (ImageNet's two cranes) get their number behind them."""
    names = [class_name(name) for name in loaded.config.method.model_dump()["classes"]]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def classes(loaded: Loaded, source: Source, batches: Any, out: Path) -> tuple[int, dict[str, int]]:
    """A table of probabilities; returns how many images, and how many of each class."""
    assert isinstance(loaded.method, classify.Classifier)
    names, rows, counts = names_of(loaded), [], Counter[str]()
    for batch in batches:
        shares = loaded.method.logits(batch.images.to(loaded.device)).softmax(1).cpu().numpy()
        for row, share in zip(batch.index.tolist(), shares, strict=True):
            best = names[int(share.argmax())]
            each = {f"p({name})": float(value) for name, value in zip(names, share, strict=True)}
            rows.append({"path": source.names[row], "class": best, "probability": float(share.max()), **each})
            counts[best] += 1
    write_rows(out, rows)
    return len(rows), dict(counts)


def masks(loaded: Loaded, source: Source, batches: Any, out: Path) -> tuple[int, dict[str, int]]:
    """A mask for each image; returns how many images, and how many pixels of each class."""
    assert isinstance(loaded.method, segment.Segmenter)
    names, settings = names_of(loaded), loaded.config.method.model_dump()
    numbers = list(settings["values"] or first_ids(len(names), settings["ignored"]))
    ids = np.array(numbers, np.uint8 if max(numbers) < 256 else np.uint16)  # beyond a byte there is no palette
    palette = np.zeros((max(256, max(numbers) + 1), 3), np.uint8)
    palette[ids] = (255 * segment.colour_table(len(names)).numpy()).round().astype(np.uint8)
    done, counts = 0, np.zeros(len(names), np.int64)
    files = safe_names(source.names, ".png")
    if renamed := {name: file for name, file in zip(source.names, files, strict=True) if not _plain(name, file)}:
        replace_file(out / FILES_FILE, json.dumps(renamed, indent=1).encode())
    for batch in batches:
        for row, scores in zip(batch.index.tolist(), loaded.method.logits(batch.images.to(loaded.device)), strict=True):
            if (size := size_of(source, row)) is None:
                continue
            found = classes_at(scores, size).cpu().numpy()
            picture = Image.fromarray(ids[found])
            if ids.dtype == np.uint8:
                picture.putpalette(palette.tobytes())
            place = out / files[row]
            place.parent.mkdir(parents=True, exist_ok=True)
            with naming(place):
                picture.save(place)
            counts += np.bincount(found.ravel(), minlength=len(names))
            done += 1
    lines = ["(no class)"] * (int(ids.max()) + 1)
    for number, name in zip(ids.tolist(), names, strict=True):
        lines[number] = name
    (out / CLASSES_FILE).write_text("\n".join(lines) + "\n", "utf-8")
    return done, {name: int(count) for name, count in zip(names, counts, strict=True) if count}


def _plain(name: str, file: str) -> bool:
    """Whether a mask has its image's name, but for the ending."""
    return name.rpartition(".")[0] + ".png" == file or name + ".png" == file


def require_writable(out: Path, *, folder: bool) -> None:
    """Raises UserError where nothing can be written to: before the images are looked at, which may take hours."""
    parent = out.resolve().parent
    if not parent.is_dir():
        raise UserError(f"the folder {parent} does not exist; make it first, or choose another --out")
    if not folder and out.is_dir():
        raise UserError(f"output file {out} is a folder; name a file in it")
    try:
        if folder:
            out.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=out if folder else parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None


def boxes(
    loaded: Loaded, source: Source, batches: Any, out: Path, *, least: float = LEAST_SCORE
) -> tuple[int, dict[str, int]]:
    """COCO's format; returns how many images, and how many boxes of each class have a score of at least `least`."""
    assert isinstance(loaded.method, detect.Detector)
    names, counts = names_of(loaded), Counter[str]()
    images, annotations = [], []
    for batch in batches:
        for row, one in zip(batch.index.tolist(), loaded.method.predict(batch.images.to(loaded.device)), strict=True):
            if (size := size_of(source, row)) is None:
                continue
            height, width = size
            images.append({"id": row, "file_name": source.names[row], "height": height, "width": width})
            found = as_numpy(one, loaded.plan.images.size, (height, width))
            assert found.scores is not None
            for (x1, y1, x2, y2), label, score in zip(
                found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
            ):
                if score < least:
                    break  # best first
                box = {"id": len(annotations), "image_id": row, "category_id": label, "score": score}
                annotations.append(box | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
                counts[names[label]] += 1
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    content = {"images": images, "categories": categories, "annotations": annotations}
    replace_file(out, json.dumps(content).encode())
    return len(images), dict(counts)


def size_of(source: Source, row: int) -> tuple[int, int] | None:
    """(H, W) of an image file; None where it can be read no more, though it could a moment ago."""
    try:
        header = decode.header(source.read(row), source.reading)
    except BadImage:
        return None
    return header.height, header.width


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    """A table in the format that the name says; the final name only ever holds a whole file."""
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
