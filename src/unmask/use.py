"""What one does with a trained run: draw reconstructions, embed images, probe the features.

Everything here reads the Run folder. Test and train features come from the same code path. Images are never masked but
in `reconstruct_images`, and where a probe is asked to (`evals/views.py`). There is no scan beforehand: a file that
turns out unreadable is named and left out, never replaced by another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unmask.batch import Batch
from unmask.config import task_names
from unmask.console import Bar, Console
from unmask.data.class_names import class_name
from unmask.data.decode import BadImage
from unmask.data.loader import Delivery, Images, Taken, choose_workers, eval_batches
from unmask.data.looks import worth_keeping
from unmask.data.page_source import read_as
from unmask.data.sources import LISTS, TARS, Source, open_files, open_source
from unmask.errors import UserError, naming, some
from unmask.evals import kept
from unmask.evals.collect import FeatureTable, collect_each
from unmask.evals.pictures import draw, require_png
from unmask.plan import autocast, choose_device, choose_precision
from unmask.rng import Draws
from unmask.run import Run
from unmask.saved import Loaded, load

EVAL_BATCH = 128
FEATURES = "features"  # of a Run: tables stored for the next probe or embed
MOST_DRAWN = 16
MANY_IMAGES = 1024  # from here on, decoding in processes of its own repays starting them
NAMED_BAD_FILES = 5
IMAGES_FOR_LAYER = 4096  # at most, that layers are compared on
COLLECTIONS = (*LISTS, *TARS, ".zip", ".parquet", ".pq")  # files that hold images, as against image files


@dataclass
class Readable(Images):
    """Images of an evaluation. A file that cannot be read is left out of its batch, where `Images` would stop.

    A batch of such files alone is empty.
    """

    def __getitem__(self, taken: Taken) -> Delivery:
        try:
            return super().__getitem__(taken)
        except BadImage:
            sound = np.array([self.fault(int(row)) is None for row in taken.index])
            return super().__getitem__(Taken(taken.index[sound], taken.epoch[sound]))

    def fault(self, row: int) -> BadImage | None:
        """What is wrong with one image, or None."""
        try:
            super().__getitem__(Taken(np.array([row]), np.zeros(1, np.int64)))
        except BadImage as error:
            return BadImage(error.code, error.detail.removeprefix(f"{self.source.names[row]}: "))
        return None


def eval_images(loaded: Loaded, source: Source) -> Readable:
    """The source as this run's encoder sees it: its size, channels and dtype, the centred box, no randomness."""
    plan, data = loaded.plan, loaded.config.data
    source.reading, rows = plan.reading, np.arange(len(source))
    return Readable(source, rows, plan.images, data.crop, training=False, min_valid=data.min_valid)


def eval_precision(loaded: Loaded) -> str:
    """That of the training, unless this device would have to emulate it: for what is measured or looked at.

    On a processor that computes in bf16 natively a probe is three times faster for it.
    """
    return choose_precision(loaded.config.train.precision, loaded.device)[0]


def read(images: Readable, rows: np.ndarray, workers: int, console: Console, bar: Bar | None = None) -> Iterator[Batch]:
    """Batches of all these rows that can be read, in order; then names the others.

    Raises ValueError at the end when not one could be read.
    """
    seen: list[np.ndarray] = []
    share, with_absent = 0.0, 0
    for number, batch in enumerate(eval_batches(images, rows, batch=EVAL_BATCH, workers=workers), 1):
        if len(batch):
            seen.append(batch.index.numpy())
            if batch.valid is not None:
                each = 1 - batch.valid.float().mean((1, 2))
                share, with_absent = share + float(each.sum()), with_absent + int((each > 0).sum())
            yield batch
        if bar is not None:
            bar.update(min(number * EVAL_BATCH, len(rows)))
    if with_absent:
        console.say(
            f"{images.source.name}: {share / len(rows):.1%} of the pixels are absent, in {with_absent} of {len(rows)} "
            "images; replaced by the mean of the training data"
        )
    bad = np.setdiff1d(rows, np.concatenate(seen)) if seen else rows
    if not len(bad):
        return
    faults = ((images.source.names[row], images.fault(row)) for row in bad[:NAMED_BAD_FILES].tolist())
    named = "; ".join(f"{name} ({fault})" for name, fault in faults)
    more = "" if len(bad) <= NAMED_BAD_FILES else f"; and {len(bad) - NAMED_BAD_FILES} more: `unmask check` lists all"
    if not seen:
        raise UserError(f"none of the {len(rows)} files of {images.source.name} can be used: {named}{more}")
    console.warn(f"{images.source.name}: {len(bad)} of {len(rows)} cannot be used and are left out: {named}{more}")


def features(
    loaded: Loaded,
    encoders: Mapping[str, nn.Module],
    source: Source,
    rows: np.ndarray,
    *,
    precision: str,
    title: str,
    console: Console,
    tokens: bool = False,
    folder: Path | None = None,
) -> dict[str, FeatureTable]:
    """A table for each encoder, of the rows that can be read; the others are named. The only way to features.

    tokens: with all tokens too, if they fit in memory. folder: where tables without tokens are kept for the next time.
    """
    keys = {} if folder is None or tokens else keys_of(loaded, encoders, source, rows, precision)
    found = {name: table for name, key in keys.items() if folder and (table := kept.find(folder, key, source, rows))}
    began = time.time()
    if new := {name: encoder for name, encoder in encoders.items() if name not in found}:
        workers = 0 if len(rows) < MANY_IMAGES else choose_workers(loaded.device, cached=False)[0]
        with console.progress(title, len(rows)) as bar:
            batches = read(eval_images(loaded, source), rows, workers, console, bar)
            num_tokens = len(rows) if tokens else 0
            found |= collect_each(new, batches, device=loaded.device, precision=precision, tokens=num_tokens)
        if folder is not None and keys and worth_keeping(began):
            size = sum(kept.keep(folder, keys[name], found[name], rows) for name in new)
            console.say(f"{title}: features kept for the next probe, {size / 2**20:.1f} MiB in {folder}")
    return {name: found[name] for name in encoders}


def keys_of(
    loaded: Loaded, encoders: Mapping[str, nn.Module], source: Source, rows: np.ndarray, precision: str
) -> dict[str, str]:
    """What kept tables of these encoders are called; {} for images of which none are kept."""
    about = {
        "precision": precision, "device": loaded.device.partition(":")[0], "images": repr(loaded.plan.images),
        "reading": loaded.plan.reading.model_dump_json(),
        "crop": repr(loaded.config.data.crop), "method": loaded.config.method.model_dump_json(),
    }  # fmt: skip
    keys = {name: kept.key_of(encoder, source, rows, about=about) for name, encoder in encoders.items()}
    return {name: key for name, key in keys.items() if key is not None}


@torch.no_grad()
def reconstruct_images(
    run: Path, images: Sequence[str], out: Path, *, step: int | None, seed: int, device: str, console: Console
) -> dict[str, Any]:
    """Draw up to 16 images as the run's method rebuilds them, and return its loss beside those of trivial guesses."""
    require_png(out)
    loaded = load(run, device=choose_device(device), step=step)
    if (task := loaded.config.method.name) in task_names() and task != "encoder":
        raise UserError(
            f"{run} was fine-tuned to {task} and rebuilds nothing; use `unmask predict {run} IMAGES --out PATH`, or "
            "reconstruct with the run that it came from"
        )
    source = read_as(open_images(images), loaded.plan.reading)
    rows = np.arange(len(source))
    if len(rows) > MOST_DRAWN:
        console.say(f"drawing {MOST_DRAWN} of {len(rows)} images, evenly spread")
        rows = rows[np.linspace(0, len(rows) - 1, MOST_DRAWN).astype(int)]
    (batch,) = read(eval_images(loaded, source), rows, 0, console)
    batch = batch.to(loaded.device)
    clock = loaded.plan.clock(loaded.step, Draws(seed, batch.epoch, batch.index))
    with autocast(eval_precision(loaded), loaded.device):
        picture = loaded.method.picture(batch, clock)._replace(valid=batch.valid)
    names = [source.names[row] for row in batch.index.tolist()]
    draw(picture, loaded.plan.images.dtype, out, f"{Path(run).resolve().name}, step {loaded.step}", names)
    numbers = {name: float(value) for name, value in picture.numbers.items()}
    console.say(f"{out}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items()))
    return numbers


def open_images(images: Sequence[str]) -> Source:
    """Image files in the order given, or one DATA."""
    one_file = len(images) == 1 and Path(images[0]).is_file() and not images[0].lower().endswith(COLLECTIONS)
    return open_files(images) if one_file or len(images) > 1 else open_source(images[0])


def embed_images(
    run: Path,
    data: str | Sequence[str],
    out: Path,
    *,
    exclude: Sequence[str] = (),
    step: int | None,
    device: str,
    console: Console,
) -> dict[str, Any]:
    """Write the features of every image to .parquet or .npz: nothing masked, and the same bytes every time.

    One row per image, in the order of the source: `name` (relative to DATA, '/'-separated), `label` (the class's name;
    only where DATA has classes), `cls` (the class token, only where the encoder has one) and `mean` (over patch
    tokens), float32 vectors of the encoder's width. In .npz each is an array of that name. Returns the object that
    --json prints. Raises ValueError when there is nothing to embed or nowhere to write.
    """
    if out.suffix not in (".parquet", ".npz"):
        raise UserError(f"output file {out} came; a name that ends in .parquet or .npz was expected")
    if not out.resolve().parent.is_dir():
        raise UserError(f"the folder {out.resolve().parent} does not exist; make it first, or choose another --out")
    loaded = load(run, device=choose_device(device), step=step)
    source = read_as(open_source(data, exclude), loaded.plan.reading)
    rows = np.arange(len(source))
    encoders = {"encoder": loaded.method.encoder}
    # fp32 always: these numbers are kept, and should be the same on a laptop and a server but for rounding.
    tables = features(
        loaded,
        encoders,
        source,
        rows,
        precision="fp32",
        title="embedding",
        console=console,
        folder=Run.open(run).path / FEATURES,
    )
    table = tables["encoder"]
    names = [source.names[row] for row in table.index.tolist()]
    labels = None if table.labels is None else [source.classes[label] for label in table.labels.tolist()]
    _write_features(out, names, labels, table.cls, table.mean)
    console.say(f"{out}: {len(names)} images, width {table.mean.shape[1]}, from step {loaded.step} of {run}")
    columns = ["name", *["label"] * (labels is not None), *["cls"] * (table.cls is not None), "mean"]
    return {
        "out": str(out),
        "images": len(names),
        "left_out": len(source) - len(names),
        "columns": columns,
        "width": int(table.mean.shape[1]),
        "step": loaded.step,
    }


def _write_features(
    out: Path, names: list[str], labels: list[str] | None, cls: np.ndarray | None, mean: np.ndarray
) -> None:
    texts = {"name": names} | ({"label": labels} if labels is not None else {})
    vectors = {name: value for name, value in (("cls", cls), ("mean", mean)) if value is not None}
    partial = out.with_name(f".{out.name}.partial")  # the final name only ever holds a complete file
    try:
        if out.suffix == ".npz":
            with naming(out), partial.open("wb") as file:  # NumPy dates every member 1980-01-01: equal bytes each time
                np.savez(file, **{name: np.array(text) for name, text in texts.items()}, **vectors)  # type: ignore[arg-type]
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            columns: dict[str, Any] = dict(texts)
            for name, value in vectors.items():
                columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(value.reshape(-1)), value.shape[1])
            pq.write_table(pa.table(columns), partial, compression="zstd")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def labels_of(source: Source) -> np.ndarray:
    """The labels (n,) of a source that has them."""
    assert source.labels is not None, "require_labels came first"
    return source.labels


def absent_classes(labels: np.ndarray, classes: Sequence[str]) -> str:
    """The classes that no image has, in words; "" where all occur."""
    there = set(np.unique(labels).tolist())
    return some(name for number, name in enumerate(classes) if number not in there)


def with_classes(source: Source, classes: Sequence[str], data: str) -> Source:
    """The test source with its labels numbered like the training classes. Raises ValueError for a class not among them.

    Images without any class that the training set has are no fault: a test set may lack some.
    """
    number = {class_name(name): i for i, name in enumerate(classes)}  # of runs of earlier versions too
    if unknown := [name for name in source.classes if name not in number]:
        raise UserError(
            f"{source.name} has classes that {data} has not ({', '.join(unknown[:6])}); {data} has "
            f"{', '.join(classes[:6])}{' ...' if len(classes) > 6 else ''}: test images must lie in sub-folders of the "
            "same names"
        )
    source.labels = np.array([number[name] for name in source.classes], np.int64)[labels_of(source)]
    source.classes = list(classes)
    return source
