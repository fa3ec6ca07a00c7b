"""Compile the transformer blocks of a method. It computes the same numbers, and the method does not know of it."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from unmask.nn.blocks import Block
from unmask.nn.cross import CrossBlock

BLOCKS = (Block, CrossBlock)


def compile_blocks(method: nn.Module, backend: str = "inductor") -> int:
    """Compile the transformer blocks of a method, in place; returns how many there are.

    Each on its own, so that blocks alike in shape and settings share one compilation: it costs as much for 32 blocks as
    for two, and what depends on the draws (masks, which patches) stays outside, so nothing is compiled again from step
    to step. backend: one of torch's.
    """
    blocks = [part for part in method.modules() if isinstance(part, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    return len(blocks)


def why_not_compiled(device: str) -> str | None:
    """Return None where torch.compile works, or the reason in one line. It is tried, which takes a second or more."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, a missing header, a version that does not fit: whatever it finds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def uncompiled() -> AbstractContextManager[object]:
    """Context manager that runs compiled blocks eagerly, to avoid recompiling for one-off batch sizes."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and to import it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
