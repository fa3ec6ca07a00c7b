"""Read OpenAI's networks: transformers' ImageGPT, and DALL-E's dVAE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.errors import ForeignError
from unmask.interop.foreign.metadata import SourceMetadata
from unmask.interop.foreign.state_dicts import (
    IMAGENET,
    Names,
    Recognised,
    count_blocks,
    need,
    require_nothing_left,
    require_same,
    root,
)
from unmask.interop.names import GPT_NAMES

GPT_HEADS = {512: 8, 1024: 8, 1536: 16}
OPENAI_LICENCE = "modified MIT (openai)"


def image_gpt(state: Mapping[str, Tensor], metadata: SourceMetadata) -> Recognised:
    """Read transformers' ImageGPT.

    ImageGPT stores matrices transposed, and the start token as the last row of the token table.
    """
    network = metadata.network
    names = Names({}, {})
    for name, value in state.items():
        short = name.removeprefix("transformer.")
        names.tensors[short], names.origin[short] = value, name
    names.drop(r"h\.\d+\.attn\.(bias|masked_bias)")  # older files contain the causal mask
    names.drop(r"score\.weight", "the classifier is left out: it is only the linear layer of a probe")
    tensors, ours, left = names.tensors, {}, []
    table = need(tensors, "wte.weight", 2)
    colours, width, depth = len(table) - 1, table.shape[1], count_blocks(tensors, "h")
    require_same("n_embd", network.n_embd, width)
    require_same("n_layer", network.n_layer, depth)
    require_same("vocab_size", network.vocab_size, colours + 1)
    for key, stated, expected in (
        ("activation_function", network.activation_function, "quick_gelu"),
        ("scale_attn_by_inverse_layer_idx", network.scale_attn_by_inverse_layer_idx, False),
    ):
        if stated not in (None, expected):
            raise ForeignError(f"config.json states {key}={stated!r}; the published networks have {expected!r}")
    for name, value in tensors.items():
        match = re.fullmatch(r"h\.(\d+)\.(.+)", name)
        if match and match[2] in GPT_NAMES:
            matrix = value.T.contiguous() if value.ndim == 2 else value
            ours[f"encoder.blocks.{match[1]}.{GPT_NAMES[match[2]]}"] = matrix
        elif match and match[2].endswith("bias") and match[2].removesuffix("bias") + "weight" in GPT_NAMES:
            if value.any():
                raise ForeignError(
                    f"{names.origin[name]} is not zero; the iGPT here has no biases, like the published networks"
                )
        elif name == "wte.weight":
            ours |= {"encoder.tokens": table[:-1].clone(), "encoder.sos": table[-1].clone()}
        elif simple := {"wpe.weight": "encoder.positions", "ln_f.weight": "encoder.norm.weight",
                        "lm_head.weight": "head.weight"}.get(name):  # fmt: skip
            ours[simple] = value
        else:
            left.append(names.origin[name])
    require_nothing_left(left)
    encoder: dict[str, Any] = {"width": width, "depth": depth, "colours": colours}
    heads = network.n_head or GPT_HEADS.get(width)
    if heads is not None:
        encoder["heads"] = heads
    palette = _clusters(metadata.preprocessor.clusters, colours)
    ours["encoder.palette"] = palette
    channels, places = palette.shape[1], len(need(tensors, "wpe.weight", 2))
    whole = "head.weight" in ours
    method: dict[str, Any] = {"name": "igpt" if whole else "encoder", "encoder": encoder}
    if whole:
        method |= {"palette": palette.tolist(), "palette_dtype": "uint8"}
    side = root(places)
    kind = "transformers ImageGPT" + ("" if whole else ", encoder only")
    return Recognised(
        kind=kind,
        licence=OPENAI_LICENCE,
        method=method,
        weights=ours,
        channels=channels,
        patch=(1, 1),
        grid=(side, side) if side else None,
        places=places,
        mean=(127.5,) * channels,
        std=(127.5,) * channels,
        statistics="pixels from -1 to 1, as in iGPT; the encoder uses only the palette",
        notes=tuple(names.notes),
    )


def _clusters(clusters: list[list[float]] | None, colours: int) -> Tensor:
    """Convert the clusters of preprocessor_config.json, colours in -1..1, to a palette (k, C) in units of 0..255."""
    if clusters is None:
        raise ForeignError(
            "got an ImageGPT without its palette, the 'clusters' of preprocessor_config.json; put that file beside the "
            "weights and give the folder"
        )
    palette = 127.5 * (torch.tensor(clusters, dtype=torch.float64) + 1)
    if palette.ndim != 2 or len(palette) != colours:
        raise ForeignError(
            f"got a palette of shape {tuple(palette.shape)} in preprocessor_config.json; expected {colours} colours; "
            "the two files belong to different models"
        )
    return palette.float()


DALLE_LAYERS = {"group_1": 1, "group_2": 4, "group_3": 7, "group_4": 10}
"""The number of the layer here that corresponds to the first of the two blocks in each group of DALL-E's dVAE."""


def dalle(state: Mapping[str, Tensor]) -> Recognised:
    """Read OpenAI's dVAE. state: tensors by their published names, prefixed with `encoder.` or `decoder.`."""
    parts = {name.split(".")[0] for name in state}
    if parts != {"encoder", "decoder"}:
        raise ForeignError(
            "got one half of DALL-E's dVAE; expected encoder and decoder; put both into one folder, as encoder.pth and "
            "decoder.pth, and give the folder"
        )
    ours, left = {}, []
    for name, value in state.items():
        place = _dalle_place(name)
        if place is None:
            left.append(name)
        else:
            ours[place] = value
    require_nothing_left(left)
    first, last = need(ours, "encoder.hidden.0.weight", 4), need(ours, "encoder.head.weight", 4)
    encoder = {
        "arch": "dalle", "codes": len(last), "width": len(first), "patch": (8, 8), "loss": "logit_laplace",
    }  # fmt: skip
    return Recognised(
        "DALL-E dVAE", OPENAI_LICENCE, {"name": "dvae", "encoder": encoder}, ours, first.shape[1], (8, 8), (32, 32), 0,
        *(IMAGENET if first.shape[1] == 3 else (None, None)), "ImageNet's; the network itself expects 0 to 255",
    )  # fmt: skip


def _dalle_place(name: str) -> str | None:
    """Rename, for example, encoder.blocks.group_2.block_1.res_path.conv_3.w to encoder.hidden.4.layers.5.weight.

    Returns None for a name that OpenAI's dVAE does not have.
    """
    match = re.fullmatch(r"(encoder|decoder)\.blocks\.(.+)\.([wb])", name)
    if match is None:
        return None
    side, rest, leaf = match[1], match[2], {"w": "weight", "b": "bias"}[match[3]]
    layers = "encoder.hidden" if side == "encoder" else "decoder.layers"
    if rest == "input":
        return f"{layers}.0.{leaf}"
    if rest == "output.conv":
        return f"encoder.head.{leaf}" if side == "encoder" else f"{layers}.13.{leaf}"
    block = re.fullmatch(r"(group_[1-4])\.block_([12])\.(?:(id_path)|res_path\.conv_([1-4]))", rest)
    if block is None:
        return None
    number = DALLE_LAYERS[block[1]] + int(block[2]) - 1
    return (
        f"{layers}.{number}.around.{leaf}" if block[3] else f"{layers}.{number}.layers.{2 * int(block[4]) - 1}.{leaf}"
    )
