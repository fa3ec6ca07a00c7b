"""Read images for evaluation with an encoder's preprocessing, and compute their features.

Features of training and test images are computed by the same function, `features`. Images are not scanned beforehand:
an unreadable file is reported in a warning and left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

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
from unmask.engine.divided_batches import in_order, own_rows
from unmask.engine.divided_scan import require_same_files
from unmask.engine.load import Loaded
from unmask.engine.world import ALONE, World, current
from unmask.errors import UserError
from unmask.evals import feature_cache
from unmask.evals.frozen_features import FeatureTable, collect_each

T = TypeVar("T")

EVAL_BATCH = 128
MANY_IMAGES = 1024  # with more images, worker processes save more time than their start takes
NAMED_BAD_FILES = 5
IMAGES_FOR_LAYER = 4096  # largest number of images on which layers are compared
COLLECTIONS = (*LISTS, *TARS, ".zip", ".parquet", ".pq")
"""Extensions of files that contain many images."""


def eval_images(loaded: Loaded, source: Source) -> ReadableImages:
    """Return the images, read at this run's size, channels and dtype, with a centre crop and no augmentation."""
    plan, data = loaded.plan, loaded.config.data
    return ReadableImages(
        source.with_reading(plan.reading),
        np.arange(len(source)),
        plan.images,
        data.crop,
        training=False,
        min_valid=data.min_valid,
    )


def eval_precision(loaded: Loaded) -> str:
    """Return the precision used in training, or fp32 if this device would have to emulate it."""
    return choose_precision(loaded.config.train.precision, loaded.device)[0]


@dataclass(frozen=True)
class _Seen(Generic[T]):
    """What is kept of a batch: the rows of its readable images, its absent pixels, and the result (None if empty)."""

    rows: np.ndarray
    absent_share: float
    with_absent: int
    result: T | None


def each_batch(
    compute: Callable[[Batch], T],
    images: ReadableImages,
    rows: np.ndarray,
    workers: int,
    console: Console,
    bar: Bar | None = None,
    *,
    world: World | None = None,
) -> Iterator[T]:
    """Yield `compute(batch)` for batches of the images of `rows` in order, without unreadable images.

    Finally lists unreadable images in a warning. The processes of `world` (None: all) divide the batches among them,
    and the results are yielded in the writer only. Raises UserError at the end when no image could be read.
    """
    world = current() if world is None else world

    def computed(batch: Batch) -> _Seen[T]:
        share, with_absent = 0.0, 0
        if len(batch) and batch.valid is not None:
            each = 1 - batch.valid.float().mean((1, 2))
            share, with_absent = float(each.sum()), int((each > 0).sum())
        return _Seen(batch.index.numpy(), share, with_absent, compute(batch) if len(batch) else None)

    batches = eval_batches(images, own_rows(rows, EVAL_BATCH, world), batch=EVAL_BATCH, workers=workers)
    seen: list[np.ndarray] = []
    share, with_absent = 0.0, 0
    for number, one in enumerate(in_order(map(computed, batches), math.ceil(len(rows) / EVAL_BATCH), world), 1):
        seen.append(one.rows)
        share, with_absent = share + one.absent_share, with_absent + one.with_absent
        if one.result is not None:
            yield one.result
        if bar is not None:
            bar.update(min(number * EVAL_BATCH, len(rows)))
    if with_absent:
        console.print(
            f"{images.source.name}: {share / len(rows):.1%} of the pixels are absent, in {with_absent} of {len(rows)} "
            "images; replaced by the mean of the training data"
        )
    world.on_writer(lambda: _report_unreadable(images, rows, np.concatenate([rows[:0], *seen]), console))


def read(
    images: ReadableImages, rows: np.ndarray, workers: int, console: Console, bar: Bar | None = None
) -> Iterator[Batch]:
    """Yield batches of the images of `rows` in order in each process that calls this; see `each_batch`."""
    return each_batch(lambda batch: batch, images, rows, workers, console, bar, world=ALONE)


def _report_unreadable(images: ReadableImages, rows: np.ndarray, seen: np.ndarray, console: Console) -> None:
    bad = np.setdiff1d(rows, seen)
    if not len(bad):
        return
    faults = ((images.source.names[row], images.fault(row)) for row in bad[:NAMED_BAD_FILES].tolist())
    named = "; ".join(f"{name} ({fault})" for name, fault in faults)
    more = "" if len(bad) <= NAMED_BAD_FILES else f"; and {len(bad) - NAMED_BAD_FILES} more: `unmask check` lists all"
    if not len(seen):
        raise UserError(f"none of the {len(rows)} files of {images.source.name} can be used: {named}{more}")
    console.warn(f"{images.source.name}: {len(bad)} of {len(rows)} cannot be used and are left out: {named}{more}")


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """How features are computed.

    title: title of the progress bar. precision: "fp32" or "bf16", by default `eval_precision`. tokens: also return all
    tokens, if they fit in memory. cache: folder where tables without tokens are cached (`feature_cache.py`).
    """

    title: str
    precision: str | None = None
    tokens: bool = False
    cache: Path | None = None


def features(
    loaded: Loaded,
    encoders: Mapping[str, nn.Module],
    source: Source,
    rows: np.ndarray,
    options: FeatureOptions,
    console: Console,
) -> dict[str, FeatureTable]:
    """Return a table of features for each encoder; unreadable images are left out and listed in a warning.

    Probes and embeddings of the same rows and precision share cached tables.
    """
    precision, folder, tokens = options.precision or eval_precision(loaded), options.cache, options.tokens
    keys, tables = dict[str, str](), dict[str, FeatureTable]()

    def missing() -> list[str]:
        if folder is not None and not tokens:
            keys.update(keys_of(loaded, encoders, source=source, rows=rows, precision=precision))
            found = {name: feature_cache.find(folder, key, source, rows) for name, key in keys.items()}
            tables.update({name: table for name, table in found.items() if table is not None})
        return [name for name in encoders if name not in tables]

    world, began = current(), time.time()
    require_same_files(source, world)
    if new := world.from_writer(missing):
        workers = 0 if len(rows) < MANY_IMAGES else choose_workers(loaded.device, cached=False)[0]
        with console.progress(options.title, len(rows)) as bar:
            tables |= collect_each(
                {name: encoders[name] for name in new},
                partial(
                    each_batch,
                    images=eval_images(loaded, source),
                    rows=rows,
                    workers=workers,
                    console=console,
                    bar=bar,
                ),
                device=loaded.device,
                precision=precision,
                tokens=len(rows) if tokens else 0,
            )
        if folder is not None and keys and is_worth_storing(began):
            size = sum(feature_cache.store(folder, keys[name], tables[name], rows) for name in new)
            console.print(f"{options.title}: cached the features for later probes, {size / 2**20:.1f} MiB in {folder}")
    if not world.is_writer:
        tables |= {name: FeatureTable.of_index(rows) for name in encoders if name not in new}
    return {name: tables[name] for name in encoders}


def keys_of(
    loaded: Loaded, encoders: Mapping[str, nn.Module], source: Source, rows: np.ndarray, precision: str
) -> dict[str, str]:
    """Return the cache keys of these encoders, or {} if the features of these images cannot be cached."""
    about = {
        "precision": precision, "device": loaded.device.partition(":")[0], "images": repr(loaded.plan.images),
        "reading": loaded.plan.reading.model_dump_json(),
        "crop": repr(loaded.config.data.crop), "method": loaded.config.method.model_dump_json(),
    }  # fmt: skip
    keys = {name: feature_cache.key_of(encoder, source, rows, about=about) for name, encoder in encoders.items()}
    return {name: key for name, key in keys.items() if key is not None}
