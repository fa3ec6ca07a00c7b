"""Which part of each image a method sees: crop boxes and flips as pure functions of uniform draws, and the resampling.

Maps of classes and boxes around objects go the same way as the image they belong to.

Boxes are (top, left, height, width) in pixels of the full image, so they can be chosen before anything is decoded. The
draws come from `rng.py`, by (seed, epoch, image); nothing here has state.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import AfterValidator, Field

from unmask.batch import IGNORED
from unmask.settings import Settings

TRIES = 10
CROP_DRAWS = 2 * TRIES + 2
SUBPIXELS = 2**16  # boxes lie on this grid, where sums are exact: no corner or edge is outside by a rounding error
KERNELS = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa, "bilinear": torch.ops.aten._upsample_bilinear2d_aa}
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
PROTOCOL_SHARE, LARGEST_CROPPED = 224 / 256, 224
Corners = tuple[float, float, float, float]  # top, left, height, width
NEAR_PIXEL, MOST_SKIPPED = 1 / 16, 32  # of a pixel, and samples: see `_from_a_pixel`
LEAST_VALID = 0.5  # share of the filter's weight that lies on valid pixels, where a resampled pixel is valid
LEAST_LEFT = 0.2  # share of its area that a box around an object keeps in a crop, or is dropped


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if not 0 < span[0] <= span[1]:
        raise ValueError("expected two numbers above 0, the smaller one first, for example [0.5,1]")
    return span


def _share(span: tuple[float, float]) -> tuple[float, float]:
    if _ordered(span)[1] > 1:
        raise ValueError("expected shares of the image's area, at most 1, for example [0.2,1]")
    return span


class CropConfig(Settings):
    """How a training crop is chosen, and what is done to its colours.

    kind "random_resized": a box of random area (`scale`, share of the image) and aspect (`ratio`), MAE's default;
    "random": a box of fixed size, `eval_share` of the largest that fits, at a random place; "center": the same box in
    the middle. scale and ratio count for "random_resized" only. flip: probability of a left-right flip. eval_share:
    side of a box of fixed size, as a share of the largest that fits: of the centre box used outside training, and for
    kind "random" and "center" of the training crops too (the paper's resize 256, crop 224 is 0.875). jitter: strength
    of `jitter_colours`, 0 for none, which is what MAE trains with (its Table 1e). interpolation: of training crops,
    "bicubic" or "bilinear", both with antialiasing (SimMIM's pre-training is bilinear); evaluation is always bicubic.
    """

    kind: Literal["random_resized", "random", "center"] = "random_resized"
    scale: Annotated[tuple[float, float], AfterValidator(_share)] = (0.2, 1.0)
    ratio: Annotated[tuple[float, float], AfterValidator(_ordered)] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    eval_share: float = Field(default=1.0, gt=0, le=1)
    jitter: float = Field(default=0.0, ge=0, le=1)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


def protocol_share(size: tuple[int, int]) -> float:
    """Side of the centre crop over the shorter side of the image in MAE's evaluation: 0.875 up to 224 pixels, then 1.

    So its `util/datasets.py`; size: (height, width) of the crop in pixels.
    """
    return PROTOCOL_SHARE if min(size) <= LARGEST_CROPPED else 1.0


def crop_for(crop: CropConfig, size: tuple[int, int], designed: tuple[int, int]) -> CropConfig:
    """`crop` of a recipe made for images of size `designed`, for images of `size`.

    Recipes that evaluate as MAE's protocol does at 224 pixels see the whole square above, as it does there.
    """
    follows = crop.eval_share == protocol_share(designed) == PROTOCOL_SHARE
    return crop.model_copy(update={"eval_share": protocol_share(size)}) if follows else crop


def center_boxes(sizes: np.ndarray, target: tuple[int, int], share: float = 1.0) -> np.ndarray:
    """(B, 2) image sizes -> (B, 4) boxes: the largest centred box of the target's shape, times `share`."""
    return _fixed_boxes(sizes, target, share, np.full((len(sizes), 2), 0.5))


def whole_boxes(sizes: np.ndarray) -> np.ndarray:
    """(B, 2) image sizes -> (B, 4) boxes that leave nothing out, whatever that does to the aspect."""
    return np.concatenate([np.zeros((len(sizes), 2)), sizes], 1)


def crop_boxes(sizes: np.ndarray, target: tuple[int, int], config: CropConfig, draws: np.ndarray) -> np.ndarray:
    """Training boxes: (B, 2) image sizes (H, W) and (B, CROP_DRAWS) uniform draws -> (B, 4) boxes."""
    if config.kind == "center":
        return center_boxes(sizes, target, config.eval_share)
    if config.kind == "random":
        return _fixed_boxes(sizes, target, config.eval_share, draws[:, -2:])
    return _random_resized(sizes, target, config, draws)


def _fixed_boxes(sizes: np.ndarray, target: tuple[int, int], share: float, place: np.ndarray) -> np.ndarray:
    scale = (sizes / np.array(target)).min(1, keepdims=True) * share
    box = np.minimum(np.round(scale * np.array(target) * SUBPIXELS) / SUBPIXELS, sizes)
    corner = np.floor((sizes - box) * place * SUBPIXELS) / SUBPIXELS
    return np.concatenate([corner, box], 1)


def _random_resized(sizes: np.ndarray, target: tuple[int, int], config: CropConfig, draws: np.ndarray) -> np.ndarray:
    """Inception-style random resized crop as torchvision draws it: ten tries, then the largest centred box.

    `ratio` is relative to the target's own shape, so that a wide model grid is not squeezed into square crops.
    """
    height, width = sizes[:, :1].astype(float), sizes[:, 1:].astype(float)
    low, high = config.scale
    area = height * width * (low + (high - low) * draws[:, :TRIES])
    shape = target[1] / target[0]
    logs = np.log(config.ratio)
    ratio = np.exp(logs[0] + (logs[1] - logs[0]) * draws[:, TRIES : 2 * TRIES]) * shape
    box_h, box_w = np.round(np.sqrt(area / ratio)), np.round(np.sqrt(area * ratio))
    fits = (box_h >= 1) & (box_w >= 1) & (box_h <= height) & (box_w <= width)  # (B, TRIES)
    first = fits.argmax(1)[:, None]
    box = np.concatenate([np.take_along_axis(box_h, first, 1), np.take_along_axis(box_w, first, 1)], 1)
    corner = np.floor((sizes - box + 1) * draws[:, -2:])
    boxes = np.concatenate([corner, box], 1)
    ratio_range = (config.ratio[0] * shape, config.ratio[1] * shape)
    return np.where(fits.any(1, keepdims=True), boxes, _fallback(height, width, ratio_range))


def _fallback(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """The largest centred box whose aspect lies within `ratio`."""
    box_w = np.minimum(width, np.maximum(1, np.round(height * ratio[1])))
    box_h = np.minimum(height, np.maximum(1, np.round(width / ratio[0])))
    return np.concatenate([np.floor((height - box_h) / 2), np.floor((width - box_w) / 2), box_h, box_w], 1)


def jitter_colours(images: np.ndarray, strength: float, draws: np.ndarray) -> np.ndarray:
    """Brightness, contrast and saturation of each image changed, in this order: (B, H, W, C) in, the same dtype out.

    draws: (B, 3) uniform in [0, 1), for a factor each in [1 - strength, 1 + strength]: the pixels times the first, the
    distance from the image's mean gray times the second, that from each pixel's own gray times the third (which does
    nothing to gray images). Gray is 0.299 R + 0.587 G + 0.114 B; the mean of the channels where there are not three.
    Results are clipped to the range of integers; float32 images have none. After torchvision's ColorJitter without hue,
    but for the order, which is random there.
    """
    factors = (1 + strength * (2 * draws - 1)).astype(np.float32)[:, :, None, None, None]  # (B, 3, 1, 1, 1)
    channels = images.shape[3]
    weights = np.array([0.299, 0.587, 0.114] if channels == 3 else [1 / channels] * channels, np.float32)
    integer = np.issubdtype(images.dtype, np.integer)
    top = np.iinfo(images.dtype).max if integer else np.inf
    bottom = 0 if integer else -np.inf
    x = (images.astype(np.float32) * factors[:, 0]).clip(bottom, top)
    mean = (x @ weights).mean((1, 2))[:, None, None, None]
    x = (mean + (x - mean) * factors[:, 1]).clip(bottom, top)
    gray = (x @ weights)[..., None]
    x = (gray + (x - gray) * factors[:, 2]).clip(bottom, top)
    return (x.round() if integer else x).astype(images.dtype)


def decode_size(size: tuple[int, int], box: np.ndarray, target: tuple[int, int]) -> tuple[int, int]:
    """How large the whole image must be decoded for the box to keep at least the target's resolution: (h, w)."""
    return (
        min(size[0], math.ceil(size[0] * target[0] / box[2])),
        min(size[1], math.ceil(size[1] * target[1] / box[3])),
    )


def cut(
    image: np.ndarray,
    box: np.ndarray,
    target: tuple[int, int],
    flip: bool,
    out: np.ndarray | None = None,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Resample the box of `image` (H, W, C) to `target` (h, w) and flip: (h, w, C) in the same dtype.

    out: where to write, contiguous; a new array when None. interpolation: "bicubic" or "bilinear", with antialiasing in
    every branch. A box of whole pixels is cut out first, as torchvision's resized crop does; of 8-bit gray and RGB it
    goes through torch's integer kernel, which differs from Pillow by 0.05 levels on average. A box with fractions,
    which a scaled decode makes of it, goes there too where it can begin within 1/16 of a pixel (nine of ten can; 0.3
    levels on average), and through Pillow otherwise; of both the filter looks a few pixels beyond the edges. Any other
    channel count or dtype goes through torch in float32, clipped to the values in the image so that bicubic overshoot
    invents none.
    """
    if out is None:
        out = np.empty((*target, image.shape[2]), image.dtype)
    numbers = out.view(np.int16) if out.dtype == np.uint16 else out  # torch cannot turn uint16
    pixels = torch.from_numpy(numbers).permute(2, 0, 1)[None]
    top, left, height, width = (float(value) for value in box)
    whole = all(value.is_integer() for value in (top, left, height, width))
    common = image.dtype == np.uint8 and image.shape[2] in (1, 3)
    if whole and (height, width) == target:
        out[...] = _inside(image, top, left, height, width)
    elif whole and common:
        part = torch.from_numpy(_inside(image, top, left, height, width).copy())
        # Not F.interpolate: it takes no `out`, and to allocate the result costs a third as much as to compute it.
        KERNELS[interpolation].out(part.permute(2, 0, 1)[None], target, False, None, None, out=pixels)
    elif common:
        part = _cut_from_pixels(image, (top, left, height, width), target, interpolation)
        if part is None:
            part = _cut_fractions(image, (top, left, height, width), target, interpolation)
        out[...] = part
    else:
        part = _inside(image, top, left, height, width)
        bands = torch.from_numpy(part.astype(np.float32)).permute(2, 0, 1)[None]
        found = F.interpolate(bands, size=target, mode=interpolation, align_corners=False, antialias=True)
        found = found[0].permute(1, 2, 0).numpy().clip(part.min(), part.max())
        out[...] = found.round() if np.issubdtype(image.dtype, np.integer) else found
    if flip:
        pixels.copy_(pixels.flip(3))  # torch turns rows of three bytes ten times faster than NumPy
    return out


def cut_valid(
    image: np.ndarray,
    valid: np.ndarray,
    fill: np.ndarray,
    box: np.ndarray,
    target: tuple[int, int],
    flip: bool,
    interpolation: str = "bicubic",
) -> tuple[np.ndarray, np.ndarray]:
    """`cut` of an image with absent pixels: (h, w, C) pixels and (h, w) bool, where they are valid.

    image: (H, W, C), finite; valid: (H, W) bool; fill: (C,), what stands for absent pixels. A pixel of the result is
    the filter's mean over the valid pixels that it covers, so no value of an absent one gets into it; it is valid where
    these have at least half of the filter's weight.
    """
    top, left, height, width = (float(value) for value in box)
    part, known = (_inside(array, top, left, height, width) for array in (image, valid))
    if part.shape[:2] == target:
        pixels, there = part.astype(np.float32), known
    else:
        weights = known[:, :, None].astype(np.float32)
        layers = np.concatenate([(part.astype(np.float32) - fill.astype(np.float32)) * weights, weights], 2)
        found = F.interpolate(
            torch.from_numpy(layers).permute(2, 0, 1)[None], target, mode=interpolation, antialias=True
        )[0].permute(1, 2, 0).numpy()  # fmt: skip
        share = found[:, :, -1:]
        there = share[:, :, 0] >= LEAST_VALID
        pixels = fill.astype(np.float32) + found[:, :, :-1] / np.where(there[:, :, None], share, 1)
        if known.any():
            pixels = pixels.clip(part[known].min(0), part[known].max(0))
    if image.dtype != np.float32:
        pixels = pixels.round()
    pixels = np.where(there[:, :, None], pixels, fill).astype(image.dtype)
    return (pixels[:, ::-1], there[:, ::-1]) if flip else (pixels, there)


def _inside(image: np.ndarray, top: float, left: float, height: float, width: float) -> np.ndarray:
    """The pixels of the box to the nearest whole ones, at least one: a view."""
    y, x = int(top), int(left)
    return image[y : max(y + 1, round(top + height)), x : max(x + 1, round(left + width))]


def _cut_from_pixels(
    image: np.ndarray, box: Corners, target: tuple[int, int], interpolation: str = "bicubic"
) -> np.ndarray | None:
    """As `_cut_fractions`, by torch's integer kernel, in a quarter of the time; None where the box cannot begin so."""
    steps = box[2] / target[0], box[3] / target[1]
    rows, columns = _from_a_pixel(box[0], steps[0]), _from_a_pixel(box[1], steps[1])
    if rows is None or columns is None:
        return None
    (y, above), (x, before) = rows, columns
    bottom, right = (math.ceil(box[i] + box[i + 2]) + _reach(steps[i]) for i in (0, 1))
    within = image[max(0, y) : bottom, max(0, x) : right]
    outside = max(0, -y), max(0, -x)
    padded = np.pad(within, ((outside[0], 0), (outside[1], 0), (0, 0)), "edge") if any(outside) else within.copy()
    part = torch.from_numpy(padded)
    # One sample more where there would be as many as pixels: for then the kernel takes the pixels, whatever the step.
    size = above + target[0], before + target[1]
    more = size[0] + (size[0] == part.shape[0]), size[1] + (size[1] == part.shape[1])
    found = KERNELS[interpolation](part.permute(2, 0, 1)[None], more, False, 1 / steps[0], 1 / steps[1])
    return found[0, :, above : size[0], before : size[1]].permute(1, 2, 0).numpy()


def _from_a_pixel(first: float, step: float) -> tuple[int, int] | None:
    """Where samples, `step` apart, can begin so that a box begins at `first`: (a whole pixel, so many samples before).

    The kernel begins at a pixel's edge. So it begins some samples before the box, which are thrown away: as many as
    bring it next to an edge, of a pixel that may lie before the image. None where MOST_SKIPPED do not bring it as near
    as NEAR_PIXEL.
    """
    begins = [first - skipped * step for skipped in range(1 + MOST_SKIPPED)]
    errors = [abs(begin - round(begin)) for begin in begins]
    skipped = min(range(len(errors)), key=errors.__getitem__)
    return (round(begins[skipped]), skipped) if errors[skipped] <= NEAR_PIXEL else None


def _reach(step: float) -> int:
    """How many pixels beyond a box the filter looks, for samples that are so far apart, and one more."""
    return math.ceil(2 * max(1, step)) + 1


def _cut_fractions(
    image: np.ndarray, box: Corners, target: tuple[int, int], interpolation: str = "bicubic"
) -> np.ndarray:
    """A box that begins or ends within a pixel, of an 8-bit image in gray or RGB, resampled by Pillow."""
    # Only what the filter reaches is handed over: Pillow first makes a copy, four bytes to a pixel, of all it is given.
    part, (top, left, height, width) = _within_reach(image, box, target)
    picture = Image.fromarray(part[:, :, 0] if image.shape[2] == 1 else part)
    edges = (left, top, min(left + width, part.shape[1]), min(top + height, part.shape[0]))
    found = picture.resize((target[1], target[0]), PILLOW[interpolation], box=edges)
    return np.asarray(found).reshape(*target, image.shape[2])


def _within_reach(image: np.ndarray, box: Corners, target: tuple[int, int]) -> tuple[np.ndarray, Corners]:
    """The pixels that the filter looks at, a view, and where the box lies in them."""
    top, left, height, width = box
    reach_y, reach_x = _reach(height / target[0]), _reach(width / target[1])
    y, x = max(0, int(top) - reach_y), max(0, int(left) - reach_x)
    part = image[y : math.ceil(top + height) + reach_y, x : math.ceil(left + width) + reach_x]
    return part, (top - y, left - x, height, width)


def room_for(target: tuple[int, int]) -> tuple[int, int]:
    """How large the parts are that `cut_later` leaves at most: (height, width)."""
    return 2 * target[0] + 16, 2 * target[1] + 16


def cut_later(
    image: np.ndarray,
    box: np.ndarray,
    target: tuple[int, int],
    flip: bool,
    out: np.ndarray,
    crop: np.ndarray,
    interpolation: str = "bicubic",
) -> None:
    """`cut` of an 8-bit gray or RGB image, left to `resample`: writes the part it needs, and where its box lies.

    out: (H, W, C) of `room_for(target)`, of which only the part is written; crop: (7,), a row of `resample`'s `crops`.
    A part too large for the room is resampled here, and there is nothing more to do than to flip it.
    """
    top, left, height, width = (float(value) for value in box)
    if all(value.is_integer() for value in (top, left, height, width)):
        part, place = _inside(image, top, left, height, width), (0.0, 0.0, height, width)
    else:
        part, place = _within_reach(image, (top, left, height, width), target)
    if part.shape[0] > out.shape[0] or part.shape[1] > out.shape[1]:
        part, place = cut(image, box, target, False, interpolation=interpolation), (0.0, 0.0, *target)
    out[: part.shape[0], : part.shape[1]] = part
    crop[:] = (*place, *part.shape[:2], flip)


def cut_map(ids: np.ndarray, box: np.ndarray, target: tuple[int, int], flip: bool) -> np.ndarray:
    """The class of each pixel of `cut`'s result: (H, W) ids of the image in full -> (h, w), the same dtype.

    The id under the middle of each pixel, never one between two; IGNORED where that lies outside the image.
    """
    rows, ys = _under(box[0], box[2], target[0], ids.shape[0])
    columns, xs = _under(box[1], box[3], target[1], ids.shape[1])
    out = np.where(rows[:, None] & columns, ids[ys[:, None], xs], ids.dtype.type(IGNORED))
    return out[:, ::-1] if flip else out


def _under(first: float, length: float, count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one side: which of the `count` samples lie within the image, and the pixel under each."""
    place = np.floor(first + (np.arange(count) + 0.5) * (length / count)).astype(np.int64)
    return (place >= 0) & (place < side), place.clip(0, side - 1)


def cut_boxes(boxes: np.ndarray, box: np.ndarray, target: tuple[int, int], flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Boxes around objects, (n, 4) as (x1, y1, x2, y2) in pixels of the full image -> the same in pixels of `cut`'s.

    Returns ((n, 4) float32, clipped to the crop; (n,) bool, those worth keeping: at least LEAST_LEFT of the area and a
    pixel of either side is left).
    """
    corner, scale = box[[1, 0, 1, 0]], np.array([target[1], target[0]] * 2) / box[[3, 2, 3, 2]]
    moved = (boxes - corner) * scale  # (n, 4)
    inside = moved.clip(0, [target[1], target[0]] * 2)
    sides, left = moved[:, 2:] - moved[:, :2], inside[:, 2:] - inside[:, :2]
    keep = (left >= 1).all(1) & (left.prod(1) >= LEAST_LEFT * sides.prod(1))
    if flip:
        inside[:, [0, 2]] = target[1] - inside[:, [2, 0]]
    return inside.astype(np.float32), keep
