"""Colours at three bits per channel, as class numbers: the targets of ViT's masked patch prediction (appendix B.1.2).

A channel in [0, 1] falls into one of 8 levels, q = min(7, floor(8 value)); the levels of C channels are the digits of
one number to base 8, first channel first: 64 r + 8 g + b for RGB, so 512 colours. The paper does not specify the order
of the digits. The caller decides which file values are 0 and 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEVELS = 8


def colour_ids(colours: Float[Tensor, "... C"]) -> Int[Tensor, "..."]:
    """Map colours (..., C) in [0, 1] to ids (...) in [0, 8^C). Values outside [0, 1] get the nearest level."""
    levels = (colours * LEVELS).floor().clamp(0, LEVELS - 1).long()
    return (levels * _place_values(colours.shape[-1], colours)).sum(-1)


def colours_of(ids: Int[Tensor, "..."], channels: int) -> Float[Tensor, "... C"]:
    """Map ids (...) to the centres of their colour cells, (..., C) in (0, 1): the inverse of `colour_ids`."""
    levels = ids[..., None] // _place_values(channels, ids) % LEVELS
    return (levels.float() + 0.5) / LEVELS


def _place_values(channels: int, like: Tensor) -> Int[Tensor, " C"]:
    return LEVELS ** torch.arange(channels - 1, -1, -1, device=like.device)
