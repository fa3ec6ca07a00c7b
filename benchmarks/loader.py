"""Measure images per second from JPEG files to augmented batches: unmask, a Pillow pipeline, and plain decoding.

    python benchmarks/loader.py FOLDER [--large 24] [--workers 2] [--json] [--keep]
    python benchmarks/loader.py --tiny

FOLDER contains JPEGs. The compared loaders run in turns on one core and are timed in processor time, which other
programs affect less than wall-clock time. `--workers N` adds rows in wall-clock time with N loader processes, and the
time that a training step waits for data. Rates are medians; `spread` is the difference between the slowest and the
fastest round of a loader, relative to its median, and the largest over all loaders is reported.

`reference` is the input pipeline of the MAE paper's code, written with Pillow: decode to RGB, random resized crop
(0.2, 1) with bicubic filter, flip, convert to a float tensor, normalise. `reference_uint8` leaves out the conversion to
float and the normalisation, as unmask's loader does, because unmask's encoder normalises on the device. All pipelines
use the same crop boxes of the same files. `bare_decode` only reads and decodes the whole file, which bounds the rate of
any loader that decodes whole files. `unmask_repeats` uses four crops of each decoded image. `unmask_for_device` leaves
resampling to the device, and only the loader is timed.

`--large N` makes N photographs of 12 megapixels from the first images of FOLDER: the images are enlarged, get Gaussian
noise of `--noise` levels, and are saved with JPEG quality 90. With noise of 4 levels they have about 2.8 MB, like
photographs of cameras; without noise they have about 1 MB. Most of their loading time is entropy decoding, which
decoding at a smaller scale does not avoid. They are loaded unchanged, and again after `unmask pack` with a short side
of 512.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from measure import command_line, conclude, origin
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from unmask.batch import ImageSpec
from unmask.data.augment import CROP_DRAWS, CropConfig, crop_boxes
from unmask.data.decode.decode import header
from unmask.data.image_reader import ImageReader
from unmask.data.loader import MicroBatches, training_batches
from unmask.data.order import Order
from unmask.data.pack_images import pack
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.rng import Stream, uniform

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def main() -> None:
    parser = command_line(__doc__, rounds=7, result="loader-<size>")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--images", type=int, default=192, help="use at most this many images of FOLDER, in whole batches"
    )
    parser.add_argument("--large", type=int, default=0, help="number of photographs of 12 megapixels to make")
    parser.add_argument(
        "--noise", type=float, default=4.0, help="standard deviation of their Gaussian noise, in levels"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="also measure wall-clock time, with this many loader processes"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides, short_side = (4000, 3000), 512
    with tempfile.TemporaryDirectory() as made:
        if options.tiny:
            options.size, options.batch, options.rounds, options.large = 32, 4, 1, 4
            sides, short_side = (128, 96), 32
            options.folder = str(draw_images(Path(made) / "images", 8))
        elif options.folder is None:
            parser.error("got no FOLDER; give one, or --tiny")
        rows = measured(open_source(options.folder), "as they are", options.images, options)
        if options.large:
            enlarge(open_source(options.folder), Path(made) / "large", options.large, sides, options.noise)
            large = open_source(Path(made) / "large")
            what = f"{math.prod(sides) / 1e6:g} megapixels, noise {options.noise:g}"
            rows += measured(large, what, options.large, options)
            pack(large.name, Path(made) / "packed.tar", short_side=short_side, workers=1)
            rows += measured(open_source(Path(made) / "packed.tar"), f"{what}, packed", options.large, options)
    conclude(f"loader-{options.size}", rows, origin(), as_json=options.json, keep=options.keep)


def measured(source: Source, what: str, most: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all loaders on one set of images; return the rows of the result."""
    batch = min(options.batch, len(source), most)
    count = min(len(source), most) // batch * batch
    spec = ImageSpec(3, (options.size,) * 2, "uint8", (0.0,) * 3, (1.0,) * 3)
    images = ImageReader(source, np.arange(count), spec, CropConfig())
    order = Order(images.rows, images.seed).take(0, count)
    repeats = math.gcd(4, batch)
    several, for_device = replace(images, repeats=repeats), replace(images, on_device=True)
    boxes, flips = drawn(source, order.index, images)

    def run(data: ImageReader) -> None:
        for _ in training_batches(data, MicroBatches(0, batch, count // batch), workers=0):
            pass

    rivals = {
        "unmask": lambda: run(images),
        "unmask_repeats": lambda: run(several),
        "unmask_for_device": lambda: run(for_device),
        "bare_decode": lambda: bare_decode(source, order.index),
        "reference": lambda: reference(source, order.index, boxes, flips, options.size, batch),
        "reference_uint8": lambda: reference(source, order.index, boxes, flips, options.size, batch, normal=False),
    }
    found = in_turns(rivals, options.rounds, time.process_time)
    rates = {name: count / statistics.median(seconds) for name, seconds in found.items()}
    row: dict[str, Any] = {
        "images": what, "count": count, "size": options.size, "workers": 0,
        "bytes": int(np.mean([len(source.read(int(i))) for i in order.index])),
        "full_size": [round(float(side)) for side in np.mean([header(source.read(int(i))).full_size
                                                              for i in order.index], 0)],
        **{f"{name}_per_s": rate for name, rate in rates.items()},
        "spread": round(max(max(s) / statistics.median(s) - min(s) / statistics.median(s) for s in found.values()), 3),
        "repeats": repeats,
        "over_reference": rates["unmask"] / rates["reference"],
        "over_reference_uint8": rates["unmask"] / rates["reference_uint8"],
        "of_bare_decode": rates["unmask"] / rates["bare_decode"],
        **pixel_difference(images, order, boxes, flips, options.size),
    }  # fmt: skip
    rows = [row]
    if options.workers:
        rows.append(with_workers(images, what, count, batch, order.index, options))
    return rows


def in_turns(
    rivals: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Time the loaders in turns, after one round of warm-up; return {loader: seconds of every call}."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, call in rivals.items():
            start = clock()
            call()
            if number:
                times[name].append(clock() - start)
    return times


def bare_decode(source: Source, rows: np.ndarray) -> None:
    for row in rows.tolist():
        simplejpeg.decode_jpeg(source.read(row), "RGB")


# Pillow reference


def drawn(source: Source, rows: np.ndarray, images: ImageReader) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop boxes (n, 4), in pixels of the files, and flips (n,) of these images in unmask's first epoch."""
    first = np.zeros(len(rows), np.int64)
    heads = [header(source.read(int(row))) for row in rows]
    sizes = np.array([head.full_size for head in heads])
    boxes = crop_boxes(sizes, images.spec.size, images.crop, uniform(images.seed, Stream.CROP, first, rows, CROP_DRAWS))
    stored = np.array([(head.height, head.width) for head in heads]) / sizes
    flips = uniform(images.seed, Stream.FLIP, first, rows, 1)[:, 0] < images.crop.flip
    return boxes * np.tile(stored, 2), flips


def reference(
    source: Source,
    rows: np.ndarray,
    boxes: np.ndarray,
    flips: np.ndarray,
    size: int,
    batch: int,
    *,
    normal: bool = True,
) -> list[torch.Tensor]:
    """Return the last full batch of the MAE paper's input pipeline, with crop boxes rounded to whole pixels."""
    batches, held = [], []
    for row, box, flip in zip(rows.tolist(), boxes, flips, strict=True):
        with Image.open(io.BytesIO(source.read(row))) as file:
            image = file.convert("RGB")
        top, left, height, width = (round(float(value)) for value in box)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        held.append((pixels.float().div(255) - MEAN) / STD if normal else pixels)
        if len(held) == batch:
            batches, held = [*batches[-1:], torch.stack(held)], []  # keep only the last batch, as a loader would
    return batches


def pixel_difference(
    images: ImageReader, order: Any, boxes: np.ndarray, flips: np.ndarray, size: int
) -> dict[str, float]:
    """Return unmask's mean absolute difference from Pillow in levels: (mean over images, worst image)."""
    differences = []
    for start in range(0, len(order.index), 16):
        part = slice(start, start + 16)
        ours = images[type(order)(order.index[part], order.epoch[part])].batch.images.numpy().astype(int)
        for mine, row, box, flip in zip(ours, order.index[part].tolist(), boxes[part], flips[part], strict=True):
            with Image.open(io.BytesIO(images.source.read(row))) as file:
                image = file.convert("RGB")
            top, left, height, width = box
            edges = (left, top, min(left + width, image.width), min(top + height, image.height))
            if (box == np.round(box)).all():  # as in torchvision: crop, then resize
                image, edges = image.crop(tuple(round(float(edge)) for edge in edges)), None
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=edges)
            theirs = np.asarray(image)[:, :: -1 if flip else 1].transpose(2, 0, 1)
            differences.append(float(np.abs(mine - theirs).mean()))
    return {"pixel_difference": float(np.mean(differences)), "pixel_difference_worst": max(differences)}


# With loader processes


class Bare(Dataset[int]):
    """Decode all images of a batch in full and discard them."""

    def __init__(self, source: Source, rows: np.ndarray, batch: int, batches: int) -> None:
        self.source, self.parts = source, [np.resize(np.roll(rows, -i * batch), batch) for i in range(batches)]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> int:
        bare_decode(self.source, self.parts[number])
        return number


def with_workers(
    images: ImageReader, what: str, count: int, batch: int, rows: np.ndarray, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure rates in wall-clock time, and the share of time that training waits for data.

    A training step is assumed to take 1.2 times as long as loading.
    """
    workers, batches = options.workers, max(6 * options.workers, (1 if options.tiny else 1536) // batch)

    def stream(data: ImageReader) -> Iterator[Any]:
        return training_batches(data, MicroBatches(0, batch, batches), workers=workers)

    rivals: dict[str, Callable[[], Iterator[Any]]] = {
        "unmask": lambda: stream(images),
        "unmask_for_device": lambda: stream(replace(images, on_device=True)),
        "bare_decode": lambda: iter(
            DataLoader(Bare(images.source, rows, batch, batches), batch_size=None, num_workers=workers)
        ),
    }
    each: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(min(3, options.rounds)):
        for name, begin in rivals.items():
            each[name].append(seconds_of_a_batch(begin(), workers))
    rates = {name: batch / statistics.median(seconds) for name, seconds in each.items()}
    step = 1.2 * batch / rates["unmask"]
    waits = waits_of(stream(images), step)
    return {
        "images": what, "count": count, "size": options.size, "workers": workers,
        **{f"{name}_per_s": rate for name, rate in rates.items()},
        "of_bare_decode": rates["unmask"] / rates["bare_decode"], "step_s": step, "first_wait_s": waits[0],
        "waiting": sum(waits[1:]) / (sum(waits[1:]) + step * (len(waits) - 1)),
    }  # fmt: skip


def seconds_of_a_batch(arriving: Iterator[Any], workers: int) -> float:
    """Return the mean seconds per batch, after the first batch of each worker."""
    for _ in range(workers):
        next(arriving)
    start, number = time.perf_counter(), 0
    for number, _ in enumerate(arriving, 1):  # noqa: B007
        pass
    return (time.perf_counter() - start) / number


def waits_of(arriving: Iterator[Any], step: float) -> list[float]:
    """Return the seconds waited for each batch, sleeping `step` seconds after each as if a GPU were computing."""
    waits, start = [], time.perf_counter()
    for _ in arriving:
        waits.append(time.perf_counter() - start)
        time.sleep(step)
        start = time.perf_counter()
    return waits


# Test images


def draw_images(folder: Path, count: int) -> Path:
    """Write small JPEGs of coarse noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.jpg", quality=90)
    return folder


def enlarge(source: Source, folder: Path, count: int, sides: tuple[int, int], noise: float) -> None:
    """Write the photographs of `--large`, each of `sides` (width, height)."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        with Image.open(io.BytesIO(source.read(number % len(source)))) as file:
            large = ImageOps.fit(file.convert("RGB"), sides, Image.Resampling.LANCZOS)
        noisy = np.asarray(large) + rng.normal(0, noise, (sides[1], sides[0], 1)).astype(np.float32)
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)


if __name__ == "__main__":
    main()
