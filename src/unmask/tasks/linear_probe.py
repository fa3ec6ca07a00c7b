"""MAE's linear probe with its published protocol: He et al. 2021, Table 10, and `main_linprobe.py`.

The class token, after the encoder's final norm, goes through a BatchNorm without gain and bias and one linear layer.
Only the linear layer is trained, with LARS, large batches and augmented images. Cheaper probes on cached features are
in `evals/`; this one is for comparison with published numbers.

The published settings are batch 16384, learning rate 6.4 (0.1 x batch / 256), 90 epochs, 10 of them warm-up, and no
weight decay. BatchNorm uses the statistics of the micro-batch in training, and their running average in evaluation. An
encoder without a class token is probed on the mean of its patch tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock, Loss, Picture
from unmask.metrics.accuracy import measure_accuracy
from unmask.metrics.measurement import Measurement, Metric
from unmask.nn.batch_sums import batch_var_mean, num_parts
from unmask.nn.inputs import Scale
from unmask.nn.vit import ViT
from unmask.task import Task, TaskConfig

BATCH_NORM_EPS = 1e-6
MOMENTUM = 0.1
HEAD_STD = 0.01


class Config(TaskConfig):
    """Settings of the linear probe. classes: names, in the order of the labels."""

    name: Literal["linear_probe"] = "linear_probe"
    classes: tuple[str, ...] = Field(min_length=2)


class LinearProbe(Task[Tensor, None]):
    """See the module docstring. A prediction is (K,) float32, the probability of each class."""

    annotation = "classes"
    headline = (Metric("accuracy", "accuracy"),)
    title = "classification"
    needs = ""  # `unmask finetune` does not offer this task
    recipe = "linear_paper"
    recipe_depends_on = "nothing"
    head_name = "the linear classifier"

    def __init__(self, config: Config, images: ImageSpec) -> None:
        super().__init__()
        self.classes = config.classes
        self.encoder = ViT(config.encoder, images)
        self.encoder.requires_grad_(False)
        self.norm = nn.BatchNorm1d(self.encoder.width, eps=BATCH_NORM_EPS, momentum=0.0, affine=False)
        self.head = nn.Linear(self.encoder.width, len(config.classes))
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the cross-entropy; log the accuracy on this batch. Raises UserError for images without labels."""
        labels = batch.require_labels()
        logits = self._scores(batch.images)
        right = (logits.detach().argmax(1) == labels).float().mean()
        return Loss(F.cross_entropy(logits, labels), {"accuracy": right})

    def logits(self, images: Tensor, scale: Scale | None = None) -> Tensor:
        """Return float32 scores (B, classes) of images in the files' units. scale: see `ImageEncoder.accept`."""
        return self._scores(self.encoder.accept(images, scale))

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]] | None = None, *, scale: Scale | None = None
    ) -> list[Tensor]:
        return list(self.logits(images, scale).softmax(1))

    def measure(self, batches: Iterable[Batch], truth: None) -> Measurement:
        """Measure the accuracy, with a Wilson interval. Raises UserError for images without labels."""
        return measure_accuracy(self.logits, batches, self.device)

    def _scores(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.encoder.features(images)
        token = (features.pooled if features.cls is None else features.cls).float()
        return self.head(self._normalise(token) if self.training else self.norm(token)).float()

    def _normalise(self, tokens: Tensor) -> Tensor:
        """Normalise with the statistics of the micro-batch, and update BatchNorm's running statistics."""
        variance, mean = self.remember(tokens)
        if num_parts() == 1:  # without its running statistics, to which torch also adds non-finite numbers
            return F.batch_norm(tokens, None, None, training=True, eps=BATCH_NORM_EPS)
        count = len(tokens) * num_parts()
        return (tokens - mean) * (variance * (count - 1) / count + BATCH_NORM_EPS).rsqrt()

    @torch.no_grad()
    def remember(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Update BatchNorm's running statistics; non-finite tokens leave them unchanged.

        Returns the unbiased variance and the mean of the micro-batch.
        """
        if len(tokens) * num_parts() < 2:
            raise UserError("got a micro-batch of one image; BatchNorm needs at least two; set train.micro_batch=2")
        norm = self.norm
        assert norm.running_mean is not None, "BatchNorm tracks running statistics"
        assert norm.running_var is not None, "BatchNorm tracks running statistics"
        assert norm.num_batches_tracked is not None, "BatchNorm tracks running statistics"
        variance, mean = batch_var_mean(tokens)
        finite = mean.isfinite().all() & variance.isfinite().all()
        for kept, now in ((norm.running_mean, mean), (norm.running_var, variance)):
            kept.copy_(torch.where(finite, kept.lerp(now, MOMENTUM), kept))
        norm.num_batches_tracked.add_(1)
        return variance, mean

    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw the images; the baseline predicts the same probability for all classes."""
        labels = batch.require_labels()
        logits = self.logits(batch.images)
        right = int((logits.argmax(1) == labels).sum())
        numbers = {
            "loss": F.cross_entropy(logits, labels),
            "all_classes_alike": logits.new_tensor(log(logits.shape[1])),
        }
        note = f"{right} of {len(logits)} of these images are classified correctly."
        return Picture({"original": batch.images.float()}, note, numbers)
