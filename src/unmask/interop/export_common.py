"""What the export targets share: tensors and metadata of a run, comparisons, and what other MAEs do not support.

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
from unmask.errors import naming
from unmask.interop.export_target import ExportError, NotChecked
from unmask.method import Method
from unmask.methods.mae import MAE
from unmask.nn.gpt import GPT
from unmask.nn.patches import normalise
from unmask.nn.vit import ViT


def imported(module: str, attribute: str = "", package: str = "") -> Any:
    """A module of another library, or something in it. Raises NotChecked with what is in the way.

    Libraries import parts of themselves late, and fail with any error where something they need is of another version.
    package: how to call it, the name of the module where it is left out.
    """
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name == module:
            raise NotChecked(f"{package or module} is not installed") from None
        said = (str(cause).strip() or "no reason given").splitlines()[0]
        raise NotChecked(f"importing {package or module} failed with {type(cause).__name__}: {said}") from None


def export_metadata(loaded: Loaded) -> str:
    """What the formats of others do not keep, as JSON for a corner of the file that they do not read.

    `import` knows by it what it would have to guess: the normalisation and the crop, the number of heads, the names of
    classes, the licence.
    """
    images, settings = loaded.plan.images, loaded.config.method.model_dump()
    heads = {part: settings[part]["heads"] for part in ("encoder", "decoder") if "heads" in (settings.get(part) or {})}
    known = {"mean": images.mean, "std": images.std, "heads": heads, "licence": loaded.licence}
    names = {"target": settings.get("target"), "classes": settings.get("classes")}
    shared = (settings.get("encoder") or {}).get("relative_bias") is True
    more = {"eval_share": loaded.config.data.crop.eval_share, "shared_bias": shared}
    return json.dumps(known | names | more)


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
    with naming(path):
        path.write_bytes(save(weights, {"format": "pt", **(header or {})}))


def tokens_of(encoder: ViT, images: Tensor) -> Tensor:
    """Class token and patch tokens of the encoder: (B, 1 + N, D)."""
    found = encoder(images)
    assert found.cls is not None
    return torch.cat([found.cls[:, None], found.patches], 1)


def normalised(encoder: ViT, images: Tensor) -> Tensor:
    """Images as other libraries want them: normalised by whoever calls."""
    return normalise(images, encoder.mean, encoder.std)


def sides(pair: tuple[int, int]) -> int | tuple[int, int]:
    """A pair as others write it: one number for a square."""
    return pair[0] if pair[0] == pair[1] else pair


def arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def largest(*pairs: tuple[Tensor, Tensor]) -> float:
    """The largest absolute difference; of other shapes it is infinite."""
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())  # nan stays nan


@contextmanager
def silence_libraries() -> Iterator[None]:
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


def left_out(loaded: Loaded, why: str) -> str:
    """A sentence: of this method the encoder is exported alone."""
    name = loaded.config.method.name
    return f"the encoder alone is exported, without {loaded.method.head_name or f'the rest of {name}'}: {why}"


def task_left_out(loaded: Loaded, target: str) -> tuple[str, ...]:
    """The same for what no other library has; nothing for an encoder that is all there is."""
    name = loaded.config.method.name
    return () if name == "encoder" else (left_out(loaded, f"{target} has no place for it; --to safetensors keeps all"),)


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
