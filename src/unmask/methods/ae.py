"""Autoencoder: Hinton & Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks".

The encoder maps an image to a small code, the decoder maps the code back to an image. Nothing is masked or random; only
the small size of the code prevents the network from copying its input. With `activation=linear` and the mean squared
error the autoencoder learns the subspace of the first principal components, which a test verifies.

Differs from the paper: all layers are trained at once with AdamW, while the paper pre-trains each as a restricted
Boltzmann machine and fine-tunes with conjugate gradients; images may have any size and number of channels; besides the
paper's logistic units and cross-entropy there are ReLU and affine layers and the mean square error of normalised
pixels.

Letters: B images, C channels, H x W pixels, D length of the code.
"""

from __future__ import annotations

from typing import Literal

from unmask.batch import Batch, ImageSpec
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.dense import DenseConfig, DenseDecoder, DenseEncoder
from unmask.nn.losses import weighted_mean
from unmask.nn.valid import pixel_weights


class Config(MethodConfig):
    """The autoencoder's settings; see `DenseConfig`."""

    name: Literal["ae"] = "ae"
    encoder: DenseConfig = DenseConfig()


class AE(Method):
    """See the module docstring."""

    encoder: DenseEncoder
    hides_patches = False

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.encoder = DenseEncoder(config.encoder, images)
        self.decoder = DenseDecoder(config.encoder, images)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the reconstruction error, averaged over all pixels and channels."""
        pixels = self.encoder.pixels(batch.images)  # (B, C, H, W)
        errors = self.encoder.errors(self.decoder(self.encoder.code(pixels)), pixels)
        return Loss(weighted_mean(errors, pixel_weights(batch)))

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw original and reconstruction; the baseline predicts the data set's mean colour for every pixel."""
        encoder = self.encoder
        pixels = encoder.pixels(batch.images)
        guess, weights = self.decoder(encoder.code(pixels)), pixel_weights(batch)
        numbers = {
            "loss": weighted_mean(encoder.errors(guess, pixels), weights),
            "data_mean_colour": weighted_mean(encoder.errors(encoder.mean_colour(pixels), pixels), weights),
        }
        panels = {"original": batch.images.float(), "from its code": encoder.drawn(guess)}
        note = f"Each image went through a code of {encoder.width} numbers; nothing was hidden from the encoder."
        return Picture(panels, note, numbers)
