"""CrossMAE's decoder: every hidden patch attends to the visible ones independently ("Rethinking Patch Dependence", Fu
et al.).

A query is the mask token plus a position. Queries attend to the encoder's tokens and never to one another, so any
subset of the hidden patches can be predicted, with predictions that do not depend on the subset. Block j reads its own
learned mixture of the outputs of ALL encoder blocks and of their input ("inter-block attention"), normalised by its own
LayerNorm. Parameters, sizes and initial weights are those of the official code (`models_cross.py`,
`transformer_utils.py`); only its unused class position is left out.

Letters for shapes: B images, K1 class token and visible patches, M queries, D width of the encoder, d of the decoder,
P values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.nn import positions
from unmask.nn.blocks import MLP, attend, init_linears, layer_norm
from unmask.nn.decoders import DecoderConfig
from unmask.nn.linear_layer import Linear
from unmask.nn.patches import take


class CrossAttention(nn.Module):
    """Multi-head attention from queries (width d) to other tokens (width D); scores are scaled by (d / heads)^-1/2."""

    def __init__(self, width: int, heads: int, seen_width: int) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"{heads} heads do not divide a decoder width of {width}; use a divisor of {width}")
        self.heads = heads
        self.q = Linear(width, width)
        self.kv = Linear(seen_width, 2 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Float[Tensor, "B M d"], seen: Float[Tensor, "B K1 D"]) -> Float[Tensor, "B M d"]:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, M, d / heads)
        k, v = self.kv(seen).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Compute x + CrossAttention(norm x, seen), then x + MLP(norm x). `seen`: normalised encoder tokens."""

    def __init__(self, width: int, heads: int, seen_width: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.cross_attn = CrossAttention(width, heads, seen_width)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(self, x: Float[Tensor, "B M d"], seen: Float[Tensor, "B K1 D"]) -> Float[Tensor, "B M d"]:
        x = x + self.cross_attn(self.norm1(x), seen)
        return x + self.mlp(self.norm2(x))


class InterBlock(nn.Module):
    """Compute one weighted sum of `sources` feature maps, with its own LayerNorm, for each of `depth` decoder blocks.

    The initial weights of the sum are Xavier-uniform, with bound sqrt(6 / (sources + depth)). The official constructor
    draws them from a normal distribution with standard deviation sources^-1/2, but the initialisation of all linear
    layers then overwrites these values.
    """

    def __init__(self, sources: int, depth: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, sources))
        self.norms = nn.ModuleList(layer_norm(width) for _ in range(depth))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, layers: Sequence[Float[Tensor, "B K1 D"]]) -> list[Float[Tensor, "B K1 D"]]:
        maps = torch.stack(list(layers))  # (sources, B, K1, D)
        mixed = (self.weight @ maps.flatten(1)).unflatten(1, maps.shape[1:])  # (depth, B, K1, D)
        return [norm(part) for norm, part in zip(self.norms, mixed, strict=True)]


class CrossDecoder(nn.Module):
    """See the module docstring. `sources`: number of feature maps to mix, or None to read only the last one.

    Raises UserError when the heads do not divide the width, or the width is not a multiple of 4.
    """

    def __init__(
        self, config: DecoderConfig, *, seen_width: int, sources: int | None, grid: tuple[int, int], out: int
    ) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(positions.sincos(config.width, grid)[None], requires_grad=False)  # (1, N, d)
        self.blocks = nn.ModuleList(CrossBlock(config.width, config.heads, seen_width) for _ in range(config.depth))
        self.norm = layer_norm(config.width)
        self.pred = Linear(config.width, out)
        self.inter_block = None if sources is None else InterBlock(sources, config.depth, seen_width)
        nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self)

    def forward(self, layers: Sequence[Float[Tensor, "B K1 D"]], where: Int[Tensor, "B M"]) -> Float[Tensor, "B M P"]:
        """Predict the patches `where` from the encoder's feature maps, earliest first."""
        seen = self.inter_block(layers) if self.inter_block else [layers[-1]] * len(self.blocks)
        x = self.mask_token + take(self.pos_embed.expand(len(where), -1, -1), where)  # (B, M, d)
        for block, tokens in zip(self.blocks, seen, strict=True):
            x = block(x, tokens)
        return self.pred(self.norm(x))
