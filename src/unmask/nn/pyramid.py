"""ViTDet's simple feature pyramid: maps of several resolutions from the last map of a vision transformer.

Li et al. 2022, "Exploring plain vision transformer backbones for object detection", section 3: only the encoder's last
map, whose stride is the patch, is used. The levels are maps four and two times finer (by transposed convolutions), the
map itself, and a map two times coarser (by pooling). Then a 1x1 and a 3x3 convolution, each with a LayerNorm over
channels, map all levels to one width.

Differs from the paper: no level has cells smaller than `FINEST` pixels unless the patches themselves are smaller, so
small patches give fewer levels; no fifth level (the paper has one for region proposals, with patch 16 in 1024-pixel
images); if the grid has an odd number of rows or columns, the coarse level keeps the last, half-filled row or column.

Letters: B images, D width of a token, R x C grid of patches, W width of the pyramid.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from unmask.nn.blocks import LAYER_NORM_EPS

FINEST = 4  # Smallest size of a cell in pixels.
SCALES = (4.0, 2.0, 1.0, 0.5)  # Number of cells per patch along one side, for each level.


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels at each position of a map (B, W, R, C)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS)

    def forward(self, input: Float[Tensor, "B W R C"]) -> Float[Tensor, "B W R C"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def scales_of(patch: tuple[int, int], grid: tuple[int, int]) -> tuple[float, ...]:
    """Return the scales of the pyramid's levels for patches of (height, width) pixels, finest first."""
    finer = [scale for scale in SCALES if scale > 1 and min(patch) / scale >= FINEST]
    coarser = [scale for scale in SCALES if scale < 1 and min(grid) * scale >= 1]
    return (*finer, 1.0, *coarser)


def same_width(before: int, width: int) -> list[nn.Module]:
    """Return the 1x1 and 3x3 convolutions of a level, with their norms."""
    return [
        nn.Conv2d(before, width, 1, bias=False),
        ChannelNorm(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        ChannelNorm(width),
    ]


def level(scale: float, before: int, width: int) -> nn.Sequential:
    """Return a module (B, before, R, C) -> (B, width, R x scale, C x scale)."""
    half, quarter = max(1, before // 2), max(1, before // 4)
    if scale == 4.0:
        change: list[nn.Module] = [
            nn.ConvTranspose2d(before, half, 2, stride=2),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ]
        before = quarter
    elif scale == 2.0:
        change, before = [nn.ConvTranspose2d(before, half, 2, stride=2)], half
    else:
        change = [] if scale == 1.0 else [nn.MaxPool2d(2, ceil_mode=True)]
    return nn.Sequential(*change, *same_width(before, width))


class Pyramid(nn.Module):
    """See the module docstring. `strides`: (height, width) in pixels of each level's cells, finest first."""

    def __init__(self, before: int, width: int, patch: tuple[int, int], grid: tuple[int, int]) -> None:
        super().__init__()
        scales = scales_of(patch, grid)
        self.strides = tuple((patch[0] / scale, patch[1] / scale) for scale in scales)
        self.levels = nn.ModuleList(level(scale, before, width) for scale in scales)

    def forward(self, x: Float[Tensor, "B D R C"]) -> list[Float[Tensor, "B W _ _"]]:
        """Return one map for each of `strides`."""
        return [part(x) for part in self.levels]
