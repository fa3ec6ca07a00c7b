"""Segmentation heads on the tokens of a vision transformer: a linear layer, or UPerNet.

UPerNet (Xiao et al. 2018, "Unified perceptual parsing for scene understanding"), as BEiT and MAE use it with a plain
transformer: one map from each of four blocks, resampled to 4, 2, 1 and 1/2 cells per patch by transposed convolutions
and pooling; pyramid pooling on the coarsest; a top-down path that adds each level to the next finer one; all levels
fused at the finest.

Differs from the paper: LayerNorm over channels instead of BatchNorm, so that a batch of one image works and images do
not affect each other; a LayerNorm on every block's tokens first, because their magnitude grows from block to block; no
dropout and no auxiliary head; no level finer than a pixel or coarser than the whole grid.

Letters: B images, D width of a token, R x C grid of patches, W width of the head, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.nn.pyramid import SCALES, ChannelNorm

BEIT_SHARES = (1 / 3, 1 / 2, 2 / 3, 1)  # Blocks that BEiT's head reads, as shares of the depth.
POOLS = (1, 2, 3, 6)  # Number of cells along each side in pyramid pooling.
CLASS_STD = 0.01


def resize(x: Float[Tensor, "B W _ _"], size: Sequence[int]) -> Float[Tensor, "B W _ _"]:
    """Resize bilinearly, with align_corners=False."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class LinearHead(nn.Module):
    """A LayerNorm and one linear layer for each patch of the last block's output."""

    def __init__(self, before: int, classes: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(before)
        self.to_classes = class_layer(before, classes)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the numbers of the blocks, counted from 1, whose maps `forward` expects."""
        return (depth,)

    def forward(self, maps: Sequence[Float[Tensor, "B D R C"]]) -> Float[Tensor, "B K R C"]:
        return self.to_classes(self.norm(maps[-1]))


class UPerNet(nn.Module):
    """See the module docstring. `patch` and `grid` determine the levels, finest first.

    feature_blocks: "beit" reads the blocks that BEiT's code reads, "even" the same number of evenly spaced blocks.
    """

    def __init__(
        self,
        before: int,
        width: int,
        classes: int,
        patch: tuple[int, int],
        grid: tuple[int, int],
        feature_blocks: str = "beit",
    ) -> None:
        super().__init__()
        self.feature_blocks = feature_blocks
        self.scales = levels_of(patch, grid)
        self.norms = nn.ModuleList(ChannelNorm(before) for _ in self.scales)
        self.levels = nn.ModuleList(rescale(scale, before) for scale in self.scales)
        self.pooled = nn.ModuleList(conv(before, width, 1) for _ in POOLS)
        self.coarsest = conv(before + len(POOLS) * width, width, 3)
        self.lateral = nn.ModuleList(conv(before, width, 1) for _ in self.scales[:-1])
        self.smooth = nn.ModuleList(conv(width, width, 3) for _ in self.scales[:-1])
        self.fuse = conv(len(self.scales) * width, width, 3)
        self.to_classes = class_layer(width, classes)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Return the blocks, counted from 1, whose maps `forward` expects: one per level, including the last block."""
        count = len(self.scales)
        if self.feature_blocks == "beit":
            return tuple(math.ceil(depth * share - 1e-6) for share in BEIT_SHARES[-count:])
        return tuple(-(-depth * number // count) for number in range(1, count + 1))

    def forward(self, maps: Sequence[Float[Tensor, "B D R C"]]) -> Float[Tensor, "B K _ _"]:
        """Return class scores (B, K, rows, cols) at the finest level."""
        levels = [change(norm(x)) for x, norm, change in zip(maps, self.norms, self.levels, strict=True)]
        top = levels[-1]
        pools = [part(F.adaptive_avg_pool2d(top, cells)) for part, cells in zip(self.pooled, POOLS, strict=True)]
        path = [self.coarsest(torch.cat([top, *(resize(x, top.shape[2:]) for x in pools)], 1))]
        for x, part in zip(levels[-2::-1], reversed(self.lateral), strict=True):  # type: ignore[call-overload]
            path.insert(0, part(x) + resize(path[0], x.shape[2:]))
        smooth = [part(x) for x, part in zip(path, self.smooth, strict=False)] + path[-1:]
        return self.to_classes(self.fuse(torch.cat([resize(x, smooth[0].shape[2:]) for x in smooth], 1)))


def levels_of(patch: tuple[int, int], grid: tuple[int, int]) -> tuple[float, ...]:
    """Return the SCALES (cells per patch along one side) that the patch and grid sizes allow, finest first."""
    return tuple(scale for scale in SCALES if scale <= min(patch) and min(grid) * scale >= 1)


def rescale(scale: float, width: int) -> nn.Module:
    """Return a module (B, D, R, C) -> (B, D, R x scale, C x scale), as in BEiT's segmentation code."""
    if scale == 4.0:
        return nn.Sequential(up(width), ChannelNorm(width), nn.GELU(), up(width))
    if scale == 2.0:
        return up(width)
    return nn.Identity() if scale == 1.0 else nn.MaxPool2d(2, ceil_mode=True)


def up(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, 2, stride=2)


def conv(before: int, after: int, side: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, side, padding=side // 2, bias=False), ChannelNorm(after), nn.ReLU())


def class_layer(width: int, classes: int) -> nn.Conv2d:
    """A 1x1 convolution with small initial weights."""
    layer = nn.Conv2d(width, classes, 1)
    nn.init.normal_(layer.weight, std=CLASS_STD)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
