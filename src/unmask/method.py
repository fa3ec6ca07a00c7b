"""THE CONTRACT: what `engine/train.py` trains. A method is an encoder, a loss and a picture.

    encoder                      the result of the training: an `ImageEncoder`, whose forward returns `Features`
    loss(batch, clock) -> Loss   one scalar to minimise, and detached numbers to log
    picture(batch, clock)        panels that show whether it learns
    after_step(clock)            update what follows the weights, such as a teacher; nothing by default

`Clock` is all that a method gets from the loop besides the batch, `Loss` all that it returns. There is one abstract
level and nothing is overridden twice. `forward` *is* `loss`, so that hooks on the module apply to the loss. Everything
else that others use of a method is declared here with a default; nothing is looked up by name.

To add a method, add one file to `methods/` with a `Config(MethodConfig)` and one subclass of `Method` whose constructor
takes `(config, images: ImageSpec)`, and a recipe. There is no registry: the file name is the method's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unmask.batch import Batch
from unmask.nn.image_encoder import EncoderConfig, ImageEncoder
from unmask.rng import Draws
from unmask.settings import Settings


class MethodConfig(Settings):
    """Base of every method's settings. name: the file in `methods/` or `tasks/`."""

    name: str
    encoder: EncoderConfig

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the method predicts the codes of a tokenizer that is not given yet."""
        return False

    @property
    def has_tokenizer(self) -> bool:
        """Whether the method contains the network of a tokenizer, whose weights come from another Run."""
        return False

    def from_files(self) -> list[str]:
        """Sentences on settings that were read from files, such as masks or a palette, so that a mix-up is seen."""
        return []


@dataclass(frozen=True)
class Clock:
    """Position of the training: `step` of `total` optimiser steps, `micro`-batch within it, random draws of the batch.

    share: of the training done, where the number of steps has changed during it; None for step / total. counted: only
    in `Method.after_step`, a 0-d bool on the device, False where the step was skipped for non-finite numbers.
    """

    step: int
    total: int
    rng: Draws
    micro: int = 0
    share: float | None = None
    counted: Tensor | None = None

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1: for schedules such as a temperature."""
        return self.step / max(1, self.total) if self.share is None else self.share


@dataclass(frozen=True)
class Loss:
    """`value`: a scalar with a graph. `logs`: detached 0-d tensors; never `.item()` them here, that stalls a GPU."""

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Picture(NamedTuple):
    """Images that show what a method does.

    panels: drawn side by side, captions as keys, each (B, C, H, W) float32 in the files' units. note: printed below.
    numbers: 0-d tensors; "loss" is the loss on these images, the others are those of baselines in the same units
    ("true_patch_mean", "nearest_visible", ...). names: printed below each image. valid: (B, H, W) bool, False where a
    pixel is absent, None where all are present.
    """

    panels: dict[str, Tensor]
    note: str
    numbers: dict[str, Tensor]
    names: tuple[str, ...] = ()
    valid: Tensor | None = None

    def sampled(self, count: int) -> Picture:
        """Keep at most `count` images, evenly spaced, because images are in the order of their folders."""
        have = len(next(iter(self.panels.values())))
        rows = torch.linspace(0, have - 1, min(count, have)).long().tolist()
        panels = {caption: panel[rows] for caption, panel in self.panels.items()}
        return self._replace(
            panels=panels,
            names=tuple(self.names[row] for row in rows) if self.names else (),
            valid=None if self.valid is None else self.valid[rows],
        )


class MeanTokenClassifier(Protocol):
    """A method that classifies the mean of the patch tokens before the encoder's final norm, as other libraries can."""

    head: nn.Linear

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in the files' units -> (B, K) float32."""
        ...

    def classify_tokens(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., K) float32."""
        ...


class Method(nn.Module, ABC):
    """A trainable method; see the module docstring. Its tensors may live on any device; it does no I/O.

    encoder: the result of the training. fixed: prefixes of the state dict under which nothing changes after `prepare`
    (a frozen tokenizer, a palette): a Run stores those tensors once, not in every checkpoint. num_prepare: number of
    images that `prepare` uses. undecayed: names of parameters without weight decay although they are no vectors.
    head_name: the part beside the encoder, for messages of exports.
    """

    encoder: ImageEncoder
    head_name: ClassVar[str] = ""
    undecayed: ClassVar[tuple[str, ...]] = ()
    fixed: tuple[str, ...] = ()
    num_prepare: int = 0

    @property
    def evaluation_mask(self) -> Callable[[Draws], Tensor] | None:
        """Draws of B images -> (B, N) bool, the tokens that are hidden when features are measured; None hides none."""
        return None

    def prepare(self, images: Tensor, valid: Tensor | None = None) -> None:
        """Set buffers that depend on the data; called before step 0, after weights are copied, if `num_prepare` > 0.

        images: (n, C, H, W) in the files' dtype on the method's device, n <= num_prepare, evenly spaced in the data.
        valid: (n, H, W) bool as in `Batch`, None where no pixel is absent.
        """
        raise TypeError(f"{type(self).__name__} needs {self.num_prepare} images but has no prepare()")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def mean_token_classifier(self) -> MeanTokenClassifier | None:
        """The method itself where its head can be exported as a classifier of other libraries; else None."""
        return None

    @abstractmethod
    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """The loss of one batch, in float32 whatever the autocast precision."""

    @abstractmethod
    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Draw what the method predicts for these images; called without gradients, in eval mode."""

    def after_step(self, clock: Clock) -> None:
        """Update what follows the weights, such as a teacher; called once after each optimiser step.

        A step with non-finite numbers leaves the weights as they are, and `clock.counted` is False on the device; every
        change must then leave its tensor bit for bit as it was, as `nn.ema.moved` does. Does nothing by default.
        """

    def forward(self, batch: Batch, clock: Clock) -> Loss:
        return self.loss(batch, clock)
