"""Images to feature tables: the one function through which training and test images go, whatever the probe.

Not here: which images (the caller's batches say), what is made of the features (`knn.py`, `linear.py`), masking (an
encoder's `forward` never masks). Letters: n images in all, D width of a feature.

There is one way in because two cost others dearly: a probe trained on one definition of a feature and tested on another
gives numbers that look merely disappointing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.batch import Batch
from unmask.nn.features import Features
from unmask.plan import autocast

LARGEST_PIXEL_SIDE = 32


@dataclass(frozen=True)
class FeatureTable:
    """Features of n images, one row each, in the order in which the batches brought them.

    `index` (n,) int64 the row of each image in its source; `labels` (n,) int64, or None where the batches have none;
    `cls` (n, D) float32, or None where the encoder has no class token; `mean` (n, D) float32, the mean over patch tokens
    (for `raw_pixels`: the pixels); `digest` (n,) uint64, equal for images that are equal in every pixel.
    """

    index: np.ndarray
    labels: np.ndarray | None
    cls: np.ndarray | None
    mean: np.ndarray
    digest: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


def collect(encoder: nn.Module, batches: Iterable[Batch], *, device: str, precision: str) -> FeatureTable:
    """Features of all images under a frozen encoder: eval mode, no gradients, nothing masked.

    encoder: on `device`; its forward maps images (B, C, H, W) in the files' dtype to `Features`. It is left in the mode
    (train or eval) in which it came, module by module. precision: "fp32", or "bf16" for autocast; rows are float32 either
    way. Raises ValueError when there is no image, or when a feature is not finite.
    """

    def features(batch: Batch) -> tuple[Tensor | None, Tensor]:
        with torch.inference_mode(), autocast(precision, device):
            out: Features = encoder(batch.to(device).images)
            return out.cls, out.pooled

    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        return _table(batches, features)
    finally:
        for module, mode in modes:  # not encoder.train(): a part may have been frozen in eval mode on purpose
            module.training = mode


def raw_pixels(batches: Iterable[Batch]) -> FeatureTable:
    """The control without any encoder: the pixels themselves, (n, C * H * W) float32 in the files' units.

    Images larger than 32 pixels on their longer side are first averaged down to it, or a table of photographs would not
    fit in memory; small differences within such a cell say little about a class.
    """

    def pixels(batch: Batch) -> tuple[None, Tensor]:
        images = batch.images.to(torch.float32)  # (B, C, H, W)
        longer = max(images.shape[2:])
        if longer > LARGEST_PIXEL_SIDE:
            size = [max(1, round(side * LARGEST_PIXEL_SIDE / longer)) for side in images.shape[2:]]
            images = F.adaptive_avg_pool2d(images, size)
        return None, images.flatten(1)

    return _table(batches, pixels)


def labels_only(batches: Iterable[Batch]) -> tuple[np.ndarray, np.ndarray | None]:
    """(index, labels) of all images, without computing anything on them."""
    index, labels = [], []
    for batch in batches:
        index.append(_array(batch.index))
        labels.append(None if batch.labels is None else _array(batch.labels))
    return _joined(index), None if any(part is None for part in labels) else _joined(labels)


def only(batches: Iterable[Batch], wanted: np.ndarray) -> Iterator[Batch]:
    """The same batches with only the images whose index is in `wanted`; batches left empty are dropped."""
    for batch in batches:
        kept = torch.from_numpy(np.flatnonzero(np.isin(_array(batch.index), wanted)))
        if len(kept):
            yield batch if len(kept) == len(batch) else Batch(
                batch.images[kept],
                batch.index[kept],
                batch.epoch[kept],
                None if batch.labels is None else batch.labels[kept],
            )


def _table(batches: Iterable[Batch], features) -> FeatureTable:
    index, labels, cls, mean, digest = [], [], [], [], []
    for batch in batches:
        token, pooled = features(batch)
        index.append(_array(batch.index))
        labels.append(None if batch.labels is None else _array(batch.labels))
        cls.append(None if token is None else _finite(token, index[-1]))
        mean.append(_finite(pooled, index[-1]))
        digest.append(_digests(batch.images))
    if not index:
        raise ValueError("no images came to compute features of; at least one was expected: look at the data with "
                         "`unmask check`")
    return FeatureTable(
        index=_joined(index),
        labels=None if any(part is None for part in labels) else _joined(labels),
        cls=None if any(part is None for part in cls) else _joined(cls),
        mean=_joined(mean),
        digest=_joined(digest),
    )


def _finite(features: Tensor, index: np.ndarray) -> np.ndarray:
    """As float32 on the host. Raises ValueError when a number is not finite: no probe could make sense of it."""
    rows = features.to(torch.float32).cpu()  # (B, D)
    bad = (~rows.isfinite()).any(1)
    if bad.any():
        raise ValueError(
            f"the features of {int(bad.sum())} of {len(rows)} images are not finite (the first is image {index[int(bad.int().argmax())]} of "
            "the source): the weights are damaged or too large for this precision; try an earlier checkpoint with --step, "
            "or precision fp32"
        )
    return rows.numpy()


def _digests(images: Tensor) -> np.ndarray:
    rows = images.cpu().contiguous().flatten(1).view(torch.uint8).numpy()  # (B, bytes)
    return np.array([int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows], np.uint64)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _joined(parts: list) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
