"""SimMIM: "SimMIM: A Simple Framework for Masked Image Modeling", Xie et al. 2022.

Mask square cells of several patches, replace their embeddings by one learnable mask token, encode the whole sequence,
and reconstruct the hidden pixels from each output token with one linear layer. The loss is the mean absolute error of
the hidden pixels over all channels; images are normalised with the data's mean and std.

The head is the official 1 x 1 convolution and pixel shuffle, written as the equivalent linear layer on patches, with
torch's initial weights as in the official code. The official ViT has one relative position bias for all blocks, no
absolute positions, LayerScale 0.1 and a LayerNorm at the end; `simmim_base` configures the encoder in the same way.

Differs from the official code: masks come from counter-based draws that depend on the image; the encoder is initialised
like every ViT in this package (in the official code: normal, standard deviation 0.02, scaled down with depth); keys
have a bias; weight decay applies to the class token; there is no stochastic depth (official: 0.1); the denominator of
the loss lacks a term of 1e-5; there are no Swin encoders.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.losses import weighted_mean
from unmask.nn.masks import Mask
from unmask.nn.patches import take
from unmask.nn.targets import flat_guesses, masked_panels
from unmask.nn.valid import valid_patches, value_weights
from unmask.nn.vit import Pair, ViT, ViTConfig
from unmask.rng import Draws


class Config(MethodConfig):
    """SimMIM's settings.

    `mask_cell`: (rows, cols) of patches that are hidden together; the paper's 32 pixels are 2 x 2 patches of 16.
    `mask_ratio`: share of the cells that are hidden, rounded up.
    """

    name: Literal["simmim"] = "simmim"
    encoder: ViTConfig
    mask_cell: Pair = (2, 2)
    mask_ratio: float = Field(default=0.6, gt=0, lt=1)


def num_hidden(num_cells: int, ratio: float) -> int:
    """Return the number of hidden cells: ratio x cells, rounded up. Raises UserError if it is 0 or all cells."""
    hidden = math.ceil(num_cells * ratio - 1e-6)
    if not 0 < hidden < num_cells:
        fix = f"a ratio of at most {(num_cells - 1) / num_cells:.3g}, or " if num_cells > 1 else ""
        raise UserError(
            f"got a mask ratio of {ratio:g}, which hides {hidden} of {num_cells} cells; expected at least one hidden "
            f"and one visible cell; use {fix}a smaller method.mask_cell"
        )
    return hidden


def cells_of(grid: tuple[int, int], cell: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, cols) of cells of `cell` patches on `grid`. Raises UserError if the cells do not tile the grid."""
    if grid[0] % cell[0] or grid[1] % cell[1]:
        raise UserError(
            f"got cells of {cell[0]} x {cell[1]} patches, which do not tile the grid of {grid[0]} x {grid[1]} patches; "
            f"use --set method.mask_cell=[{math.gcd(grid[0], cell[0])},{math.gcd(grid[1], cell[1])}], or another "
            "data.size or method.encoder.patch"
        )
    return grid[0] // cell[0], grid[1] // cell[1]


def cell_mask(batch: int, grid: tuple[int, int], cell: tuple[int, int], ratio: float, rng: Draws) -> Mask:
    """Sample whole cells to hide, uniformly without replacement, for each image; visible and hidden patches are each in
    raster order.
    """
    rows, cols = cells_of(grid, cell)
    noise = rng.uniform(rows * cols)
    assert len(noise) == batch, "rng must have draws for as many images as the batch has"
    hidden = num_hidden(rows * cols, ratio)
    chosen = noise.argsort(dim=1, stable=True)[:, :hidden]
    cells = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device).scatter(1, chosen, True)
    patches = cells.unflatten(1, (rows, cols)).repeat_interleave(cell[0], 1).repeat_interleave(cell[1], 2)
    order = patches.flatten(1).int().argsort(dim=1, stable=True)  # visible patches first
    visible = (rows * cols - hidden) * cell[0] * cell[1]
    return Mask(keep=order[:, :visible], drop=order[:, visible:])


def mean_absolute(guess: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean absolute error over values, patches and images, in float32.

    The error equals the official sum over hidden pixels, divided by their number and by the number of channels.

    weights: see `weighted_mean`.
    """
    return weighted_mean((guess.float() - truth.float()).abs(), weights)


class SimMIM(Method):
    """See the module docstring. Raises UserError, with values that fit, if sizes do not fit together."""

    encoder: ViT

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.cell, self.ratio = config.mask_cell, config.mask_ratio
        self.encoder = ViT(config.encoder, images)
        rows, cols = cells_of(self.encoder.grid, self.cell)
        num_hidden(rows * cols, self.ratio)
        height, width = self.encoder.patch
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.width))
        self.head = nn.Linear(self.encoder.width, height * width * images.channels)
        # The official code truncates at one standard deviation, too.
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the mean absolute error on the hidden pixels, in standard deviations of the data."""
        patches = self.encoder.patches(batch.images)  # (B, N, P), normalised
        mask = cell_mask(len(patches), self.encoder.grid, cell=self.cell, ratio=self.ratio, rng=clock.rng)
        weights = value_weights(valid_patches(batch, self.encoder.patch), mask.drop)
        return Loss(mean_absolute(self.guess(patches, mask), take(patches, mask.drop), weights))

    def guess(self, patches: Tensor, mask: Mask) -> Tensor:
        """Predict the hidden patches: (B, N, P) -> (B, M, P)."""
        encoder = self.encoder
        tokens = torch.where(mask.hidden()[..., None], self.mask_token, encoder.patch_embed(patches))
        return self.head(take(encoder.run(encoder.place(tokens))[:, 1:], mask.drop))

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw the original, the masked image, the prediction, and the prediction pasted into the image; report the
        loss of baselines on these images.
        """
        patches = self.encoder.patches(batch.images)
        mask = cell_mask(len(patches), self.encoder.grid, cell=self.cell, ratio=self.ratio, rng=clock.rng)
        guess = self.guess(patches, mask).float()
        truth = take(patches, mask.drop)

        valid = valid_patches(batch, self.encoder.patch)
        weights = value_weights(valid, mask.drop)
        trivial = flat_guesses(patches, batch.images.shape[1], mask=mask, grid=self.encoder.grid, valid=valid)
        numbers = {name: mean_absolute(values, truth, weights) for name, values in {"loss": guess, **trivial}.items()}
        panels = masked_panels(patches, mask, {"pasted": guess})
        note = "Only hidden pixels count in the loss; predictions use no statistics of the true patches."
        return Picture({caption: self.encoder.images(panel) for caption, panel in panels.items()}, note, numbers)
