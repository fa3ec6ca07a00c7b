"""Losses, computed in float32 whatever precision the network ran in."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def mean_square(guess: Float[Tensor, "*shape"], truth: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over all values. With as many hidden patches in every image this is MAE's masked mean."""
    return (guess.float() - truth.float()).square().mean()
