"""The networks of a discrete VAE: images to a grid of codes, and codes to images (DALL-E, Ramesh et al. 2021, App. A).

`dalle` is the published architecture (openai/DALL-E): 7 x 7 convolution, four groups of residual bottleneck blocks with
pooling by 2 between them, so one code covers 8 x 8 pixels. `small` is for images of 32 to 128 pixels: strided 4 x 4
convolutions, each halving the sides, then residual blocks. Both decoders mirror their encoders, and their first 1 x 1
convolution is the codebook: each column is the embedding of one code.

A `Tokenizer` contains both networks of a trained dVAE, frozen, for BEiT and for MAE with token targets.

Letters: B images, C channels, R x S grid of codes, V codes, O values the decoder predicts for a pixel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from pydantic import Field
from torch import Tensor, nn

from unmask.batch import ImageSpec
from unmask.errors import UserError
from unmask.nn.features import Features
from unmask.nn.image_encoder import EncoderConfig, ImageEncoder
from unmask.nn.inputs import Scale
from unmask.nn.losses import full_precision
from unmask.nn.patches import grid_of, normalise
from unmask.nn.vit import Pair

LOGIT_LAPLACE_EPS = 0.1  # Pixels are mapped into [0.1, 0.9], where the logit is bounded.
DALLE_BLOCKS = 2  # Number of blocks in each of the four groups.
DALLE_GROUPS = (1, 2, 4, 8)  # Widths of the groups, relative to the first group.
DALLE_EMBEDDING = 128
SMALL_BLOCKS = 2  # residual blocks in encoder and in decoder, unless depth is set


class ConvVAEConfig(EncoderConfig):
    """Settings of the networks of a discrete VAE. `patch`: (height, width) in pixels of the area of one code. `codes`:
    size of the codebook.

    arch "dalle": `width` is that of the first group (256 in the paper), `patch` is 8 x 8, and `depth` is fixed. arch
    "small": `width` is that of every layer, `patch` is a square with a power of two as side, `depth` is the number of
    residual blocks in the encoder, and in the decoder (None: 2). loss: "mse" predicts the normalised pixels,
    "logit_laplace" the mean and scale of DALL-E's density.
    """

    arch: Literal["small", "dalle"] = "small"
    codes: int = Field(default=512, gt=1)
    width: int = Field(default=64, gt=3)
    depth: int | None = Field(default=None, ge=0)
    patch: Pair = (4, 4)
    loss: Literal["mse", "logit_laplace"] = "mse"

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.patch


class Residual(nn.Module):
    """A residual block, which computes x + gain * layers(x); the skip connection is a 1 x 1 convolution where widths
    differ.
    """

    def __init__(self, inside: int, outside: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        hidden = max(1, outside // 4)
        widths = [inside, *[hidden] * (len(kernels) - 1), outside]
        layers: list[nn.Module] = []
        for kernel, before, after in zip(kernels, widths[:-1], widths[1:], strict=True):
            layers += [nn.ReLU(), conv(before, after, kernel)]
        self.layers = nn.Sequential(*layers)
        self.around = nn.Identity() if inside == outside else conv(inside, outside, 1)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.around(x) + self.gain * self.layers(x)


def conv(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size (or divides it by `stride`), initialised as in openai/DALL-E."""
    layer = nn.Conv2d(inside, outside, kernel, stride, padding=(kernel - 1) // 2)
    nn.init.normal_(layer.weight, std=(inside * kernel**2) ** -0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def dalle_encoder(channels: int, width: int) -> tuple[nn.Sequential, int]:
    """Return the layers up to the last hidden map, and its width."""
    widths, gain = [width * n for n in DALLE_GROUPS], 1 / (len(DALLE_GROUPS) * DALLE_BLOCKS) ** 2
    layers: list[nn.Module] = [conv(channels, width, 7)]
    for before, after in zip([width, *widths[:-1]], widths, strict=True):
        layers += [Residual(before, after, (3, 3, 3, 1), gain), Residual(after, after, (3, 3, 3, 1), gain)]
        layers += [nn.MaxPool2d(2)] * (after != widths[-1])
    return nn.Sequential(*layers, nn.ReLU()), widths[-1]


def dalle_decoder(codes: int, width: int, out: int) -> nn.Sequential:
    widths, gain = [width * n for n in reversed(DALLE_GROUPS)], 1 / (len(DALLE_GROUPS) * DALLE_BLOCKS) ** 2
    layers: list[nn.Module] = [conv(codes, DALLE_EMBEDDING, 1)]
    for before, after in zip([DALLE_EMBEDDING, *widths[:-1]], widths, strict=True):
        layers += [Residual(before, after, (1, 3, 3, 3), gain), Residual(after, after, (1, 3, 3, 3), gain)]
        layers += [nn.Upsample(scale_factor=2)] * (after != widths[-1])
    return nn.Sequential(*layers, nn.ReLU(), conv(width, out, 1))


def num_blocks(config: ConvVAEConfig) -> int:
    return SMALL_BLOCKS if config.depth is None else config.depth


def small_encoder(channels: int, config: ConvVAEConfig) -> tuple[nn.Sequential, int]:
    layers: list[nn.Module] = []
    for number in range(config.patch[0].bit_length() - 1):
        layers += [conv(channels if number == 0 else config.width, config.width, 4, 2), nn.ReLU()]
    layers += [Residual(config.width, config.width, (3, 3, 1), 1.0) for _ in range(num_blocks(config))]
    return nn.Sequential(*layers, nn.ReLU()), config.width


def small_decoder(config: ConvVAEConfig, out: int) -> nn.Sequential:
    layers: list[nn.Module] = [conv(config.codes, config.width, 1)]
    layers += [Residual(config.width, config.width, (1, 3, 3), 1.0) for _ in range(num_blocks(config))]
    for _ in range(config.patch[0].bit_length() - 1):
        layers += [nn.ReLU(), nn.Upsample(scale_factor=2), conv(config.width, config.width, 3)]
    return nn.Sequential(*layers, nn.ReLU(), conv(config.width, out, 1))


class ConvEncoder(ImageEncoder):
    """Encoder from images to scores of codes. Raises UserError for a patch that the architecture does not support.

    mean, std: of the data set, per channel. low, high: the file values that count as 0 and 1.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor
    exact = ("mean", "std", "low", "high")

    def __init__(self, config: ConvVAEConfig, images: ImageSpec) -> None:
        super().__init__()
        require_patch(config)
        self.spec, self.patch = images, config.patch
        self.grid = grid_of(images.size, config.patch)
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (images.mean, images.std))
        low, high = (torch.tensor(values, dtype=torch.float32) for values in images.value_range)
        for name, values in {"mean": mean, "std": std, "low": low, "high": high}.items():
            self.register_buffer(name, values)
        self.dalle, self.density = config.arch == "dalle", config.loss == "logit_laplace"
        make = dalle_encoder(images.channels, config.width) if self.dalle else small_encoder(images.channels, config)
        self.hidden, self.width = make
        self.head = conv(self.width, config.codes, 1)

    def unit(self, images: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Scale file values to [0, 1] and clip values outside."""
        low, high = self.low[:, None, None], self.high[:, None, None]
        return ((images.to(torch.float32) - low) / (high - low)).clamp(0, 1)

    def features(self, images: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B D R S"]:
        """Return the last hidden map."""
        self.require_shape(images)
        x = squeeze(self.unit(images)) if self.dalle else normalise(images, self.mean, self.std)
        return self.hidden(x.to(self.head.weight.dtype))

    def logits(self, images: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B V R S"]:
        """Return a float32 score for every code at every position."""
        return self.head(self.features(images)).float()

    def images(self, values: Float[Tensor, "B O H W"]) -> Float[Tensor, "B C H W"]:
        """Convert the output of a decoder to images in the files' units."""
        values = values.float()
        if not self.density:
            return values * self.std[:, None, None] + self.mean[:, None, None]
        unit = (values[:, : self.spec.channels].sigmoid() - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)
        low, high = self.low[:, None, None], self.high[:, None, None]
        return low + unit.clamp(0, 1) * (high - low)

    def forward(self, images: Shaped[Tensor, "B C H W"], scale: Scale | None = None) -> Features:
        """Return the last hidden map for probes, one token per code. scale: see `ImageEncoder.accept`."""
        images = self.accept(images, scale)
        grid = grid_of((images.shape[2], images.shape[3]), self.patch)
        return Features(cls=None, patches=self.features(images).flatten(2).transpose(1, 2), grid=grid)

    def depth_of(self, name: str) -> int:
        """Return the depth of a parameter for layer-wise decay: the number of its layer, counted from the input; the
        head is last.
        """
        return int(name.split(".")[1]) if name.startswith("hidden.") else len(self.hidden)


class ConvDecoder(nn.Module):
    """Decode codes to the inputs of the loss: C normalised values per pixel, or C means and C log-scales."""

    def __init__(self, config: ConvVAEConfig, channels: int) -> None:
        super().__init__()
        out = channels * (2 if config.loss == "logit_laplace" else 1)
        dalle = config.arch == "dalle"
        self.layers = dalle_decoder(config.codes, config.width, out) if dalle else small_decoder(config, out)

    def forward(self, shares: Float[Tensor, "B V R S"]) -> Float[Tensor, "B O H W"]:
        """Decode `shares`, the weights of all codes at every position (one-hot for ids)."""
        return self.layers(shares)

    def paint(self, ids: Int[Tensor, "B R S"]) -> Float[Tensor, "B O H W"]:
        """Decode ids. The result equals `forward` with one-hot shares, which would need V times the memory."""
        book = self.layers[0]
        assert isinstance(book, nn.Conv2d), "the first layer of the decoder is a 1 x 1 convolution, the codebook"
        assert book.bias is not None
        meaning = F.embedding(ids, book.weight.flatten(1).T) + book.bias  # (B, R, S, D)
        return self.layers[1:](meaning.permute(0, 3, 1, 2))


def squeeze(unit: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Map values from [0, 1] to [0.1, 0.9] (`map_pixels` of openai/DALL-E)."""
    return (1 - 2 * LOGIT_LAPLACE_EPS) * unit + LOGIT_LAPLACE_EPS


def require_patch(config: ConvVAEConfig) -> None:
    """Raise UserError for a patch that the architecture does not support, or a depth that it would ignore."""
    height, width = config.patch
    if config.arch == "dalle" and config.depth is not None:
        raise UserError(f"got depth={config.depth}; arch=dalle has a fixed depth; leave depth out")
    if config.arch == "dalle" and config.patch != (8, 8):
        raise UserError(
            f"got a patch of {height} x {width}; arch=dalle has one code per 8 x 8 pixels; set method.encoder.patch=8"
        )
    if height != width or height & (height - 1) or height < 2:
        raise UserError(f"got a patch of {height} x {width}; a dVAE halves the sides repeatedly; use 2, 4, 8 or 16")


def require_tokenizer(config: ConvVAEConfig | None) -> ConvVAEConfig:
    """Return the tokenizer's settings. Raises UserError if no tokenizer is given."""
    if config is None:
        raise UserError(
            "the target is a dVAE's codes, but no tokenizer was given; train one with `unmask pretrain DATA --recipe "
            "dvae_nano --out runs/tokenizer` and pass --tokenizer runs/tokenizer"
        )
    return config


class Tokenizer(nn.Module):
    """A trained, frozen dVAE that maps images to one id for every patch of `patch` pixels.

    The state dict is that of the method `dvae`, so a tokenizer can load the weights of a dVAE run. If the dVAE has
    smaller patches than the encoder, images are shrunk by the ratio of the patches (BEiT: 224 pixels with patch 16, 112
    for the tokenizer with patch 8). Raises UserError if the grid of codes differs from the grid of patches.
    """

    def __init__(self, config: ConvVAEConfig, images: ImageSpec, patch: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid_of(images.size, patch)
        self.size = (self.grid[0] * config.patch[0], self.grid[1] * config.patch[1])
        factors = [theirs / ours for theirs, ours in zip(patch, config.patch, strict=True)]
        if min(factors) < 1 or factors[0] != factors[1]:
            fits = [side for side in (16, 8, 4, 2) if side <= min(patch)]
            other = f", or train a dVAE with method.encoder.patch={fits[0]}" if patch[0] == patch[1] and fits else ""
            raise UserError(
                f"got a tokenizer with one code per {config.patch[0]} x {config.patch[1]} pixels for patches of "
                f"{patch[0]} x {patch[1]}; expected patches of the same shape, at least as large; set "
                f"method.encoder.patch={config.patch[0]} here{other}"
            )
        self.encoder = ConvEncoder(config, replace(images, size=self.size))
        self.decoder = ConvDecoder(config, images.channels)
        self.requires_grad_(False)

    @torch.no_grad()
    def ids(self, images: Shaped[Tensor, "B C H W"]) -> Int[Tensor, "B N"]:
        """Return the most likely code of every patch, in raster order."""
        if images.shape[2:] != self.size:
            images = F.interpolate(images.float(), self.size, mode="bicubic", antialias=True, align_corners=False)
        with full_precision(images.device):  # so that autocast does not change the choice between near ties
            return self.encoder.logits(images).argmax(1).flatten(1)

    @torch.no_grad()
    def paint(self, ids: Int[Tensor, "B N"], size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        """Decode codes to images of `size` in the files' units."""
        images = self.encoder.images(self.decoder.paint(ids.unflatten(1, self.grid)))
        return images if size == self.size else F.interpolate(images, size, mode="bilinear", align_corners=False)
