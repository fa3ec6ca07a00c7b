"""From a source to the plan of a run: scan the images, hold some out, choose how to load them, and make the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unmask.batch import ImageSpec
from unmask.config import Config, ConfigError, task_names
from unmask.console import Console
from unmask.data.image_reader import ImageReader
from unmask.data.loader import choose_workers
from unmask.data.order import Order
from unmask.data.scan.findings import findings
from unmask.data.scan.odd_images import constant_line, mask_warnings
from unmask.data.scan.scan import Scan
from unmask.data.sources.source import Source
from unmask.engine.divided_scan import scan_together
from unmask.engine.make_plan import DatasetFacts, LoadingPlan, Processes, make_plan
from unmask.engine.measure import Timing
from unmask.engine.resolve import require_statistics
from unmask.engine.supervision import SupervisedSplit
from unmask.engine.time_budget import Budget
from unmask.engine.training_plan import Plan
from unmask.engine.world import current
from unmask.errors import UserError

NAMED_BAD_FILES = 5
ENOUGH_TO_HOLD_OUT = 1_000  # number of images; in smaller data sets, all images are used for training
FEWEST_HELD_OUT, MOST_HELD_OUT = 64, 256
LOADED_PARTS = 3  # number of parts of the images that are loaded to measure the loading time


class DataError(UserError):
    """Raised if the images cannot be used for training."""


@dataclass(frozen=True)
class TrainingRequest:
    """The inputs of `plan_training`: images, their scan, and the resolved settings.

    scan: scan of `source`. budget: time budget, or None if the settings determine the length. reasons: sentences that
    explain why the settings were chosen. supervised: the images of a supervised run, or None for pre-training. record:
    what the command asked for, for provenance.json (`Request.record`).
    """

    source: Source
    scan: Scan
    config: Config
    device: str
    budget: Budget | None = None
    reasons: tuple[str, ...] = ()
    supervised: SupervisedSplit | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


def scan_source(source: Source, draft: Config, console: Console) -> tuple[Source, Scan]:
    """Scan as many files as the settings require. Raises DataError if too many files cannot be read.

    Return (the source, which decodes files as the scan did; the scan).
    """
    source = source.with_reading(draft.data.reading)
    checked = min(len(source), draft.data.scan_sample or len(source))
    with console.progress("checking files", checked) as bar:
        found = scan_together(source, sample=checked, channels=draft.data.channels, progress=bar.update)
    if found.known:
        console.print(
            f"{found.known} of {found.checked} files are unchanged since they were last checked, and were not read "
            "again (`unmask check` reads them)"
        )
    if found.forgotten:
        console.print(f"scan results are not cached, so the next command will read all files again: {found.forgotten}")
    reject_bad_data(found, draft)
    return found.applied_to(source), found


def odd_image_warnings(source: Source, found: Scan) -> list[str]:
    """Return warnings about images that were probably not meant for training: masks, or images of a single value."""
    constant = [] if found.constant is None else [constant_line(found.constant, found.good)]
    return mask_warnings(source) + constant


def reject_bad_data(found: Scan, config: Config) -> None:
    """Raise DataError if no files, or too few of them, can be read."""
    examples = "; ".join(f"{bad.name} ({bad.code}: {bad.detail})" for bad in found.bad[:NAMED_BAD_FILES])
    if found.good == 0:
        raise DataError(f"none of the {found.files} files of {found.source} can be read, for example {examples}")
    if found.empty_files == found.good:
        raise DataError(
            f"all pixels of the {found.good} images of {found.source} are absent (NaN, or the declared no-data value); "
            "if they are valid data: --set data.nodata=none"
        )
    if found.bad_fraction > config.data.max_bad_fraction:
        enough = math.ceil(20 * found.bad_fraction) / 20
        raise DataError(
            f"{len(found.bad)} of {found.checked} files checked cannot be read ({found.bad_fraction:.1%}; at most "
            f"{config.data.max_bad_fraction:.1%} may be): {examples}. Repair or remove them (see `unmask check`), "
            f"or --set data.max_bad_fraction={enough:g} to train on the rest"
        )


def image_spec(found: Scan, config: Config) -> ImageSpec:
    """Return the image properties from the settings, or from the scan if they are not set. Raises ConfigError."""
    channels = config.data.channels or found.channels_majority
    mean, std = config.data.mean or found.mean, config.data.std or found.std
    require_statistics(channels, mean, std)
    return ImageSpec(
        channels=channels, size=config.data.size, dtype=found.dtype_majority, mean=tuple(mean), std=tuple(std)
    )


def plan_training(request: TrainingRequest) -> tuple[ImageReader, Plan]:
    """Choose the training images, measure memory and loading time, and return the reader of the images and the plan.

    Nothing is written and no image is kept in memory yet.
    """
    config, world = request.config, current()
    processes = Processes(world.size, world.local_size)
    images, facts, image_reasons = choose_images(request)

    def plan() -> Plan:
        loading, loading_reasons = choose_loading(request, images, processes.on_this_host)
        return make_plan(
            config,
            facts,
            loading,
            request.device,
            budget=request.budget,
            reasons=(*request.reasons, *image_reasons, *loading_reasons),
            processes=processes,
        )

    return images, world.from_writer(plan)


def choose_images(request: TrainingRequest) -> tuple[ImageReader, DatasetFacts, tuple[str, ...]]:
    """Hold images out, and return the reader of the training images, the facts for the plan, and reasons for it."""
    source, found, config, split = request.source, request.scan, request.config, request.supervised
    spec = image_spec(found, config)
    excluded = np.union1d(found.bad_rows, [] if split is None else split.held_out).astype(np.int64)
    rows = np.setdiff1d(np.arange(len(source)), excluded)
    reasons: tuple[str, ...] = ()
    held_out_rows = held_out_for_loss(rows, config)
    if len(held_out_rows):
        excluded, rows = np.union1d(excluded, held_out_rows), np.setdiff1d(rows, held_out_rows)
        reasons += (f"{len(held_out_rows)} images are held out for the held-out loss: the setting data.held_out",)
    images = training_images(source, rows, spec, config)
    reasons += findings(found)
    if images.repeats > 1:
        reasons += (f"each image is decoded once in {images.repeats} epochs: data.repeats={images.repeats}",)
    if images.on_device:
        reasons += ("crops are resampled on the device: the setting data.resize",)
    if found.median_size[0] < spec.size[0] or found.median_size[1] < spec.size[1]:
        reasons += (f"most images are smaller than the model's {spec.size[0]} x {spec.size[1]} and will be enlarged",)
    test_rows = np.setdiff1d([] if split is None or split.test_rows is None else split.test_rows, found.bad_rows)
    facts = DatasetFacts(
        spec=spec,
        num_images=len(rows),
        fingerprint=source.fingerprint(),
        excluded=tuple(excluded.tolist()),
        num_test=0 if split is None else split.num_test,
        test_rows=tuple(test_rows.astype(np.int64).tolist()),
        held_out=tuple(held_out_rows.tolist()),
        annotations_digest="" if split is None else split.annotations_digest,
        reading=source.reading,
    )
    return images, facts, reasons


def choose_loading(
    request: TrainingRequest, images: ImageReader, processes: int
) -> tuple[LoadingPlan, tuple[str, ...]]:
    """Return how to load `images`, and why. The loading time is measured only if a budget requires it.

    processes: number of training processes on this host.
    """
    data, decoded_bytes = request.config.data, request.scan.decoded_bytes * len(images.rows) * processes
    cached = data.cache
    if cached is None:
        cached = decoded_bytes <= data.cache_gib * 2**30
    workers, why = choose_workers(request.device, cached=cached, processes=processes)
    if data.workers is not None:
        workers, why = data.workers, f"{data.workers} loader workers: the setting data.workers"
    memory = (f"decoded images kept in memory: {decoded_bytes / 2**20:.0f} MiB",) if cached else ()
    batch_size = request.config.train.batch_size
    loading = LoadingPlan(workers, cached, lambda: batch_seconds(images, batch_size, workers, cached=cached))
    return loading, (*memory, why)


def held_out_for_loss(rows: np.ndarray, config: Config) -> np.ndarray:
    """Return the rows, sorted, that a pre-training run holds out for its held-out loss.

    rows: (N,) rows available for training. Raises ConfigError if no image would be left for training, or if a
    supervised run would ignore the setting.
    """
    wanted = config.data.held_out
    if config.method.name in task_names():
        if wanted:
            raise ConfigError(f"got data.held_out={wanted}; supervised runs hold out test images instead: leave it out")
        return rows[:0]
    if wanted is None:
        few = len(rows) < ENOUGH_TO_HOLD_OUT
        wanted = 0 if few else min(MOST_HELD_OUT, max(FEWEST_HELD_OUT, len(rows) // 100))
    if wanted >= len(rows):
        raise ConfigError(f"got data.held_out={wanted} of {len(rows)} images; expected fewer than there are")
    return rows[np.linspace(0, len(rows) - 1, wanted).astype(int)]


def training_images(source: Source, rows: np.ndarray, spec: ImageSpec, config: Config) -> ImageReader:
    """Return the reader of the images in `rows`.

    Raises ConfigError if data.resize=device is set, but these images cannot be resampled on the device.
    """
    data = config.data
    on_device = data.resize == "device"
    if on_device and (spec.dtype != "uint8" or spec.channels not in (1, 3) or data.crop.jitter):
        what = "data.crop.jitter" if data.crop.jitter else f"{spec.dtype} images of {spec.channels} channels"
        raise ConfigError(
            f"got data.resize=device with {what}; expected 8-bit gray or RGB images without jitter; use "
            "data.resize=loader"
        )
    return ImageReader(
        source=source,
        rows=rows,
        spec=spec,
        crop=data.crop,
        seed=config.train.seed,
        repeats=data.repeats,
        on_device=on_device,
        min_valid=data.min_valid,
    )


def batch_seconds(images: ImageReader, batch: int, workers: int, *, cached: bool) -> Timing:
    """Measure the time to load one global batch, using the first images of the epoch.

    cached: whether decoded images are cached in memory before.
    """
    part = max(images.repeats, min(batch, 64) // 2 // images.repeats * images.repeats)
    parts = [Order(images.rows, images.seed, images.repeats).take(n * part, part) for n in range(LOADED_PARTS)]
    if cached:
        images = replace(images, rows=np.unique(np.concatenate([taken.index for taken in parts])), kept={})
        images.keep_decoded()
    times = []
    for taken in parts:
        images[taken]
        start = time.perf_counter()
        images[taken]
        times.append((time.perf_counter() - start) * batch / part / max(1, workers))
    return Timing.of(times)


def skipped_files(source: Source) -> str:
    """Return the numbers of skipped and excluded files, by kind, in parentheses, or "" if there are no such files."""
    excluded = ", ".join(f"{count} by {pattern}" for pattern, count in source.excluded.items())
    text = f" (excluded: {excluded})" if excluded else ""
    if not (skipped := +source.skipped):
        return text
    kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in skipped.most_common(4))
    return f" ({skipped.total()} other files skipped: {kinds})" + text
