"""Convert images to rows of patches and back, and select or replace rows.

The patch vector is laid out (row in patch, column in patch, channel), channel fastest, and patches are row-major, as in
the official MAE code; a convolution's weight is laid out (channel, row, column), which is not the same order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from unmask.errors import UserError


def grid_of(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Return the grid (rows, cols) of patches of (height, width) pixels in an image of `size` = (H, W) pixels.

    Raises UserError if a side is not a whole number of patches.
    """
    for side, length, step in zip(("height", "width"), size, patch, strict=True):
        if length % step or length < step:
            below, above = length // step * step, (length // step + 1) * step
            fits = [str(n) for n in (below, above) if n > 0]
            divisors = [d for d in range(2, length + 1) if length % d == 0]
            near = min(divisors, key=lambda d: (abs(d - step), -d), default=length)
            raise UserError(
                f"image {side} {length} is not a multiple of patch size {step}; "
                f"use {' or '.join(fits)}, or --set method.encoder.patch={near}"
            )
    return size[0] // patch[0], size[1] // patch[1]


def patchify(images: Shaped[Tensor, "B C H W"], patch: tuple[int, int]) -> Shaped[Tensor, "B N P"]:
    """(B, C, H, W) -> (B, N, P), P = patch height x patch width x C, channel fastest."""
    b, c, h, w = images.shape
    rows, cols = grid_of((h, w), patch)
    x = images.reshape(b, c, rows, patch[0], cols, patch[1])
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, rows * cols, patch[0] * patch[1] * c)


def unpatchify(
    patches: Shaped[Tensor, "B N P"], grid: tuple[int, int], patch: tuple[int, int]
) -> Shaped[Tensor, "B C H W"]:
    """The inverse of `patchify`."""
    b, c = patches.shape[0], patches.shape[2] // (patch[0] * patch[1])
    x = patches.reshape(b, grid[0], grid[1], patch[0], patch[1], c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, grid[0] * patch[0], grid[1] * patch[1])


def take(tokens: Shaped[Tensor, "B N D"], index: Int[Tensor, "B K"]) -> Shaped[Tensor, "B K D"]:
    """Select rows: result[b, k] = tokens[b, index[b, k]]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def put(
    tokens: Shaped[Tensor, "B N D"], index: Int[Tensor, "B K"], values: Shaped[Tensor, "B K D"]
) -> Shaped[Tensor, "B N D"]:
    """Replace rows in a copy of `tokens`: result[b, index[b, k]] = values[b, k]. The inverse of `take`."""
    return tokens.scatter(1, index[:, :, None].expand(-1, -1, tokens.shape[2]), values)


def normalise(
    images: Shaped[Tensor, "B C H W"], mean: Float[Tensor, " C"], std: Float[Tensor, " C"]
) -> Float[Tensor, "B C H W"]:
    """Convert images of any dtype to float32, normalised by the data set's mean and standard deviation per channel."""
    return (images.to(torch.float32) - mean[:, None, None]) / std[:, None, None]
