"""Identify the network of a state dict, and rename its tensors to unmask's names; no files are read.

    official MAE     facebookresearch/mae: encoder, encoder and decoder, fine-tuned
    BEiT             microsoft/unilm: pre-trained, fine-tuned
    SimMIM           microsoft/SimMIM, with a ViT: pre-trained
    timm             plain vision transformers; timm's BEiT has the official names
    transformers     ViTMAE, ViT, BEiT and ImageGPT, with the names used in files or in memory
    DALL-E           the dVAE of openai/DALL-E, encoder and decoder together

A tensor that is missing, unknown or of another shape raises an error, and parts that are left out on purpose are
reported. Settings that cannot be read from the weights (mostly the number of heads) come from config.json,
from the published sizes, or from the user.

Letters: D width, C channels, N patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from unmask.errors import ForeignError, UserError, listed
from unmask.interop.foreign.metadata import Preprocessor, SourceMetadata
from unmask.interop.foreign.openai import dalle, image_gpt
from unmask.interop.foreign.state_dicts import Names, Recognised
from unmask.interop.foreign.vit_checkpoints import recognise_vit
from unmask.interop.names import from_transformers


def recognise(state: Mapping[str, Tensor], metadata: SourceMetadata | None = None) -> Recognised:
    """Identify the network of a state dict and rename its tensors. Raises ForeignError for an unknown network.

    metadata: metadata that was stored with the weights.
    """
    metadata = metadata or SourceMetadata()
    training, known = metadata.training, {}
    for key, value in {"image_mean": training.mean, "image_std": training.std, "crop_pct": training.crop_pct}.items():
        if value is not None:
            known[key] = value
    metadata = replace(metadata, preprocessor=metadata.preprocessor.model_copy(update=known))
    try:
        recognised = _kind_of(state, metadata)
    except (IndexError, TypeError, ValueError, RuntimeError, KeyError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise ForeignError(
            f"the shapes of its tensors do not fit the network that their names suggest ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); the file is damaged or was edited: "
            "download it again"
        ) from None
    return replace(recognised, eval_share=share_of(metadata.preprocessor))


def share_of(preprocessor: Preprocessor) -> float | None:
    """Return the size of the evaluation crop as a share of the image's shorter side.

    Returns 1 for a preprocessor that does not crop, and None for one that does not specify the crop.
    """
    if preprocessor.crop_pct is not None:
        return preprocessor.crop_pct
    whole, crop = preprocessor.size, preprocessor.crop_size
    if preprocessor.do_center_crop and isinstance(whole, Mapping) and isinstance(crop, Mapping):
        shorter, inside = whole.get("shortest_edge"), min(crop.values())
        return min(1.0, inside / shorter) if shorter else 1.0
    return 1.0 if whole is not None and not preprocessor.do_center_crop else None


def _kind_of(state: Mapping[str, Tensor], metadata: SourceMetadata) -> Recognised:
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    names = set(state)
    if any(re.fullmatch(r"(transformer\.)?wte\.weight", name) for name in names):
        return image_gpt(state, metadata)
    if any(name.endswith("blocks.input.w") for name in names):
        return dalle(state)
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        return recognise_vit(from_transformers(state), metadata)
    if {"encoder.patch_embed.proj.weight", "decoder.0.weight"} <= names:  # official SimMIM with its pixel head
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
        names = set(state)
    if "patch_embed.proj.weight" in names:
        return recognise_vit(Names(dict(state), {name: name for name in state}), metadata)
    raise ForeignError(
        f"unrecognised checkpoint with {len(names)} tensors ({listed(sorted(names))}); supported: official MAE, BEiT "
        "and SimMIM, plain ViTs of timm, ViTMAE, ViT, BEiT and ImageGPT of transformers, DALL-E's dVAE"
    )
