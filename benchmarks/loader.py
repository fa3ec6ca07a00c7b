"""Images per second from JPEG files to augmented batches: unmask's loader, the usual one with Pillow, bare decode.

    python benchmarks/loader.py FOLDER [--large 24] [--workers 2] [--json] [--keep]
    python benchmarks/loader.py --tiny

FOLDER holds JPEGs. One core each, in turns, in seconds of processor time, which a busy machine disturbs less than the
clock does; `--workers` adds the clock's rates of so many processes, and how long a training step waits on them. Of each
rate the median is reported, and the slowest and fastest round as shares of it.

The reference is the input pipeline of the MAE paper's code, written out with Pillow: decode to RGB, random resized crop
(0.2, 1) with bicubic filter, flip, to float tensor, normalise; `reference_uint8` leaves the last two out, as unmask's
loader does (normalisation belongs to its encoder, on the device). All cut the same boxes out of the same files.
`bare_decode` reads and decodes files in full and does nothing else: it bounds any loader that decodes them in full.
`unmask_repeats` takes four crops of each decoded image; `unmask_for_device` leaves the resampling to the device, and
only the loader's half of that is measured.

`--large N` makes N photographs of 12 megapixels from the first of FOLDER: enlarged, with Gaussian noise of `--noise`
levels on top, JPEG quality 90. With 4 levels they have about 2.8 MB, as those of cameras do, with none about 1 MB; most
of the time goes into undoing the JPEG's entropy coding, which no scaled decoding spares. They are loaded as they are,
and packed (`unmask pack`) to a short side of 512.
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
from unmask.data.loader import training_batches
from unmask.data.order import Order
from unmask.data.pack import pack
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.rng import Stream, uniform

MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def main() -> None:
    parser = command_line(__doc__, rounds=7, result="loader-<size>")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=192, help="at most so many of FOLDER, in whole batches")
    parser.add_argument("--large", type=int, default=0, help="photographs of 12 megapixels to make and load")
    parser.add_argument("--noise", type=float, default=4.0, help="of those photographs, in levels")
    parser.add_argument("--workers", type=int, default=0, help="processes for the rows in seconds of the clock")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides, short_side = (4000, 3000), 512
    with tempfile.TemporaryDirectory() as made:
        if options.tiny:
            options.size, options.batch, options.rounds, options.large = 32, 4, 1, 4
            sides, short_side = (128, 96), 32
            options.folder = str(draw_images(Path(made) / "images", 8))
        elif options.folder is None:
            parser.error("FOLDER is needed, or --tiny")
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
    """The rows of one set of images."""
    batch = min(options.batch, len(source), most)
    count = min(len(source), most) // batch * batch
    spec = ImageSpec(3, (options.size,) * 2, "uint8", (0.0,) * 3, (1.0,) * 3)
    images = ImageReader(source, np.arange(count), spec, CropConfig())
    order = Order(images.rows, images.seed).take(0, count)
    repeats = math.gcd(4, batch)
    several, for_device = replace(images, repeats=repeats), replace(images, on_device=True)
    boxes, flips = drawn(source, order.index, images)

    def run(data: ImageReader) -> None:
        for _ in training_batches(data, start=0, batch=batch, batches=count // batch, workers=0):
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
    """Seconds of each call, rivals in turns, after one round that does not count."""
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


# -------------------------------------------------------------------------------------------------------- the reference


def drawn(source: Source, rows: np.ndarray, images: ImageReader) -> tuple[np.ndarray, np.ndarray]:
    """The boxes (n, 4) and flips (n,) that unmask draws for these rows of the first epoch, in pixels of the file."""
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
    """Batches as the published recipe makes them, every box to the nearest pixel."""
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
            batches, held = [*batches[-1:], torch.stack(held)], []  # no more than a loader would hold
    return batches


def pixel_difference(
    images: ImageReader, order: Any, boxes: np.ndarray, flips: np.ndarray, size: int
) -> dict[str, float]:
    """Mean absolute difference in levels from Pillow's full decode and bicubic resize, over all and the worst image."""
    differences = []
    for start in range(0, len(order.index), 16):
        part = slice(start, start + 16)
        ours = images[type(order)(order.index[part], order.epoch[part])].batch.images.numpy().astype(int)
        for mine, row, box, flip in zip(ours, order.index[part].tolist(), boxes[part], flips[part], strict=True):
            with Image.open(io.BytesIO(images.source.read(row))) as file:
                image = file.convert("RGB")
            top, left, height, width = box
            edges = (left, top, min(left + width, image.width), min(top + height, image.height))
            if (box == np.round(box)).all():  # as torchvision: cut out, then resized
                image, edges = image.crop(tuple(round(float(edge)) for edge in edges)), None
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=edges)
            theirs = np.asarray(image)[:, :: -1 if flip else 1].transpose(2, 0, 1)
            differences.append(float(np.abs(mine - theirs).mean()))
    return {"pixel_difference": float(np.mean(differences)), "pixel_difference_worst": max(differences)}


# ------------------------------------------------------------------------------------------------------------- workers


class Bare(Dataset[int]):
    """Batches that are decoded in full and thrown away."""

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
    """Rates by the clock, and what a step of computation elsewhere waits where loading is 1.2 times as fast as it."""
    workers, batches = options.workers, max(6 * options.workers, (1 if options.tiny else 1536) // batch)

    def stream(data: ImageReader) -> Iterator[Any]:
        return training_batches(data, start=0, batch=batch, batches=batches, workers=workers)

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
    """On average, once each worker has begun and brought its first."""
    for _ in range(workers):
        next(arriving)
    start, number = time.perf_counter(), 0
    for number, _ in enumerate(arriving, 1):  # noqa: B007
        pass
    return (time.perf_counter() - start) / number


def waits_of(arriving: Iterator[Any], step: float) -> list[float]:
    """Seconds that each batch was waited for, with `step` seconds of nothing after it, as when a GPU computes."""
    waits, start = [], time.perf_counter()
    for _ in arriving:
        waits.append(time.perf_counter() - start)
        time.sleep(step)
        start = time.perf_counter()
    return waits


# -------------------------------------------------------------------------------------------------------------- images


def draw_images(folder: Path, count: int) -> Path:
    """Small JPEGs of coarse noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        image.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.jpg", quality=90)
    return folder


def enlarge(source: Source, folder: Path, count: int, sides: tuple[int, int], noise: float) -> None:
    """Photographs of `sides`, (width, height); see the top."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        with Image.open(io.BytesIO(source.read(number % len(source)))) as file:
            large = ImageOps.fit(file.convert("RGB"), sides, Image.Resampling.LANCZOS)
        noisy = np.asarray(large) + rng.normal(0, noise, (sides[1], sides[0], 1)).astype(np.float32)
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)


if __name__ == "__main__":
    main()
