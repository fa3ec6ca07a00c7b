"""Compile the transformer blocks of a method with torch.compile.

The results are the same as without compilation, and methods need no changes.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from unmask.nn.blocks import Block
from unmask.nn.cross import CrossBlock
from unmask.nn.gpt import Block as GPTBlock

BLOCKS = (Block, CrossBlock, GPTBlock)


def compile_blocks(method: nn.Module, backend: str = "inductor") -> int:
    """Compile the transformer blocks of a method in place; return their number.

    Each block is compiled separately, so blocks of the same shape and settings share one compilation, and 32 blocks
    take no longer than two. Code that depends on random draws (masks, patch selection) is outside the blocks, so
    nothing is recompiled between steps. backend: name of a torch.compile backend.
    """
    blocks = [part for part in method.modules() if isinstance(part, BLOCKS)]
    for block in blocks:
        block.compile(dynamic=False, backend=backend)
    return len(blocks)


def why_not_compiled(device: str) -> str | None:
    """Return None if torch.compile works, else the reason in one line.

    The function compiles a small function to find out, which takes a second or more.
    """
    try:
        torch.compile(torch.sin, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # the type depends on the cause: a missing compiler or header, an unsupported version
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[0] if lines else type(error).__name__
    return None


def uncompiled() -> AbstractContextManager[object]:
    """Context manager that runs compiled blocks eagerly, to avoid recompiling for one-off batch sizes."""
    if "torch._dynamo" not in sys.modules:  # no block is compiled, and importing torch._dynamo would take a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
