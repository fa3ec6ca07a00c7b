"""Image classification: train a head and some or all blocks of an encoder (He et al. 2021, sections 4.3, A.1, Fig. 9).

The mean of the patch tokens, taken before the encoder's own final norm, goes through a LayerNorm and one linear layer,
as in the official fine-tuning (`models_vit.py` with global_pool). One setting, `last_blocks`, covers everything from
linear probing (only the LayerNorm and the linear layer are trained) to full fine-tuning (including positions). The
encoder's weights come from another Run, or are random for training from scratch.

Stochastic depth, mixup, cutmix, RandAugment and random erasing (Table 9) are settings of this task; layer-wise decay of
the learning rate and the moving average of weights are settings of the optimiser (`optim.py`).

Differs from the paper: mixing is drawn once per micro-batch (in the paper once per GPU's batch); with `last_blocks` 0
the head still uses mean tokens and a LayerNorm, while the paper's linear probe uses the class token and a BatchNorm
(`linear_probe.py`).

Length and data of the training are set in `finetuning/finetune_run.py`.

Letters: B images, C channels, N patches, K classes, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.method import Clock, Loss, Picture
from unmask.metrics.accuracy import measure_accuracy
from unmask.metrics.measurement import Measurement, Metric
from unmask.nn.blocks import draw_paths, layer_norm
from unmask.nn.freeze import freeze
from unmask.nn.inputs import Scale
from unmask.nn.losses import full_precision
from unmask.nn.mixing import MIX_DRAWS, mix, soft_targets
from unmask.nn.rand_augment import DRAWS, ERASE_DRAWS, MOST, erase, rand_augment
from unmask.nn.vit import ViT
from unmask.rng import MASK32, Stream, uniform, words
from unmask.task import PartialTaskConfig, Task

HEAD_STD, LINEAR_STD, SCRATCH_STD = 2e-5, 0.01, 0.02


class Config(PartialTaskConfig):
    """Settings of the classifier.

    classes: names, in the order of the labels. smoothing: label smoothing, 0 to 1. last_blocks: how many of the
    encoder's last blocks are trained with the head (None: the whole encoder). 0 trains only the head, 0.5 also the MLP
    of the last block (and its norm). drop_path: stochastic depth, the probability of skipping the last block (paper:
    0.1 to 0.3). mixup, cutmix: alpha of the Beta distribution of the mixture, 0 to disable (paper: 0.8, 1.0).
    rand_augment: magnitude of RandAugment, 0 to 10, None to disable (paper: 9). erasing: share of the images in which a
    box is erased (paper: 0.25). head_std: standard deviation of the head's initial weights (None: MAE's 2e-5, or 0.01
    if only the head is trained; recipes that train from scratch set 0.02).
    """

    name: Literal["classify"] = "classify"
    classes: tuple[str, ...] = Field(min_length=2)
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    rand_augment: float | None = Field(default=None, ge=0, le=MOST)
    erasing: float = Field(default=0.0, ge=0, le=1)
    head_std: float | None = Field(default=None, gt=0)

    @property
    def mixes_pairs(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def from_scratch(self) -> Config:
        return self if self.head_std is not None else self.model_copy(update={"head_std": SCRATCH_STD})


class Classifier(Task[Tensor, None]):
    """See the module docstring. A prediction is (K,) float32, the probability of each class."""

    annotation = "classes"
    headline = (Metric("accuracy", "accuracy"),)
    title = "classification"
    needs = "one sub-folder per class"
    recipe = "finetune"
    recipe_depends_on = "width and labels"
    head_name = "the classifier"
    low: Tensor
    high: Tensor
    undecayed = ("encoder.cls_token", "encoder.pos_embed")

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.config, self.classes = config, config.classes
        self.encoder = ViT(config.encoder, images)
        for name, values in zip(("low", "high"), images.value_range, strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None], persistent=False)
        self.fc_norm = layer_norm(self.encoder.width)
        self.fc_norm.eps = config.encoder.norm_eps
        self.head = nn.Linear(self.encoder.width, len(config.classes))
        usual = LINEAR_STD if config.last_blocks == 0 else HEAD_STD
        nn.init.trunc_normal_(self.head.weight, std=config.head_std or usual)
        nn.init.zeros_(self.head.bias)
        freeze(self.encoder, config.last_blocks)

    @property
    def mean_token_classifier(self) -> Classifier:
        return self

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the cross-entropy with soft labels; log the accuracy. Raises UserError for images without labels.

        With smoothing s the target is 1 - s + s / K for the right class and s / K for every other class. The target of
        a mixed image is the mixture of both targets; a prediction is counted as correct if it is the class of the
        larger part.
        """
        labels = batch.require_labels()
        with full_precision(batch.images.device):  # under autocast, rotations would be rounded to bfloat16
            images, targets = self.augment(batch.images, labels, clock)
        paths = None
        if self.config.drop_path:
            draws = clock.rng.uniform(2 * len(self.encoder.blocks), Stream.PATHS)
            paths = draw_paths(draws, self.config.drop_path)
        logits = self.classify_tokens(self.tokens(images, paths).mean(1))
        right = (logits.detach().argmax(1) == targets.argmax(1)).float().mean()
        return Loss(F.cross_entropy(logits, targets), {"accuracy": right})

    def augment(self, images: Tensor, labels: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        """Augment a batch: return images (B, C, H, W) in the files' units, and targets (B, K).

        Random draws depend on the step and the image's place in the global batch; draws for mixing depend on the step
        and the micro-batch.
        """
        config, seed, count = self.config, clock.rng.seed, len(images)
        step, place = np.full(count, clock.step), clock.places(count)
        targets = soft_targets(labels, len(config.classes), config.smoothing)
        if config.rand_augment is not None:
            unit = (images.float() - self.low) / (self.high - self.low)
            fill = (self.encoder.mean[:, None, None] - self.low) / (self.high - self.low)
            unit = rand_augment(unit, uniform(seed, Stream.RAND_AUGMENT, step, place, DRAWS), config.rand_augment, fill)
            images = self.low + unit * (self.high - self.low)
        if config.erasing:
            draws = uniform(seed, Stream.ERASE, step, place, ERASE_DRAWS)
            seeds = words(seed, Stream.ERASE, step, place, ERASE_DRAWS + 1)[:, ERASE_DRAWS]
            mean, std = self.encoder.mean, self.encoder.std
            images = erase(images.float(), draws, config.erasing, mean=mean, std=std, seeds=seeds)
        draws = self.batch_words(Stream.MIX, clock) * 2.0**-32
        return mix(images, targets, draws, mixup=config.mixup, cutmix=config.cutmix)

    def batch_words(self, stream: Stream, clock: Clock) -> np.ndarray:
        """Return random 32-bit words of a micro-batch; indices count from the end, to differ from those of images."""
        micro = np.array([MASK32 - clock.micro])
        return words(clock.rng.seed, stream, np.array([clock.step]), micro, MIX_DRAWS)[0]

    def logits(self, images: Tensor, scale: Scale | None = None) -> Tensor:
        """Return float32 scores (B, K) of images in the files' units. scale: see `ImageEncoder.accept`."""
        return self.classify_tokens(self.tokens(self.encoder.accept(images, scale)).mean(1))

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None, *, scale: Scale | None = None
    ) -> list[Tensor]:
        return list(self.logits(images, scale).softmax(1))

    def measure(self, batches: Iterable[Batch], truth: None) -> Measurement:
        """Measure the accuracy, with a Wilson interval. Raises UserError for images without labels."""
        return measure_accuracy(self.logits, batches, self.device)

    def tokens(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Return the patch tokens of the last block, before the encoder's own norm: (B, N, D)."""
        tokens = self.encoder.embed(self.encoder.patches(images))
        *_, last = self.encoder.layers(tokens, paths=paths)
        return last[:, 1:]

    def classify_tokens(self, tokens: Tensor) -> Tensor:
        """Return float32 scores: (..., D) -> (..., classes)."""
        return self.head(self.fc_norm(tokens)).float()

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw the original, and a copy with each patch as bright as its evidence for the predicted class."""
        labels = batch.require_labels()
        patches, tokens = self.encoder.patches(batch.images), self.tokens(batch.images)
        logits = self.classify_tokens(tokens.mean(1))
        guess = logits.argmax(1)
        evidence = self.classify_tokens(tokens)[torch.arange(len(guess)), :, guess]  # (B, N)
        least, most = evidence.aminmax(dim=1, keepdim=True)
        brightness = (evidence - least) / (most - least).clamp(min=1e-12)
        panels = {"original": patches, "evidence for the prediction": patches * brightness[..., None]}
        classes, confidence = self.config.classes, logits.softmax(1).amax(1).tolist()
        names = tuple(
            f"{classes[true]}, predicted {classes[best]} ({share:.0%})"
            if true != best
            else f"{classes[true]} ({share:.0%})"
            for true, best, share in zip(labels.tolist(), guess.tolist(), confidence, strict=True)
        )
        return Picture(
            {caption: self.encoder.images(panel) for caption, panel in panels.items()},
            f"{int((guess == labels).sum())} of {len(guess)} of these images are classified correctly.",
            {
                "loss": F.cross_entropy(logits, labels, label_smoothing=self.config.smoothing),
                "all_classes_alike": logits.new_tensor(log(logits.shape[1])),
            },
            names,
        )
