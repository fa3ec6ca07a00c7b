"""Images to feature tables: the one function through which training and test images go, whatever the probe.

Not here: which images (the caller's batches say), what is made of the features (`knn.py`, `linear.py`), masking (an
encoder's `forward` never masks). Letters: n images in all, D width of a feature.

There is one way in because two cost others dearly: a probe trained on one definition of a feature and tested on another
gives numbers that look merely disappointing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.batch import Batch
from unmask.errors import UserError
from unmask.evals.views import View
from unmask.nn.features import Features
from unmask.plan import autocast

LARGEST_PIXEL_SIDE = 32


@dataclass(frozen=True)
class FeatureTable:
    """Features of n images, one row each, in the order in which the batches brought them.

    `index` (n,) int64 the row of each image in its source; `labels` (n,) int64, or None where the batches have none;
    `cls` (n, D) float32, or None where the encoder has no class token; `mean` (n, D) float32, the mean over patch
    tokens (for `RawPixels`: the pixels); `digest` (n,) uint64, equal for images that are equal in every pixel.
    """

    index: np.ndarray
    labels: np.ndarray | None
    cls: np.ndarray | None
    mean: np.ndarray
    digest: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


class RawPixels(nn.Module):
    """The control that is no encoder at all: the pixels, as one patch of C * H * W float32 numbers in the files' units.

    Images larger than 32 pixels on their longer side are first averaged down to it, or a table of photographs would not
    fit in memory; small differences within such a cell say little about a class.
    """

    def forward(self, images: Tensor) -> Features:
        images = images.to(torch.float32)  # (B, C, H, W)
        longer = max(images.shape[2:])
        if longer > LARGEST_PIXEL_SIDE:
            rows, columns = (max(1, round(side * LARGEST_PIXEL_SIDE / longer)) for side in images.shape[2:])
            images = F.adaptive_avg_pool2d(images, (rows, columns))
        return Features(None, images.flatten(1)[:, None], (1, 1))


def collect(encoder: nn.Module, batches: Iterable[Batch], *, device: str, precision: str) -> FeatureTable:
    """Features of all images under a frozen encoder: eval mode, no gradients, nothing masked.

    encoder: on `device`; its forward maps images (B, C, H, W) in the files' dtype to `Features`. It is left in the
    mode (train or eval) in which it came, module by module. precision: "fp32", or "bf16" for autocast; rows are float32
    either way. Raises ValueError when there is no image, or when a feature is not finite.
    """
    return collect_each({"features": encoder}, batches, device=device, precision=precision)["features"]


def collect_each(
    encoders: Mapping[str, nn.Module], batches: Iterable[Batch], *, device: str, precision: str
) -> dict[str, FeatureTable]:
    """As `collect`, for several encoders while reading the images once. Raises ValueError like it."""
    rows: dict[str, _Rows] = {name: _Rows() for name in encoders}
    shared = _Shared()
    with eval_mode(*encoders.values()), torch.inference_mode(), autocast(precision, device):
        for batch in batches:
            shared.add(batch)
            moved = batch.to(device)
            for name, encoder in encoders.items():
                features = encoder.see(moved) if isinstance(encoder, View) else encoder(moved.images)
                rows[name].add(features, shared.index[-1])
    if not shared.index:
        raise UserError(
            "no images came to compute features of; at least one was expected: look at the data with `unmask check`"
        )
    return {name: shared.table(rows[name]) for name in encoders}


def collect_layers(view: View, batches: Iterable[Batch], *, device: str, precision: str) -> list[FeatureTable]:
    """As `collect`, for every layer of one encoder, from the first block's input on."""
    rows: list[_Rows] = []
    shared = _Shared()
    with eval_mode(view), torch.inference_mode(), autocast(precision, device):
        for batch in batches:
            shared.add(batch)
            for number, features in enumerate(view.every_layer(batch.to(device))):
                if number == len(rows):
                    rows.append(_Rows())
                rows[number].add(features, shared.index[-1])
    return [shared.table(layer) for layer in rows]


@contextmanager
def eval_mode(*modules: nn.Module) -> Iterator[None]:
    """In eval mode, and afterwards each part in its own mode again: one may be frozen in eval mode on purpose."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class _Rows:
    """What one encoder makes of the batches so far."""

    def __init__(self) -> None:
        self.cls: list[np.ndarray | None] = []
        self.mean: list[np.ndarray] = []

    def add(self, features: Features, index: np.ndarray) -> None:
        self.cls.append(None if features.cls is None else _finite(features.cls, index))
        self.mean.append(_finite(features.pooled, index))


class _Shared:
    """What is the same for every encoder."""

    def __init__(self) -> None:
        self.index: list[np.ndarray] = []
        self.labels: list[np.ndarray | None] = []
        self.digest: list[np.ndarray] = []

    def add(self, batch: Batch) -> None:
        self.index.append(_array(batch.index))
        self.labels.append(None if batch.labels is None else _array(batch.labels))
        self.digest.append(_digests(batch.images))

    def table(self, rows: _Rows) -> FeatureTable:
        return FeatureTable(
            np.concatenate(self.index),
            _joined(self.labels),
            _joined(rows.cls),
            np.concatenate(rows.mean),
            np.concatenate(self.digest),
        )


def _finite(features: Tensor, index: np.ndarray) -> np.ndarray:
    """As float32 on the host. Raises ValueError when a number is not finite: no probe could make sense of it."""
    rows = features.to(torch.float32).cpu().numpy()  # (B, D)
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise UserError(
            f"the features of {bad.sum()} of {len(rows)} images are not finite (the first is row "
            f"{index[bad.argmax()]} of the source): the weights are damaged, or the images hold numbers that are far "
            "from those of training; try an earlier checkpoint with --step, and look at the images with `unmask check`"
        )
    return rows


def _digests(images: Tensor) -> np.ndarray:
    rows = images.cpu().contiguous().flatten(1).view(torch.uint8).numpy()  # (B, bytes)
    return np.array(
        [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows], np.uint64
    )


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()


def _joined(parts: list[np.ndarray | None]) -> np.ndarray | None:
    """One array; None when any batch had none."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present and len(present) == len(parts) else None
