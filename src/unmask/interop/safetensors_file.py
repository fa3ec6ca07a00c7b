"""Read a method from a file written by `unmask export --to safetensors`, without its run folder.

In the file, weights have unmask's own names, and the header contains the settings and the image specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from unmask.batch import ImageSpec
from unmask.config import Config, explain
from unmask.engine import copy_weights
from unmask.errors import ForeignError, UserError, listed
from unmask.interop.foreign.metadata import DEEPEST, Deviations, Numbers, Size
from unmask.method import Method
from unmask.system.json_input import Outside, checked, read_object

HEADER = "unmask"  # key of the settings in the header


class Images(Outside):
    """The JSON form of `ImageSpec`, as stored in the header."""

    channels: Size
    size: tuple[Size, Size]
    dtype: str
    mean: Numbers
    std: Deviations


class Header(Outside):
    """The settings in the header of a file written by `unmask export --to safetensors`."""

    config: dict[str, Any]
    images: Images
    licence: str = ""


@dataclass(frozen=True)
class OwnFile:
    """The header of a file written by `unmask export --to safetensors`, with a method that reads the weights."""

    path: Path
    config: Config
    images: ImageSpec
    licence: str

    def read(self) -> tuple[Method, dict[str, Tensor]]:
        """Return the method on the meta device, which takes no memory for parameters, and its weights.

        Raises ForeignError, before reading any weights, if the tensors in the file do not match the settings in its
        header.
        """
        with safe_open(self.path, "pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        require_plausible(self.config, self.images, shapes, self.path)
        try:
            with torch.device("meta"):
                method = self.config.build(self.images)
        except (RuntimeError, TypeError, OverflowError, MemoryError, AssertionError) as error:
            raise ForeignError(
                f"{self.path}: the settings in its header do not describe a network ({type(error).__name__}); download "
                "the file again, or export the run again"
            ) from None
        wanted = {name: tuple(value.shape) for name, value in method.state_dict().items()}
        if shapes != wanted:
            faults = {
                "missing": sorted(wanted.keys() - shapes.keys()),
                "left over": sorted(shapes.keys() - wanted.keys()),
                "of another shape": [
                    f"{name} {shapes[name]} instead of {wanted[name]}"
                    for name in sorted(shapes.keys() & wanted.keys())
                    if shapes[name] != wanted[name]
                ],
            }
            named = "; ".join(f"{len(names)} {how}: {listed(names)}" for how, names in faults.items() if names)
            raise ForeignError(
                f"{self.path}: its tensors do not match the network in its header ({named}); the file is damaged "
                "or was changed: export the run again"
            )
        weights = load_file(self.path)
        for name, value in method.state_dict().items():
            if weights[name].is_floating_point() != value.is_floating_point():
                raise ForeignError(
                    f"{self.path}: {name} is {weights[name].dtype}; expected {value.dtype}: export the run again"
                )
        return method, weights


def require_plausible(config: Config, images: ImageSpec, shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise ForeignError if tensors of these shapes cannot belong to this network.

    The check limits the time and memory for building the network, even if the header is damaged: widths are limited by
    the number of values in the file, the depth by a constant, and the position table by the number of values.
    """
    values = sum(math.prod(shape) for shape in shapes.values())
    for key, number in numbers_in(config.method.model_dump()):
        most = DEEPEST if key.endswith("depth") else max(values, 1024)
        if number > most:
            raise ForeignError(
                f"{path}: got method.{key}={number} in its header; expected at most {most}, because the file "
                f"has {values} values in {len(shapes)} tensors; it is damaged or was changed: export the run again"
            )
    method: Any = config.method.model_dump()
    patch = (method.get("encoder") or {}).get("patch") or (1, 1)
    places = (images.size[0] // patch[0]) * (images.size[1] // patch[1])
    widest = max([1, *(part["width"] for part in method.values() if isinstance(part, dict) and "width" in part)])
    if places > max(values, 1024) or (places * widest > 4 * max(values, 1 << 20)):
        raise ForeignError(
            f"{path}: got images of {images.size[0]} x {images.size[1]} in its header, {places} patches of width "
            f"{widest}; the file has only {values} values, it is damaged or was changed: export the run again"
        )


def numbers_in(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield the key and value of every integer in nested settings."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{prefix}{key}.")
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, int) and not isinstance(each, bool):
                yield f"{prefix}{key}", each


def open_safetensors(path: str | Path) -> Method:
    """Return the method in a file written by `unmask export --to safetensors`, in eval mode. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected one written by `unmask export --to safetensors`")
    if (own := read_header(path)) is None:
        raise UserError(
            f"{path} was not written by `unmask export --to safetensors`; to use the weights of another library, run "
            f"`unmask import`"
        )
    _, weights = own.read()
    method = own.config.build(own.images)
    copy_weights.require_fit(method, weights, str(path))
    method.load_state_dict(weights)
    return method.eval()


def read_header(path: Path) -> OwnFile | None:
    """Read the header of a file written by `unmask export --to safetensors`, or return None for any other file.

    Raises ForeignError if unmask's metadata is damaged, instead of treating the file as one from another library.
    """
    try:
        with safe_open(path, "pt") as opened:
            text = (opened.metadata() or {}).get(HEADER)
    except (SafetensorError, OSError):
        return None
    if text is None:
        return None
    where = f"{path}: the metadata {HEADER!r} in its header"
    header = checked(Header, read_object(text, where), where)
    try:
        spec = header.images
        images = ImageSpec(
            channels=spec.channels, size=spec.size, dtype=spec.dtype, mean=tuple(spec.mean), std=tuple(spec.std)
        )
        config = Config.model_validate(header.config)
    except ValidationError as error:
        raise ForeignError(f"{where}: {explain(error)}; export the run again") from None
    except UserError as error:
        raise ForeignError(f"{where}: {error}") from None
    except RecursionError:
        raise ForeignError(f"{where}: its settings are nested too deeply; export the run again") from None
    return OwnFile(path, config, images, header.licence)
