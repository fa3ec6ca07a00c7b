"""Private parts of torch, each behind one function with a fallback for versions of torch without it.

`tests/nn/test_torch_internals.py` fails when an installed torch has changed one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from torch._subclasses.fake_tensor import FakeTensor
except ImportError:  # another version of torch; a test names the missing part
    FakeTensor = None


def onednn_linear() -> Any:
    """Return oneDNN's operator x weight^T + bias, which torch.compile uses on CPUs, or None if torch lacks it."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def multiply_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias by oneDNN, for x (rows, inside); x and weight may be transposed in memory. Needs
    `onednn_linear()`.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def in_transform(x: Tensor) -> bool:
    """Return whether x is inside a `torch.func` transform (vmap, grad, ...), where tensors have no memory of their own.

    The result is False if this version of torch has no function for it.
    """
    functorch = getattr(torch._C, "_functorch", None)
    check = getattr(functorch, "is_functorch_wrapped_tensor", None)
    return False if check is None else check(x)


def has_no_values(x: Tensor) -> bool:
    """Return whether a tensor has a shape but no values, such as those that torch.export traces with."""
    return x.is_meta or (FakeTensor is not None and isinstance(x, FakeTensor))


def memory_address(x: Tensor) -> int:
    """Return a number that is the same for two existing tensors if they begin at the same place in memory.

    Tensors without values have no memory; for them the number identifies the storage.
    """
    return x.untyped_storage()._cdata if has_no_values(x) else x.data_ptr()
