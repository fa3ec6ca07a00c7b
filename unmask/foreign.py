"""Weights that others made: which kind a state dict is, and the same tensors under our names. Pure: nothing is read.

    official MAE     facebookresearch/mae: encoder, encoder and decoder, fine-tuned
    BEiT             microsoft/unilm: pre-trained, fine-tuned
    timm             plain vision transformers; its BEiT has the official names
    transformers     ViTMAE, ViT, BEiT and ImageGPT, under the names in files and those in memory
    DALL-E           the dVAE of openai/DALL-E, encoder and decoder together

Names are translated in two steps: transformers' to the official ones ("plain" here), and those to ours. Nothing is
guessed: a tensor that is missing, left over or of another shape is an error, and what is left out on purpose is said.
What the weights do not show (the number of heads, with few exceptions) comes from a transformers folder's config.json,
from the sizes that were published, or has to be said.

Letters: D width, C channels, N patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unmask.errors import UserError

IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # mean and standard deviation, in units of 0..255
HALVES = (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
NAMED = 5
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of the published vision transformers, by width
DECODER_HEADS = {512: 16}  # of MAE's decoder
GPT_HEADS = {512: 8, 1024: 8, 1536: 16}
SIZES = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H"}
MAE_LICENCE = "CC-BY-NC 4.0 (facebookresearch/mae): not for commercial use"
BEIT_LICENCE = "MIT (microsoft/unilm)"
OPENAI_LICENCE = "modified MIT (openai)"
UNKNOWN_LICENCE = "not in the file; see the page it came from"


class ForeignError(UserError):
    """Weights of a kind that is not known, or not whole; the message names tensors and says what to do."""


@dataclass(frozen=True)
class Found:
    """What a state dict turned out to be.

    method: settings of our method; `heads` are left out where nothing shows them. weights: under our names, float32.
    channels, patch, grid: of the images that the network was made for; grid is None where N is no square and nothing
    says what rectangle it is. mean, std: of those images, in units of 0..255; None where nothing was published for so
    many channels. statistics: whose they are. notes: what was left out or assumed, in sentences.
    """

    kind: str
    licence: str
    method: dict[str, Any]
    weights: dict[str, Tensor]
    channels: int
    patch: tuple[int, int]
    grid: tuple[int, int] | None
    places: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    statistics: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The kind and the sizes: 'official MAE, full or visualise: ViT-B/16 at 224, decoder 8 x 512'."""
        encoder, size = self.method["encoder"], ""
        if self.grid is not None:
            height, width = (cells * side for cells, side in zip(self.grid, self.patch, strict=True))
            size = f" at {height}" if height == width else f" at {height} x {width}"
        if "codes" in encoder:
            return f"{self.kind}: {encoder['codes']} codes, width {encoder['width']}"
        if "colours" in encoder:
            return f"{self.kind}: {encoder['depth']} x {encoder['width']}, {encoder['colours']} colours{size}"
        patch = f"{self.patch[0]}" if self.patch[0] == self.patch[1] else f"{self.patch[0]}x{self.patch[1]}"
        known = SIZES.get((encoder["width"], encoder["depth"]))
        model = f"ViT-{known}/{patch}" if known else f"ViT {encoder['depth']} x {encoder['width']}, patch {patch},"
        decoder = self.method.get("decoder")
        more = f", decoder {decoder['depth']} x {decoder['width']}" if decoder else ""
        if classes := self.method.get("classes"):
            more = f", {len(classes)} classes"
        return f"{self.kind}: {model}{size}{more}"


@dataclass
class _Names:
    """A state dict whose names have been translated to official ones; knows what each was called in the file."""

    tensors: dict[str, Tensor]
    origin: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def drop(self, pattern: str, note: str = "") -> bool:
        """Leave out what fully matches; whether there was anything. A note says why, where that may surprise."""
        gone = [name for name in self.tensors if re.fullmatch(pattern, name)]
        for name in gone:
            del self.tensors[name]
        if gone and note:
            self.notes.append(note)
        return bool(gone)

    def has(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in self.tensors)


def unwrap(content: Any) -> dict[str, Tensor]:
    """The state dict in what a checkpoint file held: out of 'model' and the like, without 'module.' and the like.

    Raises ForeignError when there is none. What lies beside a state dict (optimiser, epoch, arguments) is left out.
    """
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        what = f"with {some(map(str, content))}" if isinstance(content, Mapping) and content else "without any weights"
        raise ForeignError(
            f"a {type(content).__name__} {what} came; a state dict (names and tensors) was expected, bare or under "
            f"{', '.join(map(repr, WRAPPERS))}"
        )
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def recognise(
    state: Mapping[str, Tensor], about: Mapping[str, Any] | None = None, look: Mapping[str, Any] | None = None
) -> Found:
    """What `state` is, and its tensors under our names. Raises ForeignError when it is none of the known kinds.

    about, look: config.json and preprocessor_config.json of a transformers folder, where there is one.
    """
    about, look = about or {}, look or {}
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    names = set(state)
    if any(re.fullmatch(r"(transformer\.)?wte\.weight", name) for name in names):
        return _image_gpt(state, about, look)
    if any(name.endswith("blocks.input.w") for name in names):
        return _dalle(state)
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        return _vit(_from_transformers(state), about, look)
    if "patch_embed.proj.weight" in names:
        return _vit(_Names(dict(state), {name: name for name in state}), about, look)
    raise ForeignError(
        f"{len(names)} tensors came that are no kind which is known here, among them {some(sorted(names))}; expected "
        "were weights of official MAE or BEiT, of a plain ViT of timm, of ViTMAE, ViT, BEiT or ImageGPT of "
        "transformers, or of DALL-E's dVAE"
    )


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

Of several names for one thing that in files comes first, here and below: `outbound.py` writes it.
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


def _from_transformers(state: Mapping[str, Tensor]) -> _Names:
    """transformers' names -> official ones; what has none keeps its own. q, k and v stay apart as attn.q, .k, .v."""
    found = _Names({}, {})
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


FOREIGN_PARTS = {
    r"(reg_token|register_tokens|embeddings\.register_tokens)": "register tokens",
    r"blocks\.\d+\.attn\.(q_norm|k_norm)\..+": "a norm on queries and keys",
    r"blocks\.\d+\.mlp\.(fc1_g|fc1_x|w1|w2|w3|w12|weights_in)\..+": "a gated MLP",
    r"blocks\.\d+\.(attn\.norm|mlp\.norm)\..+": "a norm inside attention or MLP",
    r"blocks\.\d+\.(norm3|cross_attn|adaLN.*|conv.*)\..+": "blocks of another make",
    r"(dist_token|head_dist\..+)": "a distillation token",
    r"norm_pre\..+": "a norm before the first block",
    r"attn_pool\..+": "attention pooling",
    r"patch_embed\.(backbone|norm|proj\.\d+)\..+": "a stem that is no single convolution",
}
"""What vision transformers have that ours has not, in words."""


def _vit(names: _Names, about: Mapping[str, Any], look: Mapping[str, Any]) -> Found:
    """Every vision transformer, under official names (or timm's, which are the same)."""
    for pattern, words in FOREIGN_PARTS.items():
        if names.has(pattern):
            raise ForeignError(
                f"this vision transformer has {words} ({some(_matching(names, pattern))}), which this package's has "
                "not; a plain one was expected"
            )
    transformers = bool(about.get("model_type")) or any("patch_embeddings" in old for old in names.origin.values())
    _prepare(names)
    tensors = names.tensors
    if "cls_token" not in tensors:
        raise ForeignError("this vision transformer has no class token (cls_token), and one with it was expected")
    width, patch, channels = _first_sizes(tensors)
    depth = _count_blocks(tensors, "blocks")
    beit = names.has(r"rel_pos_bias\..+|blocks\.\d+\.attn\.relative_position_bias_table|lm_head\..+|blocks\.0\.gamma_1")
    beit = beit or about.get("model_type") == "beit"
    full = "decoder_pred.weight" in tensors

    encoder: dict[str, Any] = {"width": width, "depth": depth, "patch": patch}
    encoder["mlp_ratio"] = _ratio(tensors, "blocks.0.mlp", width)
    encoder["positions"] = "absent"
    places, grid = _places(names, about, patch)
    if "pos_embed" in tensors:
        encoder["positions"] = "sincos" if is_sincos(tensors["pos_embed"]) else "learned"
    table = "rel_pos_bias.relative_position_bias_table"
    own = "blocks.0.attn.relative_position_bias_table"
    encoder["relative_bias"] = table in tensors or ("each_block" if own in tensors else False)
    scaled = any(f"blocks.0.{name}" in tensors for name in ("gamma_1", "ls1.gamma"))
    start = about.get("layer_scale_init_value") or (0.1 if depth < 24 else 1e-5)
    encoder["layer_scale"] = start if scaled else None
    encoder["norm_eps"] = float(about.get("layer_norm_eps", 1e-6))
    bias = tensors.get(table, tensors.get(own))
    heads = about.get("num_attention_heads") or (bias.shape[1] if bias is not None else HEADS.get(width))
    if heads is not None:
        encoder["heads"] = int(heads)
    _require_config(about, encoder, channels)

    mean, std, statistics = _statistics(look, channels, halves=beit)
    if full:
        kind, method = _with_decoder(names, encoder, about)
    elif "head.weight" in tensors and "fc_norm.weight" in tensors and len(tensors["head.weight"]) > 1:
        kind, method = _with_head(names, encoder, about)
    else:
        kind, method = _encoder_only(names, encoder, beit=beit)
    weights = _to_ours(names, method["name"])
    licence = BEIT_LICENCE if beit else MAE_LICENCE if full or encoder["positions"] == "sincos" else UNKNOWN_LICENCE
    if transformers:
        kind, licence = f"transformers {_family(about, beit=beit, full=full)}, {kind}", UNKNOWN_LICENCE
    else:
        kind, licence = _official(kind, encoder, licence, beit=beit, full=full)
    return Found(
        kind, licence, method, weights, channels, patch, grid, places, mean, std, statistics, tuple(names.notes)
    )


def _prepare(names: _Names) -> None:
    """Leave out what counts for nothing here, and make one qkv of what was apart."""
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
            continue  # said with the others that are missing
        third = len(tensors[fused]) // 3
        parts = [_pop_first(tensors, f"{prefix}{part}.bias", f"{prefix}{part}_bias") for part in "qkv"]
        if any(part is not None for part in parts) or f"{prefix}qkv.bias" not in tensors:
            # Without a bias of its own a projection has a bias of zero; that of the keys cancels in the softmax.
            tensors[f"{prefix}qkv.bias"] = torch.cat([torch.zeros(third) if part is None else part for part in parts])


def _pop_first(tensors: dict[str, Tensor], *names: str) -> Tensor | None:
    return next((tensors.pop(name) for name in names if name in tensors), None)


def _matching(names: _Names, pattern: str) -> list[str]:
    return [names.origin.get(name, name) for name in names.tensors if re.fullmatch(pattern, name)]


def _need(tensors: Mapping[str, Tensor], name: str, dims: int | None = None) -> Tensor:
    if name not in tensors:
        raise ForeignError(f"{name} is missing among {len(tensors)} tensors; the file is cut, or of another kind")
    if dims is not None and tensors[name].ndim != dims:
        raise ForeignError(f"{name} has the shape {tuple(tensors[name].shape)}, {dims} dimensions were expected")
    return tensors[name]


def _first_sizes(tensors: Mapping[str, Tensor]) -> tuple[int, tuple[int, int], int]:
    """(width, patch, channels)."""
    width, channels, height, across = _need(tensors, "patch_embed.proj.weight", 4).shape
    if tensors["cls_token"].shape[-1] != width:
        raise ForeignError(
            f"the class token has {tensors['cls_token'].shape[-1]} values and the patch projection makes {width}; the "
            "tensors are not of one network"
        )
    return width, (height, across), channels


def _count_blocks(tensors: Mapping[str, Tensor], blocks: str) -> int:
    """How many there are. Raises ForeignError when numbers are missing in between, or there are none."""
    numbers = {int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name))}
    if holes := sorted(set(range(max(numbers, default=0) + 1)) - numbers):
        raise ForeignError(
            f"{blocks}.{holes[0]} is missing" + (f" (and {len(holes) - 1} more)" if len(holes) > 1 else "")
            + (f", but there is {blocks}.{max(numbers)}; the file is cut or was put together wrongly" if numbers else
               "; a transformer with at least one block was expected")
        )  # fmt: skip
    return len(numbers)


def _ratio(tensors: Mapping[str, Tensor], mlp: str, width: int) -> float:
    """The hidden width over the width, such that multiplied and cut off it is the hidden width again."""
    hidden, back = len(_need(tensors, f"{mlp}.fc1.weight", 2)), _need(tensors, f"{mlp}.fc2.weight", 2).shape[1]
    if hidden != back:
        raise ForeignError(
            f"{mlp} makes {hidden} values of which {back} go on: a gated MLP, which this package's vision transformer "
            "has not; a plain one was expected"
        )
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


def _places(names: _Names, about: Mapping[str, Any], patch: tuple[int, int]) -> tuple[int, tuple[int, int] | None]:
    """(N, grid) of the images that positions were made for; N is 0 where only a relative bias knows, grid may be None.

    Positions without a row for the class token (timm's no_embed_class) get one of zeros.
    """
    tensors, stated = names.tensors, None
    if "image_size" in about:
        sides = about["image_size"]
        height, width = (sides, sides) if isinstance(sides, int) else sides
        stated = height // patch[0], width // patch[1]
    if "pos_embed" in tensors:
        table = _need(tensors, "pos_embed", 3)
        rows = table.shape[1]
        with_class = is_sincos(table) or (stated is not None and stated[0] * stated[1] == rows - 1)
        if _root(rows) and not with_class:  # 25 are 5 x 5, unless they are 4 x 6 and the class token's
            tensors["pos_embed"] = table = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
        places = table.shape[1] - 1
        if stated is not None and stated[0] * stated[1] != places:
            raise ForeignError(
                f"config.json says images of {about['image_size']} pixels, which are {stated[0]} x {stated[1]} patches "
                f"of {patch[0]} x {patch[1]}, but there are positions for {places}; the two files do not go together"
            )
        side = _root(places)
        return places, stated or ((side, side) if side else None)
    tables = [value for name, value in tensors.items() if name.endswith("relative_position_bias_table")]
    if not tables and stated is None:
        raise ForeignError("neither pos_embed nor a relative position bias came; one of them was expected")
    side = _root(len(tables[0]) - 3) if tables else 0
    return 0, stated or (((side + 1) // 2, (side + 1) // 2) if side % 2 else None)


def _root(number: int) -> int:
    """The square root, or 0 where it is not whole."""
    root = math.isqrt(max(0, number))
    return root if root * root == number else 0


def is_sincos(table: Tensor) -> bool:
    """Whether positions (1, 1 + N, D) are a fixed table of sines and cosines: squares of each pair sum to 1."""
    quarters = table[0, 1:].unflatten(-1, (2, 2, -1)) if table.shape[-1] % 4 == 0 else None
    if quarters is None or table[0, 0].abs().max() > 1e-3:
        return False
    return bool((quarters.square().sum(2) - 1).abs().max() < 1e-2)


def _require_config(about: Mapping[str, Any], encoder: Mapping[str, Any], channels: int) -> None:
    """Raises ForeignError when config.json says another size than the tensors have, or asks for what ours has not."""
    patch = encoder["patch"]
    for key, found in {
        "hidden_size": encoder["width"],
        "num_hidden_layers": encoder["depth"],
        "intermediate_size": int(encoder["width"] * encoder["mlp_ratio"]),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "num_channels": channels,
    }.items():
        _require_same(about, key, found)
    if (act := about.get("hidden_act", "gelu")) != "gelu":
        raise ForeignError(f"config.json says hidden_act={act!r}; this package's vision transformer has the exact GELU")


def _require_same(about: Mapping[str, Any], key: str, found: Any) -> None:
    if key in about and about[key] != found:
        raise ForeignError(
            f"config.json says {key}={about[key]}, but the tensors have {found}; the two files do not go together"
        )


def _statistics(
    look: Mapping[str, Any], channels: int, *, halves: bool
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None, str]:
    """(mean, std, whose): what preprocessor_config.json says, in units of 0..255, else what is published."""
    if look.get("do_normalize", True) and "image_mean" in look and "image_std" in look:
        scale = 1 / look.get("rescale_factor", 1 / 255) if look.get("do_rescale", True) else 1.0
        mean, std = ([float(value) * scale for value in look[key]] for key in ("image_mean", "image_std"))
        return tuple(mean), tuple(std), "of preprocessor_config.json"
    if look and not look.get("do_normalize", True):
        return (0.0,) * channels, (255.0,) * channels, "none: preprocessor_config.json says do_normalize=false"
    if channels != 3:
        return None, None, ""
    return (*HALVES, "0.5 and 0.5, as BEiT") if halves else (*IMAGENET, "ImageNet's, as MAE")


def _with_decoder(names: _Names, encoder: dict[str, Any], about: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A whole MAE."""
    tensors = names.tensors
    width = len(_need(tensors, "decoder_embed.weight", 2))
    decoder: dict[str, Any] = {"width": width, "depth": _count_blocks(tensors, "decoder_blocks")}
    _require_same(about, "decoder_hidden_size", width)
    _require_same(about, "decoder_num_hidden_layers", decoder["depth"])
    heads = about.get("decoder_num_attention_heads", DECODER_HEADS.get(width))
    if heads is not None:
        decoder["heads"] = heads
    method = {"name": "mae", "encoder": encoder, "decoder": decoder}
    if "norm_pix_loss" in about:
        method["target"] = "norm_pixels" if about["norm_pix_loss"] else "pixels"
        method["mask_ratio"] = about.get("mask_ratio", 0.75)
        return "full", method
    names.notes.append(
        "the decoder is taken to predict pixels normalised within each patch, as the full files do; one of the "
        "visualise files predicts plain pixels, which does not show: for it give --set method.target=pixels"
    )
    return "full or visualise", method


def _with_head(names: _Names, encoder: dict[str, Any], about: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A classifier on the mean of the patch tokens."""
    count = len(names.tensors["head.weight"])
    labels = about.get("id2label") or about.get("label_names") or {}
    told = [str(labels[key]) for key in sorted(labels, key=int)] if isinstance(labels, Mapping) else list(labels)
    classes = told if len(told) == count else [f"class {number}" for number in range(count)]
    names.drop("mask_token")
    _plain_norm(names)
    return "fine-tuned", {"name": "classify", "encoder": encoder, "classes": classes}


def _encoder_only(names: _Names, encoder: dict[str, Any], *, beit: bool) -> tuple[str, dict[str, Any]]:
    """What has no task that is known here; BEiT's own needs a tokenizer besides."""
    if beit and "lm_head.weight" in names.tensors and "mask_token" in names.tensors:
        names.drop(r"(fc_norm|head)\..+")
        return "pre-trained", {"name": "beit", "encoder": encoder}
    names.drop(r"lm_head\..+", "the head for codes is left out")
    if names.has(r"head\..+"):
        words = "on the class token" if "norm.weight" in names.tensors else "of one output, or of several layers"
        names.drop(r"head\..+", f"the classifier {words} is left out: the one here is linear, on the mean of patches")
    _plain_norm(names)
    names.drop(r"fc_norm\..+", "the norm of the mean of patch tokens is left out")
    names.drop("mask_token")
    return "encoder only", {"name": "encoder", "encoder": encoder}


def _plain_norm(names: _Names) -> None:
    """The norm after the last block, where the network pools first and normalises then: gain 1, bias 0."""
    tensors = names.tensors
    if "norm.weight" in tensors or "fc_norm.weight" not in tensors:
        return
    width = len(tensors["fc_norm.weight"])
    tensors |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    names.notes.append(
        "it has no norm of its own after the last block, so embed and probe see tokens normalised with gain 1 and "
        "bias 0"
    )


def _family(about: Mapping[str, Any], *, beit: bool, full: bool) -> str:
    named = {"vit_mae": "ViTMAE", "vit": "ViT", "beit": "BEiT"}.get(str(about.get("model_type")))
    return named or ("BEiT" if beit else "ViTMAE" if full else "ViT")


def _official(kind: str, encoder: Mapping[str, Any], licence: str, *, beit: bool, full: bool) -> tuple[str, str]:
    """(kind, licence) under official names, which several have in common."""
    if beit:
        return f"BEiT, {kind}", licence
    if full or encoder["positions"] == "sincos":
        return f"official MAE, {kind}", licence
    if kind == "fine-tuned":
        return "official MAE or timm ViT, fine-tuned", f"of official MAE {MAE_LICENCE}; of others {UNKNOWN_LICENCE}"
    return f"timm ViT, {kind}", licence


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


def _to_ours(names: _Names, method: str) -> dict[str, Tensor]:
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


def require_nothing_left(names: Iterable[str]) -> None:
    """Raises ForeignError that names tensors nobody asked for."""
    if left := sorted(names):
        raise ForeignError(
            f"{len(left)} tensors have no place in the network that the others make: {some(left)}; is it a variant, "
            "or a mixture of two files?"
        )


def some(names: Iterable[str], count: int = NAMED) -> str:
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


GPT_NAMES = {
    "ln_1.weight": "norm1.weight",
    "ln_2.weight": "norm2.weight",
    "attn.c_attn.weight": "attn.qkv.weight",
    "attn.c_proj.weight": "attn.proj.weight",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_proj.weight": "mlp.fc2.weight",
}


def _image_gpt(state: Mapping[str, Tensor], about: Mapping[str, Any], look: Mapping[str, Any]) -> Found:
    """transformers' ImageGPT: matrices are transposed, the start token is the last row of the token table."""
    names = _Names({}, {})
    for name, value in state.items():
        short = name.removeprefix("transformer.")
        names.tensors[short], names.origin[short] = value, name
    names.drop(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, in older files
    names.drop(r"score\.weight", "the classifier is left out: it is the linear layer of a probe")
    tensors, ours, left = names.tensors, {}, []
    table = _need(tensors, "wte.weight", 2)
    colours, width, depth = len(table) - 1, table.shape[1], _count_blocks(tensors, "h")
    _require_same(about, "n_embd", width)
    _require_same(about, "n_layer", depth)
    _require_same(about, "vocab_size", colours + 1)
    for key, expected in {"activation_function": "quick_gelu", "scale_attn_by_inverse_layer_idx": False}.items():
        if about.get(key, expected) != expected:
            raise ForeignError(f"config.json says {key}={about[key]!r}; the published networks have {expected!r}")
    for name, value in tensors.items():
        match = re.fullmatch(r"h\.(\d+)\.(.+)", name)
        if match and match[2] in GPT_NAMES:
            matrix = value.T.contiguous() if value.ndim == 2 else value
            ours[f"encoder.blocks.{match[1]}.{GPT_NAMES[match[2]]}"] = matrix
        elif match and match[2].endswith("bias") and match[2].removesuffix("bias") + "weight" in GPT_NAMES:
            if value.any():
                raise ForeignError(
                    f"{names.origin[name]} is not zero; the published networks have no biases, and this package's "
                    "iGPT has none"
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
    heads = about.get("n_head", GPT_HEADS.get(width))
    if heads is not None:
        encoder["heads"] = heads
    palette = _clusters(look, colours)
    ours["encoder.palette"] = palette
    channels, places = palette.shape[1], len(_need(tensors, "wpe.weight", 2))
    whole = "head.weight" in ours
    method: dict[str, Any] = {"name": "igpt" if whole else "encoder", "encoder": encoder}
    if whole:
        method |= {"palette": palette.tolist(), "palette_dtype": "uint8"}
    side = _root(places)
    kind = "transformers ImageGPT" + ("" if whole else ", encoder only")
    return Found(
        kind, OPENAI_LICENCE, method, ours, channels, (1, 1), (side, side) if side else None, places,
        (127.5,) * channels, (127.5,) * channels, "-1 to 1, as iGPT; only the palette counts", tuple(names.notes),
    )  # fmt: skip


def _clusters(look: Mapping[str, Any], colours: int) -> Tensor:
    """The palette (k, C) in units of 0..255, from the 'clusters' of preprocessor_config.json, which are in [-1, 1]."""
    if "clusters" not in look:
        raise ForeignError(
            "an ImageGPT without its palette came: its tokens mean nothing without the 'clusters' of "
            "preprocessor_config.json; put that file beside the weights and name the folder"
        )
    palette = 127.5 * (torch.tensor(look["clusters"], dtype=torch.float64) + 1)
    if palette.ndim != 2 or len(palette) != colours:
        raise ForeignError(
            f"the palette of preprocessor_config.json has the shape {tuple(palette.shape)}, {colours} colours were "
            "expected; the two files do not go together"
        )
    return palette.float()


DALLE_LAYERS = {"group_1": 1, "group_2": 4, "group_3": 7, "group_4": 10}  # of the first of two blocks


def _dalle(state: Mapping[str, Tensor]) -> Found:
    """OpenAI's dVAE, `encoder.` and `decoder.` before the published names."""
    parts = {name.split(".")[0] for name in state}
    if parts != {"encoder", "decoder"}:
        raise ForeignError(
            "one half of DALL-E's dVAE came; encoder and decoder were expected: put both into one folder, as "
            "encoder.pth and decoder.pth, and name the folder"
        )
    ours, left = {}, []
    for name, value in state.items():
        place = _dalle_place(name)
        if place is None:
            left.append(name)
        else:
            ours[place] = value
    require_nothing_left(left)
    first, last = _need(ours, "encoder.hidden.0.weight", 4), _need(ours, "encoder.head.weight", 4)
    encoder = {
        "arch": "dalle", "codes": len(last), "width": len(first), "patch": (8, 8), "loss": "logit_laplace",
    }  # fmt: skip
    return Found(
        "DALL-E dVAE", OPENAI_LICENCE, {"name": "dvae", "encoder": encoder}, ours, first.shape[1], (8, 8), (32, 32), 0,
        *(IMAGENET if first.shape[1] == 3 else (None, None)), "ImageNet's; the network itself takes 0 to 255",
    )  # fmt: skip


def _dalle_place(name: str) -> str | None:
    """encoder.blocks.group_2.block_1.res_path.conv_3.w -> encoder.hidden.4.layers.5.weight; None for the unknown."""
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
