"""Positions of patches: fixed two-dimensional sine-cosine positions of MAE (He et al. 2021, `util/pos_embed.py`),
resizing of position tables, and BEiT's relative position bias.

The code of one axis is [sin(pos w) | cos(pos w)] in halves, not interleaved, with w_i = 10000^(-i / (D/4)); the code of
a patch is [code of its COLUMN | code of its ROW], because the official code calls meshgrid with the width axis first.
With row and column swapped, released weights would give wrong features on square grids, without any error.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.errors import UserError


def sincos(width: int, grid: tuple[int, int]) -> Float[Tensor, "N D"]:
    """Return the (rows x cols, width) float32 table of positions, computed in float64. Raises UserError unless width is
    a multiple of 4.
    """
    if width % 4:
        raise UserError(
            f"token width {width} is not a multiple of 4, which sin-cos positions in 2-D need; use {width // 4 * 4 + 4}"
        )
    omega = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
    row, col = np.meshgrid(np.arange(grid[0], dtype=np.float64), np.arange(grid[1], dtype=np.float64), indexing="ij")

    def axis(position: np.ndarray) -> np.ndarray:
        angle = position.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)  # (N, D/2)

    return torch.tensor(np.concatenate([axis(col), axis(row)], 1), dtype=torch.float32)


def resize(positions: Float[Tensor, "1 N D"], old: tuple[int, int], new: tuple[int, int]) -> Float[Tensor, "1 M D"]:
    """Interpolate a table for grid `old` to grid `new` (bicubic, two-dimensional); unchanged if the grids are equal.

    Graphs that are exported for any size always interpolate, which changes no value if the grids are equal.
    """
    if is_number(new) and old == new:
        return positions
    table = positions.reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)  # (1, D, rows, cols)
    table = F.interpolate(table.float(), size=new, mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(positions.dtype)


def is_number(grid: tuple[int, int]) -> bool:
    """Return whether the sides of a grid are numbers, rather than symbols in a graph that `torch.export` makes for any
    size.
    """
    return not any(isinstance(side, torch.SymInt) for side in grid)


def fitted(name: str, value: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Adapt a tensor of a method's state dict to another grid of patches; unchanged unless it has one row per patch.

    Interpolates position tables (keeping the row of the class token, which CrossMAE's decoder lacks), iGPT's positions,
    and tables of relative positions.
    """
    places = old[0] * old[1]
    spans = [(2 * rows - 1, 2 * cols - 1) for rows, cols in (old, new)]
    if name in ("encoder.pos_embed", "decoder.pos_embed") and value.shape[1] in (places, 1 + places):
        first = value.shape[1] - places
        return torch.cat([value[:, :first], resize(value[:, first:], old, new)], 1)
    if name == "encoder.positions" and len(value) == places:
        return resize(value[None], old, new)[0]
    if name.endswith("relative_bias.table") and len(value) == spans[0][0] * spans[0][1] + 3:
        return torch.cat([resize(value[None, :-3], *spans)[0], value[-3:]])
    return value


class RelativeBias(nn.Module):
    """Bias of attention scores that depends on the offset between two patches (BEiT, Bao et al. 2021, its code).

    The table has one number per head for each of (2 rows - 1) x (2 cols - 1) offsets, and three more: from the class
    token to a patch, from a patch to the class token, and from the class token to itself. All these numbers start at
    zero.
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(_num_offsets(grid) + 3, heads))
        self.register_buffer("index", _offset_index(grid), persistent=False)

    def forward(
        self, where: Int[Tensor, "B K"] | None = None, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "*B heads K1 K1"]:
        """Return the bias between the class token and all patches in raster order, or only the patches `where`.

        grid: given if the images are larger or smaller than in training; interpolates the table of offsets (bicubic).
        """
        table, index = self.table, self.index
        if grid is not None and not (is_number(grid) and grid == self.grid):
            old, new = [(2 * rows - 1, 2 * cols - 1) for rows, cols in (self.grid, grid)]
            table = torch.cat([resize(table[None, :-3], old, new)[0], table[-3:]])
            index = _offset_index(grid).to(table.device)
        if where is not None:
            places = torch.cat([torch.zeros_like(where[:, :1]), where + 1], 1)  # (B, K1); 0 is the class token.
            index = index[places[:, :, None], places[:, None, :]]  # (B, K1, K1)
        return table[index].movedim(-1, -3)


def _num_offsets(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _offset_index(grid: tuple[int, int]) -> Int[Tensor, "N1 N1"]:
    """Return the table row for each pair of tokens (class token, then patches in raster order)."""
    rows, cols = grid
    row, col = torch.arange(rows * cols) // cols, torch.arange(rows * cols) % cols
    down = row[:, None] - row + rows - 1  # (N, N)
    across = col[:, None] - col + cols - 1
    index = torch.empty(rows * cols + 1, rows * cols + 1, dtype=torch.int64)
    index[1:, 1:] = down * (2 * cols - 1) + across
    index[0, 1:], index[1:, 0], index[0, 0] = (_num_offsets(grid) + n for n in range(3))
    return index
