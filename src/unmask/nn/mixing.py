"""Mixup and cutmix: mix each image and its target with those at the mirrored position in the batch.

Zhang et al. 2018, "mixup: Beyond empirical risk minimization"; Yun et al. 2019, "CutMix". As in MAE's fine-tuning, each
(micro-)batch uses either mixup or cutmix, with one mixing ratio. The draws are made on the host, so nothing waits for a
GPU.

Letters: B images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from unmask.errors import UserError

MIX_DRAWS = 4


def soft_targets(labels: Int[Tensor, " B"], classes: int, smoothing: float) -> Float[Tensor, "B K"]:
    """Return targets of 1 - s + s / K for the right class and s / K for every other class (Szegedy et al. 2016)."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    images: Shaped[Tensor, "B C H W"],
    targets: Float[Tensor, "B K"],
    draws: Float[np.ndarray, "4"],
    *,
    mixup: float,
    cutmix: float,
) -> tuple[Shaped[Tensor, "B C H W"], Float[Tensor, "B K"]]:
    """Mix images and targets with those of the reversed batch. draws: numbers drawn uniformly from [0, 1) for this
    batch.

    mixup, cutmix: alpha of the Beta(alpha, alpha) distribution of each image's own share, 0 to disable; if both are
    enabled, one is chosen at random. Cutmix keeps the dtype of the images, mixup returns float32. Raises UserError for
    a batch of one image.
    """
    toss, share, down, across = (float(draw) for draw in draws)
    if not mixup and not cutmix:
        return images, targets
    if len(images) == 1:
        raise UserError(
            "got a micro-batch of one image; mixup and cutmix mix at least two; use train.micro_batch=2 or more, or "
            "method.mixup=0 and method.cutmix=0"
        )
    cuts = bool(cutmix) and (not mixup or toss < 0.5)
    kept = beta_quantile(share, cutmix if cuts else mixup)
    if cuts:
        rows, cols = cut_box((images.shape[2], images.shape[3]), kept, down, across)
        mixed = images.clone()
        mixed[:, :, rows, cols] = images.flip(0)[:, :, rows, cols]
        cut = (rows.stop - rows.start) * (cols.stop - cols.start)
        kept = 1 - cut / (images.shape[2] * images.shape[3])
    else:
        mixed = images.float().lerp(images.flip(0).float(), 1 - kept)
    return mixed, targets.lerp(targets.flip(0), 1 - kept)


def beta_quantile(share: float, alpha: float) -> float:
    """Transform a uniform draw to Beta(alpha, alpha)."""
    from scipy.special import betaincinv

    return float(betaincinv(alpha, alpha, share))


def cut_box(size: tuple[int, int], kept: float, down: float, across: float) -> tuple[slice, slice]:
    """Return the rows and columns of a box with the image's aspect ratio and 1 - `kept` of its area, clipped at the
    edges.

    down, across: centre of the box, as fractions of the image's height and width.
    """
    spans = []
    for length, at in zip(size, (down, across), strict=True):
        half, middle = int(length * (1 - kept) ** 0.5) // 2, int(at * length)
        spans.append(slice(max(0, middle - half), min(length, middle + half)))
    return spans[0], spans[1]
