"""What one does with a trained run: draw reconstructions, embed images, probe the features.

Everything here reads the Run folder. Test and train features come from the same code path. Images are never masked but
in `reconstruct_images`, and where a probe is asked to (`evals/encoder_views.py`). There is no scan beforehand: a file
that turns out unreadable is named and left out, never replaced by another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import nn

from unmask.batch import Batch
from unmask.console import Bar, Console
from unmask.data.loader import choose_workers, eval_batches
from unmask.data.readable_images import ReadableImages
from unmask.data.scan.scan_cache import is_worth_storing
from unmask.data.sources.list_file import LISTS
from unmask.data.sources.source import Source
from unmask.data.sources.tar_file import TARS
from unmask.engine.device import choose_precision
from unmask.engine.load import Loaded
from unmask.errors import UserError
from unmask.evals import feature_cache
from unmask.evals.frozen_features import FeatureTable, collect_each

EVAL_BATCH = 128
MANY_IMAGES = 1024  # from here on, decoding in processes of its own repays starting them
NAMED_BAD_FILES = 5
IMAGES_FOR_LAYER = 4096  # at most, that layers are compared on
COLLECTIONS = (*LISTS, *TARS, ".zip", ".parquet", ".pq")  # files that hold images, as against image files


def eval_images(loaded: Loaded, source: Source) -> ReadableImages:
    """The source as this run's encoder sees it: its size, channels and dtype, the centred box, no randomness."""
    plan, data = loaded.plan, loaded.config.data
    source.reading, rows = plan.reading, np.arange(len(source))
    return ReadableImages(source, rows, plan.images, data.crop, training=False, min_valid=data.min_valid)


def eval_precision(loaded: Loaded) -> str:
    """That of the training, unless this device would have to emulate it: for what is measured or looked at.

    On a processor that computes in bf16 natively a probe is three times faster for it.
    """
    return choose_precision(loaded.config.train.precision, loaded.device)[0]


def read(
    images: ReadableImages, rows: np.ndarray, workers: int, console: Console, bar: Bar | None = None
) -> Iterator[Batch]:
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
    found = {
        name: table for name, key in keys.items() if folder and (table := feature_cache.find(folder, key, source, rows))
    }
    began = time.time()
    if new := {name: encoder for name, encoder in encoders.items() if name not in found}:
        workers = 0 if len(rows) < MANY_IMAGES else choose_workers(loaded.device, cached=False)[0]
        with console.progress(title, len(rows)) as bar:
            batches = read(eval_images(loaded, source), rows, workers, console, bar)
            num_tokens = len(rows) if tokens else 0
            found |= collect_each(new, batches, device=loaded.device, precision=precision, tokens=num_tokens)
        if folder is not None and keys and is_worth_storing(began):
            size = sum(feature_cache.keep(folder, keys[name], found[name], rows) for name in new)
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
    keys = {name: feature_cache.key_of(encoder, source, rows, about=about) for name, encoder in encoders.items()}
    return {name: key for name, key in keys.items() if key is not None}
