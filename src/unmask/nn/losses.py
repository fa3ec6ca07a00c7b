"""What is computed in float32 whatever precision the network runs in: losses, and the truth they are held against."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor


def mean_square(guess: Float[Tensor, "*shape"], truth: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean over all values. With as many hidden patches in every image this is MAE's masked mean."""
    return (guess.float() - truth.float()).square().mean()


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast switched off, on any device that knows it; the meta device, on which FLOPs are counted, does not."""
    known = torch.amp.autocast_mode.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
