"""Reconstruction targets of a patch: plain or normalised pixels, principal components, or the codes of a tokenizer.

A target defines how many numbers a decoder predicts for each patch (`out`), the truth at every patch (`forward`), the
error of a prediction (`loss`), how to draw a prediction, and the loss of baselines (`trivial`).

Letters: B images, N patches, Q predicted patches, P values of a patch, O numbers predicted for it, V codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from unmask.batch import ImageSpec
from unmask.errors import UserError
from unmask.nn.conv_vae import ConvVAEConfig, Tokenizer
from unmask.nn.losses import full_precision, mean_square, weighted_mean
from unmask.nn.masks import Mask, nearest_visible
from unmask.nn.patches import normalise, patchify, put, take
from unmask.nn.valid import Valid, patch_weights, value_weights

VARIANCE_EPS = 1e-6
PCA_PATCHES = 100_000  # number of patches used for principal components, or fewer if the data set has fewer


class PatchStatistics(NamedTuple):
    """Mean and standard deviation of each patch, (B, N, 1), over its pixels and channels jointly."""

    mean: Float[Tensor, "B N 1"]
    std: Float[Tensor, "B N 1"]

    def remove(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
        return (patches - self.mean) / self.std

    def restore(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
        return patches * self.std + self.mean

    def of(self, where: Int[Tensor, "B Q"]) -> PatchStatistics:
        """Return the statistics of the patches `where`."""
        return PatchStatistics(take(self.mean, where), take(self.std, where))


def patch_statistics(patches: Float[Tensor, "B N P"], valid: Valid | None = None) -> PatchStatistics:
    """Compute statistics for MAE's normalised-pixel target: unbiased variance, eps inside the root, always in float32.

    A flat patch (variance 0) becomes an all-zero target. valid: the values to include (None: all). A patch without
    valid values has mean 0 and standard deviation 1.
    """
    patches = patches.float()
    if valid is not None:
        count = valid.values.sum(-1, keepdim=True)
        mean = (patches * valid.values).sum(-1, keepdim=True) / count.clamp(min=1)
        squares = ((patches - mean) * valid.values).square().sum(-1, keepdim=True)
        std = (squares / (count - 1).clamp(min=1) + VARIANCE_EPS).sqrt()
        # Without valid values std is 1, not near 0, which would make the loss of baselines huge.
        return PatchStatistics(mean, torch.where(count > 0, std, 1.0))
    mean = patches.mean(-1, keepdim=True)
    squares = (patches - mean).square().sum(-1, keepdim=True)  # torch.var takes ten times as long on a CPU
    return PatchStatistics(mean, (squares / (patches.shape[-1] - 1) + VARIANCE_EPS).sqrt())


class Target(nn.Module, ABC):
    """See the module docstring. `patches` (B, N, P) are normalised, `images` (B, C, H, W) in the files' own units.

    valid: which patches and values count in the loss (None: all). num_prepare: number of images whose patches, (1, n,
    P), `prepare` uses before the first step; 0 for none. note: explanation for the caption of a picture.
    """

    out: int
    note: str = ""
    num_prepare: int = 0

    @abstractmethod
    def forward(
        self, patches: Float[Tensor, "B N P"], images: Tensor, valid: Valid | None = None
    ) -> Shaped[Tensor, "B N T"]:
        """Return the target of every patch, (B, N, T): T = 1 for ids of codes, T = O for all other targets."""

    @abstractmethod
    def loss(
        self, guess: Float[Tensor, "B Q O"], truth: Shaped[Tensor, "B Q T"], weights: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Return the float32 error of `guess` against `truth`, averaged with `weights`."""

    @abstractmethod
    def draw(
        self,
        guess: Float[Tensor, "B M O"],
        patches: Float[Tensor, "B N P"],
        images: Tensor,
        mask: Mask,
        valid: Valid | None = None,
    ) -> dict[str, Float[Tensor, "B M P"]]:
        """Return predictions for mask.drop as normalised patches, by the caption of their panel in a picture."""

    @abstractmethod
    def trivial(
        self, patches: Float[Tensor, "B N P"], images: Tensor, mask: Mask, valid: Valid | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the loss of baseline predictions for mask.drop on these images, in the units of `loss`."""

    def weights(self, valid: Valid | None, where: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q W"] | None:
        """Return the weights for `loss` of the patches `where`: one per patch (W = 1), or for pixels one per value (W =
        P).
        """
        weights = patch_weights(valid, where)
        return None if weights is None else weights[..., None]

    def prepare(self, patches: Float[Tensor, "1 n P"]) -> None:
        raise TypeError(f"{type(self).__name__} needs patches of {self.num_prepare} images but has no prepare()")


class Pixels(Target):
    """Target: pixels, normalised over the data set only, or with `per_patch` also within each patch (MAE section 4)."""

    def __init__(self, values: int, grid: tuple[int, int], channels: int, *, per_patch: bool) -> None:
        super().__init__()
        self.out, self.grid, self.channels, self.per_patch = values, grid, channels, per_patch
        if per_patch:
            self.note = (
                " The target is normalised within each patch; the prediction is drawn with the TRUE mean and standard "
                "deviation of each hidden patch, which the model does not know. 'Nearest stats' uses the mean and "
                "standard deviation of the nearest visible patch instead."
            )

    def forward(self, patches: Tensor, images: Tensor, valid: Valid | None = None) -> Tensor:
        return patch_statistics(patches, valid).remove(patches) if self.per_patch else patches

    def loss(self, guess: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        return mean_square(guess, truth, weights)

    def weights(self, valid: Valid | None, where: Tensor) -> Tensor | None:
        return value_weights(valid, where)

    def draw(
        self, guess: Tensor, patches: Tensor, images: Tensor, mask: Mask, valid: Valid | None = None
    ) -> dict[str, Tensor]:
        if not self.per_patch:
            return {"pasted": guess}
        statistics = patch_statistics(patches, valid)
        near = statistics.of(nearest_visible(mask, self.grid))
        return {"pasted": statistics.of(mask.drop).restore(guess), "pasted, nearest stats": near.restore(guess)}

    def trivial(self, patches: Tensor, images: Tensor, mask: Mask, valid: Valid | None = None) -> dict[str, Tensor]:
        truth, weights = self(patches, images, valid), self.weights(valid, mask.drop)
        guesses = flat_guesses(truth, self.channels, mask=mask, grid=self.grid, valid=valid)
        return {name: self.loss(guess, take(truth, mask.drop), weights) for name, guess in guesses.items()}


class PrincipalComponents(Target):
    """Target: the coefficients of a patch along the `count` directions of greatest variance (MAE, Table 1d: 96 of 768).

    `prepare` computes the directions from the data set; until then all coefficients are 0. whiten: divide each
    coefficient by its standard deviation over the data; the paper does not specify this; off by default.
    Raises UserError for more coefficients than a patch has values.
    """

    basis: Tensor
    center: Tensor
    unit: Tensor

    def __init__(self, values: int, grid: tuple[int, int], channels: int, *, count: int, whiten: bool) -> None:
        super().__init__()
        if count > values:
            raise UserError(
                f"got method.pca_coefficients={count}; a patch has only {values} values; use at most {values} "
                f"(the paper's share is {max(1, values // 8)})"
            )
        self.out, self.grid, self.channels, self.whiten = count, grid, channels, whiten
        self.num_prepare = -(-PCA_PATCHES // (grid[0] * grid[1]))
        self.register_buffer("center", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(values, count))  # (P, O): the columns are the directions.
        self.register_buffer("unit", torch.ones(count))  # Standard deviation of each coefficient.
        self.note = f" The prediction is the first {count} principal components of a patch of {values} values."

    def prepare(self, patches: Tensor) -> None:
        flat = patches.flatten(0, 1).double()
        center = flat.mean(0)
        covariance = (flat - center).T @ (flat - center) / max(1, len(flat) - 1)
        variances, directions = torch.linalg.eigh(covariance.cpu())  # ascending
        variances, directions = variances.flip(0)[: self.out], directions.flip(1)[:, : self.out]
        largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
        directions = directions * torch.where(largest < 0, -1.0, 1.0)  # fixes the sign, which depends on the library
        self.center.copy_(center)
        self.basis.copy_(directions)
        if self.whiten:
            self.unit.copy_(variances.clamp(min=VARIANCE_EPS).sqrt())

    def project(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N O"]:
        return (patches - self.center) @ self.basis / self.unit

    def forward(self, patches: Tensor, images: Tensor, valid: Valid | None = None) -> Tensor:
        with full_precision(patches.device):
            return self.project(patches.float())

    def loss(self, guess: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        return mean_square(guess, truth, weights)

    def draw(
        self, guess: Tensor, patches: Tensor, images: Tensor, mask: Mask, valid: Valid | None = None
    ) -> dict[str, Tensor]:
        return {"pasted": (guess * self.unit) @ self.basis.T + self.center}

    def trivial(self, patches: Tensor, images: Tensor, mask: Mask, valid: Valid | None = None) -> dict[str, Tensor]:
        truth, weights = take(self(patches, images), mask.drop), self.weights(valid, mask.drop)
        guesses = flat_guesses(patches, self.channels, mask=mask, grid=self.grid, valid=valid)
        return {name: self.loss(self(guess, images), truth, weights) for name, guess in guesses.items()}


class Tokens(Target):
    """Target: the codes of a trained dVAE, one class out of `codes` for every patch, with a cross-entropy loss (BEiT,
    and MAE's Table 1d).

    The tokenizer is a frozen part of the method, whose weights come from another Run. Raises UserError unless the
    tokenizer has one code for each patch of `patch` pixels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ConvVAEConfig, images: ImageSpec, patch: tuple[int, int]) -> None:
        super().__init__()
        self.out, self.patch = config.codes, patch
        self.tokenizer = Tokenizer(config, images, patch)
        self.register_buffer("mean", torch.tensor(images.mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(images.std, dtype=torch.float32), persistent=False)
        self.note = " The prediction is the codes of a dVAE, decoded to pixels."

    def forward(self, patches: Tensor, images: Tensor, valid: Valid | None = None) -> Tensor:
        return self.tokenizer.ids(images)[..., None]

    def loss(self, guess: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
        guess, truth = guess.float().flatten(0, 1), truth.flatten()
        if weights is None:
            return F.cross_entropy(guess, truth)
        return weighted_mean(F.cross_entropy(guess, truth, reduction="none"), weights.flatten())

    def draw(
        self, guess: Tensor, patches: Tensor, images: Tensor, mask: Mask, valid: Valid | None = None
    ) -> dict[str, Tensor]:
        ids = self(patches, images)
        guessed = put(ids, mask.drop, guess.argmax(-1, keepdim=True))
        size = (images.shape[2], images.shape[3])

        def paint(ids: Tensor) -> Tensor:
            painted = normalise(self.tokenizer.paint(ids[..., 0], size), self.mean, self.std)
            return take(patchify(painted, self.patch), mask.drop)

        return {"pasted": paint(guessed), "pasted, true codes": paint(ids)}

    def trivial(self, patches: Tensor, images: Tensor, mask: Mask, valid: Valid | None = None) -> dict[str, Tensor]:
        truth = take(self(patches, images), mask.drop).flatten()
        if (weights := self.weights(valid, mask.drop)) is not None and weights.any():
            truth = truth[weights.flatten() > 0]
        shares = F.one_hot(truth, self.out).float().mean(0)
        return {"code_frequencies": torch.special.entr(shares).sum()}


def flat_guesses(
    view: Float[Tensor, "B N P"], channels: int, mask: Mask, grid: tuple[int, int], valid: Valid | None = None
) -> dict[str, Float[Tensor, "B M P"]]:
    """Return baseline predictions, by name, of the hidden patches of `view` (patches as a target sees them).

    `true_patch_mean` is an oracle: the true mean colour of each hidden patch. `visible_mean` and `nearest_visible` use
    visible patches only.
    """
    pixels = view.shape[2] // channels
    colours = view.unflatten(2, (-1, channels)).mean(2)  # (B, N, C)
    if valid is not None:
        weights = valid.values.unflatten(2, (-1, channels))
        known = (view.unflatten(2, (-1, channels)) * weights).sum(2) / weights.sum(2).clamp(min=1)
        colours = torch.where(valid.patches[..., None], known, colours)
    visible = take(colours, mask.keep).mean(1, keepdim=True).expand(-1, mask.drop.shape[1], -1)  # (B, M, C)
    return {
        "true_patch_mean": take(colours, mask.drop).repeat(1, 1, pixels),
        "visible_mean": visible.repeat(1, 1, pixels),
        "nearest_visible": take(view, nearest_visible(mask, grid)),
    }


def masked_panels(
    patches: Float[Tensor, "B N P"], mask: Mask, drawn: dict[str, Float[Tensor, "B M P"]]
) -> dict[str, Float[Tensor, "B N P"]]:
    """Return panels of a picture: original, visible patches, first prediction alone, and each prediction pasted in.

    drawn: predictions for mask.drop by caption, as `Target.draw` returns them. Hidden patches have the data set's mean
    colour.
    """
    nothing = torch.zeros_like(patches)
    share = mask.drop.shape[1] / patches.shape[1]
    return {
        "original": patches,
        f"masked {share:.0%}": put(patches, mask.drop, nothing[:, : mask.drop.shape[1]]),
        "prediction": put(nothing, mask.drop, next(iter(drawn.values()))),
        **{caption: put(patches, mask.drop, values) for caption, values in drawn.items()},
    }
