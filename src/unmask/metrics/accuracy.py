"""Accuracy: the share of images whose most probable class is correct, with its Wilson interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from unmask.batch import Batch
from unmask.metrics.intervals import wilson
from unmask.metrics.measurement import Measurement


def measure_accuracy(logits: Callable[[Tensor], Tensor], batches: Iterable[Batch], device: torch.device) -> Measurement:
    """Measure the accuracy of `logits`, which maps images (B, C, H, W) to scores (B, K).

    Raises UserError for images without labels.
    """
    correct, total = torch.zeros((), dtype=torch.int64, device=device), 0
    for batch in batches:
        labels = batch.require_labels().to(device)
        correct += (logits(batch.images.to(device)).argmax(1) == labels).sum()
        total += len(batch)
    low, high = wilson(int(correct), total)
    return Measurement({"accuracy": int(correct) / total}, low, high, images=total, correct=int(correct))
