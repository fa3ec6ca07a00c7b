"""Compute the features of images with frozen encoders.

All probes use the same function for training and test images: if features of training and test images were computed
differently, scores would be low without any error.

Letters: n images, D width of a feature, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.batch import Batch
from unmask.data.device_crops import to_device
from unmask.engine.device import autocast, free_memory
from unmask.engine.world import current
from unmask.errors import UserError
from unmask.evals.encoder_views import View
from unmask.nn.features import Features
from unmask.nn.modes import eval_mode

LARGEST_PIXEL_SIDE = 32


@dataclass(frozen=True)
class FeatureTable:
    """Features of n images, one row each, in the order of the batches.

    index: (n,) int64, the row of each image in its source. labels: (n,) int64, or None without labels. cls: (n, D)
    float32, or None without a class token. mean: (n, D) float32, the mean over patch tokens (for `RawPixels`: the
    pixels). digest: (n,) uint64, equal for images with identical pixels. tokens: all tokens, or None if not requested.

    If several processes compute the features together, one of them, the writer, has them, and the others have `index`.
    """

    index: np.ndarray
    labels: np.ndarray | None
    cls: np.ndarray | None
    mean: np.ndarray
    digest: np.ndarray
    tokens: Tokens | None = None

    @classmethod
    def of_index(cls, index: np.ndarray) -> FeatureTable:
        """Return a table without features, for processes other than the writer."""
        return cls(index, None, None, np.zeros((len(index), 0), np.float32), np.zeros(len(index), np.uint64))

    def __len__(self) -> int:
        return len(self.index)

    def at(self, places: np.ndarray) -> FeatureTable:
        """Return the table of the images at these positions, in this order."""
        return FeatureTable(
            index=self.index[places],
            labels=None if self.labels is None else self.labels[places],
            cls=None if self.cls is None else self.cls[places],
            mean=self.mean[places],
            digest=self.digest[places],
            tokens=None if self.tokens is None else self.tokens.at(places),
        )


@dataclass(frozen=True)
class Tokens:
    """The class token (if any) and all patch tokens of n images, in half precision.

    values: (n, T, D) float16, (tokens - middle) / scale. middle, scale: (D,) float32, mean and standard deviation of
    the tokens in the first batch. Standardising keeps the precision of tokens with a large mean, and of values outside
    the range of float16.
    """

    values: Tensor
    middle: Tensor
    scale: Tensor

    def at(self, places: np.ndarray) -> Tokens:
        return Tokens(self.values[torch.from_numpy(np.asarray(places))], self.middle, self.scale)


def joined_tables(tables: Sequence[FeatureTable]) -> FeatureTable:
    """Concatenate tables without tokens."""
    return FeatureTable(
        index=np.concatenate([table.index for table in tables]),
        labels=_joined([table.labels for table in tables]),
        cls=_joined([table.cls for table in tables]),
        mean=np.concatenate([table.mean for table in tables]),
        digest=np.concatenate([table.digest for table in tables]),
    )


class RawPixels(nn.Module):
    """A control without an encoder: the pixels as one patch of C * H * W float32 values, not normalised.

    Images with a longer side above 32 pixels are averaged down to 32, so that a table of photographs fits in memory.
    """

    def forward(self, images: Tensor) -> Features:
        images = images.to(torch.float32)  # (B, C, H, W)
        longer = max(images.shape[2:])
        if longer > LARGEST_PIXEL_SIDE:
            rows, columns = (max(1, round(side * LARGEST_PIXEL_SIDE / longer)) for side in images.shape[2:])
            images = F.adaptive_avg_pool2d(images, (rows, columns))
        return Features(None, images.flatten(1)[:, None], (1, 1))


EachBatch = Callable[[Callable[[Batch], "BatchFeatures"]], Iterator["BatchFeatures"]]
"""Function that yields the features of each batch in order, computed by the given function; see `images.each_batch`."""


@dataclass(frozen=True)
class BatchFeatures:
    """The features of B images from several encoders.

    index: (B,). labels: (B,) or None. digest: (B,). cls, mean: (B, D) float32 of each encoder. tokens: (B, T, D)
    float32 of each encoder, empty unless requested.
    """

    index: np.ndarray
    labels: np.ndarray | None
    digest: np.ndarray
    cls: list[np.ndarray | None]
    mean: list[np.ndarray]
    tokens: list[Tensor]

    @classmethod
    def of(cls, batch: Batch, found: Sequence[Features], *, tokens: bool) -> BatchFeatures:
        """Return the features on the host. Raises UserError when a feature is not finite."""
        index = _array(batch.index)
        return cls(
            index=index,
            labels=None if batch.labels is None else _array(batch.labels),
            digest=_digests(batch.images),
            cls=[None if each.cls is None else _finite(each.cls, index) for each in found],
            mean=[_finite(each.pooled, index) for each in found],
            tokens=[_all_tokens(each) for each in found] if tokens else [],
        )


def collect_each(
    encoders: Mapping[str, nn.Module],
    each_batch: EachBatch,
    *,
    device: str,
    precision: str,
    tokens: int = 0,
) -> dict[str, FeatureTable]:
    """Compute the features of all images with frozen encoders, reading the images once.

    Encoders run in eval mode without gradients; afterwards every module has its earlier mode again. encoders: encoders
    by name, on `device`; their forward maps images (B, C, H, W) in the files' dtype to `Features`. precision: "fp32",
    or "bf16" for autocast; features are always float32. tokens: largest number of images if all their tokens are
    returned too, or 0 to return no tokens. Raises UserError if there are no images or a feature is not finite, and,
    after the first batch, if the tokens of all images would not fit in memory.
    """

    def compute(batch: Batch) -> BatchFeatures:
        moved = to_device(batch, device)
        found = [
            encoder.see(moved) if isinstance(encoder, View) else encoder(moved.images) for encoder in encoders.values()
        ]
        return BatchFeatures.of(batch, found, tokens=bool(tokens))

    batches: list[BatchFeatures] = []
    kept = [_Tokens(device) for _ in encoders] if tokens else []
    with eval_mode(*encoders.values()), torch.inference_mode(), autocast(precision, device):
        for each in each_batch(compute):
            for rows, values in zip(kept, each.tokens, strict=True):
                rows.add(values)
            if tokens and not batches:
                _require_memory([rows.values[0] for rows in kept], tokens)
            batches.append(replace(each, tokens=[]))
    index = current().from_writer(lambda: _index_of(batches))
    if not batches:
        return {name: FeatureTable.of_index(index) for name in encoders}
    return {
        name: replace(_table(batches, place), tokens=kept[place].table() if tokens else None)
        for place, name in enumerate(encoders)
    }


def collect_layers(view: View, each_batch: EachBatch, *, device: str, precision: str) -> list[FeatureTable]:
    """Compute the features of every layer of one encoder: the first block's input, then every block's output.

    Returns [] in processes other than the writer.
    """

    def compute(batch: Batch) -> BatchFeatures:
        return BatchFeatures.of(batch, list(view.every_layer(to_device(batch, device))), tokens=False)

    with eval_mode(view), torch.inference_mode(), autocast(precision, device):
        batches = list(each_batch(compute))
    return [_table(batches, layer) for layer in range(len(batches[0].mean))] if batches else []


class _Tokens:
    """Accumulates all tokens of one encoder over batches, in half precision; see `Tokens`."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.values: list[Tensor] = []
        self.middle, self.scale = torch.zeros(0), torch.ones(0)

    def add(self, values: Tensor) -> None:
        """Add the tokens (B, T, D) of a batch."""
        tokens = values.to(self.device)
        if not self.values:
            self.middle, self.scale = tokens.mean((0, 1)), tokens.std((0, 1), correction=0)
            self.scale[self.scale <= 1e-6 * self.middle.abs()] = 1.0
        largest = torch.finfo(torch.float16).max
        self.values.append(((tokens - self.middle) / self.scale).clamp(-largest, largest).half().cpu())

    def table(self) -> Tokens:
        return Tokens(torch.cat(self.values), self.middle.cpu().clone(), self.scale.cpu().clone())


def _all_tokens(features: Features) -> Tensor:
    first = [] if features.cls is None else [features.cls[:, None]]
    tokens = torch.cat([*first, features.patches], 1).to(torch.float32)  # (B, T, D)
    return tokens if current().is_writer else tokens.cpu()  # those of other processes are sent to the writer


def _index_of(batches: Sequence[BatchFeatures]) -> np.ndarray:
    if not batches:
        raise UserError(
            "got no images to compute features of; expected at least one; inspect the data with `unmask check`"
        )
    return np.concatenate([each.index for each in batches])


def _table(batches: Sequence[BatchFeatures], place: int) -> FeatureTable:
    """Return the features of one encoder. place: its place among the encoders."""
    return FeatureTable(
        index=np.concatenate([each.index for each in batches]),
        labels=_joined([each.labels for each in batches]),
        cls=_joined([each.cls[place] for each in batches]),
        mean=np.concatenate([each.mean[place] for each in batches]),
        digest=np.concatenate([each.digest for each in batches]),
    )


def _require_memory(firsts: list[Tensor], images: int) -> None:
    """Raise UserError when the tokens of `images` images would take more than half of the free memory."""
    needed = sum(first[0].nbytes for first in firsts) * images
    limit = free_memory("cpu") // 2
    if needed > limit:
        shapes = " and ".join(sorted({f"{first.shape[1]} x {first.shape[2]}" for first in firsts}))
        raise UserError(
            f"the tokens of {images} training images ({shapes} numbers each in half precision, {len(firsts)} feature "
            f"set{'s' * (len(firsts) > 1)}) would take {needed / 2**30:.1f} GiB; at most half of the free memory, "
            f"{limit / 2**30:.1f} GiB, is used for them: train on fewer images with --shots N, or use --kind linear"
        )


def _finite(features: Tensor, index: np.ndarray) -> np.ndarray:
    """Return the features as float32 on the host. Raises UserError when a value is not finite."""
    rows = features.to(torch.float32).cpu().numpy()  # (B, D)
    bad = ~np.isfinite(rows).all(1)
    if bad.any():
        raise UserError(
            f"the features of {bad.sum()} of {len(rows)} images are not finite (the first is row "
            f"{index[bad.argmax()]} of the source): the weights are damaged, or pixel values are far outside "
            "the range of the training data; try an earlier checkpoint with --step, and inspect the images with "
            "`unmask check`"
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
    """Concatenate the arrays of all batches, or return None if any of them is None."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present and len(present) == len(parts) else None
