"""Fixed two-dimensional sine-cosine positions of MAE (He et al. 2021, `util/pos_embed.py`), and resizing of tables.

The code of one axis is [sin(pos w) | cos(pos w)] in halves, not interleaved, with w_i = 10000^(-i / (D/4)); the code of
a patch is [code of its COLUMN | code of its ROW], because the official code calls meshgrid with the width axis first.
Swapping the two breaks released weights without any error on square grids.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from unmask.errors import UserError


def sincos(width: int, grid: tuple[int, int]) -> Float[Tensor, "N D"]:
    """(rows x cols, width) float32 table, computed in float64. Raises ValueError unless width is a multiple of 4."""
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
    """A table for grid `old` interpolated (bicubic, two-dimensional) to grid `new`; itself when they are equal."""
    if old == new:
        return positions
    table = positions.reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)  # (1, D, rows, cols)
    table = F.interpolate(table.float(), size=new, mode="bicubic", align_corners=False)
    return table.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(positions.dtype)
