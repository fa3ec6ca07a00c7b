"""Names of tensors: transformers' -> the official ones ("plain" here) -> ours; `interop/export_names.py` goes the way
back."""

from __future__ import annotations

import re
from collections.abc import Mapping

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
"""What stands in a block of transformers' models before the last point, in files and in memory (release 5).

Of several names for one thing that in files comes first, here and below: `interop/export_names.py` writes it.
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
    """transformers' names -> official ones; what has none keeps its own. q, k and v stay apart as attn.q, .k, .v."""
    found = Names({}, {})
    for name, value in state.items():
        plain = _plain_name(re.sub(r"^(vit|beit)\.", "", name))
        if plain in found.tensors:
            raise ForeignError(
                f"two tensors are both {plain}: {found.origin[plain]} and {name}; is the file a mixture?"
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
"""Of every block, under official names and here."""
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
"""Names of official MAE and of timm, and what they are here; # is the number of a block, * a weight or a bias."""
BEIT_SCALES = {f"blocks.#.gamma_{number}": f"encoder.blocks.#.ls{number}.gamma" for number in (1, 2)}
OURS = OFFICIAL | BEIT_SCALES | {"lm_head.*": "head.*"}


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """The name that `table` has for one, with its number of a block and its weight or bias; None where it has none."""
    number, (stem, dot, leaf) = re.search(r"(?<=blocks\.)\d+(?=\.)", name), name.rpartition(".")
    pattern = f"{stem}.*" if dot and leaf in ("weight", "bias") else name
    if number is not None:
        pattern = pattern.replace(f"blocks.{number[0]}.", "blocks.#.", 1)
    if pattern not in table:
        return None
    return table[pattern].replace("#", number[0] if number is not None else "#").replace("*", leaf)


def to_ours(names: Names, method: str) -> dict[str, Tensor]:
    """Official names -> ours. Raises ForeignError for what has none."""
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
