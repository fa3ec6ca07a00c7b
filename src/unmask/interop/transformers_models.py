"""Convert a run to transformers' ViT, ViTMAE or BEiT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unmask.engine.load import Loaded
from unmask.interop import names
from unmask.interop.export_common import (
    encoder_of,
    is_plain,
    largest,
    left_out,
    mae_misses,
    method_target,
    normalised,
    sides,
    task_left_out,
    tokens_of,
    vit_of,
    weights_of,
    what_beit_has,
)
from unmask.interop.export_target import ExportedModel, ExportError
from unmask.interop.transformers_folder import TransformersModel, folder
from unmask.interop.transformers_gpt import to_image_gpt
from unmask.method import MeanTokenClassifier
from unmask.methods.beit import BEiT
from unmask.methods.mae import MAE
from unmask.nn.gpt import GPT
from unmask.nn.masks import Mask
from unmask.nn.vit import ViT


def to_transformers(loaded: Loaded, *, whole: bool) -> ExportedModel:
    """Convert a run to a model of transformers.

    whole: whether to include the decoder or head of the pre-training, if transformers has the method.
    """
    if isinstance(loaded.method.encoder, GPT):
        return to_image_gpt(loaded)
    encoder, settings = vit_of(loaded, "transformers"), loaded.config.method.model_dump()["encoder"]
    method, spec = loaded.method, loaded.plan.images
    plain = is_plain(encoder, settings)
    config: dict[str, Any] = {
        "hidden_size": encoder.width, "num_hidden_layers": settings["depth"], "num_attention_heads": settings["heads"],
        "intermediate_size": int(encoder.width * settings["mlp_ratio"]), "hidden_act": "gelu",
        "layer_norm_eps": settings["norm_eps"], "image_size": sides(spec.size), "patch_size": sides(encoder.patch),
        "num_channels": spec.channels, "qkv_bias": True, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    why = mae_misses(loaded, "transformers' ViTMAE") if isinstance(method, MAE) and plain else None
    if whole and isinstance(method, MAE) and plain and why is None:
        return whole_mae(loaded, method, config)
    if (classifier := method.mean_token_classifier) and beit_misses(loaded, encoder) is None:
        return whole_classifier(loaded, encoder, classifier, config)
    has_beit = isinstance(method, BEiT) and method_target(loaded) == "tokens" and beit_misses(loaded, encoder) is None
    if whole and isinstance(method, BEiT) and has_beit:
        return whole_beit(loaded, method, config)
    notes = task_left_out(loaded, "transformers")
    if why is not None:
        notes = (left_out(loaded, why),)
    elif has_beit or (isinstance(method, MAE) and plain):
        notes = (
            "only the encoder is exported, with all patches visible; --to hf-pretraining exports the whole method",
        )
    if classifier:
        notes = (left_out(loaded, "transformers has a classifier on mean patch tokens only for squares (BEiT's)"),)
    if not plain:
        require_beit(loaded, encoder)
        config |= beit_config(encoder, settings) | {"use_mean_pooling": False}
    name, kind = ("ViTModel", "vit") if plain else ("BeitModel", "beit")

    def compare(model: Any, images: Tensor) -> float:
        return largest((model(pixel_values=normalised(encoder, images)).last_hidden_state, tokens_of(encoder, images)))

    return folder(
        loaded,
        TransformersModel(
            name=name,
            config=config | {"model_type": kind},
            weights=names.to_transformers(encoder_of(method), beit=not plain),
            compare=compare,
            returns="`model(pixel_values).last_hidden_state` has the class token first, then the patches.",
            notes=notes,
        ),
    )


def beit_misses(loaded: Loaded, encoder: ViT) -> str | None:
    """Return the size that transformers' BEiT does not support, as text, or None if BEiT supports this encoder.

    The relative position bias of transformers' BEiT is wrong for rectangles.
    """
    (height, width), patch = loaded.plan.images.size, encoder.patch
    if patch[0] != patch[1]:
        return f"patches of {patch[0]} x {patch[1]}"
    return f"images of {height} x {width}" if height != width else None


def require_beit(loaded: Loaded, encoder: ViT) -> None:
    """Raise ExportError if transformers' BEiT does not support this encoder."""
    if (what := beit_misses(loaded, encoder)) is not None:
        has = what_beit_has(loaded.config.method.model_dump()["encoder"])
        raise ExportError(
            f"this encoder is for {what} and has {has}, which transformers supports only in BEiT, and only for "
            "squares; use --to timm, or --to onnx"
        )


def beit_config(encoder: ViT, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "use_absolute_position_embeddings": encoder.pos_embed is not None,
        "use_relative_position_bias": settings["relative_bias"] == "each_block",
        "use_shared_relative_position_bias": settings["relative_bias"] is True,
        "layer_scale_init_value": settings["layer_scale"] or 0.0, "drop_path_rate": 0.0, "use_mask_token": False,
        "model_type": "beit",
    }  # fmt: skip


def whole_mae(loaded: Loaded, method: MAE, config: dict[str, Any]) -> ExportedModel:
    decoder = loaded.config.method.model_dump()["decoder"]
    config |= {
        "model_type": "vit_mae", "decoder_hidden_size": decoder["width"], "decoder_num_hidden_layers": decoder["depth"],
        "decoder_num_attention_heads": decoder["heads"], "decoder_intermediate_size": 4 * decoder["width"],
        "mask_ratio": method.mask_ratio, "norm_pix_loss": method_target(loaded) == "norm_pixels",
    }  # fmt: skip

    def compare(model: Any, images: Tensor) -> float:
        pixels, places = normalised(method.encoder, images), method.encoder.grid[0] * method.encoder.grid[1]
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(len(images), places, generator=generator)
        theirs, order = model(pixel_values=pixels, noise=noise), noise.argsort(1)
        hidden = int(theirs.mask[0].sum())
        drop = order[:, -hidden:]
        guess = method.guess(method.encoder.patches(images), Mask(keep=order[:, :-hidden], drop=drop))
        logits = theirs.logits.gather(1, drop[..., None].expand(-1, -1, guess.shape[2]))
        model.config.mask_ratio = 0.0  # with unsorted noise, ViTMAE would shuffle the patches
        tokens = model.vit(pixel_values=pixels, noise=torch.arange(float(places)).expand(len(images), -1))
        return largest((logits, guess), (tokens.last_hidden_state, tokens_of(method.encoder, images)))

    return folder(
        loaded,
        TransformersModel(
            name="ViTMAEForPreTraining",
            config=config,
            weights=names.to_transformers(weights_of(method, "encoder.mean", "encoder.std"), beit=False, prefix="vit."),
            compare=compare,
            returns="`model(pixel_values)` returns the loss and the prediction, with new random patch masks at every "
            "call; for features, export with --to hf.",
        ),
    )


def whole_classifier(
    loaded: Loaded, encoder: ViT, classifier: MeanTokenClassifier, config: dict[str, Any]
) -> ExportedModel:
    """Convert a classifier to BEiT's, which also uses the mean of the patch tokens instead of the class token."""
    settings = loaded.config.method.model_dump()
    config |= beit_config(encoder, settings["encoder"]) | {
        "use_mean_pooling": True, "id2label": {str(number): name for number, name in enumerate(settings["classes"])},
        "label2id": {name: number for number, name in enumerate(settings["classes"])},
    }  # fmt: skip
    weights = names.to_transformers(
        weights_of(loaded.method, "encoder.norm.", "encoder.mean", "encoder.std"), beit=True, prefix="beit."
    )
    return folder(
        loaded,
        TransformersModel(
            name="BeitForImageClassification",
            config=config,
            weights=weights,
            compare=lambda model, images: largest(
                (model(pixel_values=normalised(encoder, images)).logits, classifier.logits(images))
            ),
            returns="`model(pixel_values).logits` has a score for each class of `model.config.id2label`.",
            notes=(
                "the classifier is converted to BEiT's, which also uses the mean of the patch tokens (ViT's uses the "
                "class token)",
            ),
        ),
    )


def whole_beit(loaded: Loaded, method: BEiT, config: dict[str, Any]) -> ExportedModel:
    settings = loaded.config.method.model_dump()["encoder"]
    config |= beit_config(method.encoder, settings) | {
        "use_mask_token": True, "use_mean_pooling": True, "vocab_size": method.head.out_features,
    }  # fmt: skip
    weights = names.to_transformers(
        weights_of(method, "encoder.mean", "encoder.std", "target."), beit=True, prefix="beit."
    )
    weights = {
        name.replace("classifier.", "lm_head.").replace("beit.layernorm.", "layernorm."): value
        for name, value in weights.items()
    }

    def compare(model: Any, images: Tensor) -> float:
        pixels, encoder = normalised(method.encoder, images), method.encoder
        places = encoder.grid[0] * encoder.grid[1]
        hidden = torch.arange(places).expand(len(images), -1) % 3 == 0
        logits = model(pixel_values=pixels, bool_masked_pos=hidden).logits
        kept, dropped = (hidden == flag for flag in (False, True))
        order = torch.arange(places).expand(len(images), -1)
        mask = Mask(*(order[part].unflatten(0, (len(images), -1)) for part in (kept, dropped)))
        guess = method.guess(encoder.patches(images), mask)
        asked = logits[hidden].unflatten(0, (len(images), -1)) if logits.ndim == 3 else logits
        tokens = model.layernorm(model.beit(pixel_values=pixels).last_hidden_state)
        return largest((asked, guess), (tokens, tokens_of(encoder, images)))

    return folder(
        loaded,
        TransformersModel(
            name="BeitForMaskedImageModeling",
            config=config,
            weights=weights,
            compare=compare,
            returns="`model(pixel_values, bool_masked_pos=hidden).logits` has a score for every code; features are "
            "`model.layernorm(model.beit(pixel_values).last_hidden_state)`, the class token first.",
            notes=("the dVAE that makes the codes is left out: transformers has no dVAE",),
        ),
    )
