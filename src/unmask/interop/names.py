"""Tables of tensor names, and functions that rename the tensors of imports and exports.

An import renames tensors in two steps: from transformers' names to official names (those of official MAE, BEiT and
timm), and from official names to unmask's names. An export reverses these steps. If a table maps several names of other
libraries to the same name, exports use the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from unmask.errors import ForeignError
from unmask.interop.foreign.state_dicts import Names, require_nothing_left

BLOCK_NAMES = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.relative_position_bias": "attn",
    "relative_position_bias": "attn",
}
"""Names within a block of transformers' models, without weight or bias, in files and in memory (release 5).

In this table and the next, the name used in files comes before other names of the same tensor: exports write it.
"""
OTHER_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.relative_position_bias": "rel_pos_bias",
    "shared_position_bias": "rel_pos_bias",
    "layernorm": "norm",
    "pooler.layernorm": "fc_norm",
    "classifier": "head",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
BLOCK = re.compile(r"(encoder\.layer|layers|decoder\.decoder_layers|decoder\.decoder_encoder\.layer)\.(\d+)\.(.+)")


def from_transformers(state: Mapping[str, Tensor]) -> Names:
    """Rename transformers' tensors to official names; unknown names are unchanged. q, k and v stay separate."""
    found = Names({}, {})
    for name, value in state.items():
        plain = _plain_name(re.sub(r"^(vit|beit)\.", "", name))
        if plain in found.tensors:
            raise ForeignError(
                f"two tensors both become {plain}: {found.origin[plain]} and {name}; the file may be a mix of two files"
            )
        found.tensors[plain], found.origin[plain] = value, name
    return found


def _plain_name(name: str) -> str:
    stem, dot, leaf = name.rpartition(".")
    if match := BLOCK.fullmatch(name):
        place, number, rest = match.groups()
        blocks = "decoder_blocks" if place.startswith("decoder") else "blocks"
        if rest in ("lambda_1", "lambda_2"):
            return f"{blocks}.{number}.gamma_{rest[-1]}"
        stem, dot, leaf = rest.rpartition(".")
        return f"{blocks}.{number}.{BLOCK_NAMES.get(stem, stem)}{dot}{leaf}"
    if name in OTHER_NAMES:
        return OTHER_NAMES[name]
    return f"{OTHER_NAMES.get(stem, stem)}{dot}{leaf}"


PARTS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The parts of a transformer block that have the same names in official code and here."""
OFFICIAL = {
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "patch_embed.proj.*": "encoder.patch_embed.proj.*",
    **{f"blocks.#.{part}.*": f"encoder.blocks.#.{part}.*" for part in PARTS},
    "blocks.#.ls1.gamma": "encoder.blocks.#.ls1.gamma",
    "blocks.#.ls2.gamma": "encoder.blocks.#.ls2.gamma",
    "blocks.#.attn.relative_position_bias_table": "encoder.blocks.#.relative_bias.table",
    "rel_pos_bias.relative_position_bias_table": "encoder.relative_bias.table",
    "norm.*": "encoder.norm.*",
    "fc_norm.*": "fc_norm.*",
    "head.*": "head.*",
    "decoder_pos_embed": "decoder.pos_embed",
    **{f"decoder_{part}.*": f"decoder.{part}.*" for part in ("embed", "norm", "pred")},
    **{f"decoder_blocks.#.{part}.*": f"decoder.blocks.#.{part}.*" for part in PARTS},
}
"""Names of official MAE and timm, and their names here; # is the number of a block, * is weight or bias."""
BEIT_SCALES = {f"blocks.#.gamma_{number}": f"encoder.blocks.#.ls{number}.gamma" for number in (1, 2)}
OURS = OFFICIAL | BEIT_SCALES | {"lm_head.*": "head.*"}


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Look up the new name of a tensor in a table of names; return None if the table does not contain the tensor."""
    number, (stem, dot, leaf) = re.search(r"(?<=blocks\.)\d+(?=\.)", name), name.rpartition(".")
    pattern = f"{stem}.*" if dot and leaf in ("weight", "bias") else name
    if number is not None:
        pattern = pattern.replace(f"blocks.{number[0]}.", "blocks.#.", 1)
    if pattern not in table:
        return None
    return table[pattern].replace("#", number[0] if number is not None else "#").replace("*", leaf)


def to_ours(names: Names, method: str) -> dict[str, Tensor]:
    """Rename tensors from official names to unmask's. Raises ForeignError for unknown names."""
    ours, left = {}, []
    for name, value in names.tensors.items():
        place = renamed(name, OURS)
        if name == "mask_token":
            ours["decoder.mask_token" if method == "mae" else "mask_token"] = value
        elif place is None:
            left.append(names.origin.get(name, name))
        else:
            ours[place] = value
    require_nothing_left(left)
    return ours


GPT_NAMES = {
    "ln_1.weight": "norm1.weight",
    "ln_2.weight": "norm2.weight",
    "attn.c_attn.weight": "attn.qkv.weight",
    "attn.c_proj.weight": "attn.proj.weight",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_proj.weight": "mlp.fc2.weight",
}


# Export


def inverted(table: dict[str, str]) -> dict[str, str]:
    """Swap the keys and values of a table; of several keys with the same value, the first is used."""
    return {new: old for old, new in reversed(table.items())}


TO_OFFICIAL = inverted(OFFICIAL) | {"mask_token": "mask_token", "decoder.mask_token": "mask_token"}
TO_BEIT = TO_OFFICIAL | inverted(BEIT_SCALES)
BLOCKS, OTHERS, GPT_BLOCKS = inverted(BLOCK_NAMES), inverted(OTHER_NAMES), inverted(GPT_NAMES)


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the names of official MAE, without `mean` and `std`, which are not parameters."""
    return _under(weights, TO_OFFICIAL)


def to_beit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the names of official BEiT, which timm also uses.

    The bias of the keys is dropped, because BEiT has none. It has no effect: it adds the same value to the scores of
    all keys, and the softmax cancels it.
    """
    renamed_weights = {}
    for name, value in _under(weights, TO_BEIT).items():
        if name.endswith(".attn.qkv.bias"):
            queries, _, values = value.chunk(3)
            stem = name.removesuffix("qkv.bias")
            renamed_weights |= {f"{stem}q_bias": queries.clone(), f"{stem}v_bias": values.clone()}
        else:
            renamed_weights[name] = value
    return renamed_weights


def _under(weights: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    renamed_weights = {}
    for name, value in weights.items():
        if name not in ("encoder.mean", "encoder.std"):
            new = renamed(name, table)
            assert new is not None, f"{name} has no official name"
            renamed_weights[new] = value
    return renamed_weights


def to_transformers(weights: Mapping[str, Tensor], *, beit: bool, prefix: str = "") -> dict[str, Tensor]:
    """Rename tensors to the names that transformers uses in files of BEiT, or of ViT and ViTMAE.

    prefix: prefix of the encoder in a larger model ("vit.", "beit.").
    """
    renamed_weights = {}
    for name, value in (to_beit if beit else to_official)(weights).items():
        for plain, part in _apart(name, value).items():
            new = _transformers_name(plain)
            if plain == "mask_token" and not beit:
                new = "decoder.mask_token"
            elif not new.startswith(("decoder.", "classifier.")):
                new = prefix + new
            renamed_weights[new] = part
    return renamed_weights


def _apart(name: str, value: Tensor) -> dict[str, Tensor]:
    """Split a joint weight or bias of queries, keys and values into three tensors; return other tensors unchanged."""
    stem, attn, last = name.rpartition(".attn.")
    if last.startswith("qkv."):
        leaf = last.removeprefix("qkv.")
        return {f"{stem}{attn}{part}.{leaf}": piece.clone() for part, piece in zip("qkv", value.chunk(3), strict=True)}
    return {f"{stem}{attn}{last[0]}.bias" if last in ("q_bias", "v_bias") else name: value}


def _transformers_name(plain: str) -> str:
    """Convert an official name to the name that transformers uses in files."""
    stem, _, leaf = plain.rpartition(".")
    if match := re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(?:gamma_([12])|(.+)\..+)", plain):
        layer = f"{'decoder.decoder_layers' if match[1] else 'encoder.layer'}.{match[2]}"
        return f"{layer}.lambda_{match[3]}" if match[3] else f"{layer}.{BLOCKS[match[4]]}.{leaf}"
    return OTHERS[plain] if plain in OTHERS else f"{OTHERS[stem]}.{leaf}"


def to_image_gpt(weights: Mapping[str, Tensor], *, prefix: str = "") -> dict[str, Tensor]:
    """Rename an iGPT's tensors to the names of transformers' ImageGPT, and add the biases that it lacks, as zeros."""
    plain = {"encoder.positions": "wpe.weight", "encoder.norm.weight": "ln_f.weight"}
    table = torch.cat([weights["encoder.tokens"], weights["encoder.sos"][None]])
    renamed_weights = {f"{prefix}wte.weight": table}
    for name, value in weights.items():
        if match := re.fullmatch(r"encoder\.blocks\.(\d+)\.(.+)", name):
            new = f"{prefix}h.{match[1]}.{GPT_BLOCKS[match[2]]}"
            renamed_weights[new] = value.T.contiguous() if value.ndim == 2 else value
            if value.ndim == 2:
                renamed_weights[new.removesuffix("weight") + "bias"] = torch.zeros(len(value))
        elif name in plain:
            renamed_weights[prefix + plain[name]] = value
        elif name == "head.weight":
            renamed_weights["lm_head.weight"] = value
        else:
            assert name in ("encoder.tokens", "encoder.sos", "encoder.palette"), f"{name} has no name in ImageGPT"
    return renamed_weights
