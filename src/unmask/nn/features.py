"""`Features`, the output of every encoder: all that probes, fine-tuning and export use."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Features(NamedTuple):
    """`cls` (B, D), or None without a class token; `patches` (B, N, D) in row-major order; `grid` (rows, cols)."""

    cls: Float[Tensor, "B D"] | None
    patches: Float[Tensor, "B N D"]
    grid: tuple[int, int]

    @property
    def pooled(self) -> Float[Tensor, "B D"]:
        """Return the mean of the patch tokens, without the class token."""
        return self.patches.mean(1)

    @property
    def map(self) -> Float[Tensor, "B D R C"]:
        """Return the patch tokens as a dense feature map (B, D, rows, cols)."""
        b, _, d = self.patches.shape
        return self.patches.transpose(1, 2).reshape(b, d, *self.grid)
