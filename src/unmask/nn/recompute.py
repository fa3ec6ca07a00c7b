"""Activations that are cheap to compute twice are not kept for the backward pass. The same numbers, less memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from unmask.nn.torch_internals import in_transform


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor, made: Tensor) -> AbstractContextManager[object]:
    """Within, what is kept of `made` = function(x) is x alone; the backward pass computes `made` again.

    function: element by element, the same at each call. It saves memory where something else keeps x already.
    Compiled code decides by itself what it computes twice, and is left alone.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or in_transform(x):
        return nullcontext()
    x, address = x.detach(), made.data_ptr()

    def pack(kept: Tensor) -> Tensor | tuple[Tensor, torch.Size]:
        return (x, kept.shape) if kept.data_ptr() == address and kept.numel() == x.numel() else kept

    def unpack(packed: Tensor | tuple[Tensor, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else function(packed[0]).view(packed[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
