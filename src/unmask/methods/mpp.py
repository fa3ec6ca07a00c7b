"""Masked patch prediction: "An Image is Worth 16x16 Words", Dosovitskiy et al. 2021 (ViT), appendix B.1.2.

The task is that of BERT, with patches instead of words. Half of the patch embeddings are corrupted: 80 % of these
become a learnable [mask] embedding, 10 % the embedding of another patch, and 10 % are unchanged. The encoder processes
the whole sequence, and one linear head predicts the target from the output token of each corrupted patch. Three
targets:

    mean_colour   the mean colour of the patch at 3 bits per channel: one softmax over 512 (the paper's choice)
    colours_4x4   the patch shrunk to 4 x 4, each cell at 3 bits per channel: 16 parallel softmaxes over 512
    pixels        all values of the patch, normalised with the data set's mean and std: mean square error

Details that the paper does not specify: exactly half of the patches of every image are corrupted (N / 2, rounded up);
the kind of corruption is drawn independently for each patch, so 80/10/10 holds on average; the other patch is any other
patch of the same image; a cross-entropy is the mean over its softmaxes.

Differs from the paper, which uses 8-bit RGB only: images of one and two channels have one softmax over 8 or 64 colours;
those of four and more have one softmax over 8 levels for each channel, since 8^C classes would be too many. Channels
are scaled to [0, 1]: from 0 and 255 for 8-bit files, and from the data set's mean minus and plus two standard
deviations for 16-bit and float32 files, which seldom fill their range; values outside are clipped. There is no dropout
(the paper's supervised training has 0.1).

Letters for shapes: B images, C channels, N patches, M corrupted patches, P values of a patch, S cells of a patch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.blocks import init_linears
from unmask.nn.colours import LEVELS, colour_ids, colours_of
from unmask.nn.losses import mean_square, weighted_mean
from unmask.nn.masks import num_kept, random_mask
from unmask.nn.patches import patchify, put, take
from unmask.nn.valid import shrunk_mean, valid_patches, value_weights
from unmask.nn.vit import ViT, ViTConfig
from unmask.rng import Draws, Stream

MASKED, SWAPPED = 0.8, 0.1  # Shares of the corrupted patches; the other 10 % are unchanged.
MOST_TOGETHER = 3  # Greatest number of channels in one softmax.


class Config(MethodConfig):
    """Masked patch prediction's settings. `corrupt_ratio`: share of the patches that are corrupted and predicted."""

    name: Literal["mpp"] = "mpp"
    encoder: ViTConfig
    corrupt_ratio: float = Field(default=0.5, gt=0, lt=1)
    target: Literal["mean_colour", "colours_4x4", "pixels"] = "mean_colour"


class Corruption(NamedTuple):
    """`where` (B, M): indices of the corrupted patches. `masked` (B, M): True where [mask] replaces the embedding.

    `source` (B, M): for a corrupted patch that is not masked, the index of the patch whose embedding it gets: another
    patch if swapped, else its own.
    """

    where: Tensor
    masked: Tensor
    source: Tensor


def corrupt(batch: int, grid: tuple[int, int], ratio: float, rng: Draws) -> Corruption:
    """Choose the same number of patches in every image, and draw how to corrupt each (80 % masked, 10 % swapped, 10 %
    unchanged).
    """
    where = random_mask(batch, grid, ratio, rng).drop
    fate, other = rng.uniform(2 * where.shape[1], Stream.REPLACE).chunk(2, 1)  # (B, M) each
    n = grid[0] * grid[1]
    another = (where + 1 + (other * (n - 1)).long()) % n  # never the patch itself: the index is shifted by 1 to N - 1
    swapped = (fate >= MASKED) & (fate < MASKED + SWAPPED)
    return Corruption(where, fate < MASKED, torch.where(swapped, another, where))


class MPP(Method):
    """See the module docstring. Raises UserError if sizes do not fit together, or if no patch would be corrupted.

    low, high: the file values of each channel that are scaled to 0 and 1.
    """

    encoder: ViT
    low: Tensor
    high: Tensor

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.ratio = config.corrupt_ratio
        self.pixels = config.target == "pixels"
        self.side = 4 if config.target == "colours_4x4" else 1  # Number of cells along each side of a patch.
        self.softmaxes = 1 if images.channels <= MOST_TOGETHER else images.channels  # Number per cell.
        self.encoder = ViT(config.encoder, images)
        height, width = self.encoder.patch
        if height % self.side or width % self.side:
            raise UserError(
                f"got patches of {height} x {width} pixels, which cannot be shrunk to 4 x 4 whole cells; use a patch "
                "that is a multiple of 4, or set method.target=mean_colour"
            )
        # Reject a ratio that corrupts all patches or no patch.
        num_kept(self.encoder.grid[0] * self.encoder.grid[1], config.corrupt_ratio)
        classes = self.side**2 * self.softmaxes * LEVELS ** (images.channels // self.softmaxes)
        for name, values in zip(("low", "high"), images.value_range, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.width))
        self.head = nn.Linear(self.encoder.width, height * width * images.channels if self.pixels else classes)
        nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self.head)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the cross-entropy (or mean square error) of the corrupted patches only."""
        change = corrupt(len(batch), self.encoder.grid, self.ratio, clock.rng)
        guess = self.guess(self.encoder.patches(batch.images), change)
        truth, weights = take(self.target(batch.images, batch.valid), change.where), self.weights(batch, change)
        if self.pixels:
            return Loss(mean_square(guess, truth, weights))
        right = weighted_mean((self._logits(guess).argmax(-1) == truth).float(), weights)
        return Loss(self._cross_entropy(guess, truth, weights), {"colour_accuracy": right})

    def weights(self, batch: Batch, change: Corruption) -> Tensor | None:
        """Return weights at corrupted patches: (B, M, P) for values, (B, M, S x softmaxes) for colours; or None if all
        weights are 1.
        """
        valid = valid_patches(batch, self.encoder.patch)
        if self.pixels:
            return value_weights(valid, change.where)
        if valid is None or batch.valid is None:
            return None
        height, width = self.encoder.patch
        cells = F.max_pool2d(batch.valid[:, None].float(), (height // self.side, width // self.side))
        colours = patchify(cells, (self.side, self.side)) * valid.patches[..., None]  # (B, N, S)
        return take(colours.repeat_interleave(self.softmaxes, 2), change.where)

    def guess(self, patches: Tensor, change: Corruption) -> Tensor:
        """Return the head's output at the corrupted patches: (B, N, P) -> (B, M, outputs)."""
        encoder = self.encoder
        tokens = encoder.patch_embed(put(patches, change.where, take(patches, change.source)))
        masked = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        masked = masked.scatter(1, change.where, change.masked)[..., None]  # (B, N, 1)
        tokens = encoder.run(encoder.place(torch.where(masked, self.mask_token, tokens)))  # (B, 1 + N, D)
        return self.head(take(tokens[:, 1:], change.where))

    def target(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the target of every patch: pixels (B, N, P), or class numbers (B, N, S x softmaxes).

        valid: (B, H, W) bool, the pixels that colours are averaged over (None: all pixels).
        """
        if self.pixels:
            return self.encoder.patches(images)
        scaled = (images.float() - self.low[:, None, None]) / (self.high - self.low)[:, None, None]
        height, width = self.encoder.patch
        # (B, C, rows x side, cols x side)
        cells = shrunk_mean(scaled, (height // self.side, width // self.side), valid)
        colours = patchify(cells, (self.side, self.side))  # (B, N, S x C), channel fastest
        return colour_ids(colours.unflatten(2, (self.side**2 * self.softmaxes, -1)))

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw original, corrupted image and pasted prediction; for colours also the target, which is the best possible
        prediction.
        """
        patches = self.encoder.patches(batch.images)
        change = corrupt(len(batch), self.encoder.grid, self.ratio, clock.rng)
        guess = self.guess(patches, change).float()
        truth, weights = take(self.target(batch.images, batch.valid), change.where), self.weights(batch, change)
        shown = torch.where(change.masked[..., None], 0, take(patches, change.source))  # 0 is the mean colour
        panels = {"original": patches, "corrupted": put(patches, change.where, shown)}
        note = "Grey is [mask]; one corrupted patch in ten shows another patch of the image, one in ten is unchanged. "
        if self.pixels:
            panels["pasted"] = put(patches, change.where, guess)
            numbers = {
                "loss": mean_square(guess, truth, weights),
                "data_mean_colour": mean_square(torch.zeros_like(truth), truth, weights),
            }
            note += "The model predicts all pixels of the corrupted patches."
        else:
            ids = self._logits(guess).argmax(-1)
            panels["pasted"] = put(patches, change.where, self.paint(ids))
            panels["perfect"] = put(patches, change.where, self.paint(truth))
            counted = truth if weights is None or not weights.any() else truth[weights.any(2)][None]
            numbers = {
                "loss": self._cross_entropy(guess, truth, weights),
                "marginal_colours": self.marginal_entropy(counted),
            }
            what = "4 x 4 colours" if self.side > 1 else "one mean colour"
            note += (
                f"The model predicts {what} for each corrupted patch, at 3 bits per channel; the panel 'perfect' shows "
                "the target."
            )
        return Picture({caption: self.encoder.images(panel) for caption, panel in panels.items()}, note, numbers)

    def _logits(self, guess: Tensor) -> Tensor:
        """Reshape (B, M, outputs) to float32 logits (B, M, S x softmaxes, classes)."""
        return guess.float().unflatten(2, (self.side**2 * self.softmaxes, -1))

    def _cross_entropy(self, guess: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        logits = self._logits(guess).flatten(0, 2)
        if weights is None:
            return F.cross_entropy(logits, truth.flatten())
        nats = F.cross_entropy(logits, truth.flatten(), reduction="none").view_as(truth)
        return weighted_mean(nats, weights)

    def marginal_entropy(self, truth: Tensor) -> Tensor:
        """Return the mean loss, over all softmaxes, of predicting how frequent each colour is in these patches."""
        classes = LEVELS ** (self.encoder.spec.channels // self.softmaxes)
        share = F.one_hot(truth, classes).float().flatten(0, 1).mean(0)  # (S x softmaxes, classes)
        return torch.special.entr(share).sum(-1).mean()

    def paint(self, ids: Tensor) -> Tensor:
        """Convert class numbers (B, M, S x softmaxes) to normalised patches (B, M, P) of uniform cells."""
        channels, (height, width) = self.encoder.spec.channels, self.encoder.patch
        colours = colours_of(ids, channels // self.softmaxes).flatten(2).unflatten(2, (self.side, self.side, channels))
        colours = ((self.low + colours * (self.high - self.low)) - self.encoder.mean) / self.encoder.std
        down, across = height // self.side, width // self.side
        return colours.repeat_interleave(down, 2).repeat_interleave(across, 3).flatten(2)
