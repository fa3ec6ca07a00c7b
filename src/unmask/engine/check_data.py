"""`unmask check DATA`: describe a set of images, list unreadable files, choose a recipe, and forecast the training."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from unmask.config import DataConfig
from unmask.console import Console, duration
from unmask.data.scan.findings import file_kinds, is_plain
from unmask.data.scan.scan import Scan
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.engine.device import choose_device
from unmask.engine.divided_scan import read_as, scan_together
from unmask.engine.image_size import consequence
from unmask.engine.measure import Timing, time_steps
from unmask.engine.plan_text import print_plan
from unmask.engine.resolve import choose_config, draft_config, patch_of
from unmask.engine.training_data import (
    TrainingRequest,
    batch_seconds,
    odd_image_warnings,
    plan_training,
    skipped_files,
)
from unmask.engine.world import joined
from unmask.errors import listed

NAMED_BAD_FILES = 20
MEASURE_SECONDS = 6.0


def check_data(
    data: str | Sequence[str],
    console: Console,
    *,
    sample: int | None,
    workers: int | None,
    settings: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[int, dict[str, Any]]:
    """Scan images, forecast their training and print both; return (exit code, summary).

    All files are read, even files in the scan cache. A later `unmask pretrain` finds them in the cache and need not
    read them again. Several processes divide the files among them; the forecast is for training in one process.

    sample: number of files to read (None: all). workers: number of processes that read files (0 or None: chosen by the
    number of files, as in `unmask pretrain`). settings: KEY=VALUE assignments, as for `unmask pretrain`.
    """
    with joined() as world:
        console = world.console(console)
        draft = draft_config(None, "auto", list(settings), None)
        source = read_as(open_source(data, exclude), draft.data.reading)
        with console.progress("checking files", min(len(source), sample or len(source))) as bar:
            found = scan_together(
                source,
                sample=sample,
                workers=workers or None,
                channels=draft.data.channels,
                ignore_cache=True,
                progress=bar.update,
            )
        named = [data] if isinstance(data, str) else list(data)

        return world.from_writer(
            lambda: report(found.applied_to(source), found, draft.train.device, console, named, settings, exclude)
        )


def report(
    source: Source,
    found: Scan,
    device: str,
    console: Console,
    named: Sequence[str],
    settings: Sequence[str],
    exclude: Sequence[str],
) -> tuple[int, dict[str, Any]]:
    """Print the scan of `source` and the forecast, and return (exit code, summary). named: the data as given."""
    summary: dict[str, Any] = {
        "data": source.name,
        "files": found.files,
        "checked": found.checked,
        "good": found.good,
        "usable": found.usable,
        "bad": [vars(bad) for bad in found.bad],
        "passed_over": dict(+source.skipped),
        "excluded": source.excluded,
        "classes": list(source.classes),
        "median_size": list(found.median_size),
        "channels": dict(found.channels),
        "dtypes": dict(found.dtypes),
        "formats": dict(found.formats),
        "tolerated": dict(found.tolerated),
        "kinds": [vars(kind) for kind in file_kinds(found)],
        "reading": found.reading.model_dump(),
        "absent_share": found.absent_share,
        "absent_files": found.absent_files,
        "empty_files": found.empty_files,
        "mean": list(found.mean),
        "std": list(found.std),
    }
    if source.skipped or source.excluded:
        console.print(f"{source.name}: {len(source)} images found{skipped_files(source)}")
    print_scan(found, source, console)
    if not found.good:
        console.warn("no image can be read, so `unmask pretrain` would reject this data; the reasons are listed above")
        return 2, summary
    for line in odd_image_warnings(source, found):
        console.warn(line)
    summary |= forecast(source, found, console=console, settings=list(settings), device=choose_device(device))
    most = DataConfig().max_bad_fraction
    if found.bad_fraction > most:
        console.warn(
            f"{found.bad_fraction:.1%} of the files cannot be read; `unmask pretrain` stops if more than {most:.0%} "
            "are unreadable"
        )
        return 2, summary
    options = [text for each in exclude for text in ("--exclude", each)]
    options += [text for each in settings for text in ("--set", each)]
    console.print(f"train on these images with: {shlex.join(['unmask', 'pretrain', *named, *options])}")
    return 0, summary


def print_scan(found: Scan, source: Source, console: Console) -> None:
    console.print(
        f"{found.files} files, {found.checked} checked in {duration(found.seconds)}: {found.good} good, "
        f"{len(found.bad)} bad"
    )
    if found.forgotten:
        console.print(f"scan results are not cached, so the next command will read all files again: {found.forgotten}")
    for bad in found.bad[:NAMED_BAD_FILES]:
        console.print(f"  {bad.code:20s} {bad.name}: {bad.detail}")
    if len(found.bad) > NAMED_BAD_FILES:
        console.print(f"  ... and {len(found.bad) - NAMED_BAD_FILES} more (all of them with --json)")
    if not found.good:
        return
    (low_h, low_w), (mid_h, mid_w), (top_h, top_w) = found.min_size, found.median_size, found.max_size
    console.print(f"size (height x width): median {mid_h} x {mid_w}, from {low_h} x {low_w} to {top_h} x {top_w}")
    for title, counts in (("channels", found.channels), ("dtype", found.dtypes), ("format", found.formats)):
        console.print(f"{title}: " + ", ".join(f"{key} in {count}" for key, count in counts.most_common()))
    if not is_plain(found):
        print_table([vars(kind) for kind in file_kinds(found)], console)
    if found.dtype_majority == "uint16" and "uint8" in found.dtypes:
        console.print("values of 8-bit images are multiplied by 257, because other images have 16 bits")
    console.print(
        "mean "
        + ", ".join(f"{value:.4g}" for value in found.mean)
        + "; std "
        + ", ".join(f"{value:.4g}" for value in found.std)
        + " (per channel, in the files' units)"
    )
    console.print(f"labels: {labels_line(source)}")


def labels_line(source: Source) -> str:
    """Return the classes of a source in words, or why the source has no classes."""
    if source.classes:
        return f"{len(source.classes)} classes ({listed(source.classes)})"
    if source.unlabelled:
        return f"none, because {source.unlabelled} (pre-training needs none)"
    return "none (pre-training needs none)"


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the kinds of files, their contents, and how they are read, in aligned columns."""
    titles = list(rows[0])
    lines = [titles, *([str(row[title]) for title in titles] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        console.print("  " + "  ".join(cells).rstrip())


def forecast(source: Source, found: Scan, console: Console, settings: list[str], device: str) -> dict[str, Any]:
    """Make the plan of `unmask pretrain --recipe auto`, time a few steps, and return a forecast of the training."""
    config, reasons, proposals = choose_config(
        source, found, recipe="auto", settings=settings, device=device, budget=None
    )
    size = consequence(found.median_size, config.data.size, patch_of(config))
    console.print(size)
    images, plan = plan_training(TrainingRequest(source, found, config, device, reasons=(size, *reasons)))
    load = batch_seconds(images, plan.batch_size, plan.workers, cached=plan.cached)
    compute = Timing.of(
        time_steps(
            config,
            plan.images,
            micro=plan.micro_batch,
            precision=plan.precision,
            device=device,
            seconds=MEASURE_SECONDS,
        )
    )
    timing = compute.with_loading(load, plan.workers)
    each, takes = timing.median, [duration(plan.steps * seconds) for seconds in timing]
    print_plan(plan, config, console, printed=(size,))
    console.print(f"recipe: {config.recipe} {' '.join(f'--set {item}' for item in proposals)}".rstrip())
    console.print(
        f"forecast on {device}: {timing.words()} a step, {plan.batch_size / each:.0f} images/s; {plan.steps} steps "
        f"take about {takes[0]} ({takes[1]} to {takes[2]})" + ("; loading is the limit" if load > compute else "")
    )
    if timing.busy:
        console.warn(
            "the time of a step varies between measurements: another program is using this machine, and the forecast "
            "is only valid while it does"
        )
    return {
        "recipe": config.recipe,
        "settings": proposals,
        "reasons": list(plan.reasons),
        "step_seconds": each,
        "step_seconds_range": list(timing[1:]),
        "steps": plan.steps,
        "forecast_seconds": plan.steps * each,
        "forecast_seconds_range": [plan.steps * seconds for seconds in timing[1:]],
        "device": device,
    }
