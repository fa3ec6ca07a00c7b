"""The input of a method: a `Batch` of images, and the `ImageSpec` that describes the images of a data set.

Images keep the files' dtype (uint8 nearly always, uint16 or float32 for scientific data), because uint8 needs a quarter
of the bytes of float32. The encoder normalises the images.

Letters used for shapes everywhere in the package: B images of a batch, C channels, H x W pixels, N patches of the grid,
K kept patches, M dropped (masked) patches, P values of one patch, D width of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.errors import UserError

IGNORED = 255  # Class number of ignored pixels in `Batch.maps`: the loss and the metrics leave them out.
NO_BOX = -1  # Label in `Batch.box_labels` of padding rows.

DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}


@dataclass(frozen=True)
class ImageSpec:
    """Properties of the images of one data set, which the scan determines. They are stored with the encoder.

    size: (H, W) of the method's input in pixels.
    mean, std: mean and standard deviation of each channel, in the files' units (0..255 for uint8).
    """

    channels: int
    size: tuple[int, int]
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"got images of dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise UserError(
                f"got {len(self.mean)} means and {len(self.std)} standard deviations for {self.channels} channels; "
                "expected one of each per channel"
            )
        if min(self.std) <= 0:
            raise UserError(
                f"got standard deviations {self.std}; expected positive numbers: a channel is constant over the whole "
                "data set; drop that channel, or set data.std"
            )

    @property
    def value_range(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Values per channel that are mapped to 0 and to 1, for methods that need pixels in [0, 1].

        For 8-bit images, the range is 0 to 255. Other images seldom use the whole range of their dtype, so their range
        is the mean minus and plus two standard deviations.
        """
        if self.dtype == "uint8":
            return (0.0,) * self.channels, (255.0,) * self.channels
        pairs = list(zip(self.mean, self.std, strict=True))
        return tuple(m - 2 * s for m, s in pairs), tuple(m + 2 * s for m, s in pairs)


@dataclass(frozen=True)
class Batch:
    """One (micro-)batch.

    images: (B, C, H, W) in the files' dtype; the loader returns them channels-last in memory.
    index, epoch: (B,) each, the position of an image in its source, and how often it has been used before. Together
    they determine the random draws for the image.
    labels: (B,) int64, class of each image. labels, maps, boxes and box_labels are set only for tasks that need them.
    maps: (B, H, W) int64, the class of every pixel; 255 for pixels that the loss and the metrics ignore.
    boxes: (B, M, 4) float32, (x1, y1, x2, y2) in pixels of `images`.
    box_labels: (B, M) int64; -1 for padding where an image has fewer than M boxes.
    valid: (B, H, W) bool, False for absent pixels (no data), which are filled with the data's mean, or None (the usual
    case) if no pixel is absent.
    min_valid: the loss ignores patches with a smaller share of valid pixels.
    crops: (B, 7) crop parameters if the device resamples the images, else None. If set, `images` are regions of larger
    images, which `data.device_crops.to_device` resamples to `size` (H, W) with `interpolation`.
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
        """Return a slice of the batch, with all fields."""
        return replace(self, **{name: v[rows] for name, v in vars(self).items() if isinstance(v, Tensor)})

    @staticmethod
    def join(parts: Sequence[Batch]) -> Batch:
        """Concatenate batches, in order. All batches need the same fields and the same number of boxes."""
        if any(part.valid is not None for part in parts):
            parts = [part.with_valid() for part in parts]
        filled = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in filled})

    def require_labels(self) -> Tensor:
        """Return `labels`. Raises UserError if the images have no labels."""
        if self.labels is None:
            raise UserError(
                "got images without labels; a classifier learns from labels; put the images of each class into a "
                "sub-folder of its own"
            )
        return self.labels

    def with_valid(self) -> Batch:
        """Return the batch with `valid` set, True for all pixels if it was None."""
        if self.valid is not None:
            return self
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
