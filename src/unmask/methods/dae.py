"""Denoising autoencoder: Vincent et al. 2008 and 2010, "Stacked denoising autoencoders".

Like the autoencoder (`ae`), but the input is corrupted and the target is the clean image, so that copying does not
help. Corruptions: masking noise (a share of the values is set to 0), salt and pepper (they are set to the least or
greatest value), normal noise, and colour removal (conversion to gray, or removal of one channel or all but one: after
Zhang et al. 2016, which section 2 of MAE lists as a denoising autoencoder). The value 0 is the mean of the data set for
normalised pixels (loss=mse) and, as in the paper, the least value for pixels in [0, 1] (loss=bce).

The loss weights corrupted values by alpha and unchanged ones by beta: (1, 0.5) is the paper's double emphasis, (1, 0)
its full emphasis. Full emphasis with masking noise on patches equals the loss of MAE.

Differs from the paper: the whole stack is trained at once instead of layer by layer, so noise enters at the image only;
the weighted loss is divided by the sum of the weights; the optimiser is AdamW; the code is linear; the least and the
greatest value are those of `ImageSpec.value_range`, not of the batch.

Letters: B images, C channels, H x W pixels, n components of an image that can be corrupted.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn import corrupt
from unmask.nn.batch_sums import mean_count
from unmask.nn.dense import DenseConfig, DenseDecoder, DenseEncoder, TiedDecoder
from unmask.nn.valid import pixel_weights
from unmask.nn.vit import Pair
from unmask.rng import Draws

SHARE, SIGMA = 0.25, 0.3
SMALLEST_WEIGHT = 1e-6  # least sum of weights: makes the loss 0 if no pixel is valid
CHOOSING = ("masking", "salt_and_pepper")
TOUCHING_ALL = ("gaussian", "gray")
TAKING_COLOURS = ("gray", "single_channel", "drop_channel")


class Config(MethodConfig):
    """The denoising autoencoder's settings.

    corruption: kind of corruption of the input. share: share of the components to corrupt, for masking and
    salt_and_pepper (None: 0.25). grain: size of a component in pixels, (height, width), with all channels (None: single
    values are corrupted). sigma: standard deviation of gaussian noise, in the network's units (None: 0.3). alpha, beta:
    weights of corrupted and of unchanged values in the loss. tied: use the encoder's transposed weights in the decoder.
    """

    name: Literal["dae"] = "dae"
    encoder: DenseConfig = DenseConfig()
    corruption: Literal["masking", "salt_and_pepper", "gaussian", "gray", "single_channel", "drop_channel"] = "masking"
    share: float | None = Field(default=None, gt=0, lt=1)
    grain: Pair | None = None
    sigma: float | None = Field(default=None, gt=0)
    alpha: float = Field(default=1.0, ge=0)
    beta: float = Field(default=1.0, ge=0)
    tied: bool = False

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Config:
        if self.corruption not in CHOOSING and (self.share is not None or self.grain is not None):
            raise ValueError(
                f"share and grain apply to {' and '.join(CHOOSING)}; got corruption={self.corruption}; leave them out"
            )
        if self.corruption != "gaussian" and self.sigma is not None:
            raise ValueError(f"sigma applies to gaussian; got corruption={self.corruption}; leave it out")
        if self.corruption in TOUCHING_ALL and (self.alpha, self.beta) != (1, 1):
            raise ValueError(
                f"alpha and beta weight corrupted and unchanged values, but {self.corruption} corrupts all values; "
                "leave them out"
            )
        if self.alpha == 0:
            raise ValueError("got alpha=0, so the loss would ignore corrupted values; use alpha=1")
        return self


class DAE(Method):
    """See the module docstring. Raises UserError if the corruption does not fit the images."""

    encoder: DenseEncoder
    hides_patches = False

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        require_corruption(config, images)
        self.config = config
        self.encoder = DenseEncoder(config.encoder, images)
        self.decoder = (TiedDecoder if config.tied else DenseDecoder)(config.encoder, images)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the reconstruction error against the clean image, weighted by alpha and beta."""
        pixels = self.encoder.pixels(batch.images)  # (B, C, H, W)
        corrupted, touched = self.corrupt(pixels, clock.rng)
        return Loss(self.distance(self.rebuild(corrupted), pixels, touched, pixel_weights(batch)))

    def rebuild(self, corrupted: Tensor) -> Tensor:
        """Reconstruct images from corrupted pixels (B, C, H, W); return pixels of the same shape, or their logits."""
        code = self.encoder.code(corrupted)
        return self.decoder(code, self.encoder) if isinstance(self.decoder, TiedDecoder) else self.decoder(code)

    def corrupt(self, pixels: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        """Return (corrupted pixels, mask of the corrupted values), both (B, C, H, W)."""
        kind, share, grain = self.config.corruption, self.config.share or SHARE, self.config.grain
        images = self.encoder.spec
        count = corrupt.num_components(images.channels, images.size, grain)
        if kind == "masking":
            return corrupt.masking(pixels, rng.uniform(count), share, grain)
        if kind == "salt_and_pepper":
            draws, coins = rng.uniform(2 * count).chunk(2, 1)
            ends = (self.encoder.bottom, self.encoder.top)
            return corrupt.salt_and_pepper(pixels, draws, coins=coins, share=share, grain=grain, ends=ends)
        if kind == "gaussian":
            return corrupt.gaussian(pixels, rng.uniform(count), self.config.sigma or SIGMA)
        if kind == "gray":
            return corrupt.gray(pixels)
        one = corrupt.single_channel if kind == "single_channel" else corrupt.drop_channel
        return one(pixels, rng.uniform(1))

    def distance(self, guess: Tensor, pixels: Tensor, touched: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the mean error, weighted by alpha where the input was corrupted and by beta elsewhere.

        valid: (B, 1, H, W), 0 for absent pixels, or None if no pixel is absent.
        """
        weights = torch.where(touched, self.config.alpha, self.config.beta)
        if valid is None:
            return (self.encoder.errors(guess, pixels) * weights).sum() / mean_count(weights.sum())
        weights = weights * valid
        return (self.encoder.errors(guess, pixels) * weights).sum() / mean_count(weights.sum(), SMALLEST_WEIGHT)

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw original, corrupted image and reconstruction; one baseline predicts the mean colour, one the input."""
        encoder = self.encoder
        pixels = encoder.pixels(batch.images)
        corrupted, touched = self.corrupt(pixels, clock.rng)
        guess, valid = self.rebuild(corrupted), pixel_weights(batch)
        numbers = {
            "loss": self.distance(guess, pixels, touched, valid),
            "data_mean_colour": self.distance(encoder.mean_colour(pixels), pixels, touched, valid),
        }
        # With cross-entropy the loss of the corrupted input would be infinite: the corrupted input has probabilities of
        # exactly 0.
        if self.config.encoder.loss == "mse":
            numbers["corrupted_input"] = self.distance(corrupted, pixels, touched, valid)
        panels = {
            "original": batch.images.float(),
            "corrupted": encoder.images(corrupted),
            "from its code": encoder.drawn(guess),
        }
        note = (
            f"The encoder sees the corrupted image ({self.config.corruption.replace('_', ' ')}) through a code of "
            f"{encoder.width} numbers; the loss is against the original."
        )
        return Picture(panels, note, numbers)


def require_corruption(config: Config, images: ImageSpec) -> None:
    """Raise UserError if the corruption does not fit the images."""
    if config.corruption in TAKING_COLOURS and images.channels == 1:
        raise UserError(
            f"got corruption={config.corruption}, which removes colours, for images of one channel; use "
            "method.corruption=masking"
        )
    if config.corruption not in CHOOSING:
        return
    if config.grain is not None:
        for side, length, step in zip(("height", "width"), images.size, config.grain, strict=True):
            if length % step:
                fits = [str(n) for n in range(1, length) if length % n == 0]
                raise UserError(
                    f"got method.grain={step} for images of {side} {length}; expected a divisor; use one of "
                    f"{', '.join(fits)}, or leave it out to corrupt single values"
                )
    share = config.share or SHARE
    components = corrupt.num_components(images.channels, images.size, config.grain)
    if not 0 < corrupt.num_chosen(components, share) < components:
        what = "none" if corrupt.num_chosen(components, share) == 0 else "all"
        raise UserError(
            f"got method.share={share:g} of {components} components, which corrupts {what} of them; use another "
            "share, or a smaller method.grain"
        )
