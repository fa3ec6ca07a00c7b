"""Masked autoencoder: "Masked Autoencoders Are Scalable Vision Learners", He et al. 2021.

Hide most patches of an image, encode only the visible ones, rebuild the hidden pixels with a light decoder. The encoder
is what one keeps. Equal to the official model (`models_mae.py`) in parameters, forward pass and loss; tests hold it to
the published parameter counts and to an independent implementation.

Differs from the official code, without changing a number: only kept patches are embedded and only hidden ones
predicted; masks come from counter-based draws that belong to the image, so they do not depend on rank, worker or batch
position; the number of kept patches does not lose one to float truncation (100 patches at 0.9 keep 10, not 9).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unmask.batch import Batch, ImageSpec
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.decoders import DecoderConfig, LightDecoder
from unmask.nn.losses import mean_square
from unmask.nn.masks import Mask, nearest_visible, num_kept, random_mask
from unmask.nn.patches import put, take, unpatchify
from unmask.nn.targets import PatchStatistics, patch_statistics
from unmask.nn.vit import ViT, ViTConfig


class Config(MethodConfig):
    """MAE's settings. `target`: pixels normalised within each patch (the paper's best), or plain pixels."""

    name: Literal["mae"] = "mae"
    encoder: ViTConfig
    decoder: DecoderConfig = DecoderConfig()
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    target: Literal["norm_pixels", "pixels"] = "norm_pixels"


class MAE(Method):
    """See the module docstring. Raises ValueError when sizes do not fit together, saying which would."""

    encoder: ViT

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.mask_ratio = config.mask_ratio
        self.norm_pixels = config.target == "norm_pixels"
        self.encoder = ViT(config.encoder, images)
        num_kept(self.encoder.grid[0] * self.encoder.grid[1], config.mask_ratio)  # refuses a ratio that hides all
        values = self.encoder.patch[0] * self.encoder.patch[1] * images.channels
        self.decoder = LightDecoder(config.decoder, seen_width=self.encoder.width, grid=self.encoder.grid, out=values)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Mean square error on the hidden patches, in the target's units."""
        patches = self.encoder.patches(batch.images)  # (B, N, P), normalised
        mask = random_mask(len(patches), self.encoder.grid, self.mask_ratio, clock.rng)
        return Loss(mean_square(self.guess(patches, mask), take(self.target(patches), mask.drop)))

    def guess(self, patches: Tensor, mask: Mask) -> Tensor:
        """The prediction for the hidden patches: (B, N, P) -> (B, M, P)."""
        seen = self.encoder.run(self.encoder.embed(take(patches, mask.keep), mask.keep))
        return self.decoder(seen, mask)

    def target(self, patches: Tensor) -> Tensor:
        """What the decoder is asked for, at every patch: (B, N, P) -> (B, N, P)."""
        return patch_statistics(patches).remove(patches) if self.norm_pixels else patches

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Original, masked, prediction, pasted; and what the loss would be for two trivial guesses on these images."""
        patches = self.encoder.patches(batch.images)
        mask = random_mask(len(patches), self.encoder.grid, self.mask_ratio, clock.rng)
        guess = self.guess(patches, mask).float()
        near = nearest_visible(mask, self.encoder.grid)  # (B, M)

        target = self.target(patches)
        truth = take(target, mask.drop)
        channels = batch.images.shape[1]
        colours = target.unflatten(2, (-1, channels)).mean(2)  # (B, N, C): the mean colour of every patch
        pixels = target.shape[2] // channels
        visible = take(colours, mask.keep).mean(1, keepdim=True).expand(-1, mask.drop.shape[1], -1)  # (B, M, C)
        numbers = {
            "loss": mean_square(guess, truth),
            "true_patch_mean": mean_square(take(colours, mask.drop).repeat(1, 1, pixels), truth),
            "visible_mean": mean_square(visible.repeat(1, 1, pixels), truth),
            "nearest_visible": mean_square(take(target, near), truth),
        }

        nothing = torch.zeros_like(patches)  # the data set's mean colour
        drawn = self._to_pixels(guess, patches, mask.drop)
        panels = {
            "original": patches,
            f"masked {len(mask.drop[0]) / patches.shape[1]:.0%}": put(
                patches, mask.drop, nothing[:, : mask.drop.shape[1]]
            ),
            "prediction": put(nothing, mask.drop, drawn),
            "pasted": put(patches, mask.drop, drawn),
        }
        note = "Only hidden patches are predicted: the loss never asks for the visible ones."
        if self.norm_pixels:
            panels["pasted, nearest stats"] = put(patches, mask.drop, self._to_pixels(guess, patches, near))
            note += (
                " The target is normalised within each patch; the prediction is drawn with the TRUE mean and standard "
                "deviation of each hidden patch, which the model does not know. 'Nearest stats' borrows them from the "
                "nearest visible patch instead."
            )
        return Picture({caption: self._to_image(panel) for caption, panel in panels.items()}, note, numbers)

    def _to_pixels(self, guess: Tensor, patches: Tensor, statistics_of: Tensor) -> Tensor:
        """Prediction -> normalised pixels, with the patch statistics of the patches named (B, M)."""
        if not self.norm_pixels:
            return guess
        mean, std = patch_statistics(patches)
        return PatchStatistics(take(mean, statistics_of), take(std, statistics_of)).restore(guess)

    def _to_image(self, patches: Tensor) -> Tensor:
        """Normalised patches -> images in the files' units, float32."""
        images = unpatchify(patches, self.encoder.grid, self.encoder.patch)
        return images * self.encoder.std[:, None, None] + self.encoder.mean[:, None, None]
