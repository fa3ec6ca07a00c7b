"""Crop boxes, flips and colour jitter as pure functions of uniform random draws, and the resampling of crops.

Segmentation masks and boxes around objects are cropped and flipped with their image.

Crop boxes are (top, left, height, width) in pixels of the full image, so they can be chosen before the image is
decoded. The random draws come from `rng.py` and depend on (seed, epoch, image); nothing in this module has state.
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
from unmask.data import antialias
from unmask.settings import Settings

TRIES = 10
CROP_DRAWS = 2 * TRIES + 2
SUBPIXELS = 2**16  # box coordinates are multiples of 1 / SUBPIXELS, so that sums of them have no rounding error
PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
PROTOCOL_SHARE, LARGEST_CROPPED = 224 / 256, 224
Corners = tuple[float, float, float, float]  # Top, left, height and width of a box.
NEAR_PIXEL, MOST_SKIPPED = 1 / 16, 32  # Maximum distance in pixels, and maximum number of samples.
LEAST_VALID = 0.5  # A resampled pixel is valid if valid pixels have at least this share of the filter's weight.
LEAST_LEFT = 0.2  # Boxes around objects with less than this share of their area in the crop are dropped.


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if not 0 < span[0] <= span[1]:
        raise ValueError("expected two numbers above 0, the smaller one first, for example [0.5,1]")
    return span


def _share(span: tuple[float, float]) -> tuple[float, float]:
    if _ordered(span)[1] > 1:
        raise ValueError("expected shares of the image's area, at most 1, for example [0.2,1]")
    return span


class CropConfig(Settings):
    """Settings of training crops: box, flip, colour jitter and interpolation.

    kind: "random_resized" (MAE's default) draws a box of random area and aspect ratio; "random" draws the position of a
    box of fixed size; "center" puts that box in the middle of the image.
    scale: range of the area as a share of the image, for "random_resized" only.
    ratio: range of the aspect ratio, for "random_resized" only.
    flip: probability of a left-right flip.
    eval_share: side of the boxes of fixed size, as a share of the side of the largest box that fits (0.875 for a crop
    of 224 from 256 pixels). Boxes of fixed size are used for all evaluation, and for training crops of kind "random"
    and "center". jitter: strength of `jitter_colours`; 0, as in MAE (its Table 1e), turns it off.
    interpolation: "bicubic" or "bilinear" (SimMIM's pre-training), with antialiasing; evaluation is always bicubic.
    """

    kind: Literal["random_resized", "random", "center"] = "random_resized"
    scale: Annotated[tuple[float, float], AfterValidator(_share)] = (0.2, 1.0)
    ratio: Annotated[tuple[float, float], AfterValidator(_ordered)] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    eval_share: float = Field(default=1.0, gt=0, le=1)
    jitter: float = Field(default=0.0, ge=0, le=1)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


def protocol_share(size: tuple[int, int]) -> float:
    """Return the side of MAE's evaluation crop as a share of the image's shorter side.

    The share is 0.875 for crops of up to 224 pixels, and 1 for larger crops.
    size: (height, width) of the crop in pixels. Source: `util/datasets.py` of MAE's official code.
    """
    return PROTOCOL_SHARE if min(size) <= LARGEST_CROPPED else 1.0


def crop_for(crop: CropConfig, size: tuple[int, int], designed: tuple[int, int]) -> CropConfig:
    """Adapt the `crop` of a recipe designed for images of size `designed` to images of `size`; both are (H, W).

    A recipe that follows MAE's evaluation protocol follows it at the new size too: above 224 pixels, `eval_share` is 1.
    """
    follows_mae = crop.eval_share == protocol_share(designed) == PROTOCOL_SHARE
    return crop.model_copy(update={"eval_share": protocol_share(size)}) if follows_mae else crop


def center_boxes(sizes: np.ndarray, target: tuple[int, int], share: float = 1.0) -> np.ndarray:
    """Return centred boxes (B, 4) of the target's aspect ratio for images of `sizes` (B, 2).

    share: side of the box, as a share of the side of the largest box that fits.
    """
    return _fixed_boxes(sizes, target, share, np.full((len(sizes), 2), 0.5))


def whole_boxes(sizes: np.ndarray) -> np.ndarray:
    """Return boxes (B, 4) that cover the whole images of `sizes` (B, 2)."""
    return np.concatenate([np.zeros((len(sizes), 2)), sizes], 1)


def crop_boxes(sizes: np.ndarray, target: tuple[int, int], config: CropConfig, draws: np.ndarray) -> np.ndarray:
    """Return the crop boxes (B, 4) of training for images of `sizes` (B, 2); draws: (B, CROP_DRAWS), uniform."""
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
    """Draw Inception-style random resized crops as torchvision does: ten tries, then the largest centred box.

    `config.ratio` is relative to the target's aspect ratio, so a wide target gets wide crops.
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
    """Return the largest centred boxes whose aspect ratio lies within `ratio`."""
    box_w = np.minimum(width, np.maximum(1, np.round(height * ratio[1])))
    box_h = np.minimum(height, np.maximum(1, np.round(width / ratio[0])))
    return np.concatenate([np.floor((height - box_h) / 2), np.floor((width - box_w) / 2), box_h, box_w], 1)


def jitter_colours(images: np.ndarray, strength: float, draws: np.ndarray) -> np.ndarray:
    """Change brightness, contrast and saturation of each image, in this order.

    images: (B, H, W, C); the result has the same dtype. draws: (B, 3) uniform in [0, 1), mapped to three factors from
    1 - strength to 1 + strength. Brightness multiplies the pixels, contrast their distance from the image's mean gray
    level, and saturation their distance from the pixel's own gray level, so saturation does not change gray images. The
    gray level is 0.299 R + 0.587 G + 0.114 B, or the mean of the channels if there are not three. Integer results are
    clipped to the range of their dtype. The result is that of torchvision's ColorJitter without hue, except that
    torchvision applies the changes in random order.
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
    """Return the smallest size (h, w) of the decoded image at which `box` still has the target's resolution."""
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
    """Crop `box` from `image` (H, W, C), resample it to `target` (h, w) and flip it: (h, w, C) in the same dtype.

    out: contiguous array to write to, allocated if None. interpolation: "bicubic" or "bilinear", both with
    antialiasing.

    The implementation depends on box and image:

    - 8-bit gray or RGB, box in whole pixels: cropped first, as in torchvision's resized crop, then resampled by torch's
      integer kernel, which differs from Pillow by 0.05 levels on average.
    - 8-bit gray or RGB, box in fractions of pixels, which is the case after a scaled decode: the same kernel if
      resampling can start within 1/16 of a pixel from a pixel's edge (true of nine in ten boxes; the average difference
      from Pillow is 0.3 levels), otherwise Pillow. Both filters also use a few pixels outside the box.
    - Other channel counts or dtypes: resampled by torch in float32 and clipped to the range of the cropped pixels,
      because bicubic interpolation overshoots.
    """
    if out is None:
        out = np.empty((*target, image.shape[2]), image.dtype)
    numbers = out.view(np.int16) if out.dtype == np.uint16 else out  # torch cannot flip uint16
    pixels = torch.from_numpy(numbers).permute(2, 0, 1)[None]
    top, left, height, width = (float(value) for value in box)
    whole = all(value.is_integer() for value in (top, left, height, width))
    common = image.dtype == np.uint8 and image.shape[2] in (1, 3)
    if whole and (height, width) == target:
        out[...] = _inside(image, (top, left, height, width))
    elif whole and common:
        part = torch.from_numpy(_inside(image, (top, left, height, width)).copy())
        antialias.resample_into(pixels, part.permute(2, 0, 1)[None], interpolation)
    elif common:
        part = _cut_from_pixels(image, (top, left, height, width), target, interpolation)
        if part is None:
            part = _cut_fractions(image, (top, left, height, width), target, interpolation)
        out[...] = part
    else:
        part = _inside(image, (top, left, height, width))
        bands = torch.from_numpy(part.astype(np.float32)).permute(2, 0, 1)[None]
        resized = F.interpolate(bands, size=target, mode=interpolation, align_corners=False, antialias=True)
        resized = resized[0].permute(1, 2, 0).numpy().clip(part.min(), part.max())
        out[...] = resized.round() if np.issubdtype(image.dtype, np.integer) else resized
    if flip:
        pixels.copy_(pixels.flip(3))  # torch flips three channels ten times faster than NumPy
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
    """Crop and resample an image with absent pixels; return (h, w, C) pixels and (h, w) bool, True for valid pixels.

    image: (H, W, C), finite; valid: (H, W) bool; fill: (C,), the value of absent pixels in the result.
    Each resampled pixel is the filter's weighted mean over valid pixels only. A resampled pixel is valid if at least
    half of the filter's weight is on valid pixels.
    """
    top, left, height, width = (float(value) for value in box)
    part, part_valid = (_inside(array, (top, left, height, width)) for array in (image, valid))
    if part.shape[:2] == target:
        pixels, out_valid = part.astype(np.float32), part_valid
    else:
        weights = part_valid[:, :, None].astype(np.float32)
        layers = np.concatenate([(part.astype(np.float32) - fill.astype(np.float32)) * weights, weights], 2)
        resized = F.interpolate(
            torch.from_numpy(layers).permute(2, 0, 1)[None], target, mode=interpolation, antialias=True
        )[0].permute(1, 2, 0).numpy()  # fmt: skip
        share = resized[:, :, -1:]
        out_valid = share[:, :, 0] >= LEAST_VALID
        pixels = fill.astype(np.float32) + resized[:, :, :-1] / np.where(out_valid[:, :, None], share, 1)
        if part_valid.any():
            pixels = pixels.clip(part[part_valid].min(0), part[part_valid].max(0))
    if image.dtype != np.float32:
        pixels = pixels.round()
    pixels = np.where(out_valid[:, :, None], pixels, fill).astype(image.dtype)
    return (pixels[:, ::-1], out_valid[:, ::-1]) if flip else (pixels, out_valid)


def _inside(image: np.ndarray, box: Corners) -> np.ndarray:
    """Return a view of the pixels in the box, rounded to whole pixels and at least one pixel large."""
    top, left, height, width = box
    y, x = int(top), int(left)
    return image[y : max(y + 1, round(top + height)), x : max(x + 1, round(left + width))]


def _cut_from_pixels(
    image: np.ndarray, box: Corners, target: tuple[int, int], interpolation: str = "bicubic"
) -> np.ndarray | None:
    """Resample a crop as `_cut_fractions` does, but with torch's integer kernel, which is four times faster.

    Returns None if `_align_to_pixel` finds no pixel to start at, or if torch does not have the kernel.
    """
    steps = box[2] / target[0], box[3] / target[1]
    rows, columns = _align_to_pixel(box[0], steps[0]), _align_to_pixel(box[1], steps[1])
    if rows is None or columns is None:
        return None
    (y, above), (x, before) = rows, columns
    bottom, right = (math.ceil(box[i] + box[i + 2]) + _reach(steps[i]) for i in (0, 1))
    within = image[max(0, y) : bottom, max(0, x) : right]
    outside = max(0, -y), max(0, -x)
    padded = np.pad(within, ((outside[0], 0), (outside[1], 0), (0, 0)), "edge") if any(outside) else within.copy()
    part = torch.from_numpy(padded)
    # If the output has as many samples as the input has pixels, the kernel copies the pixels and ignores the step, so
    # one more sample is requested.
    size = above + target[0], before + target[1]
    more = size[0] + (size[0] == part.shape[0]), size[1] + (size[1] == part.shape[1])
    resized = antialias.resample_by_steps(part.permute(2, 0, 1)[None], more, steps, interpolation)
    if resized is None:
        return None
    return resized[0, :, above : size[0], before : size[1]].permute(1, 2, 0).numpy()


def _align_to_pixel(first: float, step: float) -> tuple[int, int] | None:
    """Return (pixel to start at, number of samples to discard) for samples that begin at `first`, `step` pixels apart.

    The kernel can only start at a pixel's edge. Resampling therefore starts up to MOST_SKIPPED samples before the box,
    where a sample begins closest to an edge, and the extra samples are discarded. The pixel to start at may lie outside
    the image. Returns None if no sample begins within NEAR_PIXEL of an edge.
    """
    begins = [first - skipped * step for skipped in range(1 + MOST_SKIPPED)]
    errors = [abs(begin - round(begin)) for begin in begins]
    skipped = min(range(len(errors)), key=errors.__getitem__)
    return (round(begins[skipped]), skipped) if errors[skipped] <= NEAR_PIXEL else None


def _reach(step: float) -> int:
    """Return one more than the number of pixels outside a box that the filter uses for samples `step` pixels apart."""
    return math.ceil(2 * max(1, step)) + 1


def _cut_fractions(
    image: np.ndarray, box: Corners, target: tuple[int, int], interpolation: str = "bicubic"
) -> np.ndarray:
    """Resample a box with fractional coordinates from an 8-bit gray or RGB image, using Pillow."""
    # Pillow copies its whole input, at four bytes per pixel, so pass only the pixels that the filter uses.
    part, (top, left, height, width) = _within_reach(image, box, target)
    picture = Image.fromarray(part[:, :, 0] if image.shape[2] == 1 else part)
    edges = (left, top, min(left + width, part.shape[1]), min(top + height, part.shape[0]))
    resized = picture.resize((target[1], target[0]), PILLOW[interpolation], box=edges)
    return np.asarray(resized).reshape(*target, image.shape[2])


def _within_reach(image: np.ndarray, box: Corners, target: tuple[int, int]) -> tuple[np.ndarray, Corners]:
    """Return a view of the pixels that the filter uses, and the box in coordinates of that view."""
    top, left, height, width = box
    reach_y, reach_x = _reach(height / target[0]), _reach(width / target[1])
    y, x = max(0, int(top) - reach_y), max(0, int(left) - reach_x)
    part = image[y : math.ceil(top + height) + reach_y, x : math.ceil(left + width) + reach_x]
    return part, (top - y, left - x, height, width)


def part_size(target: tuple[int, int]) -> tuple[int, int]:
    """Return the maximum size (H, W) of the image parts that `cut_later` writes."""
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
    """Prepare a crop of an 8-bit gray or RGB image for `device_crops.resample`, which does the rest of `cut`.

    Writes the pixels that the crop needs to `out` (H, W, C), whose size is `part_size(target)`, and the position of the
    box in them to `crop` (7,), a row of the argument `crops` of `resample`. A part that does not fit in `out` is
    resampled here; then `resample` only flips it.
    """
    top, left, height, width = (float(value) for value in box)
    if all(value.is_integer() for value in (top, left, height, width)):
        part, place = _inside(image, (top, left, height, width)), (0.0, 0.0, height, width)
    else:
        part, place = _within_reach(image, (top, left, height, width), target)
    if part.shape[0] > out.shape[0] or part.shape[1] > out.shape[1]:
        part, place = cut(image, box, target, False, interpolation=interpolation), (0.0, 0.0, *target)
    out[: part.shape[0], : part.shape[1]] = part
    crop[:] = (*place, *part.shape[:2], flip)


def cut_map(ids: np.ndarray, box: np.ndarray, target: tuple[int, int], flip: bool) -> np.ndarray:
    """Crop and flip a segmentation mask as `cut` does its image: `ids` (H, W) -> (h, w), the same dtype.

    Each pixel gets the id at its centre (nearest neighbour), or IGNORED if the centre lies outside the image.
    """
    rows, ys = _under(box[0], box[2], target[0], ids.shape[0])
    columns, xs = _under(box[1], box[3], target[1], ids.shape[1])
    out = np.where(rows[:, None] & columns, ids[ys[:, None], xs], ids.dtype.type(IGNORED))
    return out[:, ::-1] if flip else out


def _under(first: float, length: float, count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, along one axis, which of the `count` samples lie inside the image, and the pixel at each sample."""
    place = np.floor(first + (np.arange(count) + 0.5) * (length / count)).astype(np.int64)
    return (place >= 0) & (place < side), place.clip(0, side - 1)


def cut_boxes(boxes: np.ndarray, box: np.ndarray, target: tuple[int, int], flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Crop and flip boxes around objects as `cut` does their image.

    boxes: (n, 4) as (x1, y1, x2, y2) in pixels of the full image. Returns the boxes in pixels of the crop, (n, 4)
    float32, clipped to it; and (n,) bool, True for boxes to keep: at least LEAST_LEFT of their area and one pixel of
    each side lie inside the crop.
    """
    corner, scale = box[[1, 0, 1, 0]], np.array([target[1], target[0]] * 2) / box[[3, 2, 3, 2]]
    moved = (boxes - corner) * scale  # (n, 4)
    inside = moved.clip(0, [target[1], target[0]] * 2)
    sides, left = moved[:, 2:] - moved[:, :2], inside[:, 2:] - inside[:, :2]
    keep = (left >= 1).all(1) & (left.prod(1) >= LEAST_LEFT * sides.prod(1))
    if flip:
        inside[:, [0, 2]] = target[1] - inside[:, [2, 0]]
    return inside.astype(np.float32), keep
