"""BEiT: "BEiT: BERT Pre-Training of Image Transformers", Bao et al. 2021.

BERT's task with a vocabulary for images: about 40 % of the patches are masked in blocks, one learnable mask token
replaces their embeddings, the encoder processes the whole sequence, and one linear layer predicts the code of each
masked patch. The codes come from a frozen dVAE that was trained beforehand.

Recipes follow the released code where paper and code differ: its encoder has no absolute positions but a relative
position bias shared by all blocks, and LayerScale; the paper's main text has learned absolute positions. Positions,
bias and LayerScale are settings of the encoder. Two settings are ablations of the paper: `target=pixels` predicts
pixels instead of codes, and `mask=random` samples single patches instead of blocks.

Differs from the paper and its code: masks hide the same number of patches in every image (`nn/masks.py`), while the
masks of the code hide at most that many; the dVAE sees the encoder's crop, shrunk bicubically (in the code: a second
view of the crop, resampled by Lanczos from the file); keys have a bias, which the softmax cancels; there is no
stochastic depth (in the code 0.1); colours are not jittered unless `data.crop.jitter` is set (in the code 0.4); weight
decay applies to class token and learned positions (in the code it does not). No published result is known to depend on
these differences.

Letters: B images, N patches, M hidden patches, P values of a patch, D width, V codes.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.blocks import Block
from unmask.nn.conv_vae import ConvVAEConfig, require_tokenizer
from unmask.nn.losses import weighted_mean
from unmask.nn.masks import Mask, block_mask, num_kept, random_mask, require_blocks, smallest_block
from unmask.nn.patches import take
from unmask.nn.targets import Pixels, Target, Tokens, masked_panels
from unmask.nn.valid import valid_patches
from unmask.nn.vit import ViT, ViTConfig

INIT_STD = 0.02


class Config(MethodConfig):
    """BEiT's settings. `unmask pretrain --tokenizer RUN` sets `tokenizer`, the dVAE's network, and loads its weights.

    smallest_block: the least number of patches in a block, by default BEiT's share of the grid (16 of 14 x 14 patches).
    """

    name: Literal["beit"] = "beit"
    encoder: ViTConfig
    mask: Literal["block", "random"] = "block"
    mask_ratio: float = Field(default=75 / 196, gt=0, lt=1)
    smallest_block: int | None = Field(default=None, gt=0)
    target: Literal["tokens", "pixels"] = "tokens"
    tokenizer: ConvVAEConfig | None = None

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Config:
        if self.mask != "block" and self.smallest_block is not None:
            raise ValueError(f"smallest_block applies to mask=block; got mask={self.mask}; leave it out")
        if self.target != "tokens" and self.tokenizer is not None:
            raise ValueError(f"a tokenizer applies to target=tokens; got target={self.target}; leave it out")
        return self

    @property
    def needs_tokenizer(self) -> bool:
        return self.target == "tokens" and self.tokenizer is None

    @property
    def has_tokenizer(self) -> bool:
        return self.tokenizer is not None


class BEiT(Method):
    """See the module docstring. Raises UserError without a tokenizer, or if its codes do not fit the patches."""

    encoder: ViT
    fixed = ("target.",)

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.config = config
        self.target = make_target(config, images)
        self.encoder = ViT(config.encoder, images)
        self.smallest = config.smallest_block or smallest_block(self.encoder.grid)
        # Reject a ratio that hides all patches or no patch.
        num_kept(self.encoder.grid[0] * self.encoder.grid[1], config.mask_ratio)
        if config.mask == "block":
            require_blocks(self.encoder.grid, config.mask_ratio, self.smallest)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.encoder.width))
        self.head = nn.Linear(self.encoder.width, self.target.out)
        self._initialise()

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the cross-entropy of the masked patches' codes, or the mean squared error of their pixels."""
        patches = self.encoder.patches(batch.images)  # (B, N, P), normalised
        mask = self.sample(clock)
        guess = self.guess(patches, mask)
        valid = valid_patches(batch, self.encoder.patch)
        truth = take(self.target(patches, batch.images, valid), mask.drop)
        weights, logs = self.target.weights(valid, mask.drop), {}
        if self.config.target == "tokens":
            logs["code_accuracy"] = weighted_mean((guess.argmax(-1, keepdim=True) == truth).float(), weights)
        return Loss(self.target.loss(guess, truth, weights), logs)

    def sample(self, clock: Clock) -> Mask:
        """Sample a patch mask for each image, from the random draws of `clock`."""
        count, grid, ratio = len(clock.rng.index), self.encoder.grid, self.config.mask_ratio
        if self.config.mask == "random":
            return random_mask(count, grid, ratio, clock.rng)
        return block_mask(count, grid, ratio=ratio, rng=clock.rng, smallest=self.smallest)

    def guess(self, patches: Tensor, mask: Mask) -> Tensor:
        """Predict scores of all codes (or the pixels) of each masked patch: (B, N, P) -> (B, M, V)."""
        tokens = self.encoder.patch_embed(patches)
        tokens = torch.where(mask.hidden()[..., None], self.mask_token, tokens)  # float32, like mask_token
        return self.head(take(self.encoder.run(self.encoder.place(tokens))[:, 1:], mask.drop))

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw original, masked image, and the images decoded from predicted and true codes; report baseline losses."""
        patches = self.encoder.patches(batch.images)
        mask = self.sample(clock)
        guess = self.guess(patches, mask).float()
        valid = valid_patches(batch, self.encoder.patch)
        truth = take(self.target(patches, batch.images, valid), mask.drop)
        numbers = {"loss": self.target.loss(guess, truth, self.target.weights(valid, mask.drop))}
        numbers |= self.target.trivial(patches, batch.images, mask, valid)
        panels = masked_panels(patches, mask, self.target.draw(guess, patches, batch.images, mask, valid))
        note = "Only hidden patches are predicted, all at once and independently." + self.target.note
        return Picture({caption: self.encoder.images(panel) for caption, panel in panels.items()}, note, numbers)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialise weights like the released code: truncated normal, output layers of a block scaled by depth."""
        for part in (*self.encoder.modules(), self.head):
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(part.weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        tokens = [self.encoder.cls_token, self.mask_token]
        if self.encoder.pos_embed is not None and self.encoder.pos_embed.requires_grad:
            tokens.append(self.encoder.pos_embed)
        for token in tokens:
            nn.init.trunc_normal_(token, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
        for number, block in enumerate(self.encoder.blocks, 1):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_((2 * number) ** 0.5)
            block.mlp.fc2.weight.div_((2 * number) ** 0.5)


def make_target(config: Config, images: ImageSpec) -> Target:
    """Return the prediction target. Raises UserError if the target needs a tokenizer and none is given."""
    patch = config.encoder.patch
    if config.target == "tokens":
        return Tokens(require_tokenizer(config.tokenizer), images, patch)
    grid = (images.size[0] // patch[0], images.size[1] // patch[1])
    return Pixels(patch[0] * patch[1] * images.channels, grid, images.channels, per_patch=False)
