"""What a method predicts for a patch, and how to turn a prediction back into pixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

VARIANCE_EPS = 1e-6


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch, (B, N, 1), over its pixels and channels jointly."""

    mean: Float[Tensor, "B N 1"]
    std: Float[Tensor, "B N 1"]

    def remove(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
        return (patches - self.mean) / self.std

    def restore(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
        return patches * self.std + self.mean


def patch_statistics(patches: Float[Tensor, "B N P"]) -> PatchStatistics:
    """Statistics for MAE's normalised-pixel target: unbiased variance, eps inside the root, always in float32.

    A flat patch (variance 0) becomes an all-zero target.
    """
    patches = patches.float()
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return PatchStatistics(mean, (variance + VARIANCE_EPS).sqrt())
