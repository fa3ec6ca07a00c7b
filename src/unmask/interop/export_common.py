"""Functions that the export targets share: tensors, metadata, comparisons, and limits of libraries.

Letters: B images, N patches, D width.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from unmask.engine.load import Loaded
from unmask.errors import name_in_errors
from unmask.interop.export_target import ExportError, NotChecked
from unmask.method import Method
from unmask.methods.mae import MAE
from unmask.nn.gpt import GPT
from unmask.nn.patches import normalise
from unmask.nn.vit import ViT


def imported(module: str, attribute: str = "", package: str = "") -> Any:
    """Import a module of another library, or one attribute of the module. Raises NotChecked if that fails.

    Every exception is caught, because libraries import their parts lazily and fail with various exceptions if a
    dependency has an unsupported version. package: name of the library in the message, by default that of the module.
    """
    try:
        library = importlib.import_module(module)
        return getattr(library, attribute) if attribute else library
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name == module:
            raise NotChecked(f"{package or module} is not installed") from None
        message = (str(cause).strip() or "no reason given").splitlines()[0]
        raise NotChecked(f"importing {package or module} failed with {type(cause).__name__}: {message}") from None


def export_metadata(loaded: Loaded) -> str:
    """Return the metadata that formats of other libraries do not store, as JSON for the header of the file.

    The metadata are image size, normalisation, crop, number of heads, names of classes and licence. `unmask import`
    reads these metadata.
    """
    images, settings = loaded.plan.images, loaded.config.method.model_dump()
    heads = {part: settings[part]["heads"] for part in ("encoder", "decoder") if "heads" in (settings.get(part) or {})}
    known = {
        "size": images.size, "mean": images.mean, "std": images.std, "heads": heads, "licence": loaded.licence,
    }  # fmt: skip
    names = {"target": settings.get("target"), "classes": settings.get("classes")}
    shared = (settings.get("encoder") or {}).get("relative_bias") is True
    more = {"eval_share": loaded.config.data.crop.eval_share, "shared_bias": shared}
    return json.dumps(known | names | more)


def vit_of(loaded: Loaded, target: str) -> ViT:
    """Return the encoder of a run. Raises ExportError unless the encoder is a vision transformer."""
    encoder = loaded.method.encoder
    if not isinstance(encoder, ViT):
        raise ExportError(
            f"this is a run of {loaded.config.method.name}, whose encoder is not a vision transformer, so {target} "
            f"has no model for it; use --to onnx or --to safetensors" + ", or hf" * isinstance(encoder, GPT)
        )
    return encoder


def weights_of(method: nn.Module, *leave_out: str) -> dict[str, Tensor]:
    """Return copies of a method's tensors by name. leave_out: prefixes of names to leave out."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in method.state_dict().items()
        if not name.startswith(leave_out)
    }


def encoder_of(method: Method) -> dict[str, Tensor]:
    """Return the encoder's tensors by their names in the method, without the buffers `mean` and `std`."""
    return {name: value for name, value in weights_of(method, "encoder.mean", "encoder.std").items()
            if name.startswith("encoder.")}  # fmt: skip


def write_safetensors(path: Path, weights: dict[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the usual file permissions, unlike `safetensors.save_file`."""
    with name_in_errors(path):
        path.write_bytes(save(weights, {"format": "pt", **(header or {})}))


def tokens_of(encoder: ViT, images: Tensor) -> Tensor:
    """Return the class token and patch tokens of the encoder, (B, 1 + N, D)."""
    features = encoder(images)
    assert features.cls is not None
    return torch.cat([features.cls[:, None], features.patches], 1)


def normalised(encoder: ViT, images: Tensor) -> Tensor:
    """Normalise images (B, C, H, W) as users of the other library do before they call the model."""
    return normalise(images, encoder.mean, encoder.std)


def sides(pair: tuple[int, int]) -> int | tuple[int, int]:
    """Return a size as other libraries write it: one number for a square, otherwise a pair."""
    return pair[0] if pair[0] == pair[1] else pair


def arguments(values: Mapping[str, Any]) -> str:
    """Write keyword arguments as Python code."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def largest(*pairs: tuple[Tensor, Tensor]) -> float:
    """Return the largest absolute difference between the tensors of any pair; infinite if their shapes differ."""
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())  # preserves nan


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Context manager that silences warnings of torch.onnx and transformers, but not their errors."""
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


def left_out(loaded: Loaded, why: str) -> str:
    """Return a note that only the encoder is exported, with the reason `why`."""
    name = loaded.config.method.name
    return f"only the encoder is exported, without {loaded.method.head_name or f'the rest of {name}'}: {why}"


def task_left_out(loaded: Loaded, target: str) -> tuple[str, ...]:
    """Return the note that the target does not support the task of a run; () if the run has only an encoder."""
    name = loaded.config.method.name
    return (
        ()
        if name == "encoder"
        else (left_out(loaded, f"{target} does not support it; --to safetensors exports everything"),)
    )


def is_plain(encoder: ViT, settings: Mapping[str, Any]) -> bool:
    """Whether the encoder has position embeddings, no LayerScale and no relative position bias."""
    return encoder.pos_embed is not None and not settings["relative_bias"] and settings["layer_scale"] is None


def what_beit_has(settings: Mapping[str, Any]) -> str:
    """Name the parts of an encoder that only BEiT supports."""
    parts = ["a relative position bias"] * bool(settings["relative_bias"])
    parts += ["LayerScale"] * (settings["layer_scale"] is not None)
    parts += ["no position embeddings"] * (settings["positions"] == "absent")
    return " and ".join(parts)


def method_target(loaded: Loaded) -> str:
    """Return the setting `method.target`, or "None" if the method does not have it."""
    return str(loaded.config.method.model_dump().get("target"))


def mae_misses(loaded: Loaded, whose: str) -> str | None:
    """Return the reason why another library's MAE cannot represent this decoder, or None if it can."""
    if not isinstance(loaded.method, MAE):
        return None
    settings = loaded.config.method.model_dump()
    if settings["target"] not in ("norm_pixels", "pixels"):
        return f"{whose} predicts pixels, but this run has target={settings['target']}"
    if settings["encoder"]["norm_eps"] > 1e-5:
        return f"{whose} has the same norm_eps for encoder and decoder, but here they differ"
    if settings["mask_tokens"] != "decoder":
        return f"{whose} has mask tokens in the decoder only"
    if not all(isinstance(sides(pair), int) for pair in (loaded.plan.images.size, loaded.method.encoder.patch)):
        size, patch = (
            f"{height} x {width}" for height, width in (loaded.plan.images.size, loaded.method.encoder.patch)
        )
        return f"{whose} supports square patches of square images only, got {patch} of {size}"
    return None
