"""Compare the two libraries in torch's CPU builds that compute float32 matrix products: MKL and oneDNN."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from unmask.nn.linear_layer import mkl_is_slow
from unmask.nn.torch_internals import multiply_by_onednn, onednn_linear

ROWS, INSIDE, OUTSIDE = 800, 768, 3072  # a linear layer of ViT-B on 16 images of 50 tokens
ROUNDS = 3


@dataclass(frozen=True)
class ProductRates:
    """GFLOP/s of a float32 matrix product in each library, with torch's number of threads."""

    torch_gflops: float
    onednn_gflops: float
    uses_onednn: bool

    def text(self) -> str:
        """Return a sentence with the rates, which library is faster, and what training uses."""
        ratio = self.onednn_gflops / self.torch_gflops
        faster = "oneDNN is faster" if ratio > 1 else "torch's default library is faster"
        used = "oneDNN" if self.uses_onednn else "torch's default"
        return (
            f"{self.torch_gflops:.0f} GFLOP/s with torch's default library, {self.onednn_gflops:.0f} with oneDNN "
            f"({ratio:.2f} times): {faster} here; training uses {used}. The ratio depends on the width of the "
            "processor's vector units, which the CPU flags do not show"
        )


def measure_products() -> ProductRates | None:
    """Time a matrix product in each library, in less than a second; return None if torch has no oneDNN."""
    if onednn_linear() is None or not torch.backends.mkldnn.is_available():
        return None
    x, weight = torch.randn(ROWS, INSIDE), torch.randn(OUTSIDE, INSIDE)
    with torch.no_grad():
        default = _gflops(lambda: F.linear(x, weight))
        onednn = _gflops(lambda: multiply_by_onednn(x, weight))
    return ProductRates(default, onednn, mkl_is_slow())


def _gflops(product: Callable[[], object]) -> float:
    product()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 2 * ROWS * INSIDE * OUTSIDE / max(min(seconds), 1e-9) / 1e9
