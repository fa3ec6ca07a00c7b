"""Corruptions of a denoising autoencoder's input (Vincent et al. 2008 and 2010), as functions of uniform draws.

Each function takes pixels (B, C, H, W) in the network's units and draws in [0, 1). Each function returns the corrupted
pixels and a bool tensor (B, C, H, W), True where a value was corrupted; all other values are unchanged. Each image has
its own random draws (`rng.py`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from unmask.nn.patches import unpatchify

Pixels = Float[Tensor, "B C H W"]
Touched = Bool[Tensor, "B C H W"]

SMALLEST_DRAW = 2.0**-25  # half of the spacing of uniform draws (2^-24); keeps quantiles finite


def num_chosen(components: int, share: float) -> int:
    """Return the number of components to corrupt: round(share x n)."""
    return round(share * components)


def choose(draws: Float[Tensor, "B n"], share: float) -> Bool[Tensor, "B n"]:
    """Choose the components with the smallest draws, the same number in every example."""
    count = num_chosen(draws.shape[1], share)
    order = draws.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(draws.shape, dtype=torch.bool, device=draws.device).scatter(1, order, True)


def to_values(chosen: Bool[Tensor, "B n"], like: Pixels, grain: tuple[int, int] | None) -> Touched:
    """Expand choices of components to choices of values. A component is a value, or a cell of `grain` = (height, width)
    pixels with all channels.
    """
    b, c, h, w = like.shape
    if grain is None:
        return chosen.reshape(b, c, h, w)
    grid = (h // grain[0], w // grain[1])
    cells = chosen[:, :, None].expand(-1, -1, grain[0] * grain[1] * c)
    return unpatchify(cells, grid, grain)


def num_components(channels: int, size: tuple[int, int], grain: tuple[int, int] | None) -> int:
    """Return the number of components of an image; a component is a value, or a cell of `grain` pixels."""
    height, width = size
    return channels * height * width if grain is None else (height // grain[0]) * (width // grain[1])


def masking(
    pixels: Pixels, draws: Float[Tensor, "B n"], share: float, grain: tuple[int, int] | None
) -> tuple[Pixels, Touched]:
    """Set a share of the components to 0: the mean colour if pixels are normalised, black if they are in [0, 1]."""
    touched = to_values(choose(draws, share), pixels, grain)
    return torch.where(touched, 0.0, pixels), touched


def salt_and_pepper(
    pixels: Pixels,
    draws: Float[Tensor, "B n"],
    coins: Float[Tensor, "B n"],
    share: float,
    grain: tuple[int, int] | None,
    ends: tuple[Tensor, Tensor],
) -> tuple[Pixels, Touched]:
    """Set a share of the components to the least or greatest value (`ends`, (C, 1, 1) each) with equal probability."""
    touched = to_values(choose(draws, share), pixels, grain)
    high = to_values(coins < 0.5, pixels, grain)
    return torch.where(touched, torch.where(high, ends[1], ends[0]), pixels), touched


def gaussian(pixels: Pixels, draws: Float[Tensor, "B n"], sigma: float) -> tuple[Pixels, Touched]:
    """Add normal noise of standard deviation `sigma`, in the units of the pixels, to every value."""
    noise = torch.special.ndtri(draws.double().clamp(SMALLEST_DRAW, 1 - SMALLEST_DRAW)).to(pixels.dtype)
    return pixels + sigma * noise.reshape(pixels.shape), torch.ones_like(pixels, dtype=torch.bool)


def gray(pixels: Pixels) -> tuple[Pixels, Touched]:
    """Replace every channel by the mean of all channels, so that colours must be predicted from brightness."""
    return pixels.mean(1, keepdim=True).expand_as(pixels), torch.ones_like(pixels, dtype=torch.bool)


def single_channel(pixels: Pixels, draws: Float[Tensor, "B 1"]) -> tuple[Pixels, Touched]:
    """Keep one random channel of each image; set the others to 0."""
    touched = ~_one_channel(pixels, draws)
    return torch.where(touched, 0.0, pixels), touched


def drop_channel(pixels: Pixels, draws: Float[Tensor, "B 1"]) -> tuple[Pixels, Touched]:
    """Set one random channel of each image to 0."""
    touched = _one_channel(pixels, draws)
    return torch.where(touched, 0.0, pixels), touched


def _one_channel(pixels: Pixels, draws: Float[Tensor, "B 1"]) -> Touched:
    channels = torch.arange(pixels.shape[1], device=pixels.device)
    drawn = channels == (draws * pixels.shape[1]).long()  # (B, C)
    return drawn[:, :, None, None].expand_as(pixels)
