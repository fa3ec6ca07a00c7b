"""What one does with a trained run: draw reconstructions, embed images, probe the features.

Everything here reads the Run folder. Test and train features come from the same code path, images are never masked
outside `reconstruct_images`, and a file that cannot be read is named, never replaced by another.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask.batch import Batch
from unmask.console import Console
from unmask.data.loader import Images, eval_batches
from unmask.data.scan import scan
from unmask.data.sources import Source, open_files, open_source, require_labels
from unmask.evals.collect import collect
from unmask.evals.pictures import draw
from unmask.evals.probe import probe
from unmask.method import Clock
from unmask.plan import autocast, choose_device
from unmask.rng import Draws, Stream, words
from unmask.run import Run
from unmask.saved import Loaded, load, untrained_encoder

EVAL_BATCH = 256
MOST_DRAWN = 16


def eval_images(loaded: Loaded, source: Source) -> Images:
    """The source as this run's encoder sees it: its size, channels and dtype, the centred box, no randomness."""
    plan, data = loaded.plan, loaded.config.data
    return Images(source, np.arange(len(source)), plan.images, data.crop, training=False)


def readable_rows(source: Source, loaded: Loaded, console: Console) -> np.ndarray:
    """The rows that can be read and have the run's channels; the others are said. Raises ValueError when none is left."""
    with console.progress("checking files", len(source)) as bar:
        spec = loaded.plan.images
        found = scan(source, channels=spec.channels, dtype=spec.dtype, progress=bar.update)
    if found.bad:
        named = "; ".join(f"{bad.name} ({bad.code}: {bad.detail})" for bad in found.bad[:5])
        if not found.good:
            raise ValueError(f"none of the {found.files} files of {source.name} can be used: {named}")
        console.warn(f"{len(found.bad)} of {found.files} files cannot be used and are left out: {named}")
    return found.good_rows


def batches(images: Images, rows: np.ndarray) -> Callable[[], Iterable[Batch]]:
    """A function that reads these rows from the start each time it is called."""
    return lambda: eval_batches(images, rows, batch=EVAL_BATCH)


@torch.no_grad()
def reconstruct_images(
    run: Path, images: Sequence[str], out: Path, *, step: int | None, seed: int, device: str, console: Console
) -> dict[str, Any]:
    """Draw up to 16 images as the run's method rebuilds them, and return its loss beside those of trivial guesses."""
    loaded = load(run, device=choose_device(device), step=step)
    several = len(images) > 1 or Path(images[0]).is_file()
    source = open_files(images) if several else open_source(images[0])
    rows = readable_rows(source, loaded, console) if len(source) <= MOST_DRAWN else np.arange(len(source))
    if len(rows) > MOST_DRAWN:
        console.say(f"drawing {MOST_DRAWN} of {len(rows)} images, evenly spread")
        rows = rows[np.linspace(0, len(rows) - 1, MOST_DRAWN).astype(int)]
    batch = next(eval_batches(eval_images(loaded, source), rows, batch=len(rows))).to(loaded.device)
    clock = Clock(loaded.step, loaded.plan.steps, Draws(seed, batch.epoch, batch.index))
    with autocast(loaded.plan.precision, loaded.device):
        picture = loaded.method.picture(batch, clock)
    draw(picture, loaded.plan.images.dtype, out, f"{Path(run).name}, step {loaded.step}")
    numbers = {name: float(value) for name, value in picture.numbers.items()}
    console.say(f"{out}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items()))
    return numbers


def embed_images(run: Path, data: str, out: Path, *, step: int | None, device: str, console: Console) -> dict[str, Any]:
    """Write features with file names to .parquet or .npz; the same bytes every time."""
    if out.suffix not in (".parquet", ".npz"):
        raise ValueError(f"output file {out} came; a name that ends in .parquet or .npz was expected")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"the folder {out.resolve().parent} does not exist; make it first, or choose another --out")
    loaded = load(run, device=choose_device(device), step=step)
    source = open_source(data)
    rows = readable_rows(source, loaded, console)
    with console.progress("embedding", len(rows)) as bar:
        read = _counted(batches(eval_images(loaded, source), rows)(), bar.update)
        table = collect(loaded.method.encoder, read, device=loaded.device, precision=loaded.plan.precision)
    names = [source.names[row] for row in table.index]
    labels = None if table.labels is None else [source.classes[label] for label in table.labels]
    _write_features(out, names, labels, table.cls, table.mean)
    console.say(f"{out}: {len(names)} images, width {table.mean.shape[1]}, from step {loaded.step} of {run}")
    return {"out": str(out), "images": len(names), "width": int(table.mean.shape[1]), "step": loaded.step}


def _write_features(
    out: Path, names: list[str], labels: list[str] | None, cls: np.ndarray | None, mean: np.ndarray
) -> None:
    vectors = {name: value for name, value in (("cls", cls), ("mean", mean)) if value is not None}
    partial = out.with_name(f".{out.name}.partial")  # the final name only ever holds a complete file
    if out.suffix == ".npz":
        texts = {"name": np.array(names)} | ({"label": np.array(labels)} if labels else {})
        with partial.open("wb") as file:
            np.savez(file, **texts, **vectors)  # type: ignore[arg-type]
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"name": names} | ({"label": labels} if labels else {})
        for name, value in vectors.items():
            flat = pa.array(value.reshape(-1), pa.float32())
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
        pq.write_table(pa.table(columns), partial, compression="zstd")
    partial.replace(out)


def _counted(read: Iterable[Batch], update: Callable[[int], None]) -> Iterable[Batch]:
    done = 0
    for batch in read:
        yield batch
        done += len(batch)
        update(done)


def split_rows(labels: np.ndarray, seed: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) positions: a fifth of every class is held out, chosen by the seed alone."""
    index = np.arange(len(labels), dtype=np.int64)
    order = words(seed, Stream.LABELS, index * 0, index, 1)[:, 0]
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        test[members[np.argsort(order[members], kind="stable")][: max(1, round(share * len(members)))]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def probe_run(
    run: Path,
    data: str,
    *,
    test: str | None,
    kind: str,
    shots: int | None,
    controls: bool,
    seed: int,
    step: int | None,
    device: str,
    console: Console,
) -> dict[str, Any]:
    """Probe a run on labelled images; writes RUN/evals/probe-<kind>-<data>.json and returns it."""
    if kind not in ("knn", "linear"):
        raise ValueError(f"probe kind {kind!r} came; knn or linear was expected")
    loaded = load(run, device=choose_device(device), step=step)
    train_source = require_labels(open_source(data))
    train_rows = readable_rows(train_source, loaded, console)
    if test is None:
        assert train_source.labels is not None
        train_part, test_part = split_rows(train_source.labels[train_rows], seed)
        test_source, test_rows, train_rows = train_source, train_rows[test_part], train_rows[train_part]
    else:
        test_source = require_labels(open_source(test))
        test_rows = readable_rows(test_source, loaded, console)
    if train_source.classes != test_source.classes:
        raise ValueError(
            f"the classes of {data} ({', '.join(train_source.classes[:6])} ...) are not those of {test} "
            f"({', '.join(test_source.classes[:6])} ...); both must have the same sub-folders"
        )
    summary = probe(
        loaded.method.encoder,
        untrained_encoder(loaded.config, loaded.plan.images, device=loaded.device) if controls else None,
        batches(eval_images(loaded, train_source), train_rows),
        batches(eval_images(loaded, test_source), test_rows),
        kind=kind,
        classes=train_source.classes,
        shots=shots,
        seed=seed,
        device=loaded.device,
        precision=loaded.plan.precision,
    )
    held_out = f"a held-out fifth of {data}"
    summary |= {
        "data": data,
        "test": test or held_out,
        "step": loaded.step,
        "command": shlex.join(["unmask", *sys.argv[1:]]),
    }
    name = "".join(letter if letter.isalnum() else "-" for letter in Path(data).name).strip("-")
    name += "" if shots is None else f"-{shots}-shots"
    Run.open(run).write(f"evals/probe-{kind}-{name}.json", summary)
    say_probe(summary, console)
    return summary


def say_probe(summary: dict[str, Any], console: Console) -> None:
    """The table and the verdict, for a person."""
    what = {"knn": "k nearest neighbours", "linear": "linear probe"}[summary["kind"]]
    console.say(
        f"{what} on {summary['data']}: {summary['train_images']} training images, {summary['test_images']} test images, "
        f"{len(summary['classes'])} classes, chance {summary['chance']:.1%}"
    )
    for row in summary["rows"]:
        console.say(
            f"  {row['features']:12s} {row['pool']:7s} {row['accuracy']:6.1%}  "
            f"(95 % interval {row['low']:.1%} to {row['high']:.1%})"
        )
    console.say(f"  {summary['verdict']}")
