"""What travels from the files to a method: a `Batch` of images, and the `ImageSpec` that describes them all.

Images stay in the files' own dtype (uint8 nearly always, uint16 or float32 for scientific data): a quarter of the bytes
travel, and normalisation belongs to the encoder, so every method sees the same crop.

Letters used for shapes everywhere in the package: B images of a batch, C channels, H x W pixels, N patches of the grid,
K kept patches, M dropped (masked) patches, P values of one patch, D width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.errors import UserError

IGNORED = 255  # the class, in `Batch.maps`, of pixels that are not judged
NO_BOX = -1  # the label, in `Batch.box_labels`, of rows that only fill up

DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}


@dataclass(frozen=True)
class ImageSpec:
    """Properties of the images of one data set: determined once, by the scan, and stored with the encoder.

    `size` is (H, W) as the method sees them; `mean` and `std` are per channel, in the files' units (0..255 for uint8).
    """

    channels: int
    size: tuple[int, int]
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"image dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise UserError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations for {self.channels} channels; "
                "give one of each per channel"
            )
        if min(self.std) <= 0:
            raise UserError(
                f"standard deviations {self.std} are not all positive: a channel is constant over the whole data set; "
                "drop that channel, or give --set data.std by hand"
            )

    @property
    def value_range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The values of each channel that stand for 0 and for 1, where a method wants pixels between these.

        0 and 255 for 8-bit images. Others seldom fill their range: two standard deviations on either side of the mean.
        """
        if self.dtype == "uint8":
            return (0.0,) * self.channels, (255.0,) * self.channels
        pairs = list(zip(self.mean, self.std, strict=True))
        return tuple(m - 2 * s for m, s in pairs), tuple(m + 2 * s for m, s in pairs)


@dataclass(frozen=True)
class Batch:
    """One (micro-)batch.

    `images` (B, C, H, W) in the files' dtype, from the loader with the channels last in memory; `index` (B,) the row of
    each image in its source and `epoch` (B,) how often it has been drawn before, which together name the random draws
    of that image.

    Where a task needs them: `labels` (B,) int64; `maps` (B, H, W) int64, the class of every pixel, 255 for one that is
    not judged; `boxes` (B, M, 4) float32, (x1, y1, x2, y2) in pixels of `images`, with `box_labels` (B, M) int64, -1
    where an image has fewer than M boxes.

    `valid` (B, H, W) bool where some pixels are absent (no data); None where all are there, which is the rule. Absent
    pixels hold the data's mean. A patch of which less than `min_valid` is valid does not count in a loss.

    crops (B, 7) where resampling is left to the device: `images` are then parts of larger images, from which
    `data.device_crops.to_device` makes images of `size` (H, W) by `interpolation`.
    """

    images: Tensor
    index: Tensor
    epoch: Tensor
    labels: Tensor | None = None
    maps: Tensor | None = None
    boxes: Tensor | None = None
    box_labels: Tensor | None = None
    crops: Tensor | None = None
    size: tuple[int, int] | None = None
    interpolation: str = "bicubic"
    valid: Tensor | None = None
    min_valid: float = 0.5

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice) -> Batch:
        """Return some of the images, with all fields."""
        return replace(self, **{name: v[rows] for name, v in vars(self).items() if isinstance(v, Tensor)})

    @staticmethod
    def join(parts: Sequence[Batch]) -> Batch:
        """Return one batch of several, in order; all need the same fields and the same number of boxes."""
        if any(part.valid is not None for part in parts):
            parts = [part if part.valid is not None else part._all_valid() for part in parts]
        filled = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in filled})

    def require_labels(self) -> Tensor:
        """(B,) int64. Raises UserError where the images have no class."""
        if self.labels is None:
            raise UserError(
                "got images without labels; a classifier learns from labels; put the images of each class into a "
                "sub-folder of its own"
            )
        return self.labels

    def _all_valid(self) -> Batch:
        height, width = self.size or self.images.shape[2:]
        return replace(self, valid=torch.ones(len(self), height, width, dtype=torch.bool, device=self.images.device))

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device; copies from pinned memory overlap with computation."""
        device = torch.device(device)
        if self.images.device == device:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        return replace(self, **{name: v.pin_memory() for name, v in vars(self).items() if isinstance(v, Tensor)})
