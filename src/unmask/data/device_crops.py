"""Resample crops of 8-bit images on the training device instead of in the loader (`data.resize=device`).

The filter is Pillow's BICUBIC (a = -0.5) or BILINEAR, with antialiasing, applied as one matrix product for each axis.
The intermediate result is rounded to whole levels as in Pillow, and results agree with Pillow except for rounding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unmask.batch import Batch

AT_A_TIME = 64  # images resampled at once: limits the memory of their float32 copies


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move a batch to a device and resample its images unless the loader has already done so."""
    batch = batch.to(device)
    if batch.crops is None or batch.size is None:
        return batch
    images = resample(batch.images, batch.crops, batch.size, batch.interpolation)
    return replace(batch, images=images, crops=None, size=None)


def resample(images: Tensor, crops: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """Resample image parts (B, C, H, W) uint8 to (B, C, h, w) uint8, channels last in memory.

    crops: (B, 7) float32: top, left, height, width of the box to resample, in pixels of the part; height and width of
    the part, outside of which `images` is padding; and whether to flip, 0 or 1. size: (h, w). interpolation: "bicubic"
    or "bilinear".
    """
    pieces = [
        _resample(images[i : i + AT_A_TIME], crops[i : i + AT_A_TIME], size, interpolation)
        for i in range(0, len(images), AT_A_TIME)
    ]
    return torch.cat(pieces).contiguous(memory_format=torch.channels_last)


def _resample(images: Tensor, crops: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    top, left, height, width, rows, columns, flip = crops.unbind(1)
    down = weights(top, height, end=rows, count=size[0], side=images.shape[2], interpolation=interpolation)  # (B, h, H)
    across = weights(
        left, width, end=columns, count=size[1], side=images.shape[3], interpolation=interpolation
    )  # (B, w, W)
    x = (images.to(torch.float32) @ across.mT[:, None]).round().clamp(0, 255)  # (B, C, H, w)
    x = (down[:, None] @ x).round().clamp(0, 255).to(torch.uint8)  # (B, C, h, w)
    return torch.where(flip[:, None, None, None] > 0, x.flip(3), x)


def weights(
    start: Tensor, length: Tensor, end: Tensor, count: int, side: int, interpolation: str = "bicubic"
) -> Tensor:
    """Return the filter weights (B, count, side) of `side` pixels for each of `count` samples along one axis, float32.

    start, length: (B,), position and length of the box in pixels. end: (B,), number of image pixels; pixels from
    `end` on are padding and get weight 0.
    """
    scale = (length / count)[:, None, None]  # (B, 1, 1)
    pixel = torch.arange(side, device=start.device, dtype=torch.float32)  # (side,)
    sample = torch.arange(count, device=start.device, dtype=torch.float32)[:, None]  # (count, 1)
    centre = start[:, None, None] + (sample + 0.5) * scale  # (B, count, 1)
    x = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()  # (B, count, side)
    if interpolation == "bilinear":
        values = (1 - x).clamp(min=0)
    else:
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        values = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    values = values * (pixel < end[:, None, None])
    return values / values.sum(2, keepdim=True)
