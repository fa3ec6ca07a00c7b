"""Fit imported weights to another image size and number of channels.

another size       position embeddings and relative position biases are interpolated in two dimensions (bicubic,
                   without aligned corners); the row of the class token is unchanged
1 channel          the patch projection is summed over its channels, so that a gray image has the same features as
                   with three equal channels; if the user sets mean or std, it is the plain sum
C channels         the channels of the patch projection are repeated cyclically and scaled by 3 / C; mean and std
                   are repeated
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.batch import ImageSpec
from unmask.config import Config, ConfigError
from unmask.errors import ForeignError, listed
from unmask.interop.foreign.state_dicts import Recognised
from unmask.nn import positions
from unmask.nn.patches import grid_of


def per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Convert a list of values per channel to another number of channels: average it for one, otherwise repeat it."""
    if channels == len(values):
        return values
    return (sum(values) / len(values),) if channels == 1 else tuple(values[i % len(values)] for i in range(channels))


def fitted(
    found: Recognised, config: Config, images: ImageSpec, *, by_hand: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt imported weights to the size and channels of `images`; return them, and sentences about the changes.

    by_hand: whether the user set mean or std; if so, they can differ from the mean and std used in training.
    """
    weights, changes = dict(found.weights), []
    if images.channels != found.channels:
        weight, bias = (weights[f"encoder.patch_embed.proj.{leaf}"] for leaf in ("weight", "bias"))
        norms = None if by_hand or found.mean is None or found.std is None else (found.mean, found.std)
        weight, bias = other_channels(weight, bias, images, norms)
        weights |= {"encoder.patch_embed.proj.weight": weight, "encoder.patch_embed.proj.bias": bias}
        how = "summed" if images.channels == 1 else "repeated and scaled"
        per = f"{images.channels} channel" + "s" * (images.channels > 1)
        changes.append(f"the patch projection of {found.channels} channels is {how} to fit {per}")
    encoder: Any = config.method
    new = grid_of(images.size, encoder.encoder.patch)
    old = found.grid or new
    if found.places and old[0] * old[1] != found.places:
        raise ConfigError(
            f"data.size={list(images.size)} has {new[0]} x {new[1]} patches, but the weights have positions for "
            f"{found.places} patches of an unknown rectangle; set data.size to the size used in training"
        )
    if old != new:
        moved = {name: positions.fitted(name, value, old, new) for name, value in weights.items()}
        if any(moved[name] is not weights[name] for name in weights):
            changes.append(f"positions are interpolated from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches")
        weights = moved
    return weights, changes


def other_channels(
    weight: Tensor, bias: Tensor, images: ImageSpec, norms: tuple[tuple[float, ...], tuple[float, ...]] | None
) -> tuple[Tensor, Tensor]:
    """Adapt a patch projection (D, C, h, w) and its bias (D,) to other channels; see the module docstring.

    norms: mean and standard deviation per channel used in training, or None. If they are given, a gray image
    (normalised by a single mean and standard deviation) has exactly the same features as an image with three equal
    channels.
    """
    before, after = weight.shape[1], images.channels
    if after > 1:
        return weight[:, [number % before for number in range(after)]] * (before / after), bias
    if norms is None:
        return weight.sum(1, keepdim=True), bias
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in norms)
    shift = ((images.mean[0] - mean) / std * weight.double()).sum((1, 2, 3))
    return (weight.double() * images.std[0] / std).sum(1, keepdim=True).float(), (bias.double() + shift).float()


def require_whole(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    """Raise ForeignError, with tensor names, unless weights match the tensors of the method exactly and are finite."""
    missing, left = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    both = [(name, weights[name], value) for name, value in wanted.items() if name in weights]
    shapes = [
        f"{name} {tuple(found.shape)} instead of {tuple(value.shape)}"
        for name, found, value in both
        if found.shape != value.shape
    ]
    types = [
        f"{name} {found.dtype} instead of {value.dtype}"
        for name, found, value in both
        if found.is_floating_point() != value.is_floating_point()
    ]
    faults = {"missing": missing, "left over": left, "of another shape": shapes, "of another type": types}
    if any(faults.values()):
        named = "; ".join(f"{len(names)} {how}: {listed(names)}" for how, names in faults.items() if names)
        raise ForeignError(
            f"{what} is incomplete or different ({named}); the file is truncated, from a variant of this network, or "
            "a mix of two files"
        )
    if bad := [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise ForeignError(
            f"{what} has values that are not finite in {listed(bad)}; the file is damaged, or its training diverged"
        )


def described(images: ImageSpec) -> dict[str, Tensor]:
    """Return the encoder's buffers that hold mean, std and value range of the images, by name."""
    low, high = images.value_range
    values = {"mean": images.mean, "std": images.std, "low": low, "high": high}
    return {f"encoder.{name}": torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
