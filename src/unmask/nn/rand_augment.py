"""RandAugment and random erasing on the device, for training with labels.

Cubuk et al. 2020, "RandAugment", in the form that MAE's fine-tuning uses (timm's `rand-m9-mstd0.5-inc1`): two of
fifteen operations are drawn for each image, and each is applied with probability one half, at a strength around
`magnitude`. Zhong et al. 2020, "Random erasing": a random box is filled with noise. As in timm, shears keep the upper
left corner in place and all geometric operations are bicubic.

Operations are drawn on the host from the image's place in the global batch and the step, so a resumed run repeats them
and nothing is read back from a GPU. Colour operations use values scaled to [0, 1] by `ImageSpec.value_range`, and
augmented images are clipped to this range; pixels from outside the image have the data set's mean colour. Saturation is
changed in three-channel images only.

Letters: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

OPERATIONS = 2  # Number of operations per image.
PROBABILITY = 0.5  # Probability of applying an operation.
SPREAD = 0.5  # Standard deviation of the magnitude.
MOST = 10.0  # Greatest magnitude.
DRAWS = 4 * OPERATIONS  # Number of random draws. Per operation: kind, decision to apply it, strength, sign.
SMOOTH = [[1 / 13, 1 / 13, 1 / 13], [1 / 13, 5 / 13, 1 / 13], [1 / 13, 1 / 13, 1 / 13]]  # Pillow's filter SMOOTH.
ERASE_DRAWS = 5  # Number of random draws: decision to erase; area, aspect ratio, row and column of the box.
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)

Unit = Float[Tensor, "B C H W"]
Operation = Callable[[Unit, np.ndarray, np.ndarray, Tensor], Tensor]
"""(images in [0, 1], strengths in [0, 1], signs, fill colour) -> images."""


def rand_augment(unit: Unit, draws: Float[np.ndarray, "B 8"], magnitude: float, fill: Float[Tensor, "C 1 1"]) -> Unit:
    """Augment images with values of about 0 to 1.

    draws: uniform in [0, 1), eight for each image. fill: colour of pixels from outside the image.
    """
    from scipy.special import ndtri

    operations = [op for name, op in ALL.items() if unit.shape[1] == 3 or name != "saturation"]
    unit = unit.clone()
    for which, whether, strong, way in draws.reshape(len(draws), OPERATIONS, 4).transpose(1, 2, 0):
        chosen = np.minimum((which * len(operations)).astype(int), len(operations) - 1)
        strength = (magnitude + SPREAD * ndtri(np.clip(strong, 1e-6, 1 - 1e-6))).clip(0, MOST) / MOST
        for number, operation in enumerate(operations):
            rows = np.flatnonzero((chosen == number) & (whether < PROBABILITY))
            if len(rows):
                at = torch.from_numpy(rows).to(unit.device, non_blocking=True)
                signs = np.where(way[rows] < 0.5, -1.0, 1.0)
                unit[at] = operation(unit[at].clamp(0, 1), strength[rows], signs, fill).clamp(0, 1)
    return unit


def erase(
    images: Float[Tensor, "B C H W"],
    draws: Float[np.ndarray, "B 5"],
    probability: float,
    mean: Float[Tensor, " C"],
    std: Float[Tensor, " C"],
    seeds: Int[np.ndarray, " B"],
) -> Float[Tensor, "B C H W"]:
    """Replace a random box in some of the images by normal noise.

    mean, std: mean and standard deviation of the noise in each channel. seeds: seed of the noise of each image.
    """
    height, width = images.shape[2:]
    generator = torch.Generator(images.device)
    images = images.clone()
    logs = np.log(ERASED_ASPECT)
    for row, (whether, area, aspect, down, across) in enumerate(draws.tolist()):
        area = (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0])) * height * width
        aspect = float(np.exp(logs[0] + aspect * (logs[1] - logs[0])))
        tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if whether >= probability or not (0 < tall < height and 0 < wide < width):
            continue
        top, left = int(down * (height - tall + 1)), int(across * (width - wide + 1))
        generator.manual_seed(int(seeds[row]))
        noise = torch.randn(len(mean), tall, wide, generator=generator, device=images.device)
        images[row, :, top : top + tall, left : left + wide] = noise * std[:, None, None] + mean[:, None, None]
    return images


# Operations


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def _factors(x: Tensor, strength: np.ndarray, signs: np.ndarray) -> Tensor:
    """Return 1 + sign x 0.9 x strength, at least 0.1, as (B, 1, 1, 1)."""
    return _tensor(np.maximum(0.1, 1 + signs * 0.9 * strength), x)[:, None, None, None]


def _blend(base: Tensor, x: Tensor, factors: Tensor) -> Tensor:
    """Move x away from `base` (factor above 1) or towards it (factor below 1)."""
    return base + (x - base) * factors


def _gray(x: Tensor) -> Tensor:
    weights = [0.299, 0.587, 0.114] if x.shape[1] == 3 else [1 / x.shape[1]] * x.shape[1]
    return (x * x.new_tensor(weights)[:, None, None]).sum(1, keepdim=True)


def _brightness(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    return _blend(torch.zeros_like(x), x, _factors(x, strength, signs))


def _contrast(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    return _blend(_gray(x).mean((2, 3), keepdim=True), x, _factors(x, strength, signs))


def _saturation(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    return _blend(_gray(x), x, _factors(x, strength, signs))


def _sharpness(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    from kornia.filters import filter2d

    smooth = filter2d(x, x.new_tensor(SMOOTH)[None], border_type="replicate")
    return _blend(smooth, x, _factors(x, strength, signs))


def _auto_contrast(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    least, most = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(most > least, (x - least) / (most - least).clamp(min=1e-6), x)


def _equalise(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    from kornia.enhance import equalize

    return equalize(x)


def _invert(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    return 1 - x


def _posterise(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    """Clear the lowest 4 + 4 x strength bits of 8-bit values."""
    step = 2.0 ** (4 + (4 * strength).astype(int))
    steps = _tensor(step, x)[:, None, None, None]
    return ((x * 255).round() / steps).floor() * steps / 255


def _solarise(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    return torch.where(x >= _tensor(1 - strength, x)[:, None, None, None], 1 - x, x)


def _solarise_add(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    added = x + _tensor(strength * 110 / 255, x)[:, None, None, None]
    return torch.where(x < 128 / 255, added.clamp(max=1), x)


def warp(x: Unit, inverse: Float[np.ndarray, "B 2 3"], fill: Float[Tensor, "C 1 1"]) -> Unit:
    """Apply affine maps as Pillow's `Image.transform` does (bicubic).

    inverse: maps coordinates in the result to coordinates in `x`.

    Coordinates are (x, y) with the origin at the upper left corner of the image and pixel centres at halves. Pillow's
    kernel is steeper than torch's (a = -1, where `grid_sample` has -0.75). Pixels from outside the image have the
    colour `fill`.
    """
    height, width = x.shape[2:]
    across, down = (torch.arange(n, device=x.device, dtype=x.dtype) + 0.5 for n in (width, height))
    matrix = _tensor(inverse, x)[..., None, None]  # (B, 2, 3, 1, 1)
    at_x, at_y = (matrix[:, i, 0] * across + matrix[:, i, 1] * down[:, None] + matrix[:, i, 2] for i in (0, 1))
    inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)  # (B, H, W)
    (columns, column_weights), (rows, row_weights) = _taps(at_x, width), _taps(at_y, height)
    pixels, result = x.flatten(2), torch.zeros_like(x)
    for row, row_weight in zip(rows, row_weights, strict=True):
        for column, column_weight in zip(columns, column_weights, strict=True):
            place = (row * width + column).flatten(1)[:, None].expand(-1, x.shape[1], -1)
            result += pixels.gather(2, place).view_as(x) * (row_weight * column_weight)[:, None]
    return torch.where(inside[:, None], result, fill)


def _taps(at: Float[Tensor, "B H W"], size: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return the four pixels around each coordinate along one axis (edge pixels are repeated), and their weights."""
    first = (at - 0.5).floor()
    d = at - 0.5 - first
    weights = (-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2)
    return [(first.long() + n).clamp(0, size - 1) for n in (-1, 0, 1, 2)], weights


def _affine(count: int) -> np.ndarray:
    return np.tile(np.array([[1.0, 0, 0], [0, 1, 0]]), (count, 1, 1))


def _rotate(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
    """Rotate about the centre of the image."""
    angle, middle = np.deg2rad(30 * strength * signs), np.array([x.shape[3] / 2, x.shape[2] / 2])
    matrices = _affine(len(x))
    matrices[:, :, :2] = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], 1).reshape(-1, 2, 2)
    matrices[:, :, 2] = middle - matrices[:, :, :2] @ middle
    return warp(x, matrices, fill)


def _shear(axis: int) -> Operation:
    def shear(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
        """Shear about the upper left corner, which stays in place."""
        matrices = _affine(len(x))
        matrices[:, axis, 1 - axis] = -0.3 * strength * signs
        return warp(x, matrices, fill)

    return shear


def _translate(axis: int) -> Operation:
    def translate(x: Tensor, strength: np.ndarray, signs: np.ndarray, fill: Tensor) -> Tensor:
        matrices = _affine(len(x))
        matrices[:, axis, 2] = -0.45 * strength * signs * x.shape[3 - axis]
        return warp(x, matrices, fill)

    return translate


ALL: dict[str, Operation] = {
    "auto contrast": _auto_contrast,
    "equalise": _equalise,
    "invert": _invert,
    "rotate": _rotate,
    "posterise": _posterise,
    "solarise": _solarise,
    "solarise add": _solarise_add,
    "saturation": _saturation,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear x": _shear(0),
    "shear y": _shear(1),
    "translate x": _translate(0),
    "translate y": _translate(1),
}
