"""Weights of patches and values in a loss, for images with absent pixels (no data).

Absent pixels are filled with the data's mean, so the encoder sees a neutral value in their place. The loss ignores
absent pixels: patches with too few valid pixels have weight 0, and so have the absent pixels of all other patches. If
all pixels are valid (`Batch.valid` is None), no weights are computed.

Letters: B images, C channels, H x W pixels, N patches of the grid, P values of one patch, Q selected patches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.batch import Batch
from unmask.nn.patches import patchify, take


class Valid(NamedTuple):
    """Valid parts of images. patches: (B, N) bool, True for patches that count. values: (B, N, P), 1 for valid values
    of these patches, 0 for all others.
    """

    patches: Bool[Tensor, "B N"]
    values: Float[Tensor, "B N P"]


def valid_patches(batch: Batch, patch: tuple[int, int]) -> Valid | None:
    """Return the valid patches of (height, width) pixels and their valid values, or None if all pixels are valid."""
    if batch.valid is None:
        return None
    pixels = patchify(batch.valid[:, None].float(), patch)  # (B, N, height x width)
    patches = pixels.mean(2) >= batch.min_valid
    values = (pixels * patches[..., None]).repeat_interleave(batch.images.shape[1], 2)  # channel fastest
    return Valid(patches, values)


def patch_weights(valid: Valid | None, where: Int[Tensor, "B Q"] | None = None) -> Float[Tensor, "B Q"] | None:
    """Return 1 for each patch that counts and 0 for the others, of all patches or the patches `where`; or None if all
    count.
    """
    if valid is None:
        return None
    weights = valid.patches.float()
    return weights if where is None else weights.gather(1, where)


def value_weights(valid: Valid | None, where: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q P"] | None:
    """Return weights as `patch_weights` does, but for each value of the patches `where`."""
    return None if valid is None else take(valid.values, where)


def pixel_weights(batch: Batch) -> Float[Tensor, "B 1 H W"] | None:
    """Return 1 for each valid pixel and 0 for absent ones, or None if all are valid."""
    return None if batch.valid is None else batch.valid[:, None].float()


def shrunk_mean(
    values: Float[Tensor, "B C H W"], cell: tuple[int, int], valid: Bool[Tensor, "B H W"] | None = None
) -> Float[Tensor, "B C R S"]:
    """Return the mean of the valid pixels of each cell of (height, width) pixels, or of all its pixels if none is
    valid.
    """
    means = F.avg_pool2d(values, cell)
    if valid is None:
        return means
    weights = valid[:, None].to(values.dtype)
    shares = F.avg_pool2d(weights, cell)
    return torch.where(shares > 0, F.avg_pool2d(values * weights, cell) / shares.clamp(min=1e-9), means)
