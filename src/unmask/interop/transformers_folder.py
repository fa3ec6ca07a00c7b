"""Make a folder for transformers' `from_pretrained`: weights, config.json and preprocessor_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.engine.load import Loaded
from unmask.interop.export_common import (
    export_metadata,
    imported,
    sides,
    write_safetensors,
)
from unmask.interop.export_target import ExportedModel, ExportFailed
from unmask.interop.foreign.state_dicts import EXPORT_METADATA


@dataclass(frozen=True, kw_only=True)
class TransformersModel:
    """A run converted to a model class of transformers.

    name: name of the class. config: content of config.json. compare: function that maps (model, images) to the largest
    difference between the outputs of model and run. returns, notes: see `ExportedModel`. more: JSON files by name that
    are written instead of the usual preprocessor_config.json, or None.
    """

    name: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    compare: Callable[[Any, Tensor], float]
    returns: str
    notes: tuple[str, ...] = ()
    more: Mapping[str, dict[str, Any]] | None = None


def folder(loaded: Loaded, converted: TransformersModel) -> ExportedModel:
    """Return the export of a converted run as a folder for `from_pretrained`."""
    name, notes, more = converted.name, converted.notes, converted.more
    files = {"config.json": {"architectures": [name], "dtype": "float32"} | converted.config}
    processor = preprocessor(loaded) if more is None else None
    # By default, transformers would add a pooler with random weights.
    bare = ", add_pooling_layer=False" if name in ("ViTModel", "BeitModel") else ""
    if processor is not None and not isinstance(sides(loaded.plan.images.size), int):
        notes = (*notes, "the preprocessor resizes the whole image to a rectangle, while evaluation here uses the "
                 "largest centred crop of this shape")  # fmt: skip
    files |= more or ({} if processor is None else {"preprocessor_config.json": processor})
    if more is None and processor is None:
        notes = (*notes, f"no preprocessor: transformers' preprocessors are for 8-bit images, and these are "
                 f"{loaded.plan.images.dtype}; see the model card for the normalisation")  # fmt: skip

    def write(path: Path) -> None:
        path.mkdir()
        write_safetensors(path / "model.safetensors", converted.weights, {EXPORT_METADATA: export_metadata(loaded)})
        for file, content in files.items():
            (path / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")

    def check(path: Path, images: Tensor) -> float:
        transformers = imported("transformers")
        options = {"add_pooling_layer": False} if name in ("ViTModel", "BeitModel") else {}
        transformers.utils.logging.disable_progress_bar()
        kind = imported("transformers", name)
        # The check loads AutoModel, because most users do.
        kind = imported("transformers", "AutoModel") if name in ("ViTModel", "BeitModel") else kind
        model, told = kind.from_pretrained(path, output_loading_info=True, **options)
        faults = {key: told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if told.get(key)}
        if faults:
            raise ExportFailed(f"transformers' {name} rejects these weights: {faults}; the export has been removed")
        return converted.compare(model.eval(), images)

    return ExportedModel(
        what=f"{name} of transformers",
        library="transformers",
        load=f"from transformers import {name}\n\nmodel = {name}.from_pretrained(PATH{bare}).eval()"
        if "preprocessor_config.json" not in files else
        f"from transformers import AutoImageProcessor, {name}\n\nprocessor = AutoImageProcessor.from_pretrained(PATH)"
        f"\nmodel = {name}.from_pretrained(PATH{bare}).eval()",
        returns=converted.returns,
        write=write,
        check=check,
        notes=notes,
        classifies=name == "BeitForImageClassification",
        whole=name in ("ViTMAEForPreTraining", "BeitForMaskedImageModeling", "ImageGPTForCausalImageModeling"),
    )  # fmt: skip


def preprocessor(loaded: Loaded) -> dict[str, Any] | None:
    """Return the content of preprocessor_config.json, or None for images that do not have 8 bits per channel.

    Square images are cropped as in evaluation here: the largest centred square, scaled by `data.crop.eval_share`. For
    other rectangles, transformers resizes the whole image, which changes the aspect ratio.
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
