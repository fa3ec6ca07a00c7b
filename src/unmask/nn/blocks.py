"""The transformer block of ViT as official MAE builds it (timm 0.3.2 style), and its initialisation.

Pre-norm; one fused qkv projection with bias; exact (erf) GELU; hidden width 4 D; LayerNorm eps 1e-6 (PyTorch's default
is 1e-5); no dropout or qk-norm. Optional: LayerScale and a bias on attention scores (BEiT), and stochastic depth for
fine-tuning. Parameter names are timm's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from unmask.errors import UserError
from unmask.nn.linear_layer import Linear, linear
from unmask.nn.positions import RelativeBias
from unmask.nn.recompute import recomputed

LAYER_NORM_EPS = 1e-6
LONGEST_PLAIN = 256  # tokens; the scores of longer sequences would take too much memory


plain_attention_on_cpu = True  # changed by `fused_attention` only


def layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=LAYER_NORM_EPS)


def attend(
    q: Float[Tensor, "B heads N d"],
    k: Float[Tensor, "B heads K d"],
    v: Float[Tensor, "B heads K d"],
    bias: Float[Tensor, "*B heads N K"] | None = None,
    *,
    causal: bool = False,
) -> Float[Tensor, "B heads N d"]:
    """Return softmax(q k^T / sqrt(d) + bias) v. causal: no token attends to a later one; requires N = K and no bias.

    On CPUs the fused kernel's backward pass in bfloat16 is three to ten times slower than two plain products for the
    few tokens that masking leaves (`benchmarks/attention.py`), so on CPUs the products are computed explicitly if the
    (N, N) scores are small enough to store.
    """
    if plain_attention_on_cpu and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= LONGEST_PLAIN:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias.to(q.dtype)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        return scores.softmax(-1) @ v
    mask = None if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


@contextmanager
def fused_attention() -> Iterator[None]:
    """Context manager in which `attend` uses the fused kernel on CPUs too, to measure the memory of a step on a GPU."""
    global plain_attention_on_cpu
    before, plain_attention_on_cpu = plain_attention_on_cpu, False
    try:
        yield
    finally:
        plain_attention_on_cpu = before


class Attention(nn.Module):
    """Multi-head self-attention; scores are scaled by (width / heads)^-1/2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            fits = [h for h in range(1, width + 1) if width % h == 0]
            near = min(fits, key=lambda h: abs(h - heads))
            raise UserError(f"{heads} heads do not divide a token width of {width}; use {near} heads")
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B N D"], bias: Float[Tensor, "*B heads Q N"] | None = None, last: int | None = None
    ) -> Float[Tensor, "B Q D"]:
        """last: number of tokens at the end (1 or more) that are queries (Q = last), or None if all tokens are queries
        (Q = N).
        """
        if last is None:
            q, k, v = self._by_head(self.qkv(x), 3)
        else:
            width = x.shape[2]
            weights, biases = (part.split([width, 2 * width]) for part in (self.qkv.weight, self.qkv.bias))
            (q,) = self._by_head(linear(x[:, -last:], weights[0], biases[0]), 1)
            k, v = self._by_head(linear(x, weights[1], biases[1]), 2)
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split (B, N, parts x D) into `parts` tensors (B, heads, N, D / heads)."""
        return x.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        hidden = self.fc1(x)
        active = F.gelu(hidden)
        with recomputed(F.gelu, hidden, active):
            return self.fc2(active)


class LayerScale(nn.Module):
    """A learned factor for each channel of a token, small at the start (Touvron et al. 2021; used by BEiT)."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return x * self.gamma


class Block(nn.Module):
    """Compute x + Attention(norm x), then x + MLP(norm x).

    layer_scale: initial value of the LayerScale on both branches, or None for no LayerScale.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, layer_scale: float | None = None) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = Attention(width, heads)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.relative_bias: RelativeBias | None = None  # assigned by encoders with one bias per block

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        bias: Float[Tensor, "*B heads Q N"] | None = None,
        paths: Float[Tensor, "2 B 1 1"] | None = None,
        last: int | None = None,
    ) -> Float[Tensor, "B Q D"]:
        """paths: a factor for each residual branch of each image, from `draw_paths` (None: all factors are 1).

        last: compute only this many tokens at the end (None: all, Q = N). The values of these tokens do not change; the
        other tokens serve as keys and values only.
        """
        attended = self.ls1(self.attn(self.norm1(x), bias, last))
        x = x if last is None else x[:, -last:]
        x = x + (attended if paths is None else attended * paths[0].to(attended.dtype))
        mapped = self.ls2(self.mlp(self.norm2(x)))
        return x + (mapped if paths is None else mapped * paths[1].to(mapped.dtype))


def draw_paths(draws: Float[Tensor, "B L2"], rate: float) -> Float[Tensor, "L 2 B 1 1"]:
    """Stochastic depth (Huang et al. 2016): factors for the residual branches of each image, from two draws per block.

    The drop probability rises linearly from 0 in the first block to `rate` in the last, as in the official fine-tuning;
    surviving branches are divided by their survival probability.
    """
    depth = draws.shape[1] // 2
    kept = 1 - torch.linspace(0, rate, depth, device=draws.device)[:, None, None, None, None]
    uniform = draws.T.reshape(depth, 2, -1, 1, 1)
    return (uniform < kept).to(draws.dtype) / kept


def init_linears(module: nn.Module) -> None:
    """Initialise every Linear in `module` with Xavier-uniform weights and zero biases, LayerNorms with 1 and 0 (MAE).

    The fused qkv is initialised as one (3D, D) matrix, so its bound is sqrt(2) smaller than that of separate matrices.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
