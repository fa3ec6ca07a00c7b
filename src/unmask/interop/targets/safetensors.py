"""The whole method in one .safetensors file under unmask's own names, read by `unmask.open_safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.engine.load import Loaded
from unmask.interop.export_common import largest, weights_of, write_safetensors
from unmask.interop.export_target import ExportedModel, ExportTarget
from unmask.interop.model_card import last_name
from unmask.interop.safetensors_file import HEADER, open_safetensors


def to_safetensors(loaded: Loaded) -> ExportedModel:
    """Convert the whole method under unmask's names, with settings and image specification in the file header."""
    spec = loaded.plan.images
    config = loaded.config.model_dump(mode="json")
    config |= {part: without_folders(config[part]) for part in ("data", "graft")}  # paths are private
    header = {"config": config, "images": vars(spec), "step": loaded.step, "licence": loaded.licence}

    def check(path: Path, images: Tensor) -> float:
        again = open_safetensors(path)
        ours, theirs = loaded.method.encoder(images), again.encoder(images)
        same = [(theirs.patches, ours.patches)]
        state, other = loaded.method.state_dict(), again.state_dict()
        return largest(*same, *((other[name].float(), value.float()) for name, value in state.items()))

    return ExportedModel(
        what=f"the whole method ({loaded.config.method.name}) under its own names",
        library="unmask",
        load="import unmask\n\nmethod = unmask.open_safetensors(PATH)",
        returns="`method.encoder(images)` accepts images in the files' own units and returns `.cls` and `.patches`.",
        write=lambda path: write_safetensors(path, weights_of(loaded.method), {HEADER: json.dumps(header)}),
        check=check,
        classifies=loaded.method.mean_token_classifier is not None,
    )


def without_folders(value: Any) -> Any:
    """Return settings in which every path is shortened to its last part."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    return last_name(value) if isinstance(value, str) else value


TARGET = ExportTarget(to_safetensors, suffix=".safetensors", library_name="unmask", normalises=True, keeps_task=True)
