"""The metadata of weights from other libraries: JSON files, file headers and training arguments.

The classes define the type and range of every value that is used. An invalid value raises an error that names the file,
the key and the expected value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, ValidationError

from unmask.system.json_input import LARGEST, Outside

DEEPEST = 1_000  # blocks

Size = Annotated[int, Field(gt=0, le=LARGEST)]
Depth = Annotated[int, Field(gt=0, le=DEEPEST)]
Sides = Size | tuple[Size, Size]
Share = Annotated[float, Field(gt=0, le=1)]
Numbers = Annotated[list[float], Field(min_length=1, max_length=LARGEST)]
Deviations = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=LARGEST)]
ClassNumber = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Classes = Annotated[list[str], Field(max_length=LARGEST)]


class NetworkConfig(Outside):
    """The keys of transformers' config.json that `unmask import` uses."""

    model_type: str | None = None
    hidden_size: Size | None = None
    num_hidden_layers: Depth | None = None
    num_attention_heads: Size | None = None
    intermediate_size: Annotated[int, Field(gt=0, le=8 * LARGEST)] | None = None
    patch_size: Sides | None = None
    image_size: Sides | None = None
    num_channels: Size | None = None
    hidden_act: str | None = None
    layer_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    layer_scale_init_value: float | None = None
    decoder_hidden_size: Size | None = None
    decoder_num_hidden_layers: Depth | None = None
    decoder_num_attention_heads: Size | None = None
    norm_pix_loss: bool | None = None
    mask_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    id2label: dict[ClassNumber, str] | None = None
    label_names: Classes | None = None
    n_embd: Size | None = None
    n_layer: Depth | None = None
    n_head: Size | None = None
    vocab_size: Annotated[int, Field(gt=0, le=1 << 24)] | None = None
    activation_function: str | None = None
    scale_attn_by_inverse_layer_idx: bool | None = None


class TimmData(Outside):
    """The value of `pretrained_cfg` in timm's config.json; timm's training arguments have the same keys."""

    mean: Numbers | None = None
    std: Deviations | None = None
    crop_pct: Share | None = None


class TimmConfig(Outside):
    """config.json of timm."""

    pretrained_cfg: TimmData
    label_names: Classes | None = None


class Preprocessor(Outside):
    """preprocessor_config.json of transformers."""

    do_normalize: bool | None = None
    do_rescale: bool | None = None
    do_center_crop: bool | None = None
    rescale_factor: Annotated[float, Field(gt=0)] | None = None
    image_mean: Numbers | None = None
    image_std: Deviations | None = None
    size: Size | dict[str, Size | None] | None = None
    crop_size: Size | Annotated[dict[str, Size], Field(min_length=1)] | None = None
    crop_pct: Share | None = None
    clusters: Annotated[list[Annotated[list[float], Field(max_length=64)]], Field(max_length=LARGEST)] | None = None


class ShardIndex(Outside):
    """model.safetensors.index.json."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


class ExportMetadata(Outside):
    """Metadata that `unmask export` stores in files in other formats; see `export_common.export_metadata`."""

    mean: Numbers
    std: Deviations
    heads: dict[str, Size]
    eval_share: Share
    licence: str = ""
    target: str | None = None
    classes: Annotated[list[str], Field(max_length=LARGEST)] | None = None
    shared_bias: bool = False
    size: tuple[Size, Size] | None = None


class TrainingArguments(Outside):
    """Training arguments stored in a checkpoint by official MAE, BEiT, SimMIM or timm."""

    norm_pix_loss: bool | None = None
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    input_size: Size | None = None
    num_mask_patches: Size | None = None
    imagenet_default_mean_and_std: bool | None = None
    mask_patch_size: Size | None = None
    mean: Numbers | None = None
    std: Deviations | None = None
    crop_pct: Share | None = None


@dataclass(frozen=True)
class SourceMetadata:
    """Metadata of the weights: config.json, preprocessor_config.json, the training arguments, and unmask's own header.

    exported: metadata written by `unmask export`, or None for files of other programs.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    preprocessor: Preprocessor = field(default_factory=Preprocessor)
    training: TrainingArguments = field(default_factory=TrainingArguments)
    exported: ExportMetadata | None = None


def training_arguments(content: Any) -> tuple[TrainingArguments, tuple[str, ...]]:
    """Return the training arguments in a checkpoint, and the names of arguments with invalid values.

    content: the loaded checkpoint. Keys of SimMIM's configuration are renamed to MAE's.
    """
    if not isinstance(content, Mapping):
        return TrainingArguments(), ()
    given = content.get("args", {})
    raw = dict(given) if isinstance(given, Mapping) else dict(getattr(given, "__dict__", {}))
    config = content.get("config")
    if isinstance(config, Mapping) and isinstance(data := config.get("DATA"), Mapping):
        renamed = {"MASK_RATIO": "mask_ratio", "MASK_PATCH_SIZE": "mask_patch_size", "IMG_SIZE": "input_size"}
        raw |= {new: data[old] for old, new in renamed.items() if old in data}
    valid: dict[str, Any] = {}
    wrong = []
    for name in TrainingArguments.model_fields:
        if raw.get(name) is None:
            continue
        try:
            TrainingArguments.model_validate({name: raw[name]})
            valid[name] = raw[name]
        except ValidationError:
            wrong.append(name)
    return TrainingArguments.model_validate(valid), tuple(wrong)
