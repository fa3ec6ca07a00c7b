"""Compare float32 matrix products on a CPU: torch's choice (MKL, where torch includes it) and oneDNN.

    python benchmarks/products.py [--rounds 9] [--json] [--keep] [--tiny]
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/products.py       without oneDNN's AVX-512 code

Rates are in GFLOP/s of one thread, from the fastest round in processor time, which other programs affect little.
`ratio` is oneDNN's rate divided by torch's: the gain of `unmask.nn.linear_layer`, which calls oneDNN on AMD processors
with AVX-512. The ratio depends on the width of the processor's vector units, which the CPU flags do not show.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import command_line, conclude, origin

from unmask.nn.torch_internals import multiply_by_onednn

SHAPES = [  # rows, inside, outside
    ("ViT-B encoder, 16 images of 50 tokens", 800, 768, 3072),
    ("MAE decoder, 16 images of 197 tokens", 3152, 512, 2048),
    ("square", 4096, 1024, 4096),
]


def rate(call: Callable[[], object], flops: int, rounds: int) -> float:
    """Return the GFLOP/s of the fastest of `rounds` calls, in processor time of this thread."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        seconds.append(time.thread_time() - start)
    return flops / max(min(seconds), 1e-9) / 1e9


def main() -> None:
    options = command_line(__doc__, rounds=9, result="products").parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, height, inside, outside in SHAPES:
        scale = 16 if options.tiny else 1
        x, weight = torch.randn(height // scale, inside // scale), torch.randn(outside // scale, inside // scale)
        flops = 2 * x.shape[0] * x.shape[1] * weight.shape[0]
        rounds = 1 if options.tiny else options.rounds
        torchs = rate(lambda x=x, weight=weight: F.linear(x, weight), flops, rounds)
        onednn = rate(lambda x=x, weight=weight: multiply_by_onednn(x, weight), flops, rounds)
        rows.append({"shape": name, "torch_gflops": torchs, "onednn_gflops": onednn, "ratio": onednn / torchs})
    conclude("products", rows, origin(("torch",)), as_json=options.json, keep=options.keep)


if __name__ == "__main__":
    main()
