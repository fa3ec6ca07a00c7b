"""Encoder and decoder of the dense autoencoder: an image is one vector, encoded to a small code and decoded again.

Hinton & Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks": hidden layers with one
activation, a linear code, and a decoder with the same sizes in reverse. All images must have the training size.

Weights are initialised Xavier-uniform (Glorot & Bengio 2010, derived for units of slope 1), with four times the range
before logistic units, whose slope is a quarter. Without the factor of four the 2006 network, trained end to end, learns
only one principal component in the first thousand steps.

Letters: B images, C channels, H x W pixels, P = C x H x W values of an image, D length of the code.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from unmask.batch import ImageSpec
from unmask.nn.blocks import init_linears
from unmask.nn.features import Features
from unmask.nn.image_encoder import EncoderConfig, ImageEncoder
from unmask.nn.inputs import Scale

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "linear": nn.Identity}
LOGISTIC_GAIN = 4.0  # The slope of the logistic function at 0 is a quarter.
MIN_PROBABILITY = 1e-6  # Keeps the cross-entropy of baseline predictions finite.


class DenseConfig(EncoderConfig):
    """Settings of the dense autoencoder. hidden: sizes of the encoder's hidden layers, input first. code: length of the
    code.

    activation: activation of the hidden layers; "linear" makes the autoencoder affine: it then learns principal
    components. loss: "mse", the mean square error of pixels normalised over the data set; or "bce", the cross-entropy
    of pixels scaled to [0, 1], which are then also the network's input. 0 and 1 stand for 0 and 255 in uint8 data, and
    for two standard deviations below and above the mean in uint16 and float32 data (`ImageSpec.value_range`); values
    outside are clipped.
    """

    hidden: tuple[PositiveInt, ...] = (1000, 500, 250)
    code: int = Field(default=30, gt=0)
    activation: Literal["relu", "sigmoid", "linear"] = "relu"
    loss: Literal["mse", "bce"] = "mse"


def dense(sizes: list[int], activation: str) -> nn.Sequential:
    """Return linear layers of the widths `sizes`, input first, with activations between them but not after the last."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def init_dense(layers: nn.Sequential) -> None:
    """Initialise weights as in the module docstring, biases with zero."""
    init_linears(layers)
    for layer, following in pairwise(layers):
        if isinstance(following, nn.Sigmoid) and isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, gain=LOGISTIC_GAIN)


class DenseEncoder(ImageEncoder):
    """Encode images. `bottom` and `top` (C, 1, 1): the least and greatest pixel value, in the network's units."""

    shift: Tensor
    scale: Tensor
    bottom: Tensor
    top: Tensor
    one_size = "a dense autoencoder has one weight for each pixel"
    exact = ("shift", "scale", "bottom", "top")

    def __init__(self, config: DenseConfig, images: ImageSpec) -> None:
        super().__init__()
        self.spec, self.width, self.grid = images, config.code, (1, 1)
        low, high = (torch.tensor(values)[:, None, None] for values in images.value_range)
        mean, std = (torch.tensor(values)[:, None, None] for values in (images.mean, images.std))
        self.clipped = config.loss == "bce"
        shift, scale = (low, high - low) if self.clipped else (mean, std)
        self.register_buffer("shift", shift.float())
        self.register_buffer("scale", scale.float())
        self.register_buffer("bottom", ((low - shift) / scale).float())
        self.register_buffer("top", ((high - shift) / scale).float())
        num_values = images.channels * images.size[0] * images.size[1]
        self.layers = dense([num_values, *config.hidden, config.code], config.activation)
        init_dense(self.layers)

    def pixels(self, images: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Convert images to the network's units. Raises UserError unless size and channels match the training data."""
        self.require_shape(images)
        pixels = (images.to(torch.float32) - self.shift) / self.scale
        return pixels.clamp(0, 1) if self.clipped else pixels

    def images(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Convert pixels in the network's units to float32 images in the files' own units: the inverse of `pixels`."""
        return pixels.float() * self.scale + self.shift

    def drawn(self, guess: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Convert the output of a decoder to images in the files' own units."""
        return self.images(guess.float().sigmoid() if self.clipped else guess)

    def errors(self, guess: Float[Tensor, "B C H W"], pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return the float32 squared error of each pixel, or its cross-entropy in nats."""
        if self.clipped:
            return F.binary_cross_entropy_with_logits(guess.float(), pixels, reduction="none")
        return (guess.float() - pixels).square()

    def mean_colour(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Return the output of a baseline decoder that predicts the data set's mean colour."""
        mean = torch.tensor(self.spec.mean, device=pixels.device)[:, None, None]
        colour = self.pixels(mean.expand_as(pixels))
        return colour.logit(MIN_PROBABILITY) if self.clipped else colour

    def code(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        first = self.layers[0].weight
        assert isinstance(first, Tensor), "the first layer is linear"
        return self.layers(pixels.flatten(1).to(first.dtype))

    def forward(self, images: Shaped[Tensor, "B C H W"], scale: Scale | None = None) -> Features:
        """Return the code as the only token of a 1 x 1 grid. scale: see `ImageEncoder.accept`."""
        return Features(cls=None, patches=self.code(self.pixels(self.accept(images, scale)))[:, None], grid=(1, 1))

    def depth_of(self, name: str) -> int:
        """Depth of a parameter for layer-wise decay: the number of its layer, counted from the input."""
        return int(name.split(".")[1]) // 2


class DenseDecoder(nn.Module):
    """Decode codes to pixels in the network's units ("mse") or to their logits ("bce"); mirrors the encoder."""

    def __init__(self, config: DenseConfig, images: ImageSpec) -> None:
        super().__init__()
        self.shape = (images.channels, *images.size)
        sizes = [config.code, *reversed(config.hidden), images.channels * images.size[0] * images.size[1]]
        self.layers = dense(sizes, config.activation)
        init_dense(self.layers)

    def forward(self, code: Float[Tensor, "B D"]) -> Float[Tensor, "B C H W"]:
        return self.layers(code).unflatten(1, self.shape)


class TiedDecoder(nn.Module):
    """A mirrored decoder whose weights are the encoder's, transposed (Vincent et al. 2010); its biases are its own."""

    def __init__(self, config: DenseConfig, images: ImageSpec) -> None:
        super().__init__()
        self.shape = (images.channels, *images.size)
        sizes = [*reversed(config.hidden), images.channels * images.size[0] * images.size[1]]
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes)
        self.activation = ACTIVATIONS[config.activation]()

    def forward(self, code: Float[Tensor, "B D"], encoder: DenseEncoder) -> Float[Tensor, "B C H W"]:
        weights = [layer.weight for layer in encoder.layers if isinstance(layer, nn.Linear)]
        x = code
        for number, (weight, bias) in enumerate(zip(reversed(weights), self.biases, strict=True)):
            x = F.linear(self.activation(x) if number else x, weight.t(), bias)
        return x.unflatten(1, self.shape)
