"""Reads a method back out of one file, as `unmask export --to safetensors` writes it: no Run is needed.

The weights are under our own names; the header of the file has the settings and what the images are.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from unmask import checkpoint
from unmask.batch import ImageSpec
from unmask.config import Config
from unmask.errors import UserError
from unmask.method import Method

HEADER = "unmask"  # where our own file has its settings


def open_safetensors(path: str | Path) -> Method:
    """The method of a file that `unmask export --to safetensors` wrote, in eval mode. Raises ValueError for another."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; one that `unmask export --to safetensors` wrote was expected")
    if (described := read_header(path)) is None:
        raise UserError(
            f"{path} is no file of `unmask export --to safetensors`; weights of others become a run with `unmask "
            "import`"
        )
    config, images, _ = described
    method = config.build(images)
    weights = load_file(path)
    checkpoint.require_fit(method, weights, str(path))
    method.load_state_dict(weights)
    return method.eval()


def read_header(path: Path) -> tuple[Config, ImageSpec, str] | None:
    """Settings, images and licence ("" where none is stated) of our own file, None for any other file."""
    try:
        with safe_open(path, "pt") as opened:
            header = json.loads((opened.metadata() or {})[HEADER])
    except (SafetensorError, KeyError, OSError):
        return None
    images = header["images"]
    spec = ImageSpec(**images | {key: tuple(images[key]) for key in ("size", "mean", "std")})
    return Config.model_validate(header["config"]), spec, header.get("licence", "")
