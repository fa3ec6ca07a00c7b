"""Views of an encoder: the output of its `forward`, the features of one layer, or features with hidden tokens.

iGPT's features are best in the middle of the network, so its probe measures the best layer (Chen et al. 2020,
"Generative pretraining from pixels", section 4.1). iGPT-BERT was pre-trained on masked input, so it is evaluated with
patch masks by default: under one mask, or by majority vote over several masks (section 4.6).

Letters: n training images, m test images, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from unmask.batch import Batch
from unmask.data.annotations.splits import VOTES
from unmask.errors import UserError
from unmask.nn.features import Features
from unmask.nn.image_encoder import ImageEncoder
from unmask.rng import Draws, Stream, words

EVALUATION_EPOCH = 2**31 - 1  # no training reaches this epoch, so evaluation masks differ from training masks

Hide = Callable[[Draws], Tensor]
"""Maps the random numbers of B images to (B, N) bool, True for hidden tokens."""


class View(nn.Module):
    """An encoder, the layer that its features are taken from, and the tokens that are hidden from it.

    layer: layer to read, or None for the output of `forward`. hide: function that chooses hidden tokens, or None. mask:
    number of the patch mask; the mask of an image depends only on this number and on the image's row in its source.
    """

    def __init__(self, encoder: nn.Module, layer: int | None = None, hide: Hide | None = None, mask: int = 0) -> None:
        super().__init__()
        self.encoder, self.layer, self.hide, self.mask = encoder, layer, hide, mask

    def see(self, batch: Batch) -> Features:
        """Return the features of a batch; its images must be on the encoder's device."""
        if self.layer is None and self.hide is None:
            return self.encoder(batch.images)
        number = self.encoder.layer if self.layer is None else self.layer
        return next(islice(self.every_layer(batch), number, None))  # type: ignore[arg-type]

    def every_layer(self, batch: Batch) -> Iterator[Features]:
        """Yield the features of all layers, in order."""
        if self.hide is None:
            return self.encoder.feature_layers(batch.images)  # type: ignore[operator]
        epoch = torch.full_like(batch.index, EVALUATION_EPOCH)
        hidden = self.hide(Draws(self.mask, epoch, batch.index))
        return self.encoder.feature_layers(batch.images, hidden)  # type: ignore[operator]


def wanted_layer(encoder: ImageEncoder, layer: str | None) -> str | None:
    """Return the layer to measure: "best", "last", a number, or None for the output of `forward`.

    layer: the layer that the user requested, or None for the default of this encoder. Raises UserError for a layer that
    the encoder does not have.
    """
    if layer is None:
        return encoder.probe_layer
    if layer not in ("best", "last") and not layer.isdecimal():
        raise UserError(f"got layer {layer!r}; expected best, last or a number")
    if encoder.depth is None:
        if layer == "last":
            return None
        raise UserError(f"got layer {layer}, but this encoder has no layers to choose from; leave --layer out")
    if layer.isdecimal() and int(layer) > encoder.depth:
        raise UserError(f"got layer {layer} for an encoder of {encoder.depth} blocks; expected 0 to {encoder.depth}")
    return layer


def majority(predictions: np.ndarray, index: np.ndarray, seed: int) -> np.ndarray:
    """Return the class with the most votes for each image: (votes, m) -> (m,) int64.

    Ties are broken by a random number that depends only on the seed and the image's row.
    """
    votes = np.stack([(predictions == label).sum(0) for label in range(predictions.max() + 1)], 1)  # (m, K)
    leads = votes == votes.max(1, keepdims=True)
    draws = words(seed, Stream.LABELS, np.full_like(index, VOTES), np.asarray(index, np.int64), 1)[:, 0]
    place = draws % leads.sum(1)  # index of the chosen class among the tied ones
    return (np.cumsum(leads, 1) > place[:, None]).argmax(1).astype(np.int64)


def best_layer(accuracies: Sequence[float]) -> int:
    """Return the most accurate layer; a tie goes to the layer nearest to the middle, then to the lower number."""
    middle = (len(accuracies) - 1) / 2
    return min(range(len(accuracies)), key=lambda n: (-accuracies[n], abs(n - middle), n))
