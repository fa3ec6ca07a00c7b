"""Recompute cheap activations in the backward pass instead of storing them. The results are the same and need less
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from unmask.nn.torch_internals import in_transform, memory_address


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, made: Tensor) -> AbstractContextManager[object]:
    """Return a context manager in which autograd stores x instead of `made` = function(x), which the backward pass
    recomputes.

    function: an elementwise, deterministic function. Memory is saved only if x is stored anyway. The context manager
    does nothing in compiled code, where the compiler decides what to recompute.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_transform(x):
        return nullcontext()
    x, address = x.detach(), memory_address(made)

    def pack(kept: Tensor) -> Tensor | tuple[Tensor, torch.Size]:
        return (x, kept.shape) if memory_address(kept) == address and kept.numel() == x.numel() else kept

    def unpack(packed: Tensor | tuple[Tensor, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else function(packed[0]).view(packed[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
