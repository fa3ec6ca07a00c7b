"""Masked autoencoder: "Masked Autoencoders Are Scalable Vision Learners", He et al. 2021.

Mask most patches of an image, encode only the visible ones, and reconstruct the hidden pixels with a light decoder.
Only the encoder is used after pre-training. The model equals the official one (`models_mae.py`) in parameters, forward
pass and loss; tests compare it with the published parameter counts and with an independent implementation.

Differs from the official code without changing a result: only visible patches are embedded and only hidden ones
predicted; masks come from counter-based draws that depend on the image, not on its batch or place; float
errors do not make the number of kept patches one too small (100 patches at 0.9 keep 10, not 9).

The variants of the paper's Table 1 are settings: decoder depth and width (1a, 1b), mask tokens in the encoder (1c), the
target (1d), block-wise and grid sampling (1f), and the loss on all patches (footnote 1). Details that the paper does
not specify: block-wise masks hide the same number of patches in every image (`nn/masks.py`); with mask tokens in the
encoder the decoder receives all tokens unchanged; principal components are centred, not whitened.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn import masks
from unmask.nn.conv_vae import ConvVAEConfig, require_tokenizer
from unmask.nn.decoders import DecoderConfig, LightDecoder
from unmask.nn.masks import Mask
from unmask.nn.patches import patchify, take
from unmask.nn.targets import Pixels, PrincipalComponents, Target, Tokens, masked_panels
from unmask.nn.valid import valid_patches
from unmask.nn.vit import ViT, ViTConfig


class Config(MethodConfig):
    """MAE's settings; the defaults are the paper's, with its best target.

    mask: how hidden patches are sampled. Blocks have at least `smallest_block` patches (None: BEiT's share of the grid,
    16 of 14 x 14). "pattern" hides the patches marked "#" in `pattern`, which has one string for each row of the grid;
    if there are several patterns, one is sampled for each image (set by `unmask pretrain --masks FILE`). mask_tokens:
    the network that receives the mask tokens, "decoder" or "encoder" (Table 1c). target: pixels normalised within each
    patch, plain pixels, the first `pca_coefficients` principal components of patches (None: an eighth of a patch's
    values, the paper's 96 of 768), whitened or not, or a dVAE's codes (`unmask pretrain --tokenizer RUN` sets
    `tokenizer`, the dVAE's network, and loads its weights). loss_on: the patches in the loss, "hidden" or "all".
    """

    name: Literal["mae"] = "mae"
    encoder: ViTConfig
    decoder: DecoderConfig = DecoderConfig()
    mask: Literal["random", "block", "grid", "pattern"] = "random"
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    smallest_block: int | None = Field(default=None, gt=0)
    pattern: tuple[tuple[str, ...], ...] | None = None
    mask_tokens: Literal["decoder", "encoder"] = "decoder"
    target: Literal["norm_pixels", "pixels", "pca", "tokens"] = "norm_pixels"
    pca_coefficients: int | None = Field(default=None, gt=0)
    pca_whiten: bool = False
    tokenizer: ConvVAEConfig | None = None
    loss_on: Literal["hidden", "all"] = "hidden"

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Config:
        if (self.mask == "pattern") != (self.pattern is not None):
            raise ValueError("got only one of mask=pattern and pattern; set both with --masks FILE, or neither")
        if self.mask != "block" and self.smallest_block is not None:
            raise ValueError(f"smallest_block applies to mask=block; got mask={self.mask}; leave it out")
        if self.target != "pca" and (self.pca_coefficients is not None or self.pca_whiten):
            raise ValueError(f"pca_coefficients and pca_whiten apply to target=pca; got target={self.target}")
        if self.target != "tokens" and self.tokenizer is not None:
            raise ValueError(
                f"a tokenizer applies to target=tokens; got target={self.target}; leave it out, or set tokens"
            )
        return self

    @property
    def needs_tokenizer(self) -> bool:
        return self.target == "tokens" and self.tokenizer is None

    @property
    def has_tokenizer(self) -> bool:
        return self.tokenizer is not None

    def from_files(self) -> list[str]:
        if self.pattern is None:
            return []
        marks = "".join(self.pattern[0])
        return [f"masks: {len(self.pattern)} patterns, {marks.count('#')} of {len(marks)} patches hidden"]


class MAE(Method):
    """See the module docstring. Raises UserError, with the fix, if sizes or settings do not fit together."""

    encoder: ViT
    patterns: Tensor | None
    fixed = ("target.",)

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.encoder = ViT(config.encoder, images)
        self.mask_ratio = config.mask_ratio
        self.sampler = {
            "random": masks.random_mask,
            "block": partial(masks.block_mask, smallest=config.smallest_block),
            "grid": masks.grid_mask,
        }.get(config.mask)
        self.register_buffer("patterns", require_mask(config, self.encoder.grid), persistent=False)
        self.mask_token = (
            nn.Parameter(torch.zeros(1, 1, self.encoder.width)) if config.mask_tokens == "encoder" else None
        )
        self.everywhere = config.loss_on == "all"
        self.target = make_target(config, self.encoder)
        self.num_prepare = self.target.num_prepare
        self.decoder = LightDecoder(
            config.decoder,
            seen_width=self.encoder.width,
            grid=self.encoder.grid,
            out=self.target.out,
            fills=self.mask_token is None,
        )
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def prepare(self, images: Tensor, valid: Tensor | None = None) -> None:
        """Compute principal components from the data; see `Target.prepare`. Skips patches with absent pixels."""
        patches = self.encoder.patches(images)
        whole = None if valid is None else patchify(valid[:, None], self.encoder.patch).all(2)
        self.target.prepare(patches if whole is None or not whole.any() else patches[whole][None])

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the error of the prediction on the hidden patches, or on all patches, in the units of the target."""
        patches = self.encoder.patches(batch.images)  # (B, N, P), normalised
        mask = self.sample(clock)
        valid = valid_patches(batch, self.encoder.patch)
        truth = self.target(patches, batch.images, valid)  # (B, N, O)
        where = mask.order if self.everywhere else mask.drop
        guess, weights = self.guess(patches, mask, everywhere=self.everywhere), self.target.weights(valid, where)
        return Loss(self.target.loss(guess, take(truth, where), weights))

    def sample(self, clock: Clock) -> Mask:
        """Sample a patch mask for each image, from the random draws of `clock`."""
        grid, ratio = self.encoder.grid, self.mask_ratio
        if self.patterns is not None:
            return masks.pattern_mask(self.patterns, masks.num_kept(grid[0] * grid[1], ratio), clock.rng)
        assert self.sampler is not None, "all masks except patterns have a sampler"
        return self.sampler(len(clock.rng.index), grid, ratio, clock.rng)

    def guess(self, patches: Tensor, mask: Mask, *, everywhere: bool = False) -> Tensor:
        """Predict the hidden patches, (B, N, P) -> (B, M, O), or all patches in the order of mask.order, (B, N, O)."""
        return self.decoder(self.see(patches, mask), mask, everywhere=everywhere)

    def see(self, patches: Tensor, mask: Mask) -> Tensor:
        """Encode the visible patches: (B, N, P) -> (B, 1 + K, D).

        With mask tokens in the encoder the result is (B, 1 + N, D), in the order of mask.order.
        """
        tokens = self.encoder.embed(take(patches, mask.keep), mask.keep)
        if self.mask_token is None:
            return self.encoder.run(tokens, mask.keep)
        hidden = self.encoder.place(self.mask_token.expand(*mask.drop.shape, -1), mask.drop)
        return self.encoder.run(torch.cat([tokens, hidden], 1), mask.order)

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw the original, the masked image, the prediction, and the prediction pasted into the image; report the
        loss of baselines on these images.
        """
        patches = self.encoder.patches(batch.images)
        mask = self.sample(clock)
        guess = self.guess(patches, mask, everywhere=True).float()
        valid = valid_patches(batch, self.encoder.patch)
        truth = self.target(patches, batch.images, valid)
        hidden = guess[:, mask.keep.shape[1] :]  # in mask.order the hidden patches are last
        where, scored = (mask.order, guess) if self.everywhere else (mask.drop, hidden)
        numbers = {"loss": self.target.loss(scored, take(truth, where), self.target.weights(valid, where))}
        if not self.everywhere:  # the baselines predict hidden patches only
            numbers |= self.target.trivial(patches, batch.images, mask, valid)

        panels = masked_panels(patches, mask, self.target.draw(hidden, patches, batch.images, mask, valid))
        note = "Only hidden patches are predicted; the loss ignores the visible ones."
        if self.everywhere:
            note = "The loss covers all patches; the picture shows predictions for the hidden ones."
        panels = {caption: self.encoder.images(panel) for caption, panel in panels.items()}
        return Picture(panels, note + self.target.note, numbers)


def require_mask(config: Config, grid: tuple[int, int]) -> Tensor | None:
    """Return the patterns, (n, N) bool, or None for masks that are sampled. Raises UserError for an impossible mask."""
    kept = masks.num_kept(grid[0] * grid[1], config.mask_ratio)  # raises UserError if all or no patches are hidden
    if config.mask == "grid":
        masks.require_grid(grid, config.mask_ratio)
    if config.mask == "block":
        masks.require_blocks(grid, config.mask_ratio, config.smallest_block or masks.smallest_block(grid))
    if config.pattern is None:
        return None
    patterns = masks.read_patterns(config.pattern, grid)
    hidden = int(patterns[0].sum())
    if patterns.shape[1] - hidden != kept:
        share = hidden / patterns.shape[1]
        raise UserError(
            f"got a mask pattern that hides {hidden} of {patterns.shape[1]} patches, but "
            f"method.mask_ratio={config.mask_ratio:g}; set method.mask_ratio={share:.6g}"
        )
    return patterns


def make_target(config: Config, encoder: ViT) -> Target:
    """Return the reconstruction target. Raises UserError if the target needs a tokenizer and none is given."""
    channels = encoder.spec.channels
    values = encoder.patch[0] * encoder.patch[1] * channels
    if config.target == "tokens":
        return Tokens(require_tokenizer(config.tokenizer), encoder.spec, encoder.patch)
    if config.target == "pca":
        count = config.pca_coefficients or max(1, values // 8)
        return PrincipalComponents(values, encoder.grid, channels, count=count, whiten=config.pca_whiten)
    return Pixels(values, encoder.grid, channels, per_patch=config.target == "norm_pixels")
