"""One .safetensors file for timm's VisionTransformer or Beit.

Beit is used for an encoder with a relative position bias, or without position embeddings. In both models, as here, the
class token is the first token and has a position embedding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from unmask.engine.load import Loaded
from unmask.interop import names
from unmask.interop.export_common import (
    arguments,
    encoder_of,
    export_metadata,
    imported,
    largest,
    normalised,
    sides,
    task_left_out,
    tokens_of,
    vit_of,
    weights_of,
    write_safetensors,
)
from unmask.interop.export_target import ExportedModel, ExportTarget
from unmask.interop.foreign.state_dicts import EXPORT_METADATA


def to_timm(loaded: Loaded) -> ExportedModel:
    """Convert a run to timm's VisionTransformer or Beit."""
    encoder, settings = vit_of(loaded, "timm"), loaded.config.method.model_dump()["encoder"]
    method, spec = loaded.method, loaded.plan.images
    beit = bool(settings["relative_bias"]) or encoder.pos_embed is None
    classifier = method.mean_token_classifier
    kwargs: dict[str, Any] = {
        "pretrained": False, "img_size": sides(spec.size), "patch_size": sides(encoder.patch),
        "in_chans": spec.channels, "embed_dim": encoder.width, "depth": settings["depth"],
        "num_heads": settings["heads"], "mlp_ratio": settings["mlp_ratio"],
        "num_classes": classifier.head.out_features if classifier else 0,
        "global_pool": "avg" if classifier else "token",
    }  # fmt: skip
    if beit or settings["layer_scale"] is not None:
        kwargs["init_values"] = settings["layer_scale"] or 0.0  # with None, timm would use its default
    if beit:
        kwargs["use_abs_pos_emb"] = encoder.pos_embed is not None
        kwargs["use_rel_pos_bias"] = bool(settings["relative_bias"])
    elif classifier:
        kwargs["fc_norm"] = True
    name = "beit_base_patch16_224" if beit else "vit_base_patch16_224"
    weights = encoder_of(method)
    if classifier:
        weights = weights_of(method, "encoder.norm.", "encoder.mean", "encoder.std")
    weights = each_with_its_own(weights, settings["depth"])
    state = (names.to_beit if beit else names.to_official)(weights)
    eps = settings["norm_eps"]
    code = arguments(kwargs) + f", norm_layer=partial(nn.LayerNorm, eps={eps!r})" * (eps != 1e-6)

    def check(path: Path, images: Tensor) -> float:
        timm = imported("timm")
        layer = {} if eps == 1e-6 else {"norm_layer": lambda width, **more: nn.LayerNorm(width, **{"eps": eps} | more)}
        model = timm.create_model(name, **kwargs, **layer).eval()
        model.load_state_dict(load_file(path), strict=True)
        if classifier:
            return largest((model(normalised(encoder, images)), classifier.logits(images)))
        return largest((model.forward_features(normalised(encoder, images)), tokens_of(encoder, images)))

    what = ("Beit" if beit else "VisionTransformer") + (" with its classifier" if classifier else "")
    return ExportedModel(
        what=f"{what} of timm",
        library="timm",
        load=("from functools import partial\n\nfrom torch import nn\n" if eps != 1e-6 else "")
        + "import timm\nfrom safetensors.torch import load_file\n\n"
        + f"model = timm.create_model({name!r}, {code})\nmodel.load_state_dict(load_file(PATH))\nmodel.eval()",
        returns="`model(images)` returns logits." if classifier else
        "`model(images)` returns the class token, `model.forward_features(images)` also all patch tokens.",
        write=lambda path: write_safetensors(path, state, {EXPORT_METADATA: export_metadata(loaded)}),
        check=check,
        notes=() if classifier else task_left_out(loaded, "timm"),
        classifies=classifier is not None,
    )  # fmt: skip


def each_with_its_own(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Copy a relative position bias that all blocks share to every block, which gives the same outputs.

    timm also supports a shared bias, but only versions before 1.0.24 also expect an index of relative positions in the
    file.
    """
    name = "encoder.relative_bias.table"
    if name not in weights:
        return weights
    own = {f"encoder.blocks.{number}.relative_bias.table": weights[name].clone() for number in range(depth)}
    return {key: value for key, value in weights.items() if key != name} | own


TARGET = ExportTarget(to_timm, suffix=".safetensors", library_name="timm")
