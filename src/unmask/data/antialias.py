"""Private antialiasing kernels of torch for 8-bit images, each with a fallback for versions of torch without them.

`tests/data/test_antialias.py` fails when an installed torch has changed one of these kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS: dict[str, Any] = {
    "bicubic": getattr(torch.ops.aten, "_upsample_bicubic2d_aa", None),
    "bilinear": getattr(torch.ops.aten, "_upsample_bilinear2d_aa", None),
}
"""The kernel of each interpolation, or None if this version of torch does not have it."""


def resample_into(out: Tensor, images: Tensor, interpolation: str) -> None:
    """Resample `images` (B, C, H, W) uint8 to the size of `out` (B, C, h, w) uint8, and write the result there.

    `F.interpolate` has no argument `out`, and allocating the result takes a third as long as computing it.
    """
    kernel, size = KERNELS[interpolation], out.shape[2:]
    if kernel is None:
        out.copy_(F.interpolate(images, size, mode=interpolation, align_corners=False, antialias=True))
    else:
        kernel.out(images, size, False, None, None, out=out)


def resample_by_steps(
    images: Tensor, size: tuple[int, int], steps: tuple[float, float], interpolation: str
) -> Tensor | None:
    """Return (B, C, h, w) samples of `images` (B, C, H, W) uint8 that are `steps` pixels apart, from the first edge.

    `F.interpolate` cannot set both the size and the steps. Returns None if this version of torch does not have the
    kernel.
    """
    kernel = KERNELS[interpolation]
    return None if kernel is None else kernel(images, size, False, 1 / steps[0], 1 / steps[1])
