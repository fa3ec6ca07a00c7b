"""`unmask export RUN --to TARGET --out PATH`: a Run's weights for other libraries, with a model card beside them.

    timm         one .safetensors file for timm's VisionTransformer, or its Beit
    hf           a folder for transformers: ViTMAE, ViT, BEiT or ImageGPT, and its preprocessing
    official     {"model": state dict} in a .pth file, under the names of official MAE
    onnx         the encoder with its normalisation, for any runtime
    safetensors  the whole method under our own names, its settings in the header; `open_safetensors` reads it

An export ends with a test: the other library, where it is installed, loads what was written, and its features of random
images are held against those of the Run. What computes something else is removed. What a target cannot express (a
decoder for rectangles, a head on other tokens) is left out and said; where not even the encoder fits, it is refused.

Names and tensors are turned by `foreign.py`, the way back from `importing.py`; the card is `card.py`'s.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from unmask import checkpoint, foreign
from unmask.batch import DTYPES, ImageSpec
from unmask.card import model_card
from unmask.config import Config, nearest
from unmask.console import Console
from unmask.errors import TrainingFailed, UserError
from unmask.method import Method
from unmask.methods.beit import BEiT
from unmask.methods.igpt import IGPT
from unmask.methods.mae import MAE
from unmask.nn.gpt import GPT
from unmask.nn.gpt import Block as GPTBlock
from unmask.nn.masks import Mask
from unmask.nn.patches import normalise
from unmask.nn.vit import ViT
from unmask.run import Run
from unmask.saved import Loaded, load
from unmask.tasks.classify import Classifier

TOLERANCE = 1e-4
CHECKED = 3  # random images
OPSET = 18
ONE_FILE = 1 << 30  # bytes of weights; an ONNX file must stay below 2 GiB, beyond this its weights lie beside it
HEADER = "unmask"  # where our own file has its settings


class ExportError(UserError):
    """A Run that the target has no form for, or nowhere to write; the message says which target or name would do."""


class ExportFailed(TrainingFailed):
    """The other library computes something else from what was written, which has been removed."""


@dataclass(frozen=True)
class Made:
    """What a target makes of a Run.

    what: the model over there. library: which has to be installed for the test. load: code that loads it, with PATH for
    the place. returns: a sentence, what the code's outputs are. notes: what was left out, in sentences. write: makes
    the file, or the files of a folder. check: the largest difference between what the library computes from it and what
    the Run does, on images in the files' units; ImportError without the library.
    """

    what: str
    library: str
    load: str
    returns: str
    write: Callable[[Path], None]
    check: Callable[[Path, Tensor], float]
    notes: tuple[str, ...] = ()
    classifies: bool = False


def export_run(
    run: str | Path, to: str, out: str | Path, *, step: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Write the weights of a Run for another library, and its model card; returns what was written and tested.

    step: of the checkpoint, None for the newest. Raises ValueError for a target that is not known, one that has no form
    for this Run, or an `out` that is taken; ExportFailed when the other library does not compute the same.
    """
    console = console or Console(quiet=True)
    if to not in TARGETS:
        raise ExportError(f"target {to!r} is not known; {nearest(to, TARGETS)}")
    out, suffix, make = Path(out), *TARGETS[to]
    card = out / "README.md" if not suffix else out.with_name(out.name + ".md")
    require_free(out, card, suffix)
    loaded = load(run, step=step)
    made = make(loaded)
    console.say(f"{run} at step {loaded.step}: {made.what}")
    for note in made.notes:
        console.say(f"  {note}")
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    try:
        inside = staging / out.name
        made.write(inside)
        difference, tested = test(made, inside, loaded, run)
        name = inside / "README.md" if not suffix else inside.with_name(inside.name + ".md")
        load_it, returns = (text.replace("PATH", json.dumps(out.name)) for text in (made.load, made.returns))
        text = model_card(
            Run.open(run), config=loaded.config, plan=loaded.plan, step=loaded.step, to=to, what=made.what,
            load=load_it, returns=returns, notes=made.notes, tested=tested, classifies=made.classifies,
        )  # fmt: skip
        name.write_text(text, "utf-8")
        for file in sorted(staging.iterdir()):
            file.rename(out.parent / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    console.say(f"  {tested}")
    console.say(f"  load it with:\n\n{indented(made.load.replace('PATH', json.dumps(str(out))))}\n")
    console.say(f"{out}, with its model card {card}")
    return {
        "run": str(run), "to": to, "out": str(out), "card": str(card), "what": made.what, "step": loaded.step,
        "load": made.load.replace("PATH", json.dumps(str(out))), "notes": list(made.notes), "difference": difference,
        "tested": tested,
    }  # fmt: skip


def require_free(out: Path, card: Path, suffix: str) -> None:
    """Raises ExportError for a name that is taken, of another ending, or in no folder."""
    if suffix and out.suffix != suffix:
        raise ExportError(f"output file {out} came; a name that ends in {suffix} was expected")
    for taken in (out, card, out.with_name(out.name + ".data")):
        if taken.exists() or taken.is_symlink():
            raise ExportError(f"{taken} exists already and is not overwritten; choose another --out, or remove it")
    if not out.resolve().parent.is_dir():
        raise ExportError(f"the folder {out.resolve().parent} does not exist; make it first, or choose another --out")


def indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def test(made: Made, path: Path, loaded: Loaded, run: str | Path) -> tuple[float | None, str]:
    """(largest difference, what came of it in a sentence). Raises ExportFailed when it is more than TOLERANCE."""
    try:
        with torch.inference_mode(), quietly():
            difference = made.check(path, random_images(loaded.plan.images))
    except ImportError:
        return None, f"not checked: {made.library} is not installed"
    if not difference <= TOLERANCE:
        raise ExportFailed(
            f"what was exported of {run}, loaded by {made.library}, differs by up to {difference:.3g} from the run on "
            f"{CHECKED} random images, where at most {TOLERANCE:g} was expected; it has been removed, so nothing wrong "
            "is left. This is a fault in unmask, or a version of that library it does not know; --to safetensors needs "
            "no other library"
        )
    return difference, (
        f"checked: {made.library} computes the same from it, up to {difference:.1e} on {CHECKED} random images"
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Without what other libraries say about their own future; what is wrong raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def random_images(images: ImageSpec) -> Tensor:
    """(CHECKED, C, H, W) in the files' dtype and units, always the same."""
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.tensor(values)[:, None, None] for values in images.value_range)
    unit = torch.rand(CHECKED, images.channels, *images.size, generator=generator)
    pixels = low + unit * (high - low)
    return (pixels if images.dtype == "float32" else pixels.round().clamp(0, 65535)).to(DTYPES[images.dtype])


def largest(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest absolute difference; of other shapes it is infinite."""
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())  # nan stays nan


# ------------------------------------------------------------------------------------------------- what they share


def vit_of(loaded: Loaded, target: str) -> ViT:
    """The encoder, where it is a vision transformer. Raises ExportError for another."""
    encoder = loaded.method.encoder
    if not isinstance(encoder, ViT):
        raise ExportError(
            f"this is a run of {loaded.config.method.name}, whose encoder is no vision transformer, so there is no "
            f"{target} model for it; use --to onnx or --to safetensors" + ", or hf" * isinstance(encoder, GPT)
        )
    return encoder


def weights_of(method: nn.Module, *leave_out: str) -> dict[str, Tensor]:
    """The tensors of a method by name, less those that begin so; each for itself, as safetensors wants them."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in method.state_dict().items()
        if not name.startswith(leave_out)
    }


def encoder_of(method: Method) -> dict[str, Tensor]:
    """The encoder alone, under its names in the method; mean and std are of the images, not of the network."""
    return {name: value for name, value in weights_of(method, "encoder.mean", "encoder.std").items()
            if name.startswith("encoder.")}  # fmt: skip


def write_safetensors(path: Path, weights: dict[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """As the library's own `save_file`, which makes a file that nobody else may read."""
    path.write_bytes(save(weights, {"format": "pt", **(header or {})}))


def tokens_of(encoder: ViT, images: Tensor) -> Tensor:
    """Class token and patch tokens of the encoder: (B, 1 + N, D)."""
    found = encoder(images)
    assert found.cls is not None
    return torch.cat([found.cls[:, None], found.patches], 1)


def seen(encoder: ViT, images: Tensor) -> Tensor:
    """Images as other libraries want them: normalised by whoever calls."""
    return normalise(images, encoder.mean, encoder.std)


def sides(pair: tuple[int, int]) -> int | tuple[int, int]:
    """A pair as others write it: one number for a square."""
    return pair[0] if pair[0] == pair[1] else pair


def arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


HEADLESS = {
    "classify": "the classifier", "segment": "the head that draws maps", "detect": "the pyramid and its head",
}  # fmt: skip


def left_out(loaded: Loaded, why: str) -> str:
    """A sentence: of this method the encoder is exported alone."""
    name = loaded.config.method.name
    return f"the encoder alone is exported, without {HEADLESS.get(name, f'the rest of {name}')}: {why}"


def task_left_out(loaded: Loaded, target: str) -> tuple[str, ...]:
    """The same for what no other library has; nothing for an encoder that is all there is."""
    name = loaded.config.method.name
    return () if name == "encoder" else (left_out(loaded, f"{target} has no place for it; --to safetensors keeps all"),)


# ------------------------------------------------------------------------------------------------------------ timm


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
        asked["use_rel_pos_bias"] = settings["relative_bias"] == "each_block"
        asked["use_shared_rel_pos_bias"] = settings["relative_bias"] is True
    elif classifier:
        asked["fc_norm"] = True
    name = "beit_base_patch16_224" if beit else "vit_base_patch16_224"
    weights = encoder_of(method)
    if classifier:
        weights = weights_of(method, "encoder.norm.", "encoder.mean", "encoder.std")
    state = (foreign.to_beit if beit else foreign.to_official)(weights)
    eps = settings["norm_eps"]
    said = arguments(asked) + f", norm_layer=partial(nn.LayerNorm, eps={eps!r})" * (eps != 1e-6)

    def check(path: Path, images: Tensor) -> float:
        timm = importlib.import_module("timm")
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
        write=lambda path: write_safetensors(path, state),
        check=check,
        notes=() if classifier else task_left_out(loaded, "timm"),
        classifies=classifier is not None,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- official


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
    state = foreign.to_official(weights)

    def check(path: Path, images: Tensor) -> float:
        try:
            make = getattr(importlib.import_module(module), name)
        except AssertionError as error:  # it asks for a version of timm that does not import any more
            raise ImportError(str(error)) from None
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
        write=lambda path: torch.save({"model": state}, path),
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


def is_plain(encoder: ViT, settings: Mapping[str, Any]) -> bool:
    """Whether it is a vision transformer without anything of BEiT's."""
    return encoder.pos_embed is not None and not settings["relative_bias"] and settings["layer_scale"] is None


def what_beit_has(settings: Mapping[str, Any]) -> str:
    parts = ["a relative position bias"] * bool(settings["relative_bias"])
    parts += ["LayerScale"] * (settings["layer_scale"] is not None)
    parts += ["no positions"] * (settings["positions"] == "absent")
    return " and ".join(parts)


def method_target(loaded: Loaded) -> str:
    return str(loaded.config.method.model_dump().get("target"))


def mae_misses(loaded: Loaded, whose: str) -> str | None:
    """Why the decoder of a MAE has no place in the MAE of others; None where it has."""
    if not isinstance(loaded.method, MAE):
        return None
    settings = loaded.config.method.model_dump()
    if settings["target"] not in ("norm_pixels", "pixels"):
        return f"{whose} predicts pixels, and this one target={settings['target']}"
    if settings["encoder"]["norm_eps"] > 1e-5:
        return f"{whose} has one norm_eps for both parts, and this decoder has another than the encoder"
    if settings["mask_tokens"] != "decoder":
        return f"{whose} has mask tokens in the decoder only"
    if not all(isinstance(sides(pair), int) for pair in (loaded.plan.images.size, loaded.method.encoder.patch)):
        size, patch = (
            f"{height} x {width}" for height, width in (loaded.plan.images.size, loaded.method.encoder.patch)
        )
        return f"{whose} takes square patches of square images only, and these are {patch} of {size}"
    return None


# ---------------------------------------------------------------------------------------------------- transformers


def to_hf(loaded: Loaded) -> Made:
    """A folder for transformers: the whole method where it has it, else the encoder."""
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
    if isinstance(method, MAE) and plain and (why := mae_misses(loaded, "transformers' ViTMAE")) is None:
        return whole_mae(loaded, method, config)
    if isinstance(method, Classifier) and beit_misses(loaded, encoder) is None:
        return whole_classifier(loaded, method, config)
    if isinstance(method, BEiT) and method_target(loaded) == "tokens" and beit_misses(loaded, encoder) is None:
        return whole_beit(loaded, method, config)
    notes = task_left_out(loaded, "transformers")
    if isinstance(method, MAE) and plain:
        notes = (left_out(loaded, str(why)),)
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
        foreign.to_transformers(encoder_of(method), beit=not plain),
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
        foreign.to_transformers(weights_of(method, "encoder.mean", "encoder.std"), beit=False, prefix="vit."),
        compare,
        "`model(pixel_values)` gives the loss and the prediction; `ViTMAEModel.from_pretrained(PATH, mask_ratio=0.0)` "
        "is the encoder alone, which shuffles the patches unless `noise` is in order.",
    )


def whole_classifier(loaded: Loaded, method: Classifier, config: dict[str, Any]) -> Made:
    """BEiT's, which like ours judges the mean of the patch tokens; ViT's judges the class token."""
    settings = loaded.config.method.model_dump()
    config |= beit_config(method.encoder, settings["encoder"]) | {
        "use_mean_pooling": True, "id2label": {str(number): name for number, name in enumerate(settings["classes"])},
        "label2id": {name: number for number, name in enumerate(settings["classes"])},
    }  # fmt: skip
    weights = foreign.to_transformers(
        weights_of(method, "encoder.norm.", "encoder.mean", "encoder.std"), beit=True, prefix="beit."
    )
    return folder(
        loaded,
        "BeitForImageClassification",
        config,
        {name.replace("head.", "classifier.", 1): value for name, value in weights.items()},
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
    weights = foreign.to_transformers(
        weights_of(method, "encoder.mean", "encoder.std", "target."), beit=True, prefix="beit."
    )
    weights = {
        name.replace("head.", "lm_head.", 1).replace("beit.layernorm.", "layernorm."): value
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
    bare = ", add_pooling_layer=False" if name == "ViTModel" else ""  # a pooler there would be a random one
    if processor is not None and not isinstance(sides(loaded.plan.images.size), int):
        notes = (*notes, "the preprocessor makes rectangles of the whole image, where evaluation here takes the "
                 "largest box of their shape in the middle")  # fmt: skip
    files |= more or ({} if processor is None else {"preprocessor_config.json": processor})
    if more is None and processor is None:
        notes = (*notes, f"no preprocessor: transformers' are for 8-bit images, and these are "
                 f"{loaded.plan.images.dtype}; the card says how to normalise")  # fmt: skip

    def write(path: Path) -> None:
        path.mkdir()
        write_safetensors(path / "model.safetensors", weights)
        for file, content in files.items():
            (path / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    def check(path: Path, images: Tensor) -> float:
        import transformers

        options = {"add_pooling_layer": False} if name == "ViTModel" else {}
        transformers.utils.logging.disable_progress_bar()
        model, told = getattr(transformers, name).from_pretrained(path, output_loading_info=True, **options)
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
        foreign.to_image_gpt(weights_of(method), prefix="transformer." if head is not None else ""),
        compare,
        "Give it the tokens with the start token before them and without the last; the features of this package "
        + (f"are {where}, of `output_hidden_states=True`." if encoder.layer < depth else "are the last hidden state."),
        notes,
        more,
    )


# ------------------------------------------------------------------------------------------------------------ ONNX


class ViTGraph(nn.Module):
    """`ViT.forward` for one size of images, without Python numbers that would fix how many images there are."""

    def __init__(self, encoder: ViT, classifier: Classifier | None) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        patches = encoder.embed(encoder.patches(images))
        cls = encoder.cls_token if encoder.pos_embed is None else encoder.cls_token + encoder.pos_embed[:, :1]
        x = torch.cat([cls.expand(patches.shape[0], -1, -1), patches], 1)
        shared = None if encoder.relative_bias is None else encoder.relative_bias()
        for block in encoder.blocks:
            own = getattr(block, "relative_bias", None)
            x = block(x, shared if own is None else own())
        tokens = encoder.norm(x)
        if self.classifier is None:
            return tokens[:, 0], tokens[:, 1:]
        return tokens[:, 0], tokens[:, 1:], self.classifier.judge(x[:, 1:].mean(1))


class GPTGraph(nn.Module):
    """`GPT.forward`; distances to colours are written out, because ONNX has no cdist."""

    def __init__(self, encoder: GPT) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        pixels = encoder.shrink(images).flatten(1, 2)
        x = encoder.tokens[(pixels[:, :, None] - encoder.palette).square().sum(-1).argmin(-1)]
        if encoder.sos is not None:
            x = torch.cat([encoder.sos.expand(x.shape[0], 1, -1), x[:, :-1]], 1)
        x = x + encoder.positions
        for number, block in enumerate(encoder.blocks):
            assert isinstance(block, GPTBlock)
            if number == encoder.layer:
                return (block.norm1(x),)
            x = x + block.attn(block.norm1(x))[0]
            x = x + block.mlp(block.norm2(x))
        return (encoder.norm(x),)


class PlainGraph(nn.Module):
    """Encoders that are graphs as they stand, without a class token."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(images).patches,)


def to_onnx(loaded: Loaded) -> Made:
    """The encoder and its normalisation, for any number of images of one size; for a classifier its scores besides.

    Through torch.export: the older tracer has no RMS norm, and PyTorch is giving it up.
    """
    method, encoder, spec = loaded.method, loaded.method.encoder, loaded.plan.images
    classifier = method if isinstance(method, Classifier) else None
    if isinstance(encoder, ViT):
        graph, names = ViTGraph(encoder, classifier), ["cls", "patches", *["logits"] * (classifier is not None)]
    else:
        graph, names = GPTGraph(encoder) if isinstance(encoder, GPT) else PlainGraph(encoder), ["patches"]
    graph = graph.eval()

    def write(path: Path) -> None:
        require_onnx()
        size = sum(value.nbytes for value in graph.state_dict().values())
        example = torch.rand(2, spec.channels, *spec.size)
        with quietly(), torch.no_grad():
            torch.onnx.export(
                graph, (example,), path, input_names=["images"], output_names=names, opset_version=OPSET, dynamo=True,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, external_data=size > ONE_FILE, verbose=False,
            )  # fmt: skip

    def check(path: Path, images: Tensor) -> float:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = encoder(images)
        ours = {"cls": found.cls, "patches": found.patches}
        if classifier is not None:
            ours["logits"] = classifier.logits(images)
        pairs = []
        for part in (slice(None), slice(1)):  # three images, and one
            theirs = session.run(names, {"images": images[part].float().numpy()})
            pairs += [
                (torch.from_numpy(np.asarray(out)), ours[name][part]) for name, out in zip(names, theirs, strict=True)
            ]
        return largest(*pairs)

    height, width = spec.size
    notes = () if classifier else task_left_out(loaded, "a graph that takes images to features")
    if sum(value.nbytes for value in graph.state_dict().values()) > ONE_FILE:
        notes = (*notes, "the weights are too many for one file: they lie beside it in a file that ends in .data; keep "
                 "the two together")  # fmt: skip
    return Made(
        what="the encoder as an ONNX graph" + (", with its classifier" if classifier else ""),
        library="onnxruntime",
        load="import onnxruntime\n\nsession = onnxruntime.InferenceSession(PATH)\n"
        f'{", ".join(names)}{"," if len(names) == 1 else ""} = session.run({json.dumps(names)}, {{"images": images}})',
        returns=f"`images` is float32 (B, {spec.channels}, {height}, {width}) in the files' own units "
        f"({units(spec)}), not normalised: the graph does that. Outputs: {', '.join(names)}.",
        write=write,
        check=check,
        notes=notes,
        classifies=classifier is not None,
    )


def units(images: ImageSpec) -> str:
    return {"uint8": "0 to 255", "uint16": "0 to 65535"}.get(images.dtype, "those of the files")


def require_onnx() -> None:
    """Raises ExportError where what writes ONNX is not installed."""
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"--to onnx needs {name}, which is not installed; install it with: pip install "
                              "'unmask[onnx]'")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ ours


def to_safetensors(loaded: Loaded) -> Made:
    """The whole method under our own names; settings and images in the header of the file."""
    spec = loaded.plan.images
    config = loaded.config.model_dump(mode="json")
    config["data"] |= {"source": "", "test": None, "annotations": None}  # where they lay is nobody's business
    header = {"config": config | {"graft": []}, "images": vars(spec), "step": loaded.step}

    def check(path: Path, images: Tensor) -> float:
        again = open_safetensors(path)
        ours, theirs = loaded.method.encoder(images), again.encoder(images)
        same = [(theirs.patches, ours.patches)]
        state, other = loaded.method.state_dict(), again.state_dict()
        return largest(*same, *((other[name].float(), value.float()) for name, value in state.items()))

    return Made(
        what=f"the whole {loaded.config.method.name} under its own names",
        library="unmask",
        load="from unmask.export import open_safetensors\n\nmethod = open_safetensors(PATH)",
        returns="`method.encoder(images)` takes images in the files' own units and gives `.cls` and `.patches`.",
        write=lambda path: write_safetensors(path, weights_of(loaded.method), {HEADER: json.dumps(header)}),
        check=check,
        classifies=isinstance(loaded.method, Classifier),
    )


def open_safetensors(path: str | Path) -> Method:
    """The method of a file that `unmask export --to safetensors` wrote, in eval mode. Raises ValueError for another."""
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"{path} is not a file; one that `unmask export --to safetensors` wrote was expected")
    try:
        with safe_open(path, "pt") as opened:
            header = json.loads((opened.metadata() or {})[HEADER])
    except (SafetensorError, KeyError):
        raise ExportError(
            f"{path} is no file of `unmask export --to safetensors`; weights of others become a run with `unmask "
            "import`"
        ) from None
    images = header["images"]
    spec = ImageSpec(**images | {key: tuple(images[key]) for key in ("size", "mean", "std")})
    method = Config.model_validate(header["config"]).build(spec)
    weights = load_file(path)
    checkpoint.require_fit(method, weights, str(path))
    method.load_state_dict(weights)
    return method.eval()


TARGETS: dict[str, tuple[str, Callable[[Loaded], Made]]] = {
    "timm": (".safetensors", to_timm),
    "hf": ("", to_hf),
    "official": (".pth", to_official),
    "onnx": (".onnx", to_onnx),
    "safetensors": (".safetensors", to_safetensors),
}
"""By name: the ending of what is written, none for a folder, and what makes it."""
