"""Measure how time and memory grow with the number of images, and the encoder's time with the number of patches.

    python benchmarks/scale.py [--parts index order loading encoder] [--files 1000 10000 100000] [--json] [--keep]

index: lists and scans temporary image files in class folders, and then repeats this with a warm cache. The rival is
`os.walk` into a sorted list of (path, class), as in most data sets. The result has the seconds and bytes per file: the
bytes of the index itself (by tracemalloc), and the memory that a forked process no longer shares with its parent after
it has read every name.

order, loading: up to 1,000,000 names of the same file, so that only the number of rows differs.

encoder: the time of a forward pass at several mask ratios, and how well a linear function of the number of tokens
(visible patches and class token) fits these times.

Times are medians over rounds in which the measured functions take turns. --tiny uses very small sizes, for the test of
this script.
"""

from __future__ import annotations

import gc
import io
import os
import shutil
import statistics
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import command_line, conclude, medians, origin, spread, timings
from PIL import Image

from unmask.batch import ImageSpec
from unmask.data.augment import CropConfig
from unmask.data.image_reader import ImageReader
from unmask.data.loader import MicroBatches, training_batches
from unmask.data.order import Order
from unmask.data.scan.scan import scan
from unmask.data.scan.scan_cache import cache_file
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.engine.device import autocast, choose_device, choose_precision
from unmask.nn.patches import take
from unmask.recipes.catalogue import find
from unmask.rng import Draws, permutation

PARTS = ("index", "order", "loading", "encoder")
RATIOS = (0.95, 0.9, 0.75, 0.5, 0.25, 0.0)
BATCH = 64
DRAWN = 256  # number of batches whose random draws are timed


def picture(size: tuple[int, int], kind: str, seed: int = 0) -> bytes:
    """Return the bytes of a smooth random image file."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


# Index


def index_row(count: int, rounds: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    os.environ["UNMASK_CACHE"] = str(folder / "memory")
    try:
        root = folder / "images"
        make_files(root, count)
        start = time.perf_counter()
        first = scan(open_source(root))
        first_seconds = time.perf_counter() - start
        assert first.good == count
        rivals: dict[str, Callable[[], object]] = {
            "open": lambda: open_source(root),
            "walk": lambda: walked(root),
            "open_and_scan_again": lambda: scan(open_source(root)),
        }
        found = medians(rivals, rounds=rounds)
        kept = cache_file(open_source(root))
        return {
            "part": "index",
            "files": count,
            "first_open_and_scan_s": first_seconds,
            "open_s": found["open"],
            "open_and_scan_again_s": found["open_and_scan_again"],
            "known_again": scan(open_source(root)).known,  # 0 if the first scan took less than two seconds
            "walk_s": found["walk"],
            "open_bytes_a_file": allocated(rivals["open"]) / count,
            "walk_bytes_a_file": allocated(rivals["walk"]) / count,
            "open_bytes_a_file_in_a_fork": own_in_a_fork(open_source(root).names) / count,
            "walk_bytes_a_file_in_a_fork": own_in_a_fork([path for path, _ in walked(root)]) / count,
            "memory_on_disk_bytes_a_file": kept.stat().st_size / count if kept and kept.exists() else 0,
        }
    finally:
        shutil.rmtree(folder)


def make_files(root: Path, count: int) -> None:
    """Write `count` images of 40 x 48 pixels, half of them JPEG and half PNG, in folders of a hundred images."""
    contents = [(picture((40, 48), kind, seed), kind) for seed in range(8) for kind in ("JPEG", "PNG")]
    for number in range(count):
        content, kind = contents[number % len(contents)]
        folder = root / f"n{number // 100:08d}"
        if number % 100 == 0:
            folder.mkdir(parents=True)
        (folder / f"n{number // 100:08d}_{number:07d}.{kind.lower()}").write_bytes(content)


def walked(root: Path) -> list[tuple[str, int]]:
    """Return a sorted list of (path, class) of every file, like most data sets of image folders."""
    found = []
    for number, folder in enumerate(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())):
        for here, _, names in sorted(os.walk(os.path.join(root, folder))):
            found += [
                (os.path.join(here, name), number) for name in sorted(names) if name.lower().endswith((".jpeg", ".png"))
            ]
    return found


def allocated(call: Callable[[], object]) -> int:
    """Return the bytes that the result of a call occupies."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = call()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        del kept


def own_in_a_fork(names: Iterable[str]) -> int:
    """Return the bytes that a forked process no longer shares with its parent after reading every name."""
    if not hasattr(os, "fork") or not Path("/proc/self/smaps_rollup").exists():
        return 0
    reading, writing = os.pipe()
    with warnings.catch_warnings():  # the child process does not use torch's threads
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        before = private_bytes()
        for name in names:
            len(name)
        os.write(writing, str(private_bytes() - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private"))


# Order and loading


class OneFile(Source):
    """A source with any number of rows, all with the same bytes."""

    def __init__(self, rows: int, content: bytes) -> None:
        super().__init__("one file", [f"{row:07d}.jpg" for row in range(rows)], np.full(rows, len(content)))
        self.content = content

    def read(self, i: int) -> bytes:
        return self.content


def order_rows(counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """Time how long an epoch's order, its random draws, and a start in the middle of an epoch take."""
    begun = {count: Order(np.arange(count), 0) for count in counts}
    calls: dict[str, Callable[[], object]] = {}
    for count in counts:
        calls[f"order {count}"] = lambda count=count: permutation(0, 1, count)
        calls[f"draws {count}"] = lambda count=count: draw(begun[count])
        calls[f"begin {count}"] = lambda count=count: Order(np.arange(count), 0).take(10 * count + count // 2, BATCH)
    found = medians(calls, rounds=rounds)
    return [
        {
            "part": "order",
            "rows": count,
            "order_us_an_image": found[f"order {count}"] / count * 1e6,
            "draws_us_an_image": found[f"draws {count}"] / (DRAWN * BATCH) * 1e6,
            "begin_in_the_eleventh_epoch_s": found[f"begin {count}"],
        }
        for count in counts
    ]


def draw(order: Order) -> None:
    """Get the indices of the images of DRAWN batches, and draw 16 random numbers for each image."""
    for number in range(DRAWN):
        taken = order.take(number * BATCH, BATCH)
        Draws(0, torch.from_numpy(taken.epoch), torch.from_numpy(taken.index)).uniform(16)


def loading_rows(counts: list[int], images: int, rounds: int) -> list[dict[str, Any]]:
    """Time loading from bytes to batches; the first batch is reported separately."""
    content = picture((40, 48), "JPEG")
    spec = ImageSpec(3, (32, 32), "uint8", (0.0,) * 3, (1.0,) * 3)
    sets = {count: ImageReader(OneFile(count, content), np.arange(count), spec, CropConfig()) for count in counts}
    first: dict[int, list[float]] = {count: [] for count in counts}
    rest: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count, own in sets.items():
            start = time.perf_counter()
            batches = training_batches(own, MicroBatches(count // 2, BATCH, images // BATCH + 1), workers=0)
            next(batches)
            begun = time.perf_counter()
            for _ in batches:
                pass
            first[count].append(begun - start)
            rest[count].append((time.perf_counter() - begun) / (images // BATCH * BATCH))
    return [
        {"part": "loading", "rows": count, "first_batch_s": statistics.median(first[count]),
         **{f"{key}_ms_an_image": value * 1e3 for key, value in spread(rest[count]).items()}}
        for count in counts
    ]  # fmt: skip


# Encoder


def encoder_rows(recipe: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    device = choose_device("auto")
    precision = choose_precision("auto", device)[0]
    config = find(recipe)
    size = config.data.size
    method = config.build(ImageSpec(3, size, "uint8", (127.0,) * 3, (60.0,) * 3)).to(device).eval()
    encoder: Any = method.encoder
    patches = encoder.grid[0] * encoder.grid[1]
    kept = {ratio: max(1, round(patches * (1 - ratio))) for ratio in RATIOS}
    noise = torch.rand(batch, patches, generator=torch.Generator().manual_seed(0)).to(device)
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=device)

    def see(ratio: float) -> None:
        keep = noise.argsort(1)[:, : kept[ratio]]
        with torch.inference_mode(), autocast(precision, device):
            encoder.run(encoder.embed(take(encoder.patches(images), keep), keep))

    found = timings({str(ratio): lambda ratio=ratio: see(ratio) for ratio in RATIOS}, rounds=rounds)
    tokens = np.array([1 + kept[ratio] for ratio in RATIOS], np.float64)
    seconds = np.array([statistics.median(found[str(ratio)]) for ratio in RATIOS])
    slope, fixed = np.polyfit(tokens, seconds, 1)
    left = seconds - (fixed + slope * tokens)
    rows: list[dict[str, Any]] = [
        {"part": "encoder", "mask_ratio": ratio, "tokens": int(count),
         **{f"{key}_ms_an_image": value / batch * 1e3 for key, value in spread(found[str(ratio)]).items()},
         "share_of_whole": seconds[i] / seconds[-1], "tokens_share": count / tokens[-1]}
        for i, (ratio, count) in enumerate(zip(RATIOS, tokens, strict=True))
    ]  # fmt: skip
    line = {
        "part": "encoder, line through tokens",
        "recipe": recipe,
        "batch": batch,
        "precision": precision,
        "r_squared": float(1 - (left**2).sum() / ((seconds - seconds.mean()) ** 2).sum()),
        "ms_a_token": slope / batch * 1e3,
        "fixed_share_of_whole": float(fixed / seconds[-1]),
        "largest_departure": float(np.abs(left / seconds).max()),
    }
    return [*rows, line]


def main() -> None:
    parser = command_line(__doc__, rounds=5, result="scale")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--files", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--recipe", default="mae_base")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    if options.tiny:
        options.files, options.rows, options.rounds = [20, 40], [50, 100], 1
        options.recipe, options.batch = "mae_nano", 2
    rows: list[dict[str, Any]] = []
    if "index" in options.parts:
        rows += [index_row(count, options.rounds) for count in options.files]
    if "order" in options.parts:
        rows += order_rows(options.rows, options.rounds)
    if "loading" in options.parts:
        rows += loading_rows(options.rows, BATCH if options.tiny else 1024, options.rounds)
    if "encoder" in options.parts:
        rows += encoder_rows(options.recipe, options.batch, options.rounds)
    conclude("scale", rows, origin(), as_json=options.json, keep=options.keep)


if __name__ == "__main__":
    main()
