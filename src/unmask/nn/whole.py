"""Tensors that are stored in parts (torch's DTensor), as FSDP2 stores weights and gradients."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is stored in parts as one plain tensor, or a plain tensor itself."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
