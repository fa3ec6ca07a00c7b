"""Create weights and optimiser moments in float32, whatever `torch.set_default_dtype` was called with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_default() -> Iterator[None]:
    """Context manager (or decorator) in which new floating-point tensors are float32 unless a dtype is given."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
