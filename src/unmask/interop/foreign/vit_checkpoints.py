"""Read vision transformers of other libraries: official MAE, BEiT and SimMIM, timm, and transformers.

Settings that cannot be read from the weights (mostly the number of heads) come from config.json, from the published
sizes, or from the user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.errors import ForeignError, listed
from unmask.interop.foreign.metadata import NetworkConfig, SourceMetadata, TrainingArguments
from unmask.interop.foreign.state_dicts import (
    HALVES,
    IMAGENET,
    UNKNOWN_LICENCE,
    Names,
    Recognised,
    count_blocks,
    first_sizes,
    matching,
    need,
    pop_first,
    require_same,
    root,
)
from unmask.interop.names import to_ours

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {512: 16}
"""Number of heads of published encoders (HEADS) and of MAE's decoder (DECODER_HEADS), by width."""
MAE_LICENCE = "CC-BY-NC 4.0 (facebookresearch/mae): not for commercial use"
BEIT_LICENCE = "MIT (microsoft/unilm)"
SIMMIM_LICENCE = "MIT (microsoft/SimMIM)"
FOREIGN_PARTS = {
    r"(reg_token|register_tokens|embeddings\.register_tokens)": "register tokens",
    r"blocks\.\d+\.attn\.(q_norm|k_norm)\..+": "a norm on queries and keys",
    r"blocks\.\d+\.mlp\.(fc1_g|fc1_x|w1|w2|w3|w12|weights_in)\..+": "a gated MLP",
    r"blocks\.\d+\.(attn\.norm|mlp\.norm)\..+": "a norm inside attention or MLP",
    r"blocks\.\d+\.(norm3|cross_attn|adaLN.*|conv.*)\..+": "blocks of another architecture",
    r"(dist_token|head_dist\..+)": "a distillation token",
    r"norm_pre\..+": "a norm before the first block",
    r"attn_pool\..+": "attention pooling",
    r"patch_embed\.(backbone|norm|proj\.\d+)\..+": "a stem that is not a single convolution",
}
"""Unsupported parts of vision transformers: patterns of their tensor names, with descriptions."""


def recognise_vit(names: Names, metadata: SourceMetadata) -> Recognised:
    """Read a vision transformer under official names, which timm also uses."""
    network, training = metadata.network, metadata.training
    for pattern, words in FOREIGN_PARTS.items():
        if names.has(pattern):
            raise ForeignError(
                f"this vision transformer has {words} ({listed(matching(names, pattern))}), which is not supported; "
                "expected a plain one"
            )
    transformers = bool(network.model_type) or any("patch_embeddings" in old for old in names.origin.values())
    tensors, simmim = names.tensors, False
    if not transformers:
        simmim = _with_pixel_head(names)
    _prepare(names)
    if "cls_token" not in tensors:
        raise ForeignError("this vision transformer has no class token (cls_token); expected one")
    width, patch, channels = first_sizes(tensors)
    depth = count_blocks(tensors, "blocks")
    beit = names.has(r"rel_pos_bias\..+|blocks\.\d+\.attn\.relative_position_bias_table|lm_head\..+|blocks\.0\.gamma_1")
    beit = (beit or network.model_type == "beit") and not simmim
    full = "decoder_pred.weight" in tensors

    encoder: dict[str, Any] = {"width": width, "depth": depth, "patch": patch}
    encoder["mlp_ratio"] = _ratio(tensors, "blocks.0.mlp", width)
    encoder["positions"] = "absent"
    places, grid = _places(names, network, patch)
    if "pos_embed" in tensors:
        encoder["positions"] = "sincos" if is_sincos(tensors["pos_embed"]) else "learned"
    table = "rel_pos_bias.relative_position_bias_table"
    own = "blocks.0.attn.relative_position_bias_table"
    encoder["relative_bias"] = table in tensors or ("each_block" if own in tensors else False)
    scaled = any(f"blocks.0.{name}" in tensors for name in ("gamma_1", "ls1.gamma"))
    start = network.layer_scale_init_value or (0.1 if depth < 24 else 1e-5)
    encoder["layer_scale"] = start if scaled else None
    encoder["norm_eps"] = 1e-6 if network.layer_norm_eps is None else network.layer_norm_eps
    bias = need(tensors, table if table in tensors else own, 2) if {table, own} & tensors.keys() else None
    heads = network.num_attention_heads or (bias.shape[1] if bias is not None else HEADS.get(width))
    if heads is not None:
        encoder["heads"] = int(heads)
    _require_config(network, encoder, channels)

    normalisation = normalisation_of(metadata, channels, halves=beit)
    if simmim:
        kind, method = "pre-trained", {"name": "simmim", "encoder": encoder, **_simmim_masks(names, patch, training)}
    elif full:
        kind, method = _with_decoder(names, encoder, network, training)
    elif "head.weight" in tensors and "fc_norm.weight" in tensors and len(tensors["head.weight"]) > 1:
        kind, method = _with_head(names, encoder, network)
    else:
        kind, method = _encoder_only(names, encoder, beit=beit)
        hidden = training.num_mask_patches
        if method["name"] == "beit" and hidden is not None and places and grid is not None:
            method["mask_ratio"] = hidden / (grid[0] * grid[1])
            names.notes.append(f"in training, {hidden} of {grid[0] * grid[1]} patches were hidden")
    weights = to_ours(names, method["name"])
    licence = BEIT_LICENCE if beit else MAE_LICENCE if full or encoder["positions"] == "sincos" else UNKNOWN_LICENCE
    if transformers:
        kind, licence = f"transformers {_family(network, beit=beit, full=full)}, {kind}", UNKNOWN_LICENCE
    else:
        kind, licence = _official(kind, encoder, licence, beit=beit, full=full)
    if simmim:
        kind, licence = "SimMIM, pre-trained", SIMMIM_LICENCE
    return Recognised(
        kind=kind,
        licence=licence,
        method=method,
        weights=weights,
        channels=channels,
        patch=patch,
        grid=grid,
        places=places,
        mean=normalisation.mean,
        std=normalisation.std,
        statistics=normalisation.origin,
        notes=tuple(names.notes),
    )


def _with_pixel_head(names: Names) -> bool:
    """Return whether tensors are from official SimMIM; if so, convert its pixel head to a linear layer.

    SimMIM's pixel head is a 1 x 1 convolution followed by a pixel shuffle.
    """
    tensors = names.tensors
    weight, projection = tensors.get("decoder.0.weight"), tensors.get("patch_embed.proj.weight")
    if weight is None or projection is None or "mask_token" not in tensors or projection.ndim != 4:
        return False
    width, channels, height, across = projection.shape
    if weight.shape != (channels * height * across, width, 1, 1) or tensors["decoder.0.bias"].ndim != 1:
        return False
    # The outputs of the convolution have the order (channel, row, column); patch vectors here (row, column, channel).
    shape = (channels, height, across)
    tensors["head.weight"] = tensors.pop("decoder.0.weight").view(*shape, width).permute(1, 2, 0, 3).flatten(0, 2)
    tensors["head.bias"] = tensors.pop("decoder.0.bias").view(*shape).permute(1, 2, 0).flatten()
    return True


def _simmim_masks(names: Names, patch: tuple[int, int], training: TrainingArguments) -> dict[str, Any]:
    """Return SimMIM's settings of patch masks: `mask_cell` (size of a cell in patches) and `mask_ratio`."""
    pixels, ratio = training.mask_patch_size or 32, training.mask_ratio or 0.6
    origin = "from the training's configuration" if training.mask_patch_size else "SimMIM's defaults, not in the file"
    names.notes.append(f"patch masks have cells of {pixels} pixels, {ratio:.0%} of them hidden ({origin})")
    return {"mask_cell": tuple(max(1, pixels // side) for side in patch), "mask_ratio": ratio}


def _prepare(names: Names) -> None:
    """Drop tensors that are not needed, and join separate q, k and v."""
    names.drop(r".*relative_position_index")
    names.drop(r"pooler\.dense\..+", "the pooler (a layer on the class token) is left out")
    names.drop(r"decoder\.0\..+", "the pixel head of masked image modelling is left out")
    tensors = names.tensors
    for prefix in sorted({match[1] for name in tensors if (match := re.match(r"(.*blocks\.\d+\.attn\.)", name))}):
        apart = [tensors.pop(f"{prefix}{part}.weight", None) for part in "qkv"]
        fused = f"{prefix}qkv.weight"
        if all(part is not None for part in apart):
            tensors[fused] = torch.cat([part for part in apart if part is not None])
        if fused not in tensors:
            continue  # `require_whole` later reports all missing tensors
        third = len(tensors[fused]) // 3
        parts = [pop_first(tensors, f"{prefix}{part}.bias", f"{prefix}{part}_bias") for part in "qkv"]
        if any(part is not None for part in parts) or f"{prefix}qkv.bias" not in tensors:
            # A missing bias is set to zero. Keys need no bias, because it would cancel in the softmax.
            tensors[f"{prefix}qkv.bias"] = torch.cat([torch.zeros(third) if part is None else part for part in parts])


def _ratio(tensors: Mapping[str, Tensor], mlp: str, width: int) -> float:
    """Return `mlp_ratio`: the hidden width divided by `width`, such that int(width * mlp_ratio) is the hidden width."""
    hidden, back = len(need(tensors, f"{mlp}.fc1.weight", 2)), need(tensors, f"{mlp}.fc2.weight", 2).shape[1]
    if hidden != back:
        raise ForeignError(
            f"got {mlp} with {hidden} outputs and {back} inputs, a gated MLP, which is not supported; expected a plain "
            "MLP"
        )
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _places(names: Names, network: NetworkConfig, patch: tuple[int, int]) -> tuple[int, tuple[int, int] | None]:
    """Return the number of patches with position embeddings, and the rows and columns of patches (None if unknown).

    The number of patches is 0 for a network that has only a relative position bias. If the embeddings have no row for
    the class token (timm's no_embed_class), a row of zeros is added.
    """
    tensors, stated = names.tensors, None
    if network.image_size is not None:
        sides = network.image_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        stated = height // patch[0], width // patch[1]
    if "pos_embed" in tensors:
        table = need(tensors, "pos_embed", 3)
        rows = table.shape[1]
        with_class = is_sincos(table) or (stated is not None and stated[0] * stated[1] == rows - 1)
        if root(rows) and not with_class:  # 25 rows can be 5 x 5 patches, or 4 x 6 patches and the class token
            tensors["pos_embed"] = table = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
        places = table.shape[1] - 1
        if stated is not None and stated[0] * stated[1] != places:
            raise ForeignError(
                f"config.json states images of {network.image_size} pixels, that is {stated[0]} x {stated[1]} patches "
                f"of {patch[0]} x {patch[1]}, but the weights have positions for {places} patches; the "
                "two files belong to different models"
            )
        side = root(places)
        return places, stated or ((side, side) if side else None)
    tables = [value for name, value in tensors.items() if name.endswith("relative_position_bias_table")]
    if not tables and stated is None:
        raise ForeignError("got neither pos_embed nor a relative position bias; expected one of them")
    side = root(len(tables[0]) - 3) if tables else 0
    return 0, stated or (((side + 1) // 2, (side + 1) // 2) if side % 2 else None)


def is_sincos(table: Tensor) -> bool:
    """Whether position embeddings (1, 1 + N, D) are sines and cosines: in each pair, the squares sum to 1."""
    quarters = table[0, 1:].unflatten(-1, (2, 2, -1)) if table.shape[-1] % 4 == 0 else None
    if quarters is None or table[0, 0].abs().max() > 1e-3:
        return False
    return bool((quarters.square().sum(2) - 1).abs().max() < 1e-2)


def _require_config(network: NetworkConfig, encoder: Mapping[str, Any], channels: int) -> None:
    """Raise ForeignError if config.json contradicts the sizes of the tensors, or states an unsupported activation."""
    patch = encoder["patch"]
    require_same("hidden_size", network.hidden_size, encoder["width"])
    require_same("num_hidden_layers", network.num_hidden_layers, encoder["depth"])
    require_same("intermediate_size", network.intermediate_size, int(encoder["width"] * encoder["mlp_ratio"]))
    require_same("patch_size", network.patch_size, patch[0] if patch[0] == patch[1] else tuple(patch))
    require_same("num_channels", network.num_channels, channels)
    if network.hidden_act not in (None, "gelu"):
        raise ForeignError(f"config.json states hidden_act={network.hidden_act!r}; only the exact GELU is supported")


@dataclass(frozen=True)
class Normalisation:
    """The mean and standard deviation per channel in units of 0..255 (None if unknown), and where they were found."""

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    origin: str


def normalisation_of(metadata: SourceMetadata, channels: int, *, halves: bool) -> Normalisation:
    """Return the normalisation stated in the metadata, or else the published one.

    halves: whether the published mean and std are BEiT's 0.5 and 0.5, instead of ImageNet's.
    """
    found, training = metadata.preprocessor, metadata.training
    for key, values in (("image_mean", found.image_mean), ("image_std", found.image_std)):
        if values is not None and len(values) != channels:
            raise ForeignError(
                f"got {len(values)} values of {key} for a network of {channels} channels; expected one per channel; "
                "settings and weights belong to different models"
            )
    if training.imagenet_default_mean_and_std is not None and channels == 3 and found.image_mean is None:
        usual = IMAGENET if training.imagenet_default_mean_and_std else HALVES
        return Normalisation(*usual, "from the training arguments: imagenet_default_mean_and_std")
    if found.do_normalize is False:
        return Normalisation(
            (0.0,) * channels, (255.0,) * channels, "none: preprocessor_config.json states do_normalize=false"
        )
    if found.image_mean is not None and found.image_std is not None:
        scale = 1.0 if found.do_rescale is False else 1 / (found.rescale_factor or 1 / 255)
        mean, std = (tuple(value * scale for value in values) for values in (found.image_mean, found.image_std))
        origin = "preprocessor_config.json" if training.mean is None else "the training arguments"
        return Normalisation(mean, std, f"from {origin}")
    if channels != 3:
        return Normalisation(None, None, "")
    return (
        Normalisation(*HALVES, "0.5 and 0.5, as in BEiT")
        if halves
        else Normalisation(*IMAGENET, "ImageNet's, as in MAE")
    )


def _with_decoder(
    names: Names, encoder: dict[str, Any], network: NetworkConfig, training: TrainingArguments
) -> tuple[str, dict[str, Any]]:
    """Return the kind and settings of an MAE with its decoder."""
    tensors = names.tensors
    width = len(need(tensors, "decoder_embed.weight", 2))
    decoder: dict[str, Any] = {"width": width, "depth": count_blocks(tensors, "decoder_blocks")}
    require_same("decoder_hidden_size", network.decoder_hidden_size, width)
    require_same("decoder_num_hidden_layers", network.decoder_num_hidden_layers, decoder["depth"])
    heads = network.decoder_num_attention_heads or DECODER_HEADS.get(width)
    if heads is not None:
        decoder["heads"] = heads
    method = {"name": "mae", "encoder": encoder, "decoder": decoder}
    if network.norm_pix_loss is not None:
        method["target"] = "norm_pixels" if network.norm_pix_loss else "pixels"
        method["mask_ratio"] = 0.75 if network.mask_ratio is None else network.mask_ratio
        return "full", method
    if training.mask_ratio is not None:
        method["mask_ratio"] = training.mask_ratio
    if training.norm_pix_loss is not None:
        method["target"] = "norm_pixels" if training.norm_pix_loss else "pixels"
        return "full", method
    names.notes.append(
        "the decoder is taken to predict pixels normalised within each patch, as in the official full files; one of "
        "the visualise files predicts plain pixels, which its weights do not reveal: for that file, use --set "
        "method.target=pixels"
    )
    return "full or visualise", method


def _with_head(names: Names, encoder: dict[str, Any], network: NetworkConfig) -> tuple[str, dict[str, Any]]:
    """Return the kind and settings of a classifier on the mean of the patch tokens."""
    count = len(names.tensors["head.weight"])
    labels = network.id2label or network.label_names or {}
    texts = [str(labels[key]) for key in sorted(labels, key=int)] if isinstance(labels, Mapping) else list(labels)
    classes = texts if len(texts) == count else [f"class {number}" for number in range(count)]
    # The class number is appended to duplicate names (ImageNet has two classes called crane) to keep them distinct.
    classes = [name if classes.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(classes)]
    names.drop("mask_token")
    _plain_norm(names)
    return "fine-tuned", {"name": "classify", "encoder": encoder, "classes": classes}


def _encoder_only(names: Names, encoder: dict[str, Any], *, beit: bool) -> tuple[str, dict[str, Any]]:
    """Return the kind and settings of a pre-trained BEiT, or of an encoder whose head, if any, is not supported."""
    if beit and "lm_head.weight" in names.tensors and "mask_token" in names.tensors:
        names.drop(r"(fc_norm|head)\..+")
        return "pre-trained", {"name": "beit", "encoder": encoder}
    names.drop(r"lm_head\..+", "the head that predicts codes is left out")
    if names.has(r"head\..+"):
        words = "on the class token" if "norm.weight" in names.tensors else "with one output or several layers"
        names.drop(
            r"head\..+", f"the classifier {words} is left out: classifiers here are linear on the mean of patch tokens"
        )
    _plain_norm(names)
    names.drop(r"fc_norm\..+", "the norm of the mean of patch tokens is left out")
    names.drop("mask_token")
    return "encoder only", {"name": "encoder", "encoder": encoder}


def _plain_norm(names: Names) -> None:
    """Add a norm with gain 1 and bias 0 after the last block if the network normalises only after pooling."""
    tensors = names.tensors
    if "norm.weight" in tensors or "fc_norm.weight" not in tensors:
        return
    width = len(tensors["fc_norm.weight"])
    tensors |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    names.notes.append(
        "the network has no norm after the last block, so embed and probe use tokens normalised with gain 1 and bias 0"
    )


def _family(network: NetworkConfig, *, beit: bool, full: bool) -> str:
    named = {"vit_mae": "ViTMAE", "vit": "ViT", "beit": "BEiT"}.get(str(network.model_type))
    return named or ("BEiT" if beit else "ViTMAE" if full else "ViT")


def _official(kind: str, encoder: Mapping[str, Any], licence: str, *, beit: bool, full: bool) -> tuple[str, str]:
    """Return (kind, licence) of a checkpoint under official names, which MAE, BEiT and timm share."""
    if beit:
        return f"BEiT, {kind}", licence
    if full or encoder["positions"] == "sincos":
        return f"official MAE, {kind}", licence
    if kind == "fine-tuned":
        return "official MAE or timm ViT, fine-tuned", f"for official MAE {MAE_LICENCE}; for others {UNKNOWN_LICENCE}"
    return f"timm ViT, {kind}", licence
