"""`unmask check DATA`: what is in a folder of images, what is broken, which recipe fits, and how long it would take."""

from __future__ import annotations

from typing import Any

from unmask.config import override
from unmask.console import Console, duration
from unmask.data.loader import Images, choose_workers
from unmask.data.scan import Scan, scan
from unmask.data.sources import open_source
from unmask.plan import choose_device, choose_micro_batch, choose_precision, measure_step_seconds, saved_bytes_per_image
from unmask.recipes import catalogue
from unmask.start import batch_seconds, image_spec

NAMED_BAD_FILES = 20


def check_data(data: str, console: Console, *, sample: int | None, workers: int) -> tuple[int, dict[str, Any]]:
    """Returns (exit code, summary): 0 when the data can be trained on, 2 when not."""
    source = open_source(data)
    with console.progress("checking files", min(len(source), sample or len(source))) as bar:
        found = scan(source, sample=sample, workers=workers, progress=bar.update)
    summary: dict[str, Any] = {
        "data": source.name,
        "files": found.files,
        "checked": found.checked,
        "good": found.good,
        "bad": [vars(bad) for bad in found.bad],
        "passed_over": dict(source.skipped),
        "classes": list(source.classes),
        "median_size": list(found.median_size),
        "channels": dict(found.channels),
        "dtypes": dict(found.dtypes),
        "formats": dict(found.formats),
        "mean": list(found.mean),
        "std": list(found.std),
    }
    say_scan(found, source.classes, console)
    if not found.good:
        console.warn("no image can be read; nothing to train on")
        return 2, summary
    summary |= forecast(source, found, console)
    most = catalogue.find("mae_nano").data.max_bad_fraction
    if found.bad_fraction > most:
        console.warn(
            f"{found.bad_fraction:.1%} of the files cannot be read; at more than {most:.0%} `unmask pretrain` stops"
        )
        return 2, summary
    return 0, summary


def say_scan(found: Scan, classes: list[str], console: Console) -> None:
    console.say(
        f"{found.files} files, {found.checked} checked in {duration(found.seconds)}: {found.good} good, "
        f"{len(found.bad)} bad"
    )
    for bad in found.bad[:NAMED_BAD_FILES]:
        console.say(f"  {bad.code:20s} {bad.name}: {bad.detail}")
    if len(found.bad) > NAMED_BAD_FILES:
        console.say(f"  ... and {len(found.bad) - NAMED_BAD_FILES} more (all of them with --json)")
    if not found.good:
        return
    (low_h, low_w), (mid_h, mid_w), (top_h, top_w) = found.min_size, found.median_size, found.max_size
    console.say(f"size (height x width): median {mid_h} x {mid_w}, from {low_h} x {low_w} to {top_h} x {top_w}")
    for title, counts in (("channels", found.channels), ("dtype", found.dtypes), ("format", found.formats)):
        console.say(f"{title}: " + ", ".join(f"{key} in {count}" for key, count in counts.most_common()))
    console.say(
        "mean "
        + ", ".join(f"{value:.4g}" for value in found.mean)
        + "; std "
        + ", ".join(f"{value:.4g}" for value in found.std)
        + " (per channel, in the files' units)"
    )
    console.say(
        f"labels: {len(classes)} classes from sub-folders" if classes else "labels: none (pre-training needs none)"
    )


def forecast(source: Any, found: Scan, console: Console) -> dict[str, Any]:
    """The recipe `auto` would take, measured for a few steps, and what it would cost."""
    device = choose_device("auto")
    name, overrides, reasons = catalogue.choose(found.good, found.median_size, device)
    config = override(catalogue.find(name), overrides)
    spec = image_spec(found, config)
    precision, _ = choose_precision("auto", device)
    micro, _ = choose_micro_batch(
        config, saved_bytes_per_image(config.build(spec).to(device), spec, precision, device), device
    )
    compute = measure_step_seconds(config, spec, micro, precision, device, seconds=3)
    images = Images(source, found.good_rows, spec, config.data.crop)
    cached = found.decoded_bytes * found.good <= config.data.cache_gib * 2**30
    workers, _ = choose_workers(device, cached=cached)
    load = batch_seconds(images, config.train.batch_size, max(1, workers))
    each = max(compute, load) if workers else compute + (0 if cached else load)
    epochs = config.train.epochs or 100
    steps = config.train.steps or max(1, round(epochs * found.good / config.train.batch_size))
    for reason in reasons:
        console.say(f"  {reason}")
    settings = " ".join(f"--set {item}" for item in overrides)
    console.say(f"recipe: {name} {settings}".rstrip())
    console.say(
        f"forecast on {device}: {each:.3g} s a step, {config.train.batch_size / each:.0f} images/s; "
        f"{steps} steps take about {duration(steps * each)}"
        + ("; loading is the limit" if load > compute and workers else "")
    )
    return {
        "recipe": name,
        "settings": overrides,
        "reasons": reasons,
        "step_seconds": each,
        "steps": steps,
        "forecast_seconds": steps * each,
        "device": device,
    }
