"""CrossMAE: "Rethinking Patch Dependence for Masked Autoencoders", Fu, Lian et al. 2024 (TMLR 2025).

The encoder is MAE's and sees the visible patches only. CrossMAE differs from MAE in its decoder: hidden patches do not
attend to one another; each attends to the visible ones by cross-attention only. So the decoder need not predict all
hidden patches: with N patches, mask ratio r and predict ratio gamma, the decoder runs on gamma N query tokens instead
of MAE's 1 + N (at 224 pixels and gamma 0.25 these are 49 of 147 hidden patches, instead of 197 tokens), and the loss
covers only these. Decoder block j reads its own learned mixture of all the encoder's feature maps, including the
encoder's input (`nn/cross.py`).

The mixtures have their own LayerNorms, so the encoder's final LayerNorm gets no gradient: it keeps its initial values
(gain 1, bias 0) and is marked as not trainable, unless `weighted_features` is off. The official code does not train
this LayerNorm, either; its fine-tuning starts from a new one.

Differs from the official code without changing a result: only kept patches are embedded; masks come from counter-based
draws that depend on the image; float errors do not make N (1 - r) or N (r - gamma) one too small. The official
code calls gamma `kept_mask_ratio`. No other difference from the paper is known.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.cross import CrossDecoder
from unmask.nn.decoders import DecoderConfig
from unmask.nn.masks import Mask, num_kept, random_mask
from unmask.nn.patches import take
from unmask.nn.targets import Pixels, masked_panels
from unmask.nn.valid import valid_patches
from unmask.nn.vit import ViT, ViTConfig


class Config(MethodConfig):
    """CrossMAE's settings. `mask_ratio` and `predict_ratio` are shares of ALL patches: 0.75 and 0.25 predict a third of
    the hidden patches.
    """

    name: Literal["crossmae"] = "crossmae"
    encoder: ViTConfig
    decoder: DecoderConfig = DecoderConfig(depth=12)
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    predict_ratio: float = Field(default=0.25, gt=0, lt=1)
    weighted_features: bool = True
    target: Literal["norm_pixels", "pixels"] = "norm_pixels"


def num_asked(num_patches: int, mask_ratio: float, predict_ratio: float) -> int:
    """Return how many hidden patches are predicted: all but N (mask_ratio - predict_ratio), rounded down; at least one.

    Raises UserError if more patches would be predicted than are hidden.
    """
    hidden = num_patches - num_kept(num_patches, mask_ratio)
    if predict_ratio > mask_ratio:
        raise UserError(
            f"got a predict ratio of {predict_ratio:g} and a mask ratio of {mask_ratio:g}; both are shares of all "
            f"patches, and only hidden ones can be predicted; set method.predict_ratio={mask_ratio:g} or less"
        )
    return max(1, hidden - math.floor(num_patches * (mask_ratio - predict_ratio) + 1e-6))


class CrossMAE(Method):
    """See the module docstring. Raises UserError, with values that fit, if sizes or ratios do not fit together."""

    encoder: ViT

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.mask_ratio = config.mask_ratio
        self.encoder = ViT(config.encoder, images)
        rows, cols = self.encoder.grid
        values = self.encoder.patch[0] * self.encoder.patch[1] * images.channels
        per_patch = config.target == "norm_pixels"
        self.target = Pixels(values, self.encoder.grid, images.channels, per_patch=per_patch)
        self.asked = num_asked(rows * cols, config.mask_ratio, config.predict_ratio)
        self.decoder = CrossDecoder(
            config.decoder,
            seen_width=self.encoder.width,
            sources=config.encoder.depth + 1 if config.weighted_features else None,
            grid=self.encoder.grid,
            out=values,
        )
        self.encoder.norm.requires_grad_(not config.weighted_features)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the mean squared error on the predicted patches, in the units of the target."""
        patches = self.encoder.patches(batch.images)  # (B, N, P), normalised
        mask = random_mask(len(patches), self.encoder.grid, self.mask_ratio, clock.rng)
        asked = mask.drop[:, -self.asked :]  # random: the order of mask.drop is random
        guess = self.decoder(self.layers(patches, mask), asked)
        valid = valid_patches(batch, self.encoder.patch)
        truth = take(self.target(patches, batch.images, valid), asked)
        return Loss(self.target.loss(guess, truth, self.target.weights(valid, asked)))

    def layers(self, patches: Tensor, mask: Mask) -> list[Tensor]:
        """Return the inputs of the decoder: (B, N, P) -> feature maps (B, 1 + K, D), class token first, earliest block
        first.

        The feature maps are the encoder's input and the output of each of its blocks; without `weighted_features` there
        is only one, the encoder's output.
        """
        tokens = self.encoder.embed(take(patches, mask.keep), mask.keep)
        if self.decoder.inter_block is None:
            return [self.encoder.run(tokens, mask.keep)]
        return list(self.encoder.layers(tokens, mask.keep))

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw predictions of ALL hidden patches; the reported losses cover only the patches predicted in training."""
        patches = self.encoder.patches(batch.images)
        mask = random_mask(len(patches), self.encoder.grid, self.mask_ratio, clock.rng)
        guess = self.decoder(self.layers(patches, mask), mask.drop).float()
        asked = Mask(mask.keep, mask.drop[:, -self.asked :])
        valid = valid_patches(batch, self.encoder.patch)
        truth = take(self.target(patches, batch.images, valid), asked.drop)
        weights = self.target.weights(valid, asked.drop)
        numbers = {"loss": self.target.loss(guess[:, -self.asked :], truth, weights)}
        numbers |= self.target.trivial(patches, batch.images, asked, valid)

        panels = masked_panels(patches, mask, self.target.draw(guess, patches, batch.images, mask, valid))
        note = (
            f"In training the decoder predicts {self.asked} of the {guess.shape[1]} hidden patches; for this "
            "picture it predicts all of them, which does not change the individual predictions."
        )
        panels = {caption: self.encoder.images(panel) for caption, panel in panels.items()}
        return Picture(panels, note + self.target.note, numbers)
