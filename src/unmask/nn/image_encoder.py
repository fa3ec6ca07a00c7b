"""The base of all encoders, with every member that probes, fine-tuning, export and the training loop may use.

`forward(images)` returns `Features`. Optional members are declared here with a default, so that no caller needs
`getattr`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unmask.batch import ImageSpec
from unmask.errors import UserError
from unmask.nn.features import Features
from unmask.nn.inputs import Scale, in_data_units, require_images
from unmask.settings import Settings


class EncoderConfig(Settings):
    """Base class of the settings of all encoders."""

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """(height, width) of one token in pixels, or None for an encoder without patches."""
        return None


class ImageEncoder(nn.Module):
    """Base of all encoders: checks the input, and stores the constants of the data in float32.

    spec: the training data. width: size of a token. patch: (height, width) in pixels, of encoders that accept several
    sizes. grid: (rows, columns) of tokens at the training size. depth: number of blocks whose outputs `feature_layers`
    yields, or None for an encoder without a choice of layers. layer: the layer whose features `forward` returns (None:
    the last). probe_layer: the default layer of probes (None: the output of `forward`). one_size: the reason why images
    must have the training size; empty if any whole number of patches is accepted. exact: the buffers in the files'
    units, which `.half()` and `.bfloat16()` leave in float32, because 16-bit values do not fit in half precision.
    """

    spec: ImageSpec
    width: int
    patch: tuple[int, int]
    grid: tuple[int, int]
    depth: int | None = None
    layer: int | None = None
    probe_layer: str | None = None
    one_size: str = ""
    exact: tuple[str, ...] = ("mean", "std")

    def feature_layers(
        self, images: Tensor, hidden: Tensor | None = None, scale: Scale | None = None
    ) -> Iterator[Features]:
        """Yield the features of every layer, 0 (the input of the first block) to `depth`.

        hidden: (B, N) bool, tokens whose content is removed, for encoders trained with hidden tokens. scale: see
        `accept`. Raises UserError for an encoder without layers.
        """
        raise UserError(f"{type(self).__name__} has no layers to choose from; use encoder(images)")

    def depth_of(self, name: str) -> int:
        """Return the depth of a parameter, counted from the input, for layer-wise decay of the learning rate.

        Raises UserError for an encoder that defines no depths.
        """
        raise UserError(
            f"got optim.layer_decay for {type(self).__name__}, which has no order of layers; set optim.layer_decay=1"
        )

    def accept(self, images: Any, scale: Scale | None = None) -> Tensor:
        """Return `images` (B, C, H, W) in the files' units. Raises UserError for images that this encoder does not
        accept.

        scale: with None, the range of float images is checked; with "data", all values are accepted unchanged; with
        "unit", values between 0 and 1 are multiplied by 255 (8-bit data) or 65535 (16-bit data).
        """
        if torch.jit.is_tracing():
            raise UserError(
                "got a call from torch.jit.trace (or torch.onnx.export with dynamo=False), which would silently fix "
                "the batch size; use torch.export.export(encoder, (images,), dynamic_shapes=...) or "
                "`unmask export RUN --to onnx`"
            )
        self.require_shape(images)
        return in_data_units(images, self.spec, scale)

    def require_shape(self, images: Any) -> None:
        """Raise UserError unless `images` is a tensor (B, C, H, W) of a size that this encoder accepts."""
        require_images(images, self.spec)
        size = (images.shape[2], images.shape[3])
        if self.one_size:
            if size != self.spec.size:
                expected = f"(B, {self.spec.channels}, {self.spec.size[0]}, {self.spec.size[1]})"
                raise UserError(
                    f"got images of shape {tuple(images.shape)}; expected {expected}: {self.one_size}; crop or resize "
                    "the images to that size"
                )
            return
        for side, length, step in zip(("height", "width"), size, self.patch, strict=True):
            if length % step or length < step:
                fits = [str(n) for n in (length // step * step, (length // step + 1) * step) if n]
                raise UserError(
                    f"got images of shape {tuple(images.shape)}, {side} {length}; expected a multiple of the patch "
                    f"size {step}; crop or resize the {side} to {' or '.join(fits)}"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = {name: self._buffers[name] for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self
