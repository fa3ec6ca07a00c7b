"""Our weights under the names of others: the way back from `interop/foreign/names.py`, whose tables it reads right to
left.

    official MAE     and timm's plain vision transformers, which have the same names
    BEiT             official, and timm's
    transformers     ViT, ViTMAE, BEiT and ImageGPT, under the names in files

Where several names of others are one of ours, the first of the table is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unmask.interop.foreign.names import BEIT_SCALES, BLOCK_NAMES, GPT_NAMES, OFFICIAL, OTHER_NAMES, renamed


def turned(table: dict[str, str]) -> dict[str, str]:
    """Values to keys; of several keys the first."""
    return {new: old for old, new in reversed(table.items())}


TO_OFFICIAL = turned(OFFICIAL) | {"mask_token": "mask_token", "decoder.mask_token": "mask_token"}
TO_BEIT = TO_OFFICIAL | turned(BEIT_SCALES)
BLOCKS, OTHERS, GPT_BLOCKS = turned(BLOCK_NAMES), turned(OTHER_NAMES), turned(GPT_NAMES)


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of official MAE. Those that are no parameters (mean and std) have none there."""
    return _under(weights, TO_OFFICIAL)


def to_beit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under the names of official BEiT, which are those of timm's.

    Keys have no bias there, and none is needed: it adds the same to the scores that a query has for all keys, which
    the softmax takes out again.
    """
    found = {}
    for name, value in _under(weights, TO_BEIT).items():
        if name.endswith(".attn.qkv.bias"):
            queries, _, values = value.chunk(3)
            stem = name.removesuffix("qkv.bias")
            found |= {f"{stem}q_bias": queries.clone(), f"{stem}v_bias": values.clone()}
        else:
            found[name] = value
    return found


def _under(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        if name not in ("encoder.mean", "encoder.std"):
            new = renamed(name, table)
            assert new is not None, f"{name} has no name there, and should not have been asked for"
            found[new] = value
    return found


def to_transformers(weights: Mapping[str, Tensor], *, beit: bool, prefix: str = "") -> dict[str, Tensor]:
    """Our tensors under the names that transformers has in files: of BEiT, or of ViT and ViTMAE.

    prefix: of the encoder, where it is a part of a larger model ("vit.", "beit.").
    """
    found = {}
    for name, value in (to_beit if beit else to_official)(weights).items():
        for plain, part in _apart(name, value).items():
            new = _transformers_name(plain)
            if plain == "mask_token" and not beit:
                new = "decoder.mask_token"
            elif not new.startswith(("decoder.", "classifier.")):
                new = prefix + new
            found[new] = part
    return found


def _apart(name: str, value: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values one by one."""
    stem, attn, last = name.rpartition(".attn.")
    if last.startswith("qkv."):
        leaf = last.removeprefix("qkv.")
        return {f"{stem}{attn}{part}.{leaf}": piece.clone() for part, piece in zip("qkv", value.chunk(3), strict=True)}
    return {f"{stem}{attn}{last[0]}.bias" if last in ("q_bias", "v_bias") else name: value}


def _transformers_name(plain: str) -> str:
    """What a tensor of an official name is called in files of transformers."""
    stem, _, leaf = plain.rpartition(".")
    if match := re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(?:gamma_([12])|(.+)\..+)", plain):
        layer = f"{'decoder.decoder_layers' if match[1] else 'encoder.layer'}.{match[2]}"
        return f"{layer}.lambda_{match[3]}" if match[3] else f"{layer}.{BLOCKS[match[4]]}.{leaf}"
    return OTHERS[plain] if plain in OTHERS else f"{OTHERS[stem]}.{leaf}"


def to_image_gpt(weights: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """An iGPT's tensors under the names of transformers' ImageGPT; see `interop/foreign/openai.py`. Biases there are
    zeros."""
    plain = {"encoder.positions": "wpe.weight", "encoder.norm.weight": "ln_f.weight"}
    table = torch.cat([weights["encoder.tokens"], weights["encoder.sos"][None]])
    found = {f"{prefix}wte.weight": table}
    for name, value in weights.items():
        if match := re.fullmatch(r"encoder\.blocks\.(\d+)\.(.+)", name):
            new = f"{prefix}h.{match[1]}.{GPT_BLOCKS[match[2]]}"
            found[new] = value.T.contiguous() if value.ndim == 2 else value
            if value.ndim == 2:
                found[new.removesuffix("weight") + "bias"] = torch.zeros(len(value))
        elif name in plain:
            found[prefix + plain[name]] = value
        elif name == "head.weight":
            found["lm_head.weight"] = value
        else:
            assert name in ("encoder.tokens", "encoder.sos", "encoder.palette"), f"{name} has no name there"
    return found
