"""A .pth file for the official MAE code: {"model": state dict}, for its models_mae or models_vit.

The model is models_mae.MaskedAutoencoderViT if it can represent encoder and decoder, otherwise
models_vit.VisionTransformer. In both models, as here, the class token is the first token and has a position embedding.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unmask.engine.load import Loaded
from unmask.interop import names
from unmask.interop.export_common import (
    arguments,
    encoder_of,
    export_metadata,
    imported,
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
from unmask.interop.export_target import ExportedModel, ExportError, ExportTarget
from unmask.interop.foreign.state_dicts import EXPORT_METADATA
from unmask.methods.mae import MAE
from unmask.nn.masks import Mask


def to_official(loaded: Loaded) -> ExportedModel:
    """Convert a run to a model of official MAE: encoder and decoder, encoder only, or a fine-tuned classifier."""
    encoder, settings = vit_of(loaded, "official MAE"), loaded.config.method.model_dump()["encoder"]
    method, spec = loaded.method, loaded.plan.images
    if not is_plain(encoder, settings):
        raise ExportError(
            f"this encoder has {what_beit_has(settings)}; official MAE supports only position embeddings, no "
            "LayerScale and no relative position bias; use --to timm or --to hf"
        )
    kwargs: dict[str, Any] = {
        "img_size": sides(spec.size), "patch_size": sides(encoder.patch), "in_chans": spec.channels,
        "embed_dim": encoder.width, "depth": settings["depth"], "num_heads": settings["heads"],
        "mlp_ratio": settings["mlp_ratio"],
    }  # fmt: skip
    norm = f"norm_layer=partial(nn.LayerNorm, eps={settings['norm_eps']!r})"
    why = mae_misses(loaded, "official MAE")
    classifier = method.mean_token_classifier
    if isinstance(method, MAE) and spec.channels != 3:
        why = why or f"official MAE's decoder supports only 3 channels, and this run has {spec.channels}"
    if isinstance(method, MAE) and settings["mlp_ratio"] != 4:
        why = why or "official MAE has the same mlp_ratio for encoder and decoder"
    notes: tuple[str, ...] = ()
    if classifier:
        weights, what = weights_of(method, "encoder.norm.", "encoder.mean", "encoder.std"), "fine-tuned"
        kwargs |= {"qkv_bias": True, "num_classes": classifier.head.out_features, "global_pool": True}
    elif isinstance(method, MAE) and why is None:
        weights, what = weights_of(method, "encoder.mean", "encoder.std", "target."), "encoder and decoder"
        decoder = loaded.config.method.model_dump()["decoder"]
        kwargs |= {
            "decoder_embed_dim": decoder["width"], "decoder_depth": decoder["depth"],
            "decoder_num_heads": decoder["heads"], "norm_pix_loss": method_target(loaded) == "norm_pixels",
        }  # fmt: skip
    else:
        weights, what = encoder_of(method), "encoder only"
        kwargs |= {"qkv_bias": True, "num_classes": 0, "global_pool": False}
        notes = (left_out(loaded, why),) if why else task_left_out(loaded, "official MAE")
    module, name = (
        ("models_mae", "MaskedAutoencoderViT") if what == "encoder and decoder" else ("models_vit", "VisionTransformer")
    )
    state = names.to_official(weights)

    def check(path: Path, images: Tensor) -> float:
        make = imported(module, name, f"{module} of facebookresearch/mae")
        layer = partial(nn.LayerNorm, eps=settings["norm_eps"])
        model = make(**kwargs, norm_layer=layer).eval()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"], strict=True)
        if isinstance(method, MAE) and module == "models_mae":
            return against_models_mae(model, method, images)
        theirs = (
            model(normalised(encoder, images)) if classifier else model.forward_features(normalised(encoder, images))
        )
        return largest((theirs, classifier.logits(images) if classifier else encoder(images).cls))

    return ExportedModel(
        what=f"official MAE, {what}",
        library=f"{module} of facebookresearch/mae",
        load=f"from functools import partial\n\nimport torch\nfrom torch import nn\n\nfrom {module} import {name}\n\n"
        f"model = {name}({arguments(kwargs)}, {norm})\n"
        'model.load_state_dict(torch.load(PATH, map_location="cpu", weights_only=True)["model"])\nmodel.eval()',
        returns={"models_mae": "`model(images, mask_ratio)` returns loss, prediction and patch mask."}.get(
            module,
            "`model(images)` returns logits."
            if classifier
            else "`model.forward_features(images)` returns the class token.",
        ),
        write=lambda path: torch.save({"model": state, EXPORT_METADATA: export_metadata(loaded)}, path),
        check=check,
        notes=notes,
        classifies=classifier is not None,
    )


def against_models_mae(model: Any, method: MAE, images: Tensor) -> float:
    """Return the largest difference from models_mae, in features of all patches and in predictions under its mask."""
    tokens, _, back = model.forward_encoder(normalised(method.encoder, images), 0.0)
    patches = tokens[:, 1:].gather(1, back[..., None].expand(-1, -1, tokens.shape[2]))
    whole = torch.cat([tokens[:, :1], patches], 1)
    tokens, mask, back = model.forward_encoder(normalised(method.encoder, images), method.mask_ratio)
    order, hidden = back.argsort(1), int(mask[0].sum())
    drop = order[:, -hidden:]
    theirs = model.forward_decoder(tokens, back)
    ours = method.guess(method.encoder.patches(images), Mask(keep=order[:, :-hidden], drop=drop))
    theirs = theirs.gather(1, drop[..., None].expand(-1, -1, theirs.shape[2]))
    return largest((whole, tokens_of(method.encoder, images)), (theirs, ours))


TARGET = ExportTarget(to_official, suffix=".pth", library_name="pytorch")
