"""`nn.Linear` that computes float32 products with oneDNN on AMD processors with AVX-512; the results are equal up to
rounding.

torch computes float32 products with MKL, which can be less than half as fast on these processors as oneDNN, which
torch's CPU builds also contain (`benchmarks/step.py`; bfloat16 always uses oneDNN). On other processors, and for small
products, torch's own implementation is used. The choice depends on the processor and the shapes alone, so a resumed run
repeats its results.

Letters: rows: leading dimensions of the input; inside, outside: number of input and output features.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unmask.nn import torch_internals

FEWEST = 1 << 20  # multiply-accumulates; for fewer, calling oneDNN takes longer than it saves


class Linear(nn.Linear):
    """`nn.Linear` computed by `linear`: same parameters, names and initial weights."""

    def forward(self, input: Float[Tensor, "*rows inside"]) -> Float[Tensor, "*rows outside"]:
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*rows inside"], weight: Float[Tensor, "outside inside"], bias: Float[Tensor, " outside"] | None
) -> Float[Tensor, "*rows outside"]:
    """Return x weight^T + bias, like `F.linear`."""
    if not _for_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _ByOneDNN.apply(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])  # type: ignore[union-attr]


def _for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first, because the sizes in exported graphs are symbols
        and not torch_internals.in_transform(x)
        and mkl_is_slow()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.ndim > 1
        and x.numel() * weight.shape[0] >= FEWEST
    )


@cache
def mkl_is_slow() -> bool:
    """Return whether torch has both MKL and oneDNN, and MKL is much slower on this processor."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or torch_internals.onednn_linear() is None:
        return False
    about = Path("/proc/cpuinfo")
    return about.exists() and "AuthenticAMD" in about.read_text()


class _ByOneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch_internals.multiply_by_onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            torch_internals.multiply_by_onednn(gradient, weight.T) if for_x else None,
            torch_internals.multiply_by_onednn(gradient.T, x.T) if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )
