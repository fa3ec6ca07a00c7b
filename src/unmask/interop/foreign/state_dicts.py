"""Unwrap a state dict, look up its tensors, and record the recognised network.

Letters: D width, C channels, N patches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from unmask.errors import ForeignError, listed

IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # mean and standard deviation, in units of 0..255
HALVES = (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
EXPORT_METADATA = "unmask_imprint"
"""Key of unmask's own metadata in files of other formats."""
DEEPEST_WRAPPER = 8  # limit on nested wrappers, for a pickle that contains itself
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.")
SIZES = {(192, 12): "Ti", (384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H"}
UNKNOWN_LICENCE = "not in the file; see the page it was downloaded from"


@dataclass(frozen=True)
class Recognised:
    """A recognised state dict.

    method: settings of the corresponding unmask method, without `heads` if unknown. weights: tensors under unmask's
    names, float32. channels, patch, grid: number of channels, size of a patch in pixels, and rows and columns of
    patches of the images that the network was trained on; grid is None if the weights do not determine it. places:
    number of patches with position embeddings, or 0. mean, std: normalisation in units of 0..255, or None if none was
    published for this number of channels. statistics: where mean and std were found. notes: sentences about parts that
    were left out or assumed. eval_share: the evaluation crop as a share of the image's shorter side, or None if
    unknown.
    """

    kind: str
    licence: str
    method: dict[str, Any]
    weights: dict[str, Tensor]
    channels: int
    patch: tuple[int, int]
    grid: tuple[int, int] | None
    places: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    statistics: str
    notes: tuple[str, ...] = ()
    eval_share: float | None = None

    @property
    def name(self) -> str:
        """Kind and sizes of the network, such as 'official MAE, full: ViT-B/16 at 224, decoder 8 x 512'."""
        encoder, size = self.method["encoder"], ""
        if self.grid is not None:
            height, width = (cells * side for cells, side in zip(self.grid, self.patch, strict=True))
            size = f"{height}" if height == width else f"{height} x {width}"
        if "codes" in encoder:
            return f"{self.kind}: {encoder['codes']} codes, width {encoder['width']}"
        if "colours" in encoder:
            at = f" at {size}" if size else ""
            return f"{self.kind}: {encoder['depth']} x {encoder['width']}, {encoder['colours']} colours{at}"
        patch = f"{self.patch[0]}" if self.patch[0] == self.patch[1] else f"{self.patch[0]}x{self.patch[1]}"
        known = SIZES.get((encoder["width"], encoder["depth"]))
        model = f"ViT-{known}/{patch}" if known else f"ViT {encoder['depth']} x {encoder['width']}, patch {patch}"
        decoder = self.method.get("decoder")
        more = f", decoder {decoder['depth']} x {decoder['width']}" if decoder else ""
        if classes := self.method.get("classes"):
            more = f", {len(classes)} classes"
        joined = "" if not size else f" at {size}" if known else f", at {size}"
        return f"{self.kind}: {model}{joined}{more}"


@dataclass
class Names:
    """A state dict under official names. origin: the name in the file for every official name."""

    tensors: dict[str, Tensor]
    origin: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def drop(self, pattern: str, note: str = "") -> bool:
        """Drop tensors whose full names match `pattern`; return whether there were any. note: text for the user."""
        gone = [name for name in self.tensors if re.fullmatch(pattern, name)]
        for name in gone:
            del self.tensors[name]
        if gone and note:
            self.notes.append(note)
        return bool(gone)

    def has(self, pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in self.tensors)


def unwrap(content: Any) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, removing wrappers such as 'model' and prefixes such as 'module.'.

    Other content of the checkpoint (optimiser, epoch, arguments) is left out. Raises ForeignError for a checkpoint
    without tensors.
    """
    for _ in range(DEEPEST_WRAPPER):
        if not isinstance(content, Mapping) or any(isinstance(value, Tensor) for value in content.values()):
            break
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        what = (
            f"with {listed(map(str, content))}" if isinstance(content, Mapping) and content else "without any weights"
        )
        raise ForeignError(
            f"got a {type(content).__name__} {what}; expected a state dict (names and tensors), bare or under "
            f"{', '.join(map(repr, WRAPPERS))}"
        )
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    while prefix := next((each for each in PREFIXES if all(name.startswith(each) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def pop_first(tensors: dict[str, Tensor], *names: str) -> Tensor | None:
    return next((tensors.pop(name) for name in names if name in tensors), None)


def matching(names: Names, pattern: str) -> list[str]:
    return [names.origin.get(name, name) for name in names.tensors if re.fullmatch(pattern, name)]


def need(tensors: Mapping[str, Tensor], name: str, dims: int | None = None) -> Tensor:
    if name not in tensors:
        raise ForeignError(
            f"{name} is missing among {len(tensors)} tensors; the file is truncated, or is from another network"
        )
    if dims is not None and tensors[name].ndim != dims:
        raise ForeignError(f"{name} has the shape {tuple(tensors[name].shape)}; expected {dims} dimensions")
    return tensors[name]


def first_sizes(tensors: Mapping[str, Tensor]) -> tuple[int, tuple[int, int], int]:
    """Return the width, the patch size (height, width) and the channels of the patch projection."""
    width, channels, height, across = need(tensors, "patch_embed.proj.weight", 4).shape
    if tensors["cls_token"].shape[-1] != width:
        raise ForeignError(
            f"the class token has {tensors['cls_token'].shape[-1]} values, but the patch projection has {width}; the "
            "tensors belong to different networks"
        )
    return width, (height, across), channels


def count_blocks(tensors: Mapping[str, Tensor], blocks: str) -> int:
    """Count the transformer blocks. Raises ForeignError if there are none or their numbers have a gap."""
    numbers = {int(match[1]) for name in tensors if (match := re.match(rf"{re.escape(blocks)}\.(\d{{1,9}})\.", name))}
    expected = max(numbers, default=0) + 1
    if len(numbers) != expected:
        hole = next(number for number in range(expected) if number not in numbers)
        more = expected - len(numbers) - 1
        raise ForeignError(
            f"{blocks}.{hole} is missing" + (f" (and {more} more)" if more else "")
            + (f", but there is {blocks}.{max(numbers)}; the file is truncated or was assembled wrongly" if numbers else
               "; expected a transformer with at least one block")
        )  # fmt: skip
    return len(numbers)


def root(number: int) -> int:
    """Return the square root of a number, or 0 if the root is not an integer."""
    root = math.isqrt(max(0, number))
    return root if root * root == number else 0


def require_same(key: str, stated: Any, found: Any) -> None:
    """Raise ForeignError if a value stated in config.json (None if absent) differs from that of the tensors."""
    if stated is not None and stated != found:
        raise ForeignError(
            f"config.json states {key}={stated}, but the tensors have {found}; the two files belong to different models"
        )


def require_nothing_left(names: Iterable[str]) -> None:
    """Raise ForeignError for tensors that do not belong to the recognised network."""
    if left := sorted(names):
        raise ForeignError(
            f"{len(left)} tensors do not belong to the network recognised from the others: {listed(left)}; the file "
            "may be from a variant, or a mix of two files"
        )
