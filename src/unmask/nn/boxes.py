"""Boxes in images: overlap, non-maximum suppression, clipping and drawing.

A box is (x1, y1, x2, y2) in pixels, x to the right and y down, with x1 <= x2 and y1 <= y2; the upper left pixel covers
(0, 0, 1, 1). The functions use torch only, not torchvision.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

TINY = 1e-9  # avoids 0 / 0 for a box without area


def area(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Return areas in square pixels; 0 for a box with x2 < x1 or y2 < y1."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def shared_area(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*m 4"]) -> Float[Tensor, "*k"]:
    """Return the overlap, in square pixels, of each box in `a` with its counterpart in `b`; the two broadcast."""
    top_left, bottom_right = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    return area(torch.cat([top_left, bottom_right], -1))


def pairwise_iou(a: Float[Tensor, "n 4"], b: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    """Return the intersection over union, 0 to 1, of every box in `a` with every box in `b`."""
    both = shared_area(a[:, None], b[None])
    return both / (area(a)[:, None] + area(b)[None] - both).clamp(min=TINY)


def giou(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Return the generalised intersection over union of each box in `a` with its counterpart in `b` (Rezatofighi et al.
    2019).

    Equal boxes have the value 1. For boxes without overlap the value is negative and falls towards -1 with growing
    distance, so its gradient is not zero. The value does not depend on the units of the boxes, which may differ between
    x and y.
    """
    both = shared_area(a, b)
    union = area(a) + area(b) - both
    hull = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1))
    return both / union.clamp(min=TINY) - (hull - union) / hull.clamp(min=TINY)


def suppress(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], labels: Int[Tensor, " n"], threshold: float
) -> Int[Tensor, " k"]:
    """Greedy non-maximum suppression within each class; return the indices of the remaining boxes, best score first.

    A box is suppressed if a better remaining box of the same class overlaps it with an IoU above `threshold`.
    Synchronises with the device once.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    overlapping = ((pairwise_iou(boxes, boxes) > threshold) & (labels[:, None] == labels[None])).cpu()
    suppressed = torch.zeros(len(boxes), dtype=torch.bool)
    kept = []
    for row, is_suppressed in enumerate(suppressed.numpy()):  # numpy() returns a view, which shows the updates below
        if not is_suppressed:
            kept.append(row)
            suppressed |= overlapping[row]
    return order[torch.tensor(kept, dtype=torch.int64, device=order.device)]


def clip(boxes: Float[Tensor, "*n 4"], size: tuple[int, int]) -> Float[Tensor, "*n 4"]:
    """Clip boxes to an image of `size` = (H, W) pixels."""
    high, wide = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, wide), y1.clamp(0, high), x2.clamp(0, wide), y2.clamp(0, high)], -1)


def outline(
    image: Float[Tensor, "C H W"], boxes: Float[Tensor, "n 4"], colours: Float[Tensor, "n C"]
) -> Float[Tensor, "C H W"]:
    """Draw each box in its colour on a copy of the image, with lines as wide as 1 % of the shorter side."""
    image, (high, wide) = image.clone(), image.shape[1:]
    line = max(1, round(min(high, wide) / 100))
    for (x1, y1, x2, y2), colour in zip(clip(boxes, (high, wide)).round().int().tolist(), colours, strict=True):
        x1, y1 = min(x1, wide - 1), min(y1, high - 1)
        x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
        for rows, cols in (
            (slice(y1, min(y1 + line, y2)), slice(x1, x2)),
            (slice(max(y2 - line, y1), y2), slice(x1, x2)),
            (slice(y1, y2), slice(x1, min(x1 + line, x2))),
            (slice(y1, y2), slice(max(x2 - line, x1), x2)),
        ):
            image[:, rows, cols] = colour[:, None, None]
    return image
