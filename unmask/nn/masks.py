"""Which patches a method sees: `Mask`, and the samplers that make one.

Indices run over the patch grid only, never with an offset for a class token. Every image of a batch keeps the same
number of patches, so shapes are static. A sampler is a function (B, grid, ratio, rng) -> Mask, and its draws belong to
the image (see `rng.py`), not to its place in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.errors import UserError
from unmask.rng import Draws


@dataclass(frozen=True)
class Mask:
    """`keep` (B, K) and `drop` (B, M): indices of the visible and of the hidden patches; K + M = N."""

    keep: Int[Tensor, "B K"]
    drop: Int[Tensor, "B M"]

    def hidden(self) -> Bool[Tensor, "B N"]:
        """True where a patch is hidden, in raster order."""
        flags = torch.zeros(
            len(self.keep), self.keep.shape[1] + self.drop.shape[1], dtype=torch.bool, device=self.keep.device
        )
        return flags.scatter(1, self.drop, True)


def num_kept(num_patches: int, ratio: float) -> int:
    """How many patches stay visible: N (1 - ratio) rounded down, as the official code does.

    The official `int(N * (1 - ratio))` loses one more where the product falls just below a whole number (N = 100, ratio
    0.9 gives 9); the small term mends that. Raises ValueError when nothing would be visible, or nothing hidden.
    """
    kept = math.floor(num_patches * (1 - ratio) + 1e-6)
    if not 0 < kept < num_patches:
        what = "nothing visible" if kept < 1 else "nothing hidden"
        raise UserError(
            f"a mask ratio of {ratio} on {num_patches} patches leaves {what}; "
            f"choose a ratio between {1 / num_patches:.3g} and {1 - 1 / num_patches:.3g}"
        )
    return kept


def mask_from_noise(noise: Float[Tensor, "B N"], ratio: float) -> Mask:
    """Keep the patches with the smallest noise (official MAE). Ties go to the lower index, alike on every device."""
    order = noise.argsort(dim=1, stable=True)
    kept = num_kept(noise.shape[1], ratio)
    return Mask(keep=order[:, :kept], drop=order[:, kept:])


def random_mask(batch: int, grid: tuple[int, int], ratio: float, rng: Draws) -> Mask:
    """Uniform sampling without replacement, each image its own mask (MAE section 3)."""
    noise = rng.uniform(grid[0] * grid[1])
    assert len(noise) == batch, "the draws belong to another batch"
    return mask_from_noise(noise, ratio)


def nearest_visible(mask: Mask, grid: tuple[int, int]) -> Int[Tensor, "B M"]:
    """For every hidden patch the index of the visible patch nearest to it (Euclidean; ties to the lower index)."""
    one_by_one = [_nearest(keep.sort().values, drop, grid[1]) for keep, drop in zip(mask.keep, mask.drop, strict=True)]
    return torch.stack(one_by_one)  # of all images at once the distances would fill the memory


def _nearest(keep: Int[Tensor, "K"], drop: Int[Tensor, "M"], cols: int) -> Int[Tensor, "M"]:
    down = (drop // cols)[:, None] - keep // cols  # (M, K)
    across = (drop % cols)[:, None] - keep % cols
    distance = down.square() + across.square()
    first = (distance == distance.amin(1, keepdim=True)).int().argmax(1)  # argmax takes the first of equals
    return keep[first]
