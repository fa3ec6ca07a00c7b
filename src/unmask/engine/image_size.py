"""Choose the size of the method's input images, and describe its effect.

Recipes whose name ends in a word of `FOLLOWING` are not from a paper, so their image size and patch size are chosen for
the images, as for the recipe `auto`, unless one of the two is set. Tokenizers have a fixed size, because BEiT resizes
images for them so that there are as many codes as patches. Segmentation masks and boxes need more detail than classes,
so segmentation and detection use larger images than the pre-training did, if the files are large enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from unmask.config import Config, method_class, task_names
from unmask.recipes import catalogue

Size = tuple[int, int]
FOLLOWING = ("nano", "tiny", "small")
SMALLEST, SMALL_SIDE, NANO_SIDE = 16, 48, 64  # In pixels.
STRETCH = 1.2  # If images are resampled by a smaller factor, the report describes this as "about their own size".
LARGER = 1.5  # Segmentation and detection enlarge the input size for images that are larger by this factor.


def follows_images(name: str) -> bool:
    """Return whether the image size of a pre-training recipe is chosen for the images."""
    if name.rpartition("_")[2] not in FOLLOWING:
        return False
    method = catalogue.find(name).method.name
    return method not in task_names() and method_class(method).follows_images


def candidates(name: str, median: Size) -> Iterable[list[str]]:
    """Yield lists of settings KEY=VALUE that adapt the recipe `name` to images of `median` (H, W) pixels, best first.

    The caller must use the first valid list, because some methods need multiples of more than the patch size.
    """
    if not follows_images(name):
        return
    base: Any = catalogue.find(name)
    own, patch = base.data.size[0], base.method.encoder.patch_size
    side, unit = min(median), max(4, patch[0] if patch is not None else 4)
    if name.endswith("_nano"):
        enlarged = side >= SMALL_SIDE
        most, whole = NANO_SIDE if enlarged else side, None if patch is None else patch[0] * (2 if enlarged else 1)
    else:
        most, whole = min(own, side), None if patch is None else patch[0]
    unit *= 2 if most > own else 1
    for step in (unit, 2 * unit):
        small = max(SMALLEST, round(most / step) * step)
        if whole is None:
            yield [_size(catalogue.shape_for(median, small, step))]
            continue
        chosen = catalogue.fitting_patch(whole, lambda patch, small=small: catalogue.shape_for(median, small, patch))
        yield [_size(catalogue.shape_for(median, small, chosen)), f"method.encoder.patch=[{chosen},{chosen}]"]
        yield [_size((small, small)), f"method.encoder.patch=[{whole},{whole}]"]


def _size(shape: Size) -> str:
    return f"data.size=[{shape[0]},{shape[1]}]"


def dense_size(config: Config, median: Size, most: Size) -> Size:
    """Return the input size (H, W) for segmentation or detection.

    It is the `median` size of the images, reduced to at most as many pixels as `most` (H, W) has, and rounded to a
    multiple of the encoder's patch size. If the images are not much larger than the size in `config`, that size is
    returned.
    """
    settings: Any = config.method
    patch, own = settings.encoder.patch, config.data.size
    scale = min(1.0, math.sqrt(most[0] * most[1] / (median[0] * median[1])))
    height, width = (max(1, round(side * scale / step)) * step for side, step in zip(median, patch, strict=True))
    return (height, width) if max(height / own[0], width / own[1]) > LARGER else own


def consequence(median: Size, size: Size, patch: Size | None) -> str:
    """Describe the effect of resampling images of `median` (H, W) pixels to `size`, in one sentence."""
    factor = math.sqrt(median[0] * median[1] / (size[0] * size[1]))
    text = f"images of {median[0]} x {median[1]} (median) are resampled to {size[0]} x {size[1]} pixels: "
    if factor > STRETCH:
        text += f"{factor:.1f} times smaller, so detail finer than about {math.ceil(factor)} pixels is lost"
    elif factor < 1 / STRETCH:
        text += f"{1 / factor:.1f} times larger, which adds no detail"
    else:
        text += "about their own size"
    if patch is not None:
        text += f"; {size[0] // patch[0]} x {size[1] // patch[1]} patches of {patch[0]} x {patch[1]}"
    return text + "; --set data.size=[H,W] sets another size"
