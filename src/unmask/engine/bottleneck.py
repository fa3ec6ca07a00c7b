"""`unmask doctor DATA`: measure which part of training is slowest: reading, decoding, cropping or computing."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from unmask.config import Config
from unmask.console import Console
from unmask.data.image_reader import ImageReader, OpenedImage
from unmask.data.loader import MicroBatches, training_batches
from unmask.data.order import Order
from unmask.data.pack_images import SHORT_SIDE
from unmask.data.scan.scan import num_cores, scan
from unmask.data.sources.open_source import open_source
from unmask.data.sources.tiff_samples import apply_reading
from unmask.engine.device import choose_device
from unmask.engine.measure import measure_step_seconds, with_loading
from unmask.engine.resolve import choose_config, draft_config, reject_supervised, settings_with_options
from unmask.engine.training_data import TrainingRequest, plan_training, reject_bad_data
from unmask.engine.training_plan import Plan

LOOKED_AT = 128  # Number of files to scan before choosing the recipe.
TIMED = 256  # Maximum number of images to time.
PATIENCE = 4.0  # Maximum seconds of each measurement.
MARGIN = 1.2  # Loading should be faster than the step by this factor, so that short delays do not stall training.
STORAGE, DECODING, TRANSFORM, STEP = "storage", "decoding", "transform", "step"


# Where the time goes


@dataclass(frozen=True)
class Pace:
    """Measured times in seconds per sample.

    read, decode, transform: times in one process; transform includes cropping, resizing, flipping and stacking. step:
    time of the optimiser step. workers: planned number of loader workers. cores: number of cores of this machine.
    cached: whether images are read and decoded only once, before training. loaded: measured samples per second from the
    planned workers, or from the main process with 0 workers. repeats: number of samples per decoded image. bytes: mean
    file size in bytes. large: whether packing would shrink the images. jitter: whether crops have colour jitter.
    """

    read: float
    decode: float
    transform: float
    step: float
    workers: int
    cores: int
    cached: bool
    loaded: float
    repeats: int = 1
    bytes: float = 0.0
    large: bool = False
    jitter: bool = False

    @property
    def load(self) -> float:
        """Seconds to load one sample in one process during training."""
        return self.transform if self.cached else self.read + self.decode + self.transform

    @property
    def wait(self) -> float:
        """Share of a step spent waiting for images."""
        whole = with_loading(self.step, 1 / self.loaded, self.workers)
        return max(0.0, 1 - self.step / whole)

    @property
    def limit(self) -> str:
        """The slowest part of loading if loading cannot keep up with the step, else STEP."""
        if 1 / self.loaded <= self.step:
            return STEP
        costs = {TRANSFORM: self.transform} if self.cached else self.costs
        return max(costs, key=costs.__getitem__)

    @property
    def costs(self) -> dict[str, float]:
        return {STORAGE: self.read, DECODING: self.decode, TRANSFORM: self.transform}

    @property
    def enough_workers(self) -> int:
        """Number of workers with which loading is 20 % faster than the step."""
        return max(1, math.ceil(MARGIN * self.load / self.step))

    def advice(self, data: str) -> list[str]:
        """Return suggestions to speed up loading, the simplest first, or [] if training hardly waits for images."""
        if self.wait <= 0.05:
            return []
        found = []
        if self.workers < self.enough_workers <= max(1, self.cores - 1):
            found.append(f"--set data.workers={self.enough_workers}")
        if self.limit == STORAGE:
            found.append(
                "copy the images to a local disk, or pack them into one file that can be read sequentially: "
                f"unmask pack {data} packed.tar"
            )
        elif self.large:
            found.append(f"shrink the images once to the size that the recipe needs: unmask pack {data} packed.tar")
        if self.limit == DECODING:
            more = 2 * self.repeats
            found.append(f"--set data.repeats={more} uses {more} crops of every decoded image")
            found.append("--set data.cache=true keeps decoded images in memory, if they fit")
        elif self.limit == TRANSFORM:
            found.append("use fewer pixels: --set data.size=..." + ", or no --set data.crop.jitter" * self.jitter)
        if self.enough_workers > max(1, self.cores - 1):
            found.append(
                f"{self.enough_workers} workers would keep up, but there are only {self.cores} cores: loading is the "
                "bottleneck, so a larger model would train at the same images/s"
            )
        return found


def find_bottleneck(
    data: str,
    console: Console,
    *,
    recipe: str = "auto",
    exclude: Sequence[str] = (),
    settings: Iterable[str] = (),
    tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Measure what limits the speed of training on these images; print and return the result.

    Raises UserError if the images cannot be used.
    """
    settings = settings_with_options(None, recipe, list(settings), tokenizer=tokenizer, palette=None, masks=None)
    draft = draft_config(None, recipe, settings, None)
    reject_supervised(draft, None)
    device = choose_device(draft.train.device)
    source = apply_reading(open_source(data, exclude), draft.data.reading)
    found = scan(source, sample=LOOKED_AT, workers=0, channels=draft.data.channels)
    reject_bad_data(found, draft)
    source = found.applied_to(source)
    config, reasons, _ = choose_config(source, found, recipe=recipe, settings=settings, device=device, budget=None)
    images, plan = plan_training(TrainingRequest(source, found, config, device, reasons=reasons))
    console.print(
        f"{source.name}: {len(source)} images, recipe {config.recipe}, batches of {plan.batch_size} on {device}, "
        f"images {'kept in memory' if plan.cached else 'read anew in every epoch'}"
    )
    seen = set(found.good_rows.tolist()) | set(found.bad_rows.tolist())
    pace = measure(images, plan, np.array([row for row in images.rows.tolist() if row not in seen], np.int64), config)
    large = min(found.median_size) > max(SHORT_SIDE, *plan.images.size)
    pace = replace(pace, large=large)
    advice = pace.advice(data)
    print_pace(pace, plan, advice, console)
    return {
        "data": source.name,
        "recipe": config.recipe,
        "device": device,
        "batch_size": plan.batch_size,
        **asdict(pace),
        "limit": pace.limit,
        "wait": pace.wait,
        "enough_workers": pace.enough_workers,
        "advice": advice,
    }


def measure(images: ImageReader, plan: Plan, unread: np.ndarray, config: Config) -> Pace:
    """Measure all times.

    unread: rows of files that this command has not read yet, because files that it has read may be in the page cache.
    """
    rows = unread if len(unread) >= min(TIMED, len(images.rows)) // 2 else images.rows
    timed = TimedImages(**{**vars(images), "rows": rows, "kept": {}})
    whole, samples = _loading(timed)
    read, decoding = timed.reading / samples, timed.decoding / samples
    transform = whole / samples - read - decoding
    if plan.cached:
        read, decoding = timed.reading / timed.files, timed.decoding / timed.files
        images = replace(images, rows=np.unique(Order(rows, images.seed).take(0, TIMED // 4).index), kept={})
        images.keep_decoded()
        whole, samples = _loading(images)
        transform = whole / samples
    return Pace(
        read=read,
        decode=decoding,
        transform=transform,
        step=measure_step_seconds(
            config, plan.images, micro=plan.micro_batch, precision=plan.precision, device=plan.device, seconds=PATIENCE
        )
        / plan.batch_size,
        workers=plan.workers,
        cores=num_cores(),
        cached=plan.cached,
        loaded=delivered(images, plan),
        repeats=images.repeats,
        bytes=timed.bytes / timed.files,
        jitter=images.crop.jitter > 0,
    )


@dataclass
class TimedImages(ImageReader):
    """An `ImageReader` that counts files and bytes, and the seconds of reading and of decoding."""

    reading: float = 0.0
    decoding: float = 0.0
    files: int = 0
    bytes: int = 0

    def opened(self, row: int) -> OpenedImage:
        start = time.perf_counter()
        found = super().opened(row)
        self.reading += time.perf_counter() - start
        self.files, self.bytes = self.files + 1, self.bytes + len(found.data)
        return found

    def decoded(self, opened: OpenedImage, boxes: np.ndarray) -> OpenedImage:
        start = time.perf_counter()
        found = super().decoded(opened, boxes)
        self.decoding += time.perf_counter() - start
        return found


def _loading(images: ImageReader) -> tuple[float, int]:
    """Load samples for at most `PATIENCE` seconds; return (seconds, number of samples)."""
    order, count = Order(images.rows, images.seed, images.repeats), 16 * images.repeats
    images[order.take(0, images.repeats)]  # warm-up, because the first image also loads libraries
    if isinstance(images, TimedImages):
        images.reading, images.decoding, images.files, images.bytes = 0.0, 0.0, 0, 0
    done, start = 0, time.perf_counter()
    while done < TIMED * images.repeats and time.perf_counter() - start < PATIENCE:
        done += len(images[order.take(done, count)].batch.index)
    return time.perf_counter() - start, done


def delivered(images: ImageReader, plan: Plan) -> float:
    """Return the images per second of the loader with the planned workers, without the start-up time of the workers."""
    micro = images.repeats * max(1, min(plan.micro_batch, 64) // images.repeats)
    batches = training_batches(images, MicroBatches(0, micro, 100_000), workers=plan.workers)
    try:
        for _ in range(max(1, 5 * plan.workers + 3 * (plan.workers > 0))):  # skip batches that were loaded ahead
            next(batches)
        done, start = 0, time.perf_counter()
        while done < 16 * micro and time.perf_counter() - start < PATIENCE:
            done += len(next(batches).batch.index)
        return done / (time.perf_counter() - start)
    finally:
        batches.close()


def print_pace(pace: Pace, plan: Plan, advice: list[str], console: Console) -> None:
    once = " (once, before the first step)" if pace.cached else ""
    files = pace.read * (1 if pace.cached else pace.repeats)  # seconds a file
    speed = f" ({pace.bytes / max(files, 1e-9) / 1e6:.0f} MB/s)" if pace.bytes else ""
    sample = "per image" if pace.repeats == 1 or pace.cached else f"per sample, with {pace.repeats} per image"
    console.print(f"read       {1e3 * pace.read:8.3f} ms {sample}{speed}{once}")
    console.print(f"decode     {1e3 * pace.decode:8.3f} ms{once}")
    console.print(f"transform  {1e3 * pace.transform:8.3f} ms")
    console.print(f"step       {1e3 * pace.step:8.3f} ms: {1 / pace.step:.0f} images/s")
    console.print(
        f"{plan.workers or 'no'} loader worker{'s' * (plan.workers != 1)}: {pace.loaded:.0f} images/s, "
        f"{pace.loaded * pace.step:.3g} times the rate of the step; "
        + (f"{pace.wait:.0%} of the time is spent waiting for images" if pace.wait > 0.005 else "no waiting")
    )
    if pace.limit == STEP:
        also = f", and data.workers={pace.enough_workers} would suffice" if plan.workers else ""
        console.print(f"the limit is the step{also}")
    else:
        console.print(f"the limit is {pace.limit}: data.workers={pace.enough_workers} would keep up with the step")
    for text in advice:
        console.print(f"  {text}")
