"""The transformer of iGPT (Chen et al. 2020, code openai/image-gpt): images as sequences of palette colours.

Differs from a ViT in every detail: the norm divides by the root mean square without subtracting the mean and has a gain
only; no matrix has a bias; the activation is x sigmoid(1.702 x); positions are learned and one-dimensional; a token is
a colour, not a patch. Initial weights are those of the published code; the output table starts at zero.

Letters: B images, C channels, R x S grid of pixels that are tokens, N = R x S, D width, k colours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field
from torch import Tensor, nn

from unmask.batch import ImageSpec
from unmask.errors import UserError
from unmask.nn.blocks import attend
from unmask.nn.colour_palette import nearest_colour
from unmask.nn.features import Features
from unmask.nn.image_encoder import EncoderConfig, ImageEncoder
from unmask.nn.inputs import Scale
from unmask.nn.patches import grid_of
from unmask.nn.recompute import recomputed
from unmask.nn.vit import Pair

NORM_EPS = 1e-5

Cache = list[tuple[Tensor, Tensor]]
"""For each block, the keys and values of all tokens processed so far, (B, heads, tokens, D / heads)."""


class GPTConfig(EncoderConfig):
    """Settings of the network of an iGPT. `patch`: pixels that are averaged into one token, (height, width). `colours`:
    number of palette colours.

    feature_layer: the block whose normalised input the encoder returns, 0 for the first, depth for the final output; by
    default the middle, where the paper found the best features.
    """

    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    patch: Pair = (1, 1)
    colours: int = Field(default=512, gt=1)
    feature_layer: int | None = Field(default=None, ge=0)

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.patch


class Norm(nn.Module):
    """RMSNorm: compute x / sqrt(mean of x^2 + eps), times a learned gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        normed = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), NORM_EPS)
        return normed.to(self.weight.dtype)


class Attention(nn.Module):
    """Multi-head self-attention without biases; causal: no token attends to a later one."""

    def __init__(self, width: int, heads: int, depth: int, *, causal: bool) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"{heads} heads do not divide a token width of {width}; use a divisor of {width}")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.proj.weight, std=(width * depth) ** -0.5)

    def forward(
        self, x: Float[Tensor, "B N D"], before: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "B N D"], tuple[Tensor, Tensor]]:
        """Return the attention output, and the keys and values of all tokens so far. before: keys and values of earlier
        tokens.
        """
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if before is not None:
            assert x.shape[1] == 1, "with cached keys and values, x must be one token"
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        out = attend(q, k, v, causal=self.causal and before is None)
        return self.proj(out.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        hidden = 1.702 * self.fc1(x)
        active = F.silu(hidden)  # 1.702 times the activation x sigmoid(1.702 x)
        with recomputed(F.silu, hidden, active):
            return self.fc2(active) / 1.702


class Block(nn.Module):
    """Compute x + attention(norm x), then x + MLP(norm x). Initial weights have the published standard deviations."""

    def __init__(self, width: int, heads: int, depth: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1 = Norm(width)
        self.attn = Attention(width, heads, depth, causal=causal)
        self.norm2 = Norm(width)
        self.mlp = MLP(width)

    def forward(self, x: Float[Tensor, "B N D"], *, only_normed: bool = False) -> Float[Tensor, "B N D"]:
        """Return the output, or with only_normed the normalised input (n^l in the paper)."""
        normed = self.norm1(x)
        if only_normed:
            return normed
        x = x + self.attn(normed)[0]
        return x + self.mlp(self.norm2(x))


class GPT(ImageEncoder):
    """See the module docstring. causal: if True, token t is predicted from the tokens before it; if False, all tokens
    attend to each other.

    `palette` (k, C), in the files' units, is zero until the method sets it.
    """

    palette: Tensor
    depth: int
    layer: int
    one_size = "an iGPT has learned positions for the training size only"
    exact = ("palette",)

    def __init__(self, config: GPTConfig, images: ImageSpec, *, causal: bool) -> None:
        super().__init__()
        self.spec, self.patch, self.width, self.depth = images, config.patch, config.width, config.depth
        self.grid = grid_of(images.size, config.patch)
        self.layer = config.depth // 2 if config.feature_layer is None else config.feature_layer
        # Probes use the best layer by default, as in the paper.
        self.probe_layer = "best" if config.feature_layer is None else str(config.feature_layer)
        if self.layer > config.depth:
            raise UserError(
                f"got method.encoder.feature_layer={self.layer} for {config.depth} blocks; use 0 to {config.depth}"
            )
        self.register_buffer("palette", torch.zeros(config.colours, images.channels))
        self.tokens = nn.Parameter(torch.empty(config.colours, config.width).normal_(std=0.02))
        self.positions = nn.Parameter(torch.empty(self.grid[0] * self.grid[1], config.width).normal_(std=0.01))
        self.sos = nn.Parameter(torch.empty(config.width).normal_(std=0.02)) if causal else None
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.depth, causal=causal) for _ in range(config.depth)
        )
        self.norm = Norm(config.width)

    def shrink(self, images: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B R S C"]:
        """Average cells of `patch` pixels. Raises UserError for images whose shape differs from training."""
        self.require_shape(images)
        return F.avg_pool2d(images.float(), self.patch).movedim(1, -1)

    @torch.no_grad()
    def ids(self, images: Shaped[Tensor, "B C H W"]) -> Int[Tensor, "B N"]:
        """Return the nearest palette colour of every token, in raster order."""
        return nearest_colour(self.shrink(images), self.palette).flatten(1)

    def paint(self, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B C H W"]:
        """Convert palette ids to images in the files' units."""
        painted = self.palette[ids].unflatten(1, self.grid).movedim(-1, 1)
        return painted.repeat_interleave(self.patch[0], 2).repeat_interleave(self.patch[1], 3)

    def embed(self, ids: Int[Tensor, "B N"], hidden: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B N D"]:
        """Return the input of the first block.

        Causal: position t depends on the tokens before t only. hidden: tokens whose content is removed; their positions
        remain.
        """
        x = self.tokens[ids]
        if hidden is not None:
            x = x * ~hidden[..., None]
        if self.sos is not None:
            x = torch.cat([self.sos.expand(len(x), 1, -1), x[:, :-1]], 1)
        return x + self.positions

    def layers(
        self, ids: Int[Tensor, "B N"], hidden: Bool[Tensor, "B N"] | None = None
    ) -> Iterator[Float[Tensor, "B N D"]]:
        """Yield the normalised input of each block, then the output: depth + 1 tensors. hidden: see `embed`."""
        x = self.embed(ids, hidden)
        for block in self.blocks:
            yield block(x, only_normed=True)
            x = block(x)
        yield self.norm(x)

    def run(self, ids: Int[Tensor, "B N"], hidden: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B N D"]:
        """Return the normalised output of the last block."""
        x = self.embed(ids, hidden)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def feature_layers(
        self, images: Shaped[Tensor, "B C H W"], hidden: Bool[Tensor, "B N"] | None = None, scale: Scale | None = None
    ) -> Iterator[Features]:
        """See `ImageEncoder.feature_layers`."""
        images = self.accept(images, scale)
        for normed in self.layers(self.ids(images), hidden):
            yield Features(cls=None, patches=normed, grid=self.grid)

    def forward(self, images: Shaped[Tensor, "B C H W"], scale: Scale | None = None) -> Features:
        """Features of the configured layer, with no token hidden. scale: see `ImageEncoder.accept`."""
        x = self.embed(self.ids(self.accept(images, scale)))
        for block in islice(self.blocks, self.layer):
            x = block(x)
        last = self.norm(x) if self.layer == self.depth else self.blocks[self.layer](x, only_normed=True)
        return Features(cls=None, patches=last, grid=self.grid)

    def step(self, tokens: Float[Tensor, "B n D"], place: int, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Return the output (B, n, D) for n more tokens, the first at `place`, and a cache; with a `cache`, n must be
        1.
        """
        x, kept = tokens + self.positions[place : place + tokens.shape[1]], []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            attended, pair = block.attn(block.norm1(x), None if cache is None else cache[number])
            x = x + attended
            x = x + block.mlp(block.norm2(x))
            kept.append(pair)
        return self.norm(x), kept

    def depth_of(self, name: str) -> int:
        """Depth of a parameter for layer-wise decay: 0 for embeddings, i + 1 for block i, depth + 1 for `norm`."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return len(self.blocks) + 1 if name.startswith("norm") else 0
