"""Check the images passed to a trained encoder: type, shape, number of channels, and the units of the values.

An encoder subtracts the mean of its training data and divides by their standard deviation itself, so it expects the
values of the files. Images in another range (0 to 1 of torchvision's ToTensor, or already normalised) would yield
plausible, wrong features without any error. The checks run in the public entry points (`encoder(images)`,
`method.logits(images)`, `method.predict(images)`), not in the training loss: reading the range of float images waits
for the device. The values are not read while a graph is traced, compiled or exported.

Letters: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from unmask.batch import ImageSpec
from unmask.errors import UserError
from unmask.nn.torch_internals import has_no_values, in_transform

Scale = Literal["data", "unit"]
"""Units of images: those of the files ("data"), or 0 to 1 for 8-bit and 16-bit data ("unit")."""

FULL = {"uint8": 255.0, "uint16": 65535.0}  # Greatest possible value in a file; float files have none.
LEAST_RANGE = 32.0  # In data of a smaller range, values up to 1 are plausible.
ROUNDING = 1e-3
OVERSHOOT = 0.25  # Fraction of the range by which resampling may overshoot.
FARTHEST = 50.0  # Greatest plausible distance of a batch's mean from the data's, in standard deviations.
LARGEST_NORMALISED = 16.0
SHOWN = 4  # Number of channels whose statistics a message shows.
NEAREST = 1.5  # Values near 0 are untypical if mean > NEAREST x standard deviation.


def require_images(images: Any, spec: ImageSpec) -> None:
    """Raise UserError unless `images` is a real tensor (B, C, H, W) with the channels of the data."""
    expected = f"(B, {spec.channels}, H, W)"
    if not isinstance(images, Tensor):
        shape = f" of shape {tuple(images.shape)}" if hasattr(images, "shape") else ""
        raise UserError(
            f"got {_type_name(images)}{shape}; expected a torch.Tensor of shape {expected} with the files' values; "
            f"use {_conversion(images, spec.channels)}"
        )
    if images.dtype == torch.bool or images.is_complex():
        raise UserError(
            f"got images of dtype {images.dtype}; expected numbers in the units of the training data ({_about(spec)}); "
            + ("use images.to(torch.uint8) * 255" if images.dtype == torch.bool else "pass real numbers")
        )
    shape, channels = tuple(images.shape), spec.channels
    if len(shape) == 4 and shape[1] == channels:
        return
    last = len(shape) in (3, 4) and shape[-1] == channels
    if len(shape) == 4 and last:
        advice = "channels come second: pass images.permute(0, 3, 1, 2)"
    elif len(shape) == 3 and shape[0] == channels:
        advice = "a batch is expected: pass images[None] for one image"
    elif len(shape) == 3 and last:
        advice = "a batch with the channels second is expected: pass images.permute(2, 0, 1)[None] for one image"
    elif len(shape) in (2, 3) and channels == 1:
        advice = "pass images[None, None]" if len(shape) == 2 else "pass images[:, None] for a batch of gray images"
    elif len(shape) == 4 and channels == 3 and shape[1] == 1:
        advice = f"this encoder was trained on {channels}-channel images: repeat gray with images.expand(-1, 3, -1, -1)"
    elif len(shape) == 4 and channels == 3 and shape[1] == 4:
        advice = "drop the alpha channel with images[:, :3]"
    else:
        advice = f"this encoder was trained on {channels}-channel images"
    raise UserError(f"got images of shape {shape}; expected {expected}; {advice}")


def in_data_units(images: Tensor, spec: ImageSpec, scale: Scale | None = None) -> Tensor:
    """Convert images (B, C, H, W) to the files' units; see `ImageEncoder.accept`. Raises UserError."""
    if scale not in (None, "data", "unit"):
        raise UserError(f'got scale={scale!r}; expected None, "data" or "unit"')
    if scale == "unit":
        return _from_unit(images, spec)
    if scale is None and not _unambiguous(images, spec) and _readable(images):
        low, high, away = _range(images, spec)
        if fault := _fault(low, high, away=away, spec=spec, dtype=str(images.dtype).removeprefix("torch.")):
            raise UserError(fault)
    return images


def _from_unit(images: Tensor, spec: ImageSpec) -> Tensor:
    if spec.dtype not in FULL:
        raise UserError(
            f'got scale="unit"; expected the files\' units: this encoder was trained on float images ({_about(spec)}), '
            "which have no full range to scale 0 to 1 to; pass the values of the files"
        )
    if not images.is_floating_point():
        raise UserError(
            f'got scale="unit" with {images.dtype} images; expected floats between 0 and 1; leave scale out'
        )
    if _readable(images):
        low, high, _ = _range(images, spec)
        if not (math.isfinite(low) and low >= -2 * OVERSHOOT and high <= 1 + 2 * OVERSHOOT):
            raise UserError(
                f'got scale="unit" with values from {low:.4g} to {high:.4g}; expected 0 to 1; leave scale out for '
                "values in the files' units, and leave normalisation to the encoder"
            )
    return images.to(torch.float64 if images.dtype == torch.float64 else torch.float32) * FULL[spec.dtype]


def _unambiguous(images: Tensor, spec: ImageSpec) -> bool:
    """Return whether the dtype alone shows that the images have the values of the files."""
    return str(images.dtype) == f"torch.{spec.dtype}" != "torch.float32"


def _readable(images: Tensor) -> bool:
    """Return whether the values can be read: not in a traced or compiled graph, nor from tensors without values."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or has_no_values(images)
    return not traced and not in_transform(images) and images.shape.numel() > 0


@torch.no_grad()
def _range(images: Tensor, spec: ImageSpec) -> tuple[float, float, float]:
    """Return the least and the greatest value, and how many standard deviations a channel's mean is at most away from
    the data's.

    The call synchronises with the device once.
    """
    values = images.detach().float()
    low, high = values.aminmax()
    mean, std = (torch.tensor(numbers, device=values.device) for numbers in (spec.mean, spec.std))
    away = ((values.mean((0, 2, 3)) - mean) / std).abs().max()
    result = torch.stack([low, high, away]).tolist()
    return result[0], result[1], result[2]


def _fault(low: float, high: float, away: float, spec: ImageSpec, dtype: str) -> str:
    """Return an error message with the fix for values from `low` to `high`, or "" if they are plausible."""
    got, full = f"got {dtype} images with values from {low:.4g} to {high:.4g}", FULL.get(spec.dtype)
    keep = 'or scale="data" if the values are right as they are'
    if not (math.isfinite(low) and math.isfinite(high)):
        return (
            "got images with values that are not finite (NaN or infinity); expected numbers in every pixel; fill "
            "absent pixels with the mean of the data: torch.where(images.isfinite(), images, "
            "torch.tensor(encoder.spec.mean)[:, None, None])"
        )
    if full == FULL["uint16"] and dtype == "uint8":
        return (
            f"{got}; expected the units of the training data ({_about(spec)}); pass the 16-bit values, or 8-bit images "
            "times 257 (images.to(torch.int32) * 257), as in training"
        )
    if low == high == 0:
        return ""  # zeros are black in all units
    near_zero = _near_zero(spec)
    if near_zero and max(abs(low), abs(high)) <= 1 + ROUNDING:
        fix = 'scale="unit" for values between 0 and 1 (ToTensor)' if full else "the values as they are in the files"
        return (
            f"{got}; expected the units of the training data ({_about(spec)}), in which these would be almost black; "
            f"pass {fix}, {keep}"
        )
    negative = low < -OVERSHOOT * max(abs(high), 1)
    if negative and (full or (near_zero and max(-low, high) <= LARGEST_NORMALISED)):
        fix = 'pass scale="unit" after ToTensor alone' if full else "pass the values as they are in the files"
        return (
            f"{got}, as after normalisation; expected the units of the training data ({_about(spec)}): the encoder "
            f"subtracts the mean and divides by the standard deviation itself; leave Normalize out and {fix}, {keep}"
        )
    if (full and max(-low, high - full) > OVERSHOOT * full) or (not full and away > FARTHEST):
        return (
            f"{got}; expected the units of the training data ({_about(spec)}); convert the values to these units, "
            f"{keep}"
        )
    return ""


def _near_zero(spec: ImageSpec) -> bool:
    """Return whether values up to 1 cover only a tiny, untypical part of the data's range."""
    largest = max(mean + 2 * std for mean, std in zip(spec.mean, spec.std, strict=True))
    if spec.dtype in FULL:
        return largest >= LEAST_RANGE
    # Float data may have a mean near 0 (heights above sea level): then values near 0 are typical.
    return largest >= LEAST_RANGE and all(mean > NEAREST * std for mean, std in zip(spec.mean, spec.std, strict=True))


def _about(spec: ImageSpec) -> str:
    """Describe the data's dtype, range and statistics."""
    kind = {"uint8": "uint8, 0 to 255", "uint16": "uint16, 0 to 65535"}.get(spec.dtype, spec.dtype)
    mean, std = (", ".join(f"{value:.4g}" for value in values[:SHOWN]) for values in (spec.mean, spec.std))
    more = ", ..." if spec.channels > SHOWN else ""
    return f"{kind}; mean {mean}{more}, standard deviation {std}{more}"


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def _conversion(value: Any, channels: int) -> str:
    """Return code that converts a NumPy array or a Pillow image to a batch."""
    shape = getattr(value, "shape", None)
    if shape is None:
        code, shape = "torch.from_numpy(numpy.array(image))", (0, 0) if channels == 1 else (0, 0, channels)
    else:
        code = "torch.from_numpy(array)"
    if len(shape) == 2:
        return f"{code}[None, None]"
    last = shape[-1] == channels and shape[-3] != channels
    order = {3: ".permute(2, 0, 1)", 4: ".permute(0, 3, 1, 2)"}.get(len(shape), "") if last else ""
    return code + order + "[None]" * (len(shape) == 3)
