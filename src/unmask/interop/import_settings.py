"""Determine the settings of a run that is created from imported weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError

from unmask.batch import ImageSpec
from unmask.config import Config, ConfigError, DataConfig, explain, override, parse, parse_method
from unmask.data.augment import CropConfig, crop_for, protocol_share
from unmask.engine import resolve
from unmask.interop.fit_weights import per_channel
from unmask.interop.foreign.metadata import ExportMetadata
from unmask.interop.foreign.state_dicts import Recognised
from unmask.optim import OptimConfig

RECIPE = "import"
OWN_BIAS = r"encoder\.blocks\.\d+\.relative_bias\.table"
UNSTATED = "not stated; the licence of the exported run applies"
OPTIMS = {
    "beit": OptimConfig(base_lr=1.5e-3 / 8, betas=(0.9, 0.999), final_lr=1 / 150, clip=3.0),
    "classify": OptimConfig(base_lr=1e-3, betas=(0.9, 0.999)),
    "simmim": OptimConfig(base_lr=1e-4 * 256 / 512, betas=(0.9, 0.999), clip=5.0),
    "igpt": OptimConfig(base_lr=0.006, betas=(0.9, 0.95), weight_decay=0),
    "dvae": OptimConfig(base_lr=0.5e-4, betas=(0.9, 0.999), weight_decay=1e-4, warmup=0, final_lr=0.0125),
}
"""The optimiser settings for `pretrain --from` an imported run, by method; methods not listed have those of MAE."""


def require_heads(found: Recognised, settings: Iterable[str]) -> Recognised:
    """Take numbers of heads that the weights do not determine from the user's settings.

    Raises ConfigError if such a number is missing in the settings or does not divide the width.
    """
    given, method = parse(settings), dict(found.method)
    for part in ("encoder", "decoder"):
        if part not in method or (part == "encoder" and method["name"] == "dvae") or "heads" in method[part]:
            continue
        key, width = f"method.{part}.heads", method[part]["width"]
        heads = given.get(key)
        if not isinstance(heads, int) or heads < 1 or width % heads:
            problem = f"got {key}={heads}, which does not divide" if key in given else "unknown number of heads for"
            raise ConfigError(
                f"{problem} the width {width} of this {part}, and the weights do not determine the number of heads; "
                f"give a divisor of {width} with --set {key}=N (heads of published networks have a width of 64 or 32)"
            )
        method[part] = {**method[part], "heads": heads}
    return replace(found, method=method)


def with_export_metadata(found: Recognised, exported: ExportMetadata) -> Recognised:
    """Replace assumptions about the network by the metadata that `unmask export` stored with the weights."""
    if exported.shared_bias:
        found = with_shared_bias(found)
    method = dict(found.method)
    for part, heads in exported.heads.items():
        if part in method:
            method[part] = {**method[part], "heads": heads}
    notes, grid = found.notes, found.grid
    if exported.size is not None:
        rows, columns = (side // patch for side, patch in zip(exported.size, found.patch, strict=True))
        grid = (rows, columns) if rows * columns == found.places else grid
    if method["name"] == "classify" and exported.classes:
        method["classes"] = exported.classes
    if method["name"] == "mae" and exported.target in ("norm_pixels", "pixels"):
        method["target"] = exported.target
        notes = tuple(note for note in notes if not note.startswith("the decoder is taken to predict"))
    return replace(
        found, method=method, notes=notes, grid=grid, kind=f"{found.kind}, exported by unmask",
        eval_share=exported.eval_share, mean=tuple(exported.mean), std=tuple(exported.std),
        statistics="from the exported run", licence=exported.licence or UNSTATED,
    )  # fmt: skip


def with_shared_bias(found: Recognised) -> Recognised:
    """Merge the relative position biases of all blocks into one shared bias, if they are equal."""
    tables = {name: value for name, value in found.weights.items() if re.fullmatch(OWN_BIAS, name)}
    if not tables or not all(torch.equal(value, next(iter(tables.values()))) for value in tables.values()):
        return found
    weights = {name: value for name, value in found.weights.items() if name not in tables}
    weights["encoder.relative_bias.table"] = next(iter(tables.values()))
    return replace(found, weights=weights, method=found.method | {
        "encoder": found.method["encoder"] | {"relative_bias": True}
    })  # fmt: skip


def as_encoder(found: Recognised, why: str) -> Recognised:
    """Reduce a recognised method to its encoder, with the task `encoder`. why: a note for the user."""
    weights = {name: value for name, value in found.weights.items() if name.startswith("encoder.")}
    method = {"name": "encoder", "encoder": found.method["encoder"]}
    return replace(found, method=method, weights=weights, notes=(*found.notes, why))


def choose_method(found: Recognised, settings: list[str], tokenizer: Path | None) -> Recognised:
    """Return the whole method, or only its encoder if the rest cannot be imported.

    tokenizer: run of a dVAE, for a BEiT. Raises ConfigError for a tokenizer or a number of channels that the method
    cannot use.
    """
    given, name = parse(settings), found.method["name"]
    channels = given.get("data.channels", found.channels)
    if tokenizer is not None and name != "beit":
        raise ConfigError(
            f"got --tokenizer {tokenizer}, but this is {found.kind}, which predicts no codes; leave it out"
        )
    if name == "beit" and tokenizer is None:
        return as_encoder(
            found,
            "its head predicts the codes of a dVAE that is not in the file, so only the encoder is imported; for "
            "the whole method, import the dVAE first and give --tokenizer RUN",
        )
    if channels == found.channels or not isinstance(channels, int) or name in ("encoder", "classify"):
        return found
    if name == "igpt":
        raise ConfigError(
            f"got data.channels={channels}, but the palette has colours of {found.channels} channels; leave it out"
        )
    if name == "dvae":
        raise ConfigError(
            f"got data.channels={channels}, but this dVAE is for {found.channels} channels; leave it out, or train one "
            "with `unmask pretrain DATA --recipe dvae_small`"
        )
    return as_encoder(
        found,
        f"the rest of the method is for {found.channels} channels instead of {channels}, so only the encoder is "
        "imported",
    )


def configure(found: Recognised, settings: list[str], origin: str) -> tuple[Config, ImageSpec]:
    """Return the configuration of the new run, and the specification of its images.

    settings: the user's KEY=VALUE. origin: name of the source of the weights. Raises ConfigError for a setting that
    does not exist or that the weights determine.
    """
    resolve.reject_conflicts(parse(settings), None)
    if "graft" in parse(settings):
        raise ConfigError("graft cannot be set: all weights come from the imported file; leave it out")
    method = {**found.method, "origin": origin} if found.method["name"] == "encoder" else found.method
    if found.grid is not None:
        size = found.grid[0] * found.patch[0], found.grid[1] * found.patch[1]
    elif "data.size" in parse(settings):
        size = DataConfig().size
    else:
        raise ConfigError(
            f"got positions for {found.places} patches, which is not a square number; give the image size with --set "
            "data.size=[HEIGHT,WIDTH]"
        )
    crop = CropConfig(eval_share=found.eval_share or protocol_share(size))
    try:
        base = Config(
            recipe=RECIPE,
            method=parse_method(method),
            data=DataConfig(size=size, crop=crop),
            optim=OPTIMS.get(found.method["name"], OptimConfig()),
        )
    except ValidationError as error:
        raise ConfigError(f"weights of {found.name}: {explain(error)}") from None
    config = override(base, settings)
    require_as_found(base, config)
    if found.eval_share is None and "data.crop.eval_share" not in parse(settings):
        crop = crop_for(config.data.crop, config.data.size, size)
        config = config.model_copy(update={"data": config.data.model_copy(update={"crop": crop})})
    return with_statistics(found, config)


def require_as_found(base: Config, config: Config) -> None:
    """Raise ConfigError for a setting that contradicts the weights."""
    before, after = (tree.model_dump()["method"] for tree in (base, config))
    free = {"heads", "feature_layer", "norm_eps"} | ({"patch"} if "colours" in before["encoder"] else set())
    given = ("palette", "palette_dtype", "origin", "tokenizer")
    if changed := [key for key in given if before.get(key) != after.get(key)]:
        raise ConfigError(f"method.{changed[0]} cannot be set: the weights determine it; leave it out")
    for part in ("encoder", "decoder"):
        theirs, ours = before.get(part) or {}, after.get(part) or {}
        for key, value in theirs.items():
            if ours.get(key) != value and key not in free:
                raise ConfigError(
                    f"method.{part}.{key}={ours.get(key)} was set, but the weights have {value}; leave it out: "
                    f"imported weights cannot change shape"
                )


def with_statistics(found: Recognised, config: Config) -> tuple[Config, ImageSpec]:
    """Set channels, mean and standard deviation from the settings, or else from the weights.

    Raises ConfigError if neither the settings nor the weights state a mean and standard deviation.
    """
    channels = config.data.channels or found.channels
    mean, std = config.data.mean, config.data.std
    if found.mean is not None and found.std is not None:
        mean, std = mean or per_channel(found.mean, channels), std or per_channel(found.std, channels)
    if mean is None or std is None:
        raise ConfigError(
            f"these weights are for {found.channels} channels, for which no normalisation is published; give the one "
            "used in their training with --set data.mean=[...] and --set data.std=[...], in the files' units (0 to 255)"
        )
    resolve.require_statistics(channels, mean, std)
    images = ImageSpec(channels=channels, size=config.data.size, dtype="uint8", mean=tuple(mean), std=tuple(std))
    data = {"channels": channels, "mean": images.mean, "std": images.std}
    return config.model_copy(update={"data": config.data.model_copy(update=data)}), images
