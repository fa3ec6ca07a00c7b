"""Autoencoder: Hinton & Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks".

An image becomes a small code and an image again; what is kept is the code. Nothing is hidden and nothing is drawn at
random: all that keeps it from copying is that the code is small. With `activation=linear` and the mean square error it
learns the space of the first principal components, and a test holds it to that.

Differs from the paper: all layers are trained at once with AdamW, where the paper pre-trained each as a restricted
Boltzmann machine and fine-tuned with conjugate gradients; images of any size and number of channels; besides the
paper's logistic units and cross-entropy, ReLU and affine layers and the mean square error of normalised pixels.

Letters: B images, C channels, H x W pixels, D length of the code.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.batch import Batch, ImageSpec
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.dense import DenseConfig, DenseDecoder, DenseEncoder
from unmask.nn.losses import mean_square


class Config(MethodConfig):
    """The autoencoder's settings; see `DenseConfig`."""

    name: Literal["ae"] = "ae"
    encoder: DenseConfig = DenseConfig()


class AE(Method):
    """See the module docstring."""

    encoder: DenseEncoder

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.cross_entropy = config.encoder.loss == "bce"
        self.encoder = DenseEncoder(config.encoder, images)
        self.decoder = DenseDecoder(config.encoder, images)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """How far the decoder's image is from the one that was encoded, mean over all pixels and channels."""
        pixels = self.encoder.pixels(batch.images)  # (B, C, H, W)
        return Loss(self.distance(self.decoder(self.encoder.code(pixels)), pixels))

    def distance(self, guess: Tensor, pixels: Tensor) -> Tensor:
        """Mean square error, or cross-entropy in nats with `guess` as logits; float32."""
        if self.cross_entropy:
            return F.binary_cross_entropy_with_logits(guess.float(), pixels)
        return mean_square(guess, pixels)

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Original and reconstruction; beside the loss that of guessing the data set's mean colour for every pixel."""
        pixels = self.encoder.pixels(batch.images)
        guess = self.decoder(self.encoder.code(pixels)).float()
        mean = torch.tensor(self.encoder.spec.mean, device=pixels.device)[:, None, None]
        colour = self.encoder.pixels(mean.expand_as(pixels))
        numbers = {
            "loss": self.distance(guess, pixels),
            "data_mean_colour": self.distance(colour.logit(1e-6) if self.cross_entropy else colour, pixels),
        }
        drawn = guess.sigmoid() if self.cross_entropy else guess
        panels = {"original": batch.images.float(), "from its code": self.encoder.images(drawn)}
        note = f"Each image went through a code of {self.encoder.width} numbers; nothing was hidden from the encoder."
        return Picture(panels, note, numbers)
