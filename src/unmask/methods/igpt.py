"""Image GPT: "Generative Pretraining from Pixels", Chen et al. 2020 (V2), and its code (openai/image-gpt).

An image is a sequence of colours from a small palette, in raster order. The network has two objectives to choose from:
`ar` predicts every token from the tokens before it (mean negative log likelihood, in nats per token), `bert` masks each
token with probability 0.15, which removes its content but not its position, and predicts the masked tokens from all
others (mean over the masked tokens of an image, then over images). The best features are in the middle of the network.

The palette is computed from the data by k-means before the first step and stored in the Run, or is given with `unmask
pretrain --palette` and is then part of the settings.

Differs from the paper: a token is the mean of `patch` pixels of the crop, while the paper resamples whole images to 32,
48 or 64 pixels; the palette is computed from the training data; positions are not resized, so only one image size is
accepted; images without a masked token (rare, except for short sequences) have weight 0. As in the paper `bert` is
probed with one mask, or by a vote over several masks (`unmask probe --mask-votes`); `embed` masks nothing.

Letters: B images, N tokens, k colours of the palette, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.batch_sums import batch_sum, mean_count
from unmask.nn.colour_palette import k_means
from unmask.nn.gpt import GPT, GPTConfig
from unmask.nn.losses import weighted_mean
from unmask.nn.patches import patchify
from unmask.nn.valid import patch_weights, valid_patches
from unmask.rng import Draws, Stream

PALETTE_IMAGES = 512
MASK_PROBABILITY = 0.15  # the paper found 0.2 equally good and larger values worse


class Config(MethodConfig):
    """iGPT's settings.

    mask_probability: probability of hiding a token, for objective=bert (None: 0.15). palette: colours in the files'
    units, one number per channel (None: computed from the data). palette_dtype: dtype of the images that a given
    palette was computed from.
    """

    name: Literal["igpt"] = "igpt"
    encoder: GPTConfig
    objective: Literal["ar", "bert"] = "ar"
    mask_probability: float | None = Field(default=None, gt=0, lt=1)
    palette: tuple[tuple[float, ...], ...] | None = None
    palette_dtype: str | None = None

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Config:
        if self.objective != "bert" and self.mask_probability is not None:
            raise ValueError(
                f"mask_probability applies to objective=bert; got objective={self.objective}; leave it out"
            )
        if (self.palette is None) != (self.palette_dtype is None):
            raise ValueError("got only one of palette and palette_dtype; set both with --palette PATH, or neither")
        if self.palette is not None and len(self.palette) != self.encoder.colours:
            raise ValueError(
                f"got a palette of {len(self.palette)} colours and encoder.colours={self.encoder.colours}; leave "
                "encoder.colours out: --palette sets it"
            )
        return self

    def from_files(self) -> list[str]:
        return [] if self.palette is None else [f"palette: {len(self.palette)} colours, given"]


class IGPT(Method):
    """See the module docstring. Raises UserError if the given palette does not fit the images."""

    encoder: GPT
    hides_patches = False
    fixed = ("encoder.palette",)

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.causal, self.mask_probability = config.objective == "ar", config.mask_probability or MASK_PROBABILITY
        self.encoder = GPT(config.encoder, images, causal=self.causal)
        self.head = nn.Linear(self.encoder.width, config.encoder.colours, bias=False)
        nn.init.zeros_(self.head.weight)
        if config.palette is None:
            self.num_prepare = PALETTE_IMAGES
        else:
            require_palette(config, images)
            self.encoder.palette.copy_(torch.tensor(config.palette))

    def prepare(self, images: Tensor, valid: Tensor | None = None) -> None:
        """Compute the palette from cells without absent pixels."""
        pixels = self.encoder.shrink(images).flatten(0, 2)
        whole = None if valid is None else patchify(valid[:, None], self.encoder.patch).all(2).flatten()
        pixels = pixels if whole is None or not whole.any() else pixels[whole]
        self.encoder.palette.copy_(k_means(pixels, len(self.encoder.palette)))

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the loss in nats per token: the mean over all tokens ("ar") or over the hidden tokens ("bert")."""
        ids = self.encoder.ids(batch.images)
        hidden = None if self.causal else self.hide(clock.rng)
        guess = self.head(self.encoder.run(ids, hidden)).float()  # (B, N, k)
        nats = F.cross_entropy(guess.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
        right = (guess.argmax(-1) == ids).float()
        used = batch_sum(guess.new_zeros(guess.shape[-1]).index_fill(0, ids.flatten(), 1.0)).clamp(max=1)
        weights = patch_weights(valid_patches(batch, self.encoder.patch))
        if hidden is None:
            mean = partial(weighted_mean, weights=weights)
        else:
            mean = partial(mean_over, hidden=hidden if weights is None else hidden & (weights > 0))
        return Loss(mean(nats), {"colour_accuracy": mean(right), "palette_used": used.mean()})

    def hide(self, rng: Draws) -> Tensor:
        """Choose the tokens to hide: return (B, N) bool, True with probability `mask_probability`."""
        return rng.uniform(self.encoder.grid[0] * self.encoder.grid[1]) < self.mask_probability

    @property
    def evaluation_mask(self) -> Callable[[Draws], Tensor] | None:
        """A function that samples masks as in training, or None if training hides no tokens."""
        return None if self.causal else self.hide

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw the quantised images, the given part, and its completion by the model."""
        ids, loss = self.encoder.ids(batch.images), self.loss(batch, clock).value
        weights = patch_weights(valid_patches(batch, self.encoder.patch))
        counted = ids if weights is None or not weights.any() else ids[weights > 0][None]
        shares = torch.bincount(counted.flatten(), minlength=len(self.encoder.palette)) / counted.numel()
        numbers = {
            "loss": loss,
            "colour_frequencies": torch.special.entr(shares).sum(),
            "previous_colour": repeat_or_any(ids, len(shares)),
        }
        quantised = self.encoder.paint(ids)
        panels = {"original": batch.images.float(), f"in {len(self.encoder.palette)} colours": quantised}
        gray = torch.tensor(self.encoder.spec.mean, device=ids.device)[:, None, None].expand_as(quantised)
        if self.causal:
            given = self.encoder.grid[0] // 2 * self.encoder.grid[1]
            known = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) < given
            finished = self.complete(ids, given, clock.rng)
            what = "completed"
            note = "The upper half is given; the lower half is sampled token by token from the predicted distribution."
        else:
            known = ~self.hide(clock.rng)
            guess = self.head(self.encoder.run(ids, ~known)).argmax(-1)
            finished = torch.where(known, ids, guess)
            what = "filled in"
            note = "Each hidden token has its most likely colour; all are predicted at once."
        visible = self.paint_flags(known)
        panels["given"] = torch.where(visible, quantised, gray)
        panels[what] = self.encoder.paint(finished)
        return Picture(panels, note + " The loss is in nats per token.", numbers)

    def paint_flags(self, flags: Tensor) -> Tensor:
        """Expand flags of tokens, (B, N) bool, to flags of pixels, (B, 1, H, W) bool."""
        rows, cols = self.encoder.patch
        return flags.unflatten(1, self.encoder.grid)[:, None].repeat_interleave(rows, 2).repeat_interleave(cols, 3)

    def complete(self, ids: Tensor, given: int, rng: Draws) -> Tensor:
        """Sample all ids (B, N) after the first `given` ones, each conditioned on the ids before it."""
        encoder, draws = self.encoder, rng.uniform(ids.shape[1], Stream.COLOURS)
        assert encoder.sos is not None, "only objective=ar samples token by token"
        result, cache = ids.clone(), None
        tokens = torch.cat([encoder.sos.expand(len(ids), 1, -1), encoder.tokens[ids[:, :given]]], 1)
        for place in range(given, ids.shape[1]):
            out, cache = encoder.step(tokens, place + 1 - tokens.shape[1], cache)
            sums = self.head(out[:, -1]).float().softmax(-1).cumsum(-1)  # (B, k)
            result[:, place] = (sums < draws[:, place, None]).sum(1).clamp(max=len(encoder.palette) - 1)
            tokens = encoder.tokens[result[:, place, None]]
        return result


def mean_over(values: Tensor, hidden: Tensor) -> Tensor:
    """Average over the hidden tokens of each image, then over the images that have hidden tokens: (B, N) -> ()."""
    of_image = (values * hidden).sum(1) / hidden.sum(1).clamp(min=1)
    return of_image.sum() / mean_count(hidden.any(1).sum(), least=1.0)


def repeat_or_any(ids: Tensor, colours: int) -> Tensor:
    """Return the loss, in nats per token, of a baseline that knows only how often a token equals the previous one."""
    again = (ids[:, 1:] == ids[:, :-1]).float().sum() / max(1, ids[:, 1:].numel())
    return torch.special.entr(torch.stack([again, 1 - again])).sum() + (1 - again) * math.log(colours - 1)


def require_palette(config: Config, images: ImageSpec) -> None:
    """Raise UserError if the palette was computed from images of another dtype or number of channels."""
    assert config.palette is not None
    if config.palette_dtype != images.dtype:
        raise UserError(
            f"got a palette of {config.palette_dtype} images; these images are {images.dtype}; compute one from such "
            "images with `unmask palette`, or leave --palette out"
        )
    channels = {len(colour) for colour in config.palette}
    if channels != {images.channels}:
        raise UserError(
            f"got a palette of {' or '.join(map(str, sorted(channels)))} channels; these images have "
            f"{images.channels}; compute one from such images with `unmask palette`, or leave --palette out"
        )
