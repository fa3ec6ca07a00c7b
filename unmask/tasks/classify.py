"""Image classification by an encoder of which the last blocks are trained: He et al. 2021, section 4.3, A.1 and Fig. 9.

The mean of the patch tokens, taken before the encoder's own final norm, goes through a LayerNorm and one linear layer,
as in the official fine-tuning (`models_vit.py` with global_pool). Everything from linear probing (nothing but these two
is trained) to fine-tuning (everything is) is one setting, `last_blocks`. The encoder's weights are grafted.

Differs from the paper: no mixup, cutmix, random augmentation, erasing, drop path, or layer-wise decay of the learning
rate; a fixed position table stays fixed, where the official fine-tuning trains it; with `last_blocks` 0 the head is
trained like every other, on mean tokens and a LayerNorm, where the paper's linear probe has LARS, the class token and
a BatchNorm.

Not here: how long and on which labels (`finetune.py`), and how good it is on test images.
"""

from __future__ import annotations

from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, MethodConfig, Picture
from unmask.nn.blocks import layer_norm
from unmask.nn.vit import ViT, ViTConfig

MLP_ALONE = 0.5
HEAD_STD, LINEAR_STD = 2e-5, 0.01


class Config(MethodConfig):
    """classes: names, in the order of the labels. smoothing: share of the target that goes evenly to all classes.

    last_blocks: how many of the encoder's last blocks are trained with the head; None for the whole encoder, which as
    many blocks as it has means too. 0 trains the head alone, 0.5 with it the MLP of the last block (and its norm).
    """

    name: Literal["classify"] = "classify"
    encoder: ViTConfig
    classes: tuple[str, ...] = Field(min_length=2)
    last_blocks: float | None = None
    smoothing: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _blocks_that_there_are(self) -> Config:
        depth, asked = self.encoder.depth, self.last_blocks
        if asked is not None and asked != MLP_ALONE and asked not in range(depth + 1):
            raise ValueError(
                f"last_blocks={asked:g} came, but this encoder has {depth} blocks; 0 (the head alone), 0.5 (the MLP of "
                f"the last block) or a whole number up to {depth} was expected"
            )
        return self


class Classifier(Method):
    """See the module docstring. `trained` says what of the encoder is; the rest has no gradient."""

    encoder: ViT

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.encoder = ViT(config.encoder, images)
        self.smoothing = config.smoothing
        self.fc_norm = layer_norm(self.encoder.width)
        self.head = nn.Linear(self.encoder.width, len(config.classes))
        nn.init.trunc_normal_(self.head.weight, std=LINEAR_STD if config.last_blocks == 0 else HEAD_STD)
        nn.init.zeros_(self.head.bias)
        freeze(self.encoder, config.last_blocks)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Cross-entropy with smoothed labels; logs the share of this batch that is right. Raises UserError unlabelled.

        With smoothing s the target is 1 - s + s / classes for the right class and s / classes for each other.
        """
        labels, logits = require_labels(batch), self.logits(batch.images)
        right = (logits.detach().argmax(1) == labels).float().mean()
        return Loss(self.error(logits, labels), {"accuracy": right})

    def error(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in the files' units -> (B, classes) float32."""
        return self.judge(self.tokens(images).mean(1))

    def tokens(self, images: Tensor) -> Tensor:
        """The patch tokens of the last block, before the encoder's own norm: (B, N, D)."""
        *_, last = self.encoder.layers(self.encoder.embed(self.encoder.patches(images)))
        return last[:, 1:]

    def judge(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., classes), float32."""
        return self.head(self.fc_norm(tokens)).float()

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Original, and the same with those patches lit that by themselves speak for the class that was predicted."""
        labels = require_labels(batch)
        patches, tokens = self.encoder.patches(batch.images), self.tokens(batch.images)
        logits = self.judge(tokens.mean(1))
        guess = logits.argmax(1)
        speaks = self.judge(tokens)[torch.arange(len(guess)), :, guess]  # (B, N)
        least, most = speaks.aminmax(dim=1, keepdim=True)
        lit = (speaks - least) / (most - least).clamp(min=1e-12)
        panels = {"original": patches, "what speaks for the guess": patches * lit[..., None]}
        return Picture(
            {caption: self.encoder.images(panel) for caption, panel in panels.items()},
            f"{int((guess == labels).sum())} of {len(guess)} of these images are given the right class.",
            {"loss": self.error(logits, labels), "all_classes_alike": logits.new_tensor(log(logits.shape[1]))},
        )


def freeze(encoder: ViT, last_blocks: float | None) -> None:
    """Leave a gradient to the last blocks only. The encoder's own final norm is not used, so it never has one."""
    depth = len(encoder.blocks)
    encoder.norm.requires_grad_(False)
    if last_blocks is None or last_blocks == depth:
        return
    encoder.requires_grad_(False)
    if last_blocks == MLP_ALONE:
        last = encoder.blocks[-1]
        for part in (last.norm2, last.mlp, last.ls2):  # type: ignore[union-attr]
            part.requires_grad_(True)
    else:
        for block in encoder.blocks[depth - int(last_blocks) :]:
            block.requires_grad_(True)


def require_labels(batch: Batch) -> Tensor:
    """(B,) int64. Raises UserError when the images came without classes."""
    if batch.labels is None:
        raise UserError(
            "images without labels came, and a classifier learns from labels; put each class into a sub-folder of its "
            "own"
        )
    return batch.labels
