"""Check an export: loaded by the other library, it must compute the same outputs as the run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from unmask.batch import DTYPES, ImageSpec
from unmask.engine.load import Loaded
from unmask.interop.export_common import silence_libraries
from unmask.interop.export_target import ExportedModel, ExportFailed, NotChecked

TOLERANCE = 1e-4
CHECKED = 3  # random images


def check_export(exported: ExportedModel, path: Path, loaded: Loaded, run: str | Path) -> tuple[float | None, str]:
    """Compare the outputs of the exported file with those of the run, on random images.

    path: the exported file or folder. Returns the largest absolute difference (None if the other library cannot be used
    on this machine) and a sentence about the result. Raises ExportFailed when the difference exceeds TOLERANCE.
    """
    try:
        with torch.inference_mode(), silence_libraries():
            difference = exported.check(path, random_images(loaded.plan.images))
    except NotChecked as reason:
        return None, f"not checked: {reason}"
    if not difference <= TOLERANCE:
        raise ExportFailed(
            f"the export of {run}, loaded by {exported.library}, differs from the run by up to {difference:.3g} on "
            f"{CHECKED} random images; expected at most {TOLERANCE:g}. The export has been removed. Either unmask has "
            "a bug or it does not support this version of the library; --to safetensors needs no other library"
        )
    return difference, (
        f"checked: {exported.library} computes the same outputs up to {difference:.1e} on {CHECKED} random images"
    )


def random_images(images: ImageSpec) -> Tensor:
    """Return reproducible random images (CHECKED, C, H, W) in the files' dtype and units."""
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.tensor(values)[:, None, None] for values in images.value_range)
    unit = torch.rand(CHECKED, images.channels, *images.size, generator=generator)
    pixels = low + unit * (high - low)
    return (pixels if images.dtype == "float32" else pixels.round().clamp(0, 65535)).to(DTYPES[images.dtype])
