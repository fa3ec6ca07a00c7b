"""Weights that others made: which kind a state dict is, and the same tensors under our names. Pure: nothing is read.

    official MAE     facebookresearch/mae: encoder, encoder and decoder, fine-tuned
    BEiT             microsoft/unilm: pre-trained, fine-tuned
    SimMIM           microsoft/SimMIM, with a ViT: pre-trained
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

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from unmask.errors import ForeignError, UserError, some
from unmask.interop.foreign.openai import dalle, image_gpt
from unmask.interop.foreign.state_dicts import Names, Recognised
from unmask.interop.foreign.vit_checkpoints import recognise_vit
from unmask.interop.names import from_transformers


def recognise(
    state: Mapping[str, Tensor],
    about: Mapping[str, Any] | None = None,
    look: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Recognised:
    """What `state` is, and its tensors under our names. Raises ForeignError when it is none of the known kinds.

    about, look: config.json and preprocessor_config.json of a transformers folder, where there is one. training: the
    arguments of the training that wrote the file, as `metadata.TrainingArguments`.
    """
    look, training = dict(look or {}), training or {}
    look |= {f"image_{key}": training[key] for key in ("mean", "std") if key in training}
    look |= {"crop_pct": training["crop_pct"]} if "crop_pct" in training else {}
    try:
        found = _kind_of(state, about or {}, look, training)
    except (IndexError, TypeError, ValueError, RuntimeError, KeyError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise ForeignError(
            f"its tensors do not have the shapes of the network that their names are of ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); get the file again, it is damaged or "
            "was made by hand"
        ) from None
    return replace(found, eval_share=share_of(look))


def share_of(look: Mapping[str, Any]) -> float | None:
    """Of the shorter side of an image, what preprocessor_config.json (or timm's crop_pct) lets the network see.

    A preprocessor that does not crop shows it the whole image; None where there is no preprocessor.
    """
    if "crop_pct" in look:
        return float(look["crop_pct"])
    whole, crop = look.get("size"), look.get("crop_size")
    if look.get("do_center_crop") and isinstance(whole, Mapping) and isinstance(crop, Mapping):
        shorter, inside = whole.get("shortest_edge"), min(crop.values())
        return min(1.0, inside / shorter) if shorter else 1.0
    return 1.0 if whole is not None and not look.get("do_center_crop") else None


def _kind_of(
    state: Mapping[str, Tensor], about: Mapping[str, Any], look: Mapping[str, Any], training: Mapping[str, Any]
) -> Recognised:
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    names = set(state)
    if any(re.fullmatch(r"(transformer\.)?wte\.weight", name) for name in names):
        return image_gpt(state, about, look)
    if any(name.endswith("blocks.input.w") for name in names):
        return dalle(state)
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        return recognise_vit(from_transformers(state), about, look, training)
    if {"encoder.patch_embed.proj.weight", "decoder.0.weight"} <= names:  # official SimMIM, whole
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
        names = set(state)
    if "patch_embed.proj.weight" in names:
        return recognise_vit(Names(dict(state), {name: name for name in state}), about, look, training)
    raise ForeignError(
        f"{len(names)} tensors came that are no kind which is known here, among them {some(sorted(names))}; expected "
        "were weights of official MAE or BEiT, of a plain ViT of timm, of ViTMAE, ViT, BEiT or ImageGPT of "
        "transformers, or of DALL-E's dVAE"
    )
