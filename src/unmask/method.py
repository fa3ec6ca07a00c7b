"""The interface of every method that `engine/train.py` trains: an encoder, a loss and a picture.

    encoder                      the result of the training: an `ImageEncoder`, whose forward returns `Features`
    loss(batch, clock) -> Loss   one scalar to minimise, and detached numbers to log
    picture(batch, clock) images that show whether the method learns
    after_step(clock) updates tensors that depend on the weights, such as a teacher; does nothing by default

The training loop passes a method the batch and a `Clock`, and the method returns a `Loss`. Methods subclass `Method`
directly, never each other. `forward` calls `loss`, so that hooks on the module apply to the loss. All other members
that the package uses are declared here with a default, so none is looked up by name.

To add a method, add one file to `methods/` with a `Config(MethodConfig)` and one subclass of `Method` whose constructor
takes `(config, images: ImageSpec)`, and a recipe. There is no registry: the file name is the method's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from unmask.batch import Batch
from unmask.nn.image_encoder import EncoderConfig, ImageEncoder
from unmask.rng import Draws
from unmask.settings import Settings


class MethodConfig(Settings):
    """Base class of every method's settings. name: name of the method's file in `methods/` or `tasks/`."""

    name: str
    encoder: EncoderConfig

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the method predicts the codes of a tokenizer, but no tokenizer has been given yet."""
        return False

    @property
    def has_tokenizer(self) -> bool:
        """Whether the method contains the network of a tokenizer, whose weights are copied from another run."""
        return False

    @property
    def mixes_pairs(self) -> bool:
        """Whether the loss mixes pairs of images, as mixup does; both images of a pair are then in the same process."""
        return False

    def from_files(self) -> list[str]:
        """Return sentences that describe settings read from files, such as a palette, to reveal a wrong file."""
        return []


@dataclass(frozen=True)
class Clock:
    """Position in the training, and the random draws of the batch.

    step, total: number of optimiser steps done, and in all. rng: random draws. micro: number of the micro-batch within
    the step. share: share of the training done, if the number of steps has changed during the training (None: step /
    total). counted: 0-d bool on the device, False if the step was skipped because of non-finite numbers; set in
    `Method.after_step` only. place: (B,) int64, places of the images in the global batch of the step, for batches that
    are a part of a micro-batch (None: the batch is a whole micro-batch).
    """

    step: int
    total: int
    rng: Draws
    micro: int = 0
    share: float | None = None
    counted: Tensor | None = None
    place: np.ndarray | None = None

    @property
    def progress(self) -> float:
        """Share of the training done, 0 to 1, for schedules such as a temperature."""
        return self.step / max(1, self.total) if self.share is None else self.share

    def places(self, count: int) -> np.ndarray:
        """Return the places of the batch's `count` images in the global batch of the step, (B,) int64."""
        if self.place is None:
            return self.micro * count + np.arange(count)
        assert len(self.place) == count, f"{len(self.place)} places for {count} images"
        return self.place


@dataclass(frozen=True)
class Loss:
    """The loss of a batch.

    value: scalar to minimise, with its autograd graph. logs: detached 0-d tensors to log (not numbers, because
    `.item()` would stall a GPU).
    """

    value: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Picture(NamedTuple):
    """Images that show what a method does.

    panels: {caption: images (B, C, H, W) float32 in the files' units}, drawn side by side. note: text below the panels.
    numbers: 0-d tensors; "loss" is the loss on these images, and the others are losses of baselines in the same units
    ("true_patch_mean", "nearest_visible", ...). names: texts below the images. valid: (B, H, W) bool, False for absent
    pixels, or None if no pixel is absent.
    """

    panels: dict[str, Tensor]
    note: str
    numbers: dict[str, Tensor]
    names: tuple[str, ...] = ()
    valid: Tensor | None = None

    def sampled(self, count: int) -> Picture:
        """Return the picture with at most `count` images.

        The images are evenly spaced, because they are in the order of their folders.
        """
        have = len(next(iter(self.panels.values())))
        rows = torch.linspace(0, have - 1, min(count, have)).long().tolist()
        panels = {caption: panel[rows] for caption, panel in self.panels.items()}
        return self._replace(
            panels=panels,
            names=tuple(self.names[row] for row in rows) if self.names else (),
            valid=None if self.valid is None else self.valid[rows],
        )


class MeanTokenClassifier(Protocol):
    """A method that classifies the mean of the patch tokens before the encoder's final norm.

    Other libraries have such classifiers too, so the method can be exported to them.
    """

    head: nn.Linear

    def logits(self, images: Tensor) -> Tensor:
        """Return class logits (B, K) float32 of images (B, C, H, W) in the files' units."""
        ...

    def classify_tokens(self, tokens: Tensor) -> Tensor:
        """Return class logits (..., K) float32 of mean tokens (..., D)."""
        ...


class Method(nn.Module, ABC):
    """A trainable method; see the module docstring. Works on any device and does no I/O.

    encoder: the result of the training. fixed: prefixes of the state dict whose tensors do not change after `prepare`
    (a frozen tokenizer, a palette); a run stores them once, not in every checkpoint. num_prepare: number of images that
    `prepare` uses. undecayed: names of parameters without weight decay, besides 1-D parameters, which never have weight
    decay. head_name: name of the part beside the encoder, for messages about exports. hides_patches: whether the
    training hides patches of the images, as model cards state. follows_images: whether recipes named *_nano, *_tiny and
    *_small get the size and patch that suit the images; False if another network depends on the size.
    """

    encoder: ImageEncoder
    head_name: ClassVar[str] = ""
    hides_patches: ClassVar[bool] = True
    follows_images: ClassVar[bool] = True
    undecayed: ClassVar[tuple[str, ...]] = ()
    fixed: tuple[str, ...] = ()
    num_prepare: int = 0

    @property
    def evaluation_mask(self) -> Callable[[Draws], Tensor] | None:
        """Function from the draws of B images to (B, N) bool, True for tokens that evaluations hide, or None."""
        return None

    def prepare(self, images: Tensor, valid: Tensor | None = None) -> None:
        """Set buffers that depend on the data. This is called before step 0, after weights are copied, if `num_prepare`
        > 0.

        images: (n, C, H, W) in the files' dtype on the method's device, n <= num_prepare, evenly spaced in the data.
        valid: (n, H, W) bool as in `Batch`, or None if no pixel is absent.
        """
        raise TypeError(f"{type(self).__name__} needs {self.num_prepare} images but has no prepare()")

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def mean_token_classifier(self) -> MeanTokenClassifier | None:
        """The method itself if other libraries can use its head as a classifier, else None."""
        return None

    @abstractmethod
    def loss(self, batch: Batch, clock: Clock) -> Loss:
        """Return the loss of one batch, in float32 under any autocast precision.

        The batch may be a part of a micro-batch: means over a number of values that depends on the data use
        `nn.batch_sums.mean_count`.
        """

    @abstractmethod
    def picture(self, batch: Batch, clock: Clock) -> Picture:
        """Return a picture of the method's predictions for these images.

        The caller disables gradients and sets eval mode.
        """

    def after_step(self, clock: Clock) -> None:
        """Update tensors that depend on the weights, such as a teacher. The training loop calls this once after each
        optimiser step.

        A step with non-finite numbers does not change the weights, and `clock.counted` is then False on the device. In
        that case this method must leave every tensor bit-identical, as `nn.ema.moved` does. The default implementation
        does nothing.
        """

    def forward(self, batch: Batch, clock: Clock) -> Loss:
        return self.loss(batch, clock)
