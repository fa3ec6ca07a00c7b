"""Mean intersection over union of segmentation masks, at the original size of the images.

Each image is resized as a whole to the model's input size, without keeping its aspect ratio. The scores are resized
bilinearly to the size of the file, and the best class of each pixel is compared with the mask. Pixels labelled IGNORED
do not count.

The intersection over union of a class is TP / (TP + FP + FN), counted over the pixels of all images. The mean (mIoU) is
over the classes that occur in the masks; predicting a class that occurs in no mask only lowers the IoU of the true
classes. The 95 % interval is a percentile bootstrap over images: it accounts for the choice of test images, not for the
seed of the training.

Letters: n images, K classes, H x W pixels of the file, h x w pixels of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unmask.batch import IGNORED, Batch
from unmask.errors import UserError
from unmask.metrics.intervals import Interval
from unmask.metrics.measurement import Measurement
from unmask.nn.map_heads import resize

RESAMPLES = 1000
MOST_VALUES = 1 << 26  # greatest number of scores to resize at a time (256 MiB)


@dataclass
class Tally:
    """Running counts. `confusion` (K, K) int64: pixels of class i that were predicted as class j.

    `images`: (3, K) int64 for each image: correct pixels, true pixels and predicted pixels of each class.
    """

    classes: tuple[str, ...]
    confusion: np.ndarray = field(init=False)
    images: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.confusion = np.zeros((len(self.classes), len(self.classes)), np.int64)

    def add(self, guess: Int[Tensor, "H W"], truth: Int[Tensor, "H W"]) -> None:
        """Add one image; pixels whose truth is IGNORED do not count."""
        count = len(self.classes)
        counted = truth != IGNORED
        pairs = truth[counted].long() * count + guess[counted].long()
        one = torch.bincount(pairs, minlength=count * count).reshape(count, count).cpu().numpy()
        self.confusion += one
        self.images.append(np.stack([one.diagonal(), one.sum(1), one.sum(0)]))


@dataclass(frozen=True)
class Scores:
    """`ious` (K,) is nan for a class that does not occur; `interval`: 95 % limits of `mean_iou`."""

    classes: tuple[str, ...]
    mean_iou: float
    interval: Interval
    ious: np.ndarray
    pixel_accuracy: float
    confusion: np.ndarray
    num_images: int

    def as_measurement(self) -> Measurement:
        """Convert the scores to a Measurement with the IoU of each class (None for a class that does not occur)."""
        ious = {name: None if np.isnan(iou) else float(iou) for name, iou in zip(self.classes, self.ious, strict=True)}
        return Measurement(
            {"mean_iou": self.mean_iou, "pixel_accuracy": self.pixel_accuracy},
            self.interval.low,
            self.interval.high,
            images=self.num_images,
            by_class=ious,
            confusion=tuple(map(tuple, self.confusion.tolist())),
        )


def measure(
    logits: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    truth: Callable[[int], np.ndarray],
    classes: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Scores:
    """Measure the mean IoU of a model on these images.

    logits: (B, C, h, w) images -> (B, K, _, _) scores. batches: batches of whole, uncropped images (`image_reader` with
    `whole`). truth: function that maps the row of an image to its (H, W) classes at the size of the file
    (`SegmentationMasks.read`). Raises UserError if all pixels are ignored.
    """
    tally = Tally(tuple(classes))
    with torch.no_grad():
        for batch in batches:
            for row, scores in zip(batch.index.tolist(), logits(batch.images.to(device)), strict=True):
                true = torch.from_numpy(truth(row)).to(device)
                tally.add(classes_at(scores, (true.shape[0], true.shape[1])), true)
    return score(tally, seed=seed)


def classes_at(logits: Float[Tensor, "K h w"], size: tuple[int, int]) -> Int[Tensor, "H W"]:
    """Return the best class of each pixel after resizing the scores to `size`; many classes are resized in parts."""
    step = max(1, MOST_VALUES // (size[0] * size[1]))
    best = torch.full(size, -torch.inf, device=logits.device)
    which = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for start in range(0, len(logits), step):
        value, number = resize(logits[None, start : start + step].float(), size)[0].max(0)
        which = torch.where(value > best, number + start, which)
        best = torch.maximum(value, best)
    return which


def score(tally: Tally, *, seed: int = 0) -> Scores:
    """Compute the scores from the counts, with the interval from RESAMPLES bootstrap samples of the images."""
    each = np.array(tally.images).reshape(len(tally.images), 3, len(tally.classes))  # (n, 3, K)
    total = each.sum(0)
    if not total[1].any():
        raise UserError(f"got masks of {len(each)} images in which all pixels are ignored; ignore fewer ids")
    draws = np.random.default_rng(seed).multinomial(len(each), np.full(len(each), 1 / len(each)), RESAMPLES)
    resampled = (draws.astype(float) @ each.reshape(len(each), -1)).reshape(RESAMPLES, *total.shape)
    means = mean_iou(*resampled.swapaxes(0, 1))
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return Scores(
        classes=tally.classes,
        mean_iou=float(mean_iou(*total)),
        interval=Interval(float(low), float(high)),
        ious=ious(*total),
        pixel_accuracy=float(total[0].sum() / total[1].sum()),
        confusion=tally.confusion,
        num_images=len(each),
    )


def ious(right: np.ndarray, true: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each class, nan for classes that do not occur; all arrays are (..., K)."""
    return np.where(true > 0, right / np.maximum(true + given - right, 1), np.nan)


def mean_iou(right: np.ndarray, true: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Return the mean over the classes that occur, nan if none does: (..., K) -> (...)."""
    occurs = (true > 0).sum(-1)
    return np.where(occurs > 0, np.nansum(ious(right, true, given), -1) / np.maximum(occurs, 1), np.nan)
