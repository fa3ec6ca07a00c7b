"""A Run's weights for timm, and for the code of official MAE, whose vision transformer has the names of timm's.

timm       its VisionTransformer; with a relative position bias, or without positions, its Beit
official   models_mae.MaskedAutoencoderViT (encoder and decoder), else models_vit.VisionTransformer

Both have positions with a row for the class token, which comes first.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unmask.engine.load import Loaded
from unmask.interop import export_names
from unmask.interop.foreign.state_dicts import IMPRINT
from unmask.interop.targets.common import (
    ExportError,
    Made,
    arguments,
    encoder_of,
    imported,
    imprint,
    is_plain,
    largest,
    left_out,
    mae_misses,
    method_target,
    seen,
    sides,
    task_left_out,
    tokens_of,
    vit_of,
    weights_of,
    what_beit_has,
    write_safetensors,
)
from unmask.methods.mae import MAE
from unmask.nn.masks import Mask
from unmask.tasks.classify import Classifier


def to_timm(loaded: Loaded) -> Made:
    """timm's VisionTransformer; with a relative position bias, or without positions, its Beit."""
    encoder, settings = vit_of(loaded, "timm"), loaded.config.method.model_dump()["encoder"]
    method, spec = loaded.method, loaded.plan.images
    beit = bool(settings["relative_bias"]) or encoder.pos_embed is None
    classifier = method if isinstance(method, Classifier) else None
    asked: dict[str, Any] = {
        "pretrained": False, "img_size": sides(spec.size), "patch_size": sides(encoder.patch),
        "in_chans": spec.channels, "embed_dim": encoder.width, "depth": settings["depth"],
        "num_heads": settings["heads"], "mlp_ratio": settings["mlp_ratio"],
        "num_classes": classifier.head.out_features if classifier else 0,
        "global_pool": "avg" if classifier else "token",
    }  # fmt: skip
    if beit or settings["layer_scale"] is not None:
        asked["init_values"] = settings["layer_scale"] or 0.0  # timm takes None for: as usual
    if beit:
        asked["use_abs_pos_emb"] = encoder.pos_embed is not None
        asked["use_rel_pos_bias"] = bool(settings["relative_bias"])
    elif classifier:
        asked["fc_norm"] = True
    name = "beit_base_patch16_224" if beit else "vit_base_patch16_224"
    weights = encoder_of(method)
    if classifier:
        weights = weights_of(method, "encoder.norm.", "encoder.mean", "encoder.std")
    weights = each_with_its_own(weights, settings["depth"])
    state = (export_names.to_beit if beit else export_names.to_official)(weights)
    eps = settings["norm_eps"]
    said = arguments(asked) + f", norm_layer=partial(nn.LayerNorm, eps={eps!r})" * (eps != 1e-6)

    def check(path: Path, images: Tensor) -> float:
        timm = imported("timm")
        layer = {} if eps == 1e-6 else {"norm_layer": lambda width, **more: nn.LayerNorm(width, **{"eps": eps} | more)}
        model = timm.create_model(name, **asked, **layer).eval()
        model.load_state_dict(load_file(path), strict=True)
        if classifier:
            return largest((model(seen(encoder, images)), classifier.logits(images)))
        return largest((model.forward_features(seen(encoder, images)), tokens_of(encoder, images)))

    what = ("Beit" if beit else "VisionTransformer") + (" with its classifier" if classifier else "")
    return Made(
        what=f"{what} of timm",
        library="timm",
        load=("from functools import partial\n\nfrom torch import nn\n" if eps != 1e-6 else "")
        + "import timm\nfrom safetensors.torch import load_file\n\n"
        + f"model = timm.create_model({name!r}, {said})\nmodel.load_state_dict(load_file(PATH))\nmodel.eval()",
        returns="`model(images)` gives logits." if classifier else
        "`model(images)` gives the class token, `model.forward_features(images)` it and all patch tokens.",
        write=lambda path: write_safetensors(path, state, {IMPRINT: imprint(loaded)}),
        check=check,
        notes=() if classifier else task_left_out(loaded, "timm"),
        classifies=classifier is not None,
    )  # fmt: skip


def each_with_its_own(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The relative position bias that all blocks share, written once for each block, which computes the same.

    timm can share it too, but what its file must hold then depends on its version (before 1.0.24 also an index).
    """
    name = "encoder.relative_bias.table"
    if name not in weights:
        return weights
    own = {f"encoder.blocks.{number}.relative_bias.table": weights[name].clone() for number in range(depth)}
    return {key: value for key, value in weights.items() if key != name} | own


def to_official(loaded: Loaded) -> Made:
    """The files of official MAE: encoder and decoder, encoder, or fine-tuned."""
    encoder, settings = vit_of(loaded, "official MAE"), loaded.config.method.model_dump()["encoder"]
    method, spec = loaded.method, loaded.plan.images
    if not is_plain(encoder, settings):
        raise ExportError(
            f"this encoder has {what_beit_has(settings)}, and official MAE's has positions, and neither LayerScale nor "
            "a relative position bias; use --to timm or --to hf"
        )
    asked: dict[str, Any] = {
        "img_size": sides(spec.size), "patch_size": sides(encoder.patch), "in_chans": spec.channels,
        "embed_dim": encoder.width, "depth": settings["depth"], "num_heads": settings["heads"],
        "mlp_ratio": settings["mlp_ratio"],
    }  # fmt: skip
    norm = f"norm_layer=partial(nn.LayerNorm, eps={settings['norm_eps']!r})"
    why = mae_misses(loaded, "official MAE")
    classifier = method if isinstance(method, Classifier) else None
    if isinstance(method, MAE) and spec.channels != 3:
        why = why or f"official MAE's decoder draws 3 channels, and there are {spec.channels}"
    if isinstance(method, MAE) and settings["mlp_ratio"] != 4:
        why = why or "official MAE has one mlp_ratio for encoder and decoder"
    notes: tuple[str, ...] = ()
    if classifier:
        weights, what = weights_of(method, "encoder.norm.", "encoder.mean", "encoder.std"), "fine-tuned"
        asked |= {"qkv_bias": True, "num_classes": classifier.head.out_features, "global_pool": True}
    elif isinstance(method, MAE) and why is None:
        weights, what = weights_of(method, "encoder.mean", "encoder.std", "target."), "encoder and decoder"
        decoder = loaded.config.method.model_dump()["decoder"]
        asked |= {
            "decoder_embed_dim": decoder["width"], "decoder_depth": decoder["depth"],
            "decoder_num_heads": decoder["heads"], "norm_pix_loss": method_target(loaded) == "norm_pixels",
        }  # fmt: skip
    else:
        weights, what = encoder_of(method), "encoder only"
        asked |= {"qkv_bias": True, "num_classes": 0, "global_pool": False}
        notes = (left_out(loaded, why),) if why else task_left_out(loaded, "official MAE")
    module, name = (
        ("models_mae", "MaskedAutoencoderViT") if what == "encoder and decoder" else ("models_vit", "VisionTransformer")
    )
    state = export_names.to_official(weights)

    def check(path: Path, images: Tensor) -> float:
        make = imported(module, name, f"{module} of facebookresearch/mae")
        layer = partial(nn.LayerNorm, eps=settings["norm_eps"])
        model = make(**asked, norm_layer=layer).eval()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"], strict=True)
        if isinstance(method, MAE) and module == "models_mae":
            return against_models_mae(model, method, images)
        theirs = model(seen(encoder, images)) if classifier else model.forward_features(seen(encoder, images))
        return largest((theirs, classifier.logits(images) if classifier else encoder(images).cls))

    return Made(
        what=f"official MAE, {what}",
        library=f"{module} of facebookresearch/mae",
        load=f"from functools import partial\n\nimport torch\nfrom torch import nn\n\nfrom {module} import {name}\n\n"
        f"model = {name}({arguments(asked)}, {norm})\n"
        'model.load_state_dict(torch.load(PATH, map_location="cpu", weights_only=True)["model"])\nmodel.eval()',
        returns={"models_mae": "`model(images, mask_ratio)` gives loss, prediction and mask."}.get(
            module,
            "`model(images)` gives logits."
            if classifier
            else "`model.forward_features(images)` gives the class token.",
        ),
        write=lambda path: torch.save({"model": state, IMPRINT: imprint(loaded)}, path),
        check=check,
        notes=notes,
        classifies=classifier is not None,
    )


def against_models_mae(model: Any, method: MAE, images: Tensor) -> float:
    """Features of all patches, and the prediction under the mask that the official code draws."""
    found, _, back = model.forward_encoder(seen(method.encoder, images), 0.0)
    patches = found[:, 1:].gather(1, back[..., None].expand(-1, -1, found.shape[2]))
    whole = torch.cat([found[:, :1], patches], 1)
    found, mask, back = model.forward_encoder(seen(method.encoder, images), method.mask_ratio)
    order, hidden = back.argsort(1), int(mask[0].sum())
    drop = order[:, -hidden:]
    theirs = model.forward_decoder(found, back)
    ours = method.guess(method.encoder.patches(images), Mask(keep=order[:, :-hidden], drop=drop))
    theirs = theirs.gather(1, drop[..., None].expand(-1, -1, theirs.shape[2]))
    return largest((whole, tokens_of(method.encoder, images)), (theirs, ours))
