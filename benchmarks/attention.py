"""Time the forward and backward pass of attention: PyTorch's fused kernel and `unmask.nn.blocks.attend`.

    python benchmarks/attention.py [--rounds 9] [--json] [--keep] [--tiny]

The shapes are typical of masked autoencoders, with few visible tokens in the encoder and all tokens in the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from measure import command_line, conclude, medians, origin

from unmask.nn.blocks import attend

SHAPES = [
    ("demo encoder, 9 visible + class", 256, 3, 10, 32),
    ("demo decoder, 36 + class", 256, 2, 37, 32),
    ("mae_nano encoder, 16 visible + class", 256, 3, 17, 64),
    ("mae_nano decoder, 64 + class", 256, 3, 65, 32),
    ("ViT-B/16 encoder, 49 visible + class", 32, 12, 50, 64),
    ("MAE decoder, 196 + class", 32, 16, 197, 32),
]


def main() -> None:
    options = command_line(__doc__, rounds=9, result="attention").parse_args()
    rounds = 1 if options.tiny else options.rounds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for what, batch, heads, tokens, width in SHAPES:
        batch = 2 if options.tiny else batch
        qkv = torch.randn(3, batch, heads, tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)

        def run(attention, qkv=qkv):
            attention(*qkv.unbind(0)).sum().backward()

        found = medians(
            {"fused": lambda run=run: run(F.scaled_dot_product_attention), "ours": lambda run=run: run(attend)},
            rounds=rounds,
        )
        rows.append(
            {"shape": what, "fused_ms": 1e3 * found["fused"], "ours_ms": 1e3 * found["ours"],
             "ratio": found["fused"] / found["ours"]}
        )  # fmt: skip
    conclude("attention", rows, origin(), as_json=options.json, keep=options.keep)


if __name__ == "__main__":
    main()
