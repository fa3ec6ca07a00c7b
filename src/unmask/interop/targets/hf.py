"""A Run as a folder for transformers: ViT, BEiT, ImageGPT or ViTMAE, and the preprocessor that goes with it.

The encoder, of which `AutoModel` and pipelines then give all tokens; by another name the whole method, where
transformers has it. Its ViTMAE hides patches at random whenever it runs, so it is no form for features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.engine.load import Loaded
from unmask.interop import export_names
from unmask.interop.foreign.state_dicts import IMPRINT
from unmask.interop.targets.common import (
    ExportError,
    ExportFailed,
    Made,
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
from unmask.methods.beit import BEiT
from unmask.methods.igpt import IGPT
from unmask.methods.mae import MAE
from unmask.nn.gpt import GPT
from unmask.nn.masks import Mask
from unmask.nn.vit import ViT
from unmask.tasks.classify import Classifier


def to_hf(loaded: Loaded) -> Made:
    """A folder for transformers: the encoder, an iGPT, or a classifier.

    `AutoModel` and the feature-extraction pipeline give every token of it, the same at every call.
    """
    return make(loaded, whole=False)


def to_hf_pretraining(loaded: Loaded) -> Made:
    """A folder for transformers of the whole pre-training method. Raises ExportError where it has none for it."""
    made = make(loaded, whole=True)
    if isinstance(loaded.method, (MAE, BEiT, IGPT)) and made.whole:
        return made
    raise ExportError(
        f"transformers has no pre-training model for this run of {loaded.config.method.name}"
        + (f" ({made.notes[0]})" if made.notes and isinstance(loaded.method, (MAE, BEiT)) else "")
        + "; use --to hf for the encoder"
    )


def make(loaded: Loaded, *, whole: bool) -> Made:
    """whole: with the decoder or the head of the pre-training, where transformers has the method."""
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
    if isinstance(method, Classifier) and beit_misses(loaded, encoder) is None:
        return whole_classifier(loaded, method, config)
    has_beit = isinstance(method, BEiT) and method_target(loaded) == "tokens" and beit_misses(loaded, encoder) is None
    if whole and isinstance(method, BEiT) and has_beit:
        return whole_beit(loaded, method, config)
    notes = task_left_out(loaded, "transformers")
    if why is not None:
        notes = (left_out(loaded, why),)
    elif has_beit or (isinstance(method, MAE) and plain):
        notes = ("the encoder alone, all patches visible; --to hf-pretraining has the rest of the method",)
    if isinstance(method, Classifier):
        notes = (left_out(loaded, "transformers has a classifier on mean patch tokens for squares only (BEiT's)"),)
    if not plain:
        require_beit(loaded, encoder)
        config |= beit_config(encoder, settings) | {"use_mean_pooling": False}
    name, kind = ("ViTModel", "vit") if plain else ("BeitModel", "beit")

    def compare(model: Any, images: Tensor) -> float:
        return largest((model(pixel_values=seen(encoder, images)).last_hidden_state, tokens_of(encoder, images)))

    return folder(
        loaded,
        name,
        config | {"model_type": kind},
        export_names.to_transformers(encoder_of(method), beit=not plain),
        compare,
        "`model(pixel_values).last_hidden_state` has the class token first, then the patches.",
        notes,
    )


def beit_misses(loaded: Loaded, encoder: ViT) -> str | None:
    """What transformers' BEiT cannot be given; None where it fits. Of rectangles its relative bias is another one."""
    (height, width), patch = loaded.plan.images.size, encoder.patch
    if patch[0] != patch[1]:
        return f"patches of {patch[0]} x {patch[1]}"
    return f"images of {height} x {width}" if height != width else None


def require_beit(loaded: Loaded, encoder: ViT) -> None:
    """Raises ExportError where transformers' BEiT is asked for and does not fit."""
    if (what := beit_misses(loaded, encoder)) is not None:
        has = what_beit_has(loaded.config.method.model_dump()["encoder"])
        raise ExportError(
            f"this encoder is for {what} and has {has}, for which transformers has its BEiT only, and that is right "
            "for squares only; use --to timm, or --to onnx"
        )


def beit_config(encoder: ViT, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "use_absolute_position_embeddings": encoder.pos_embed is not None,
        "use_relative_position_bias": settings["relative_bias"] == "each_block",
        "use_shared_relative_position_bias": settings["relative_bias"] is True,
        "layer_scale_init_value": settings["layer_scale"] or 0.0, "drop_path_rate": 0.0, "use_mask_token": False,
        "model_type": "beit",
    }  # fmt: skip


def whole_mae(loaded: Loaded, method: MAE, config: dict[str, Any]) -> Made:
    decoder = loaded.config.method.model_dump()["decoder"]
    config |= {
        "model_type": "vit_mae", "decoder_hidden_size": decoder["width"], "decoder_num_hidden_layers": decoder["depth"],
        "decoder_num_attention_heads": decoder["heads"], "decoder_intermediate_size": 4 * decoder["width"],
        "mask_ratio": method.mask_ratio, "norm_pix_loss": method_target(loaded) == "norm_pixels",
    }  # fmt: skip

    def compare(model: Any, images: Tensor) -> float:
        pixels, places = seen(method.encoder, images), method.encoder.grid[0] * method.encoder.grid[1]
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(len(images), places, generator=generator)
        theirs, order = model(pixel_values=pixels, noise=noise), noise.argsort(1)
        hidden = int(theirs.mask[0].sum())
        drop = order[:, -hidden:]
        guess = method.guess(method.encoder.patches(images), Mask(keep=order[:, :-hidden], drop=drop))
        logits = theirs.logits.gather(1, drop[..., None].expand(-1, -1, guess.shape[2]))
        model.config.mask_ratio = 0.0  # it still shuffles the patches, unless the noise is in order already
        tokens = model.vit(pixel_values=pixels, noise=torch.arange(float(places)).expand(len(images), -1))
        return largest((logits, guess), (tokens.last_hidden_state, tokens_of(method.encoder, images)))

    return folder(
        loaded,
        "ViTMAEForPreTraining",
        config,
        export_names.to_transformers(weights_of(method, "encoder.mean", "encoder.std"), beit=False, prefix="vit."),
        compare,
        "`model(pixel_values)` gives the loss and the prediction, under masks that are drawn at random at every call; "
        "for features export with --to hf.",
    )


def whole_classifier(loaded: Loaded, method: Classifier, config: dict[str, Any]) -> Made:
    """BEiT's, which like ours judges the mean of the patch tokens; ViT's judges the class token."""
    settings = loaded.config.method.model_dump()
    config |= beit_config(method.encoder, settings["encoder"]) | {
        "use_mean_pooling": True, "id2label": {str(number): name for number, name in enumerate(settings["classes"])},
        "label2id": {name: number for number, name in enumerate(settings["classes"])},
    }  # fmt: skip
    weights = export_names.to_transformers(
        weights_of(method, "encoder.norm.", "encoder.mean", "encoder.std"), beit=True, prefix="beit."
    )
    return folder(
        loaded,
        "BeitForImageClassification",
        config,
        weights,
        lambda model, images: largest((model(pixel_values=seen(method.encoder, images)).logits, method.logits(images))),
        "`model(pixel_values).logits` has a score for each class of `model.config.id2label`.",
        (
            "it is BEiT's classifier over there, the one that judges the mean of the patch tokens as this one does "
            "(ViT's judges the class token)",
        ),
    )


def whole_beit(loaded: Loaded, method: BEiT, config: dict[str, Any]) -> Made:
    settings = loaded.config.method.model_dump()["encoder"]
    config |= beit_config(method.encoder, settings) | {
        "use_mask_token": True, "use_mean_pooling": True, "vocab_size": method.head.out_features,
    }  # fmt: skip
    weights = export_names.to_transformers(
        weights_of(method, "encoder.mean", "encoder.std", "target."), beit=True, prefix="beit."
    )
    weights = {
        name.replace("classifier.", "lm_head.").replace("beit.layernorm.", "layernorm."): value
        for name, value in weights.items()
    }

    def compare(model: Any, images: Tensor) -> float:
        pixels, encoder = seen(method.encoder, images), method.encoder
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
        "BeitForMaskedImageModeling",
        config,
        weights,
        compare,
        "`model(pixel_values, bool_masked_pos=hidden).logits` has a score for every code; features are "
        "`model.layernorm(model.beit(pixel_values).last_hidden_state)`, the class token first.",
        ("the dVAE that makes the codes is left out: transformers has none",),
    )


def folder(
    loaded: Loaded,
    name: str,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    compare: Callable[[Any, Tensor], float],
    returns: str,
    notes: tuple[str, ...] = (),
    more: Mapping[str, dict[str, Any]] | None = None,
) -> Made:
    """A folder for `from_pretrained`. compare: (model, images) -> the largest difference. more: other JSON files."""
    files = {"config.json": {"architectures": [name], "dtype": "float32"} | config}
    processor = preprocessor(loaded) if more is None else None
    # A pooler there would be a random one.
    bare = ", add_pooling_layer=False" if name in ("ViTModel", "BeitModel") else ""
    if processor is not None and not isinstance(sides(loaded.plan.images.size), int):
        notes = (*notes, "the preprocessor makes rectangles of the whole image, where evaluation here takes the "
                 "largest box of their shape in the middle")  # fmt: skip
    files |= more or ({} if processor is None else {"preprocessor_config.json": processor})
    if more is None and processor is None:
        notes = (*notes, f"no preprocessor: transformers' are for 8-bit images, and these are "
                 f"{loaded.plan.images.dtype}; the card says how to normalise")  # fmt: skip

    def write(path: Path) -> None:
        path.mkdir()
        write_safetensors(path / "model.safetensors", weights, {IMPRINT: imprint(loaded)})
        for file, content in files.items():
            (path / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    def check(path: Path, images: Tensor) -> float:
        transformers = imported("transformers")
        options = {"add_pooling_layer": False} if name in ("ViTModel", "BeitModel") else {}
        transformers.utils.logging.disable_progress_bar()
        kind = imported("transformers", name)
        # Whoever names no class gets this one, so it is what is checked where there is nothing but an encoder.
        kind = imported("transformers", "AutoModel") if name in ("ViTModel", "BeitModel") else kind
        model, told = kind.from_pretrained(path, output_loading_info=True, **options)
        faults = {key: told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if told.get(key)}
        if faults:
            raise ExportFailed(f"transformers' {name} does not take these weights: {faults}; they have been removed")
        return compare(model.eval(), images)

    return Made(
        what=f"{name} of transformers",
        library="transformers",
        load=f"from transformers import {name}\n\nmodel = {name}.from_pretrained(PATH{bare}).eval()"
        if "preprocessor_config.json" not in files else
        f"from transformers import AutoImageProcessor, {name}\n\nprocessor = AutoImageProcessor.from_pretrained(PATH)"
        f"\nmodel = {name}.from_pretrained(PATH{bare}).eval()",
        returns=returns,
        write=write,
        check=check,
        notes=notes,
        classifies=name == "BeitForImageClassification",
        whole=name in ("ViTMAEForPreTraining", "BeitForMaskedImageModeling", "ImageGPTForCausalImageModeling"),
    )  # fmt: skip


def preprocessor(loaded: Loaded) -> dict[str, Any] | None:
    """preprocessor_config.json; None for images that are not 8 bits a channel.

    As in evaluation here: of squares the largest in the middle (or the share of it that the settings say). Rectangles
    are made of the whole image over there, which changes their aspect.
    """
    spec = loaded.plan.images
    if spec.dtype != "uint8":
        return None
    height, width = spec.size
    square = height == width
    size = (
        {"size": {"shortest_edge": round(height / loaded.config.data.crop.eval_share)}, "do_center_crop": True,
         "crop_size": {"height": height, "width": width}} if square else {"size": {"height": height, "width": width}}
    )  # fmt: skip
    return {
        "image_processor_type": "BitImageProcessor" if square else "ViTImageProcessor", "do_resize": True, **size,
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [value / 255 for value in spec.mean], "image_std": [value / 255 for value in spec.std],
        "do_convert_rgb": spec.channels == 3,
    }  # fmt: skip


def to_image_gpt(loaded: Loaded) -> Made:
    """transformers' ImageGPT, with the palette in its preprocessor where that can hold it."""
    method, encoder = loaded.method, loaded.method.encoder
    assert isinstance(encoder, GPT)
    if encoder.sos is None:
        raise ExportError(
            "this iGPT fills in hidden tokens (objective=bert), and transformers' ImageGPT predicts the next one; use "
            "--to onnx or --to safetensors"
        )
    head = method.head if isinstance(method, IGPT) else None
    colours, spec, depth = len(encoder.palette), loaded.plan.images, len(encoder.blocks)
    config = {
        "model_type": "imagegpt", "vocab_size": colours + 1, "n_positions": encoder.grid[0] * encoder.grid[1],
        "n_embd": encoder.width, "n_layer": depth, "n_head": loaded.config.method.model_dump()["encoder"]["heads"],
        "activation_function": "quick_gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    notes = (f"the start token is {colours}, the number after the last colour", )  # fmt: skip
    if spec.channels == 3 and spec.dtype == "uint8":
        more = {"preprocessor_config.json": {
            "image_processor_type": "ImageGPTImageProcessor", "do_resize": True, "do_normalize": True,
            "size": {"height": encoder.grid[0], "width": encoder.grid[1]}, "do_color_quantize": True,
            "resample": 3 if encoder.patch == (1, 1) else 4, "clusters": (encoder.palette / 127.5 - 1).tolist(),
        }}  # fmt: skip
        if encoder.patch != (1, 1):
            notes = (*notes, f"a token is the mean of {encoder.patch[0]} x {encoder.patch[1]} pixels; the preprocessor "
                     "rounds these means, so now and then it takes another colour")  # fmt: skip
    else:
        more = {"palette.json": {"colours": encoder.palette.tolist(), "dtype": spec.dtype}}
        notes = (*notes, "no preprocessor: ImageGPT's has 8-bit RGB colours only; palette.json holds the colours, in "
                 "the files' units, and a token is the nearest one")  # fmt: skip

    def compare(model: Any, images: Tensor) -> float:
        ids = encoder.ids(images)
        given = torch.cat([torch.full_like(ids[:, :1], colours), ids[:, :-1]], 1)
        out = model(input_ids=given, output_hidden_states=True)
        core = model.transformer if head is not None else model
        last = core.ln_f if encoder.layer == depth else core.h[encoder.layer].ln_1
        features = out.hidden_states[encoder.layer]
        pairs = [(features if encoder.layer == depth else last(features), encoder(images).patches)]
        if head is not None:
            pairs.append((out.logits, head(encoder.run(ids))))
        return largest(*pairs)

    where = f"`model.{'transformer.' * (head is not None)}h[{encoder.layer}].ln_1(hidden_states[{encoder.layer}])`"
    return folder(
        loaded,
        "ImageGPTForCausalImageModeling" if head is not None else "ImageGPTModel",
        config,
        export_names.to_image_gpt(weights_of(method), prefix="transformer." if head is not None else ""),
        compare,
        "Give it the tokens with the start token before them and without the last; the features of this package "
        + (f"are {where}, of `output_hidden_states=True`." if encoder.layer < depth else "are the last hidden state."),
        notes,
        more,
    )
