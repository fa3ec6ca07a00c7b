"""`unmask palette DATA`: compute iGPT's colour palette for these images, as a file that several runs can use.

The file is JSON with `colours` (k lists of C numbers in the files' units), `dtype` and `channels` of the images, their
source, the mean square error per channel, and the number of colours that are used. If the images have fewer than k
different pixel values, some colours are duplicates and remain unused. A picture beside the file shows the images in
these colours.
"""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from unmask.batch import Batch, ImageSpec
from unmask.console import Console
from unmask.data.augment import CropConfig
from unmask.data.loader import eval_batches
from unmask.data.readable_images import ReadableImages
from unmask.data.scan.scan import scan
from unmask.data.sources.open_source import open_source
from unmask.engine.training_data import DataError
from unmask.errors import UserError
from unmask.method import Picture
from unmask.nn.colour_palette import k_means, nearest_colour
from unmask.report.pictures import draw, require_png
from unmask.system.atomic_files import replace_file

MAX_IMAGES = 512
MAX_COLOURS = 4096  # k-means with more colours takes minutes.
DRAWN = 8  # Number of images in the picture.


def make_palette(data: str, *, colours: int, size: int, out: Path, console: Console) -> dict[str, Any]:
    """Write `out` (.json) and a .png beside it, and return the content of the JSON file.

    The colours are the k-means centres of the pixels of up to 512 evenly spaced images. Each image is cropped to its
    largest centred square and resized to `size` pixels per side. Raises UserError if an argument is out of range, if no
    image can be read, if `out` cannot be written, or if one of the two files exists already.
    """
    picture = out.with_suffix(".png")
    _check_arguments(out, picture, colours, size)
    images, valid, spec = _read_images(data, size, console)
    pixels = images.movedim(1, -1)  # (n, H, W, C)
    palette = k_means(pixels.flatten(0, 2) if valid is None else pixels[valid], colours)
    ids = nearest_colour(pixels, palette)
    quantised = palette[ids].movedim(-1, 1)
    error = float((quantised - images).square().mean())
    used = int(ids.unique().numel())
    source = open_source(data).name
    summary: dict[str, Any] = {
        "colours": palette.tolist(),
        "dtype": spec.dtype,
        "channels": spec.channels,
        "source": source,
        "images": len(images),
        "pixels": ids.numel(),
        "used": used,
        "mean_square_error": error,
        "version": version("unmask"),
    }
    replace_file(out, json.dumps(summary, indent=1).encode("ascii") + b"\n")
    note = (
        f"{colours} colours from {len(images)} images of {size} x {size} pixels; {used} of them are used. Mean square "
        f"error per channel {error:.4g}, in the files' units."
    )
    side = size * math.ceil(math.ceil(colours**0.5) / size)  # side of a panel, with a pixel for each colour
    panels = {
        "original": F.interpolate(images[:DRAWN], (side, side)),
        f"in {colours} colours": F.interpolate(quantised[:DRAWN], (side, side)),
        "the palette": draw_swatches(palette, side).expand(len(images[:DRAWN]), -1, -1, -1),
    }
    draw(Picture(panels, note, {}), spec.dtype, picture, f"palette of {source}")
    console.print(f"{out}: {note}")
    console.print(f"picture: {picture}; use it with: unmask pretrain {data} --recipe igpt_nano --palette {out}")
    return summary


def _check_arguments(out: Path, picture: Path, colours: int, size: int) -> None:
    if out.suffix != ".json":
        raise UserError(f"got palette file {out}; expected a name that ends in .json")
    require_png(picture)
    if taken := [str(path) for path in (out, picture) if path.exists()]:
        one = len(taken) == 1
        raise UserError(
            f"palette file {' and '.join(taken)} exist{'s' * one} already; choose another --out, or remove "
            f"{'it' if one else 'both'}"
        )
    if not 2 <= colours <= MAX_COLOURS or size < 1:
        raise UserError(
            f"got {colours} colours at {size} pixels; expected 2 to {MAX_COLOURS} colours and at least 1 pixel"
        )


def _read_images(data: str, size: int, console: Console) -> tuple[torch.Tensor, torch.Tensor | None, ImageSpec]:
    """Return (images (n, C, size, size) float32, valid pixels (None: all), image spec) of up to MAX_IMAGES images."""
    source = open_source(data)
    with console.progress("checking files", min(len(source), MAX_IMAGES)) as bar:
        found = scan(source, sample=MAX_IMAGES, progress=bar.update)
    if not found.good:
        raise DataError(
            f"none of {found.checked} files of {source.name} can be read; run `unmask check` to see the reasons"
        )
    spec = ImageSpec(
        channels=found.channels_majority,
        size=(size, size),
        dtype=found.dtype_majority,
        mean=tuple(found.mean),
        std=tuple(found.std),
    )
    rows = np.linspace(0, len(source) - 1, min(len(source), MAX_IMAGES)).astype(int)
    readable = ReadableImages(found.applied_to(source), rows, spec, CropConfig(), training=False)
    batch = Batch.join(list(eval_batches(readable, rows, batch=64, workers=0)))
    valid = None if batch.valid is None or not batch.valid.any() else batch.valid
    return batch.images.float(), valid, spec


def draw_swatches(palette: torch.Tensor, size: int) -> torch.Tensor:
    """Return an image (1, C, size, size) that shows the colours from dark to bright in a square grid."""
    side = math.ceil(len(palette) ** 0.5)
    order = palette.mean(1).argsort()
    padded = torch.cat([palette[order], palette[order][-1:].expand(side * side - len(palette), -1)])
    return F.interpolate(padded.T.reshape(1, -1, side, side), (size, size), mode="nearest")
