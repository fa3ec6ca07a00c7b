"""Record the sizes of the tensors that torch operations return, with torch's dispatch mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:  # private; tests/engine/test_fused_gate_and_sizes.py fails if torch moves it
    TorchDispatchMode = None


def recorder() -> OperationSizes | NothingRecorded:
    """Return a context manager that records in the list `bytes` how many bytes each torch operation inside it returned.

    If this version of torch has no dispatch mode, the list stays empty.
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
        if sizes := [tensor.nbytes for tensor in several if isinstance(tensor, torch.Tensor)]:
            self.bytes.append(sum(sizes))
        return out


class CastSizes(TorchDispatchMode or object):  # pyright: ignore[reportGeneralTypeIssues]
    """Context manager that records the bytes of the bfloat16 copies that autocast makes of tensors.

    named: (name, tensor) pairs. bytes: sizes of the copies, by name.
    """

    def __init__(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self.names = {tensor.untyped_storage()._cdata: name for name, tensor in named}
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            name = self.names.get(args[0].untyped_storage()._cdata)
            if name is not None:
                self.bytes[name] += out.nbytes
        return out
