"""`unmask doctor`: versions, device, and a self-test that runs the real path from files to a checkpoint.

`unmask doctor DATA`: where the time of training on these images would go (reading, decoding, cropping, the step), which
of them is the limit, and what to do about it. Measured on a sample, with the plan that `unmask pretrain` would make.
"""

from __future__ import annotations

import math
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unmask.console import Console
from unmask.data import augment, decode
from unmask.data.decode import BadImage
from unmask.data.loader import Images, Order, Taken, training_batches
from unmask.data.scan import num_cores, scan
from unmask.data.sources import Source, open_source
from unmask.pack import SHORT_SIDE
from unmask.plan import Plan, choose_device, choose_precision, measure_step_seconds, with_loading
from unmask.rng import Stream, philox, uniform
from unmask.start import drafted, prepare, pretrain, provenance_versions, refuse_bad_data, refuse_labels, settle

SELF_TEST = (
    "train.steps=8",
    "train.batch_size=8",
    "train.log_every=1",
    "data.size=[16,16]",
    "data.workers=0",
    "method.encoder.width=32",
    "method.encoder.depth=1",
    "method.encoder.heads=2",
    "method.decoder.width=16",
    "method.decoder.depth=1",
    "method.decoder.heads=2",
    "train.device=cpu",
)
LOOKED_AT = 128  # files that the recipe is chosen by
TIMED = 256  # images that are timed; fewer where they are slow
PATIENCE = 4.0  # seconds for each measurement
MARGIN = 1.2  # how much faster than the step loading should be, so that a slow moment leaves no gap
STORAGE, DECODING, TRANSFORM, STEP = "storage", "decoding", "transform", "step"


def examine(console: Console) -> tuple[bool, dict[str, Any]]:
    """Prints what a person would paste into a bug report. Returns (everything works, summary)."""
    device = choose_device("auto")
    precision, why = choose_precision("auto", device)
    summary: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": provenance_versions(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads",
        "precision": precision,
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
    }
    console.say(f"python {summary['python']} on {summary['platform']}")
    console.say("  ".join(f"{name} {version}" for name, version in summary["versions"].items()))
    console.say(f"device: {summary['device']}; {why}; {summary['free_disk_gib']} GiB of disk free here")
    tests: dict[str, Callable[[], str]] = {
        "random numbers": _random_numbers,
        "decode": _decode,
        "train": _train,
    }
    summary["tests"] = {}
    for name, test in tests.items():
        start = time.perf_counter()
        try:
            outcome, good = test(), True
        except Exception as error:
            outcome, good = f"{type(error).__name__}: {error}", False
        summary["tests"][name] = {"ok": good, "outcome": outcome, "seconds": round(time.perf_counter() - start, 2)}
        console.say(f"{'ok    ' if good else 'FAILED'} {name}: {outcome} ({summary['tests'][name]['seconds']} s)")
    good = all(test["ok"] for test in summary["tests"].values())
    console.say("everything works" if good else "something does not work: please report the lines above")
    return good, summary


def _random_numbers() -> str:
    zero = np.zeros(1, np.int64)
    got = [int(word[0]) for word in philox((zero, zero, zero, zero), (0, 0))]
    assert got == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], f"Philox gives {got}"
    return "the counter-based generator gives its published values"


def _decode() -> str:
    import io

    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((256, 192)))
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=95)
    start, count = time.perf_counter(), 50
    for _ in range(count):
        image = decode.decode(file.getvalue())
    error = np.abs(image.astype(float) - smooth).mean()
    assert error < 4, f"a decoded JPEG differs by {error:.1f} levels on average"
    return f"JPEG at {count / (time.perf_counter() - start):.0f} images of 256 x 192 a second"


def _train() -> str:
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        rng = np.random.default_rng(0)
        for number in range(16):
            small = Image.fromarray(rng.integers(0, 255, (3, 3, 3), np.uint8))
            small.resize((20, 20), Image.Resampling.BICUBIC).save(images / f"{number}.png")
        run = pretrain(images, recipe="mae_nano", out=Path(folder, "run"), settings=SELF_TEST)
        losses = [row["loss"] for row in run.metrics()]
    assert len(losses) == 8, f"losses {losses}"
    assert np.isfinite(losses).all(), f"losses {losses}"
    return f"8 steps from files to checkpoint, loss {losses[0]:.3f} to {losses[-1]:.3f}"


# -------------------------------------------------------------------------------------------------- where the time goes


@dataclass(frozen=True)
class Pace:
    """What one image costs, in seconds: to read, decode and transform (crop, resize, flip, stack) in one process, and
    its share of a step; `workers` as planned, `cores` there are; `cached`: read and decoded only once, before training.

    loaded: images a second that the planned workers were seen to deliver, or the one process with 0 workers.
    """

    read: float
    decode: float
    transform: float
    step: float
    workers: int
    cores: int
    cached: bool
    loaded: float
    bytes: float = 0.0  # of one file
    large: bool = False  # whether packing would shrink the images
    jitter: bool = False

    @property
    def load(self) -> float:
        """Of one process, for every image of a step."""
        return self.transform if self.cached else self.read + self.decode + self.transform

    @property
    def wait(self) -> float:
        """The share of a step that is spent on waiting for images."""
        whole = with_loading(self.step, 1 / self.loaded, self.workers)
        return max(0.0, 1 - self.step / whole)

    @property
    def limit(self) -> str:
        """STEP, or what takes longest where loading cannot keep up."""
        if 1 / self.loaded <= self.step:
            return STEP
        costs = {TRANSFORM: self.transform} if self.cached else self.costs
        return max(costs, key=costs.__getitem__)

    @property
    def costs(self) -> dict[str, float]:
        return {STORAGE: self.read, DECODING: self.decode, TRANSFORM: self.transform}

    @property
    def enough_workers(self) -> int:
        """How many load as fast as the step takes images, and a fifth faster."""
        return max(1, math.ceil(MARGIN * self.load / self.step))

    def advice(self, data: str) -> list[str]:
        """What to do, the simplest first; nothing where the step is the limit and is not kept waiting."""
        if self.wait <= 0.05:
            return []
        found = []
        if self.workers < self.enough_workers <= max(1, self.cores - 1):
            found.append(f"--set data.workers={self.enough_workers}")
        if self.limit == STORAGE:
            found.append(
                "copy the images to a disk of this machine, or put them into one file that is read in order: "
                f"unmask pack {data} packed.tar"
            )
        elif self.large:
            found.append(f"make the images as large as the recipe needs them, once: unmask pack {data} packed.tar")
        if self.limit == DECODING:
            found.append("--set data.repeats=2 takes two crops of every image that is decoded")
            found.append("--set data.cache=true keeps decoded images in memory, if they fit")
        elif self.limit == TRANSFORM:
            found.append("fewer pixels: --set data.size=..." + ", or no --set data.crop.jitter" * self.jitter)
        if self.enough_workers > max(1, self.cores - 1):
            found.append(
                f"{self.enough_workers} workers would keep up, and there are {self.cores} cores: a larger model loses "
                "nothing"
            )
        return found


def examine_data(data: str, console: Console, *, recipe: str = "auto", settings: Iterable[str] = ()) -> dict[str, Any]:
    """Says what limits training on these images, and returns it. Raises UserError where they cannot be trained on."""
    settings = list(settings)
    draft = drafted(None, recipe, settings, None)
    refuse_labels(draft, None)
    device = choose_device(draft.train.device)
    source = open_source(data)
    found = scan(source, sample=LOOKED_AT, workers=0, channels=draft.data.channels)
    refuse_bad_data(found, draft)
    config, reasons, _ = settle(source, found, recipe, settings, device, budget=None)
    images, plan = prepare(source, found, config, device, budget=None, reasons=reasons)
    console.say(
        f"{source.name}: {len(source)} images, recipe {config.recipe}, batches of {plan.batch_size} on {device}, "
        f"images {'kept in memory' if plan.cached else 'read anew in every epoch'}"
    )
    seen = set(found.good_rows.tolist()) | set(found.bad_rows.tolist())
    pace = measure(images, plan, np.array([row for row in images.rows.tolist() if row not in seen], np.int64), config)
    large = min(found.median_size) > max(SHORT_SIDE, *plan.images.size)
    pace = replace(pace, large=large, jitter=images.crop.jitter > 0)
    advice = pace.advice(data)
    say_pace(pace, plan, advice, console)
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


def measure(images: Images, plan: Plan, unread: np.ndarray, config: Any) -> Pace:
    """unread: rows that this command has not read yet, so that they come from the storage if anything does."""
    rows = unread if len(unread) >= min(TIMED, len(images.rows)) // 2 else images.rows
    taken = Order(rows, images.seed).take(0, TIMED)
    timed = TimedSource(images.source)
    whole = _each(replace(images, source=timed, kept={}, repeats=1), taken)
    read, size = timed.seconds / max(1, timed.files), timed.bytes / max(1, timed.files)
    decoding = decode_seconds(images, taken)
    transform = max(0.0, whole - read - decoding)
    if plan.cached:
        kept = replace(images, rows=np.unique(taken.index[: len(taken.index) // 4]), kept={})
        kept.keep_decoded()
        images, transform = kept, _each(replace(kept, repeats=1), Order(kept.rows, images.seed).take(0, len(kept.rows)))
    return Pace(
        read=read,
        decode=decoding,
        transform=transform,
        step=measure_step_seconds(config, plan.images, plan.micro_batch, plan.precision, plan.device, seconds=PATIENCE)
        / plan.batch_size,
        workers=plan.workers,
        cores=num_cores(),
        cached=plan.cached,
        loaded=delivered(images, plan),
        bytes=size,
    )


class TimedSource(Source):
    """Another source, and how long its files took to read."""

    def __init__(self, source: Source) -> None:
        super().__init__(source.name, source.names, source.sizes, location=source.location)
        self.source, self.labels = source, source.labels
        self.seconds, self.files, self.bytes = 0.0, 0, 0

    def read(self, i: int) -> bytes:
        start = time.perf_counter()
        data = self.source.read(i)
        self.seconds += time.perf_counter() - start
        self.files, self.bytes = self.files + 1, self.bytes + len(data)
        return data


def _each(images: Images, taken: Taken) -> float:
    """Seconds an image, of as many as can be loaded in the time there is."""
    images[Taken(taken.index[:1], taken.epoch[:1])]  # the first is slower: libraries are loaded
    if isinstance(images.source, TimedSource):
        images.source.seconds, images.source.files, images.source.bytes = 0.0, 0, 0
    done, start = 0, time.perf_counter()
    for first in range(0, len(taken.index), 16):
        part = slice(first, first + 16)
        done += len(images[Taken(taken.index[part], taken.epoch[part])].batch.index)
        if time.perf_counter() - start > PATIENCE:
            break
    return (time.perf_counter() - start) / done


def decode_seconds(images: Images, taken: Taken) -> float:
    """Seconds to decode an image as large as its crop needs it; files that cannot be read are left out."""
    spent, done, began = 0.0, 0, time.perf_counter()
    draws = uniform(images.seed, Stream.CROP, taken.epoch, taken.index, augment.CROP_DRAWS)
    for row, draw in zip(taken.index.tolist(), draws, strict=True):
        try:
            data = images.source.read(row)
            start = time.perf_counter()
            head = decode.header(data)
            size = head.full_size
            box = augment.crop_boxes(np.array([size]), images.spec.size, images.crop, draw[None])[0]
            found = decode.decode(data, at_least=augment.decode_size(size, box, images.spec.size), found=head)
            decode.conform(found, images.spec.channels, images.spec.dtype)
        except BadImage:
            continue
        spent, done = spent + time.perf_counter() - start, done + 1
        if spent > PATIENCE or time.perf_counter() - began > 2 * PATIENCE:  # storage may be slower than decoding
            break
    return spent / max(1, done)


def delivered(images: Images, plan: Plan) -> float:
    """Images a second from the loader with the planned workers; the time they take to start does not count."""
    micro = images.repeats * max(1, min(plan.micro_batch, 64) // images.repeats)
    batches = training_batches(images, start=0, batch=micro, batches=100_000, workers=plan.workers)
    try:
        for _ in range(max(1, 5 * plan.workers)):  # until what was loaded ahead is used up
            next(batches)
        done, start = 0, time.perf_counter()
        while done < 16 * micro and time.perf_counter() - start < PATIENCE:
            done += len(next(batches).batch.index)
        return done / (time.perf_counter() - start)
    finally:
        batches.close()


def say_pace(pace: Pace, plan: Plan, advice: list[str], console: Console) -> None:
    once = " (once, before the first step)" if pace.cached else ""
    speed = f" ({pace.bytes / max(pace.read, 1e-9) / 1e6:.0f} MB/s)" if pace.bytes else ""
    console.say(f"read       {1e3 * pace.read:8.3f} ms an image{speed}{once}")
    console.say(f"decode     {1e3 * pace.decode:8.3f} ms{once}")
    console.say(f"transform  {1e3 * pace.transform:8.3f} ms")
    console.say(f"step       {1e3 * pace.step:8.3f} ms: takes {1 / pace.step:.0f} images/s")
    console.say(
        f"{plan.workers or 'no'} loader worker{'s' * (plan.workers != 1)}: {pace.loaded:.0f} images/s, "
        f"{pace.loaded * pace.step:.3g} times what the step takes; "
        + (f"{pace.wait:.0%} of the time is spent on waiting for images" if pace.wait > 0.005 else "no waiting")
    )
    if pace.limit == STEP:
        also = f", and data.workers={pace.enough_workers} would suffice" if plan.workers else ""
        console.say(f"the limit is the step{also}")
    else:
        console.say(f"the limit is {pace.limit}: data.workers={pace.enough_workers} would keep up with the step")
    for text in advice:
        console.say(f"  {text}")
