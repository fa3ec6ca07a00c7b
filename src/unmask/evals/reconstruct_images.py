"""`unmask reconstruct`: draw a picture of images reconstructed by the method of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unmask.config import task_names
from unmask.console import Console
from unmask.data.device_crops import to_device
from unmask.data.sources.image_files import open_files
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.data.sources.tiff_samples import apply_reading
from unmask.engine.device import autocast, choose_device
from unmask.engine.load import load
from unmask.errors import UserError
from unmask.evals.images import COLLECTIONS, eval_images, eval_precision, read
from unmask.report.pictures import draw, require_png
from unmask.results import ReconstructResult
from unmask.rng import Draws

MAX_DRAWN = 16


@torch.no_grad()
def reconstruct_images(
    run: Path, images: Sequence[str], out: Path, *, step: int | None, seed: int, device: str, console: Console
) -> ReconstructResult:
    """Draw the reconstructions of up to 16 images into the PNG file `out`.

    Raises UserError for a fine-tuned run, which cannot reconstruct, and when no image can be read.
    """
    require_png(out)
    loaded = load(run, device=choose_device(device), step=step)
    if (task := loaded.config.method.name) in task_names():
        raise UserError(
            f"{run} was fine-tuned to {task} and cannot reconstruct; use `unmask predict {run} IMAGES --out PATH`, "
            "or reconstruct with its pre-trained run"
        )
    source = apply_reading(open_images(images), loaded.plan.reading)
    rows = np.arange(len(source))
    if len(rows) > MAX_DRAWN:
        console.print(f"drawing {MAX_DRAWN} of {len(rows)} images, evenly spread")
        rows = rows[np.linspace(0, len(rows) - 1, MAX_DRAWN).astype(int)]
    (batch,) = read(eval_images(loaded, source), rows, 0, console)
    batch = to_device(batch, loaded.device)
    clock = loaded.plan.clock(loaded.step, Draws(seed, batch.epoch, batch.index))
    with autocast(eval_precision(loaded), loaded.device):
        picture = loaded.method.picture(batch, clock)._replace(valid=batch.valid)
    names = [source.names[row] for row in batch.index.tolist()]
    draw(picture, loaded.plan.images.dtype, out, f"{Path(run).resolve().name}, step {loaded.step}", names)
    numbers = {name: float(value) for name, value in picture.numbers.items()}
    console.print(f"{out}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items()))
    return ReconstructResult(picture=str(out), losses=numbers)


def open_images(images: Sequence[str]) -> Source:
    """Open several image files in the given order, or a single image file or data source."""
    one_file = len(images) == 1 and Path(images[0]).is_file() and not images[0].lower().endswith(COLLECTIONS)
    return open_files(images) if one_file or len(images) > 1 else open_source(images[0])
