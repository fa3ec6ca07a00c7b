"""Record the sizes of the tensors that torch operations return, with torch's dispatch mode."""

from __future__ import annotations

from typing import Any

import torch

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # a private module of torch; tests/engine/test_fused_gate_and_sizes.py fails if it has moved
    TorchDispatchMode = None


def recorder() -> OperationSizes | NothingRecorded:
    """Return a context manager whose `bytes` lists how many bytes each operation inside it returned, in order.

    If torch has no dispatch mode, the list remains empty.
    """
    return NothingRecorded() if TorchDispatchMode is None else OperationSizes()


class NothingRecorded:
    """Context manager that records nothing."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def __enter__(self) -> NothingRecorded:
        return self

    def __exit__(self, *_: object) -> None: ...


class OperationSizes(TorchDispatchMode or object):  # pyright: ignore[reportGeneralTypeIssues]
    """Context manager that records the bytes of the tensors that each operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        several = out if isinstance(out, tuple | list) else (out,)
        self.bytes.append(sum(tensor.nbytes for tensor in several if isinstance(tensor, torch.Tensor)))
        return out
