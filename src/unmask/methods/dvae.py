"""Discrete VAE: "Zero-Shot Text-to-Image Generation", Ramesh et al. 2021 (DALL-E), section 2.1 and appendix A.

The encoder maps an image to a grid of codes from a codebook, the decoder maps the codes back to an image. In training a
code is a soft choice: the scores of all codes plus Gumbel noise, through a softmax whose temperature decreases; in
evaluation the most likely code is used. The loss is the reconstruction error plus a small KL divergence from the
uniform prior. BEiT, and MAE with target=tokens, predict the ids of the codes.

The reconstruction error is a mean over pixels and channels and KL a mean over codes. The total equals the paper's sum
divided by 256 x 256 x 3, so the paper's beta of 6.6 is a `kl_weight` of 6.6 / 192. Temperature and KL weight follow
half a cosine.

Differs from the paper: the weights are not averaged (the paper: moving average, decay 0.999); images are cropped by the
loader, as for every method here; schedules are shares of the training instead of numbers of steps. `arch="small"` with
the mean square error of normalised pixels is for images of 32 to 128 pixels and not from a paper.

Letters: B images, C channels, H x W pixels, R x S grid of codes, V codes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from unmask.batch import Batch, ImageSpec
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.batch_sums import batch_sum, num_parts
from unmask.nn.conv_vae import ConvDecoder, ConvEncoder, ConvVAEConfig, squeeze
from unmask.nn.losses import mean_square, weighted_mean
from unmask.nn.patches import normalise
from unmask.nn.valid import patch_weights, pixel_weights, valid_patches
from unmask.rng import Draws, Stream

LARGEST_DRAW = 1 - 2.0**-24  # greatest uniform draw, so that its logarithm is not 0


class Config(MethodConfig):
    """The dVAE's settings.

    temperature: first and last temperature of the softmax. kl_weight: final weight of the KL term; it starts at 0.
    temperature_share, kl_share: shares of the training after which temperature and weight reach their final values.
    """

    name: Literal["dvae"] = "dvae"
    encoder: ConvVAEConfig
    temperature: tuple[PositiveFloat, PositiveFloat] = (1.0, 1 / 16)
    temperature_share: float = Field(default=0.05, gt=0, le=1)
    kl_weight: float = Field(default=6.6 / 192, ge=0)
    kl_share: float = Field(default=1 / 600, gt=0, le=1)


class DVAE(Method):
    """See the module docstring. Raises UserError for a patch that does not fit the image or the architecture."""

    encoder: ConvEncoder
    hides_patches = False
    follows_images = False  # BEiT resizes images so that it has as many codes as patches

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvEncoder(config.encoder, images)
        self.decoder = ConvDecoder(config.encoder, images.channels)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return reconstruction error plus weighted KL divergence; log how much of the codebook this batch uses."""
        logits = self.encoder.logits(batch.images)  # (B, V, R, S)
        temperature, kl_weight = self.schedules(clock.progress)
        guess = self.decoder(gumbel_softmax(logits, temperature, clock.rng))
        codes = patch_weights(valid_patches(batch, self.encoder.patch))
        reconstruction = self.reconstruction(guess, batch.images, pixel_weights(batch))
        kl = kl_to_uniform(logits, None if codes is None else codes.unflatten(1, logits.shape[2:]))
        perplexity, used = usage(logits.argmax(1), logits.shape[1])
        logs = {
            "reconstruction": reconstruction.detach(),
            "kl": kl.detach(),
            "perplexity": perplexity,
            "codes_used": used,
            "temperature": perplexity.new_full((), temperature),  # created on the device, without synchronisation
            "kl_weight": perplexity.new_full((), kl_weight),
        }
        return Loss(reconstruction + kl_weight * kl, logs)

    def schedules(self, progress: float) -> tuple[float, float]:
        """Return (temperature, KL weight) at this share of the training."""
        config = self.config
        return (
            half_cosine(*config.temperature, progress / config.temperature_share),
            half_cosine(0.0, config.kl_weight, progress / config.kl_share),
        )

    def reconstruction(self, guess: Tensor, images: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the float32 reconstruction error: mean squared error or negative log-likelihood.

        weights: (B, 1, H, W), 0 for absent pixels, or None if no pixel is absent.
        """
        if self.config.encoder.loss == "mse":
            return mean_square(guess, normalise(images, self.encoder.mean, self.encoder.std), weights)
        return logit_laplace(guess, squeeze(self.encoder.unit(images)), weights)

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw the original, its reconstruction from codes, and the codes, one colour for each code."""
        ids = self.encoder.logits(batch.images).argmax(1)  # (B, R, S)
        perplexity, used = usage(ids, self.config.encoder.codes)
        panels = {
            "original": batch.images.float(),
            "from its codes": self.encoder.images(self.decoder.paint(ids)),
            "codes": self._colour(ids, batch.images.shape[2:]),
        }
        numbers = {"loss": self.loss(batch, clock).value}
        if self.config.encoder.loss == "mse":
            truth = normalise(batch.images, self.encoder.mean, self.encoder.std)
            numbers["data_mean_colour"] = mean_square(torch.zeros_like(truth), truth, pixel_weights(batch))
        these = "this image" if len(ids) == 1 else f"these {len(ids)} images"
        note = (
            f"Each image is {ids.shape[1]} x {ids.shape[2]} codes out of {self.config.encoder.codes}. In {these} "
            f"{float(used):.0%} of the codes occur, with a perplexity of {float(perplexity):.0f} (the number of "
            "equally frequent codes with the same entropy)."
        )
        return Picture(panels, note, numbers)

    def _colour(self, ids: Tensor, size: torch.Size) -> Tensor:
        """Draw codes (B, R, S) as images (B, C, H, W) in the files' units, in evenly distributed colours."""
        low, high = self.encoder.low[:, None, None], self.encoder.high[:, None, None]
        steps = even_steps(len(low)).to(ids.device)
        shares = (ids[:, None] * steps[:, None, None]).frac()
        return F.interpolate(low + shares * (high - low), tuple(size), mode="nearest")


def even_steps(channels: int) -> Tensor:
    """Return (C,) steps whose multiples, modulo 1, fill the unit cube evenly (Roberts 2018, "R-sequence").

    The steps are powers of 1 / g with g ** (C + 1) = g + 1. For one channel g is the golden ratio; its powers would put
    the colours of three channels on a line.
    """
    g = 1.0
    for _ in range(60):  # this fixed-point iteration converges from any start
        g = (1 + g) ** (1 / (channels + 1))
    return g ** -torch.arange(1.0, channels + 1)


def half_cosine(start: float, end: float, progress: float) -> float:
    """Interpolate along half a cosine from `start` (progress 0) to `end` (progress 1 and above)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def gumbel_softmax(logits: Tensor, temperature: float, rng: Draws) -> Tensor:
    """Sample soft choices of codes (B, V, R, S), which sum to 1 over V (Jang et al. 2017, Maddison et al. 2017)."""
    draws = rng.uniform(logits[0].numel(), Stream.CODES).reshape(logits.shape).clamp(1e-9, LARGEST_DRAW)
    return ((logits - (-draws.log()).log()) / temperature).softmax(1)


def kl_to_uniform(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the KL divergence of the codes' distribution from the uniform one, mean over all codes: 0 to log V nats.

    weights: (B, R, S), 0 for codes of absent patches, or None if no patch is absent.
    """
    log_shares = logits.log_softmax(1)
    if weights is None:
        return (log_shares.exp() * log_shares).sum(1).mean() + math.log(logits.shape[1])
    return weighted_mean((log_shares.exp() * log_shares).sum(1) + math.log(logits.shape[1]), weights)


def logit_laplace(guess: Tensor, unit: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean negative log density of pixels in (0, 1) whose logits are Laplace-distributed.

    guess: C means and C log-scales for each pixel.
    """
    center, log_scale = guess.float().chunk(2, 1)
    distance = (unit.logit() - center).abs() * (-log_scale).exp()
    return weighted_mean(distance + log_scale + math.log(2) + (unit * (1 - unit)).log(), weights)


def usage(ids: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Return (perplexity, share of the codes that occur) of ids of any shape, as two 0-d float32 tensors.

    Both are of the whole micro-batch.
    """
    counts = torch.zeros(codes, device=ids.device).scatter_add(0, ids.flatten(), torch.ones_like(ids.flatten()).float())
    counts = batch_sum(counts)
    entropy = torch.special.entr(counts / (ids.numel() * num_parts())).sum()
    return entropy.exp(), (counts > 0).float().mean()
