"""The vision transformer encoder (Dosovitskiy et al. 2021) in the form official MAE trains.

Encoding has three steps, so that a method can intervene between them: `patches(images)` -> `embed(patches)` ->
`run(tokens)`; `forward(images)` runs all three steps and returns `Features`. Mean and standard deviation of the data
are buffers, so an encoder carries its own preprocessing and takes images in the files' own units.

Sizes of the paper (width x depth, heads): ViT-B 768 x 12, 12 heads; ViT-L 1024 x 24, 16 heads; ViT-H 1280 x 32, 16
heads, patch 14.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import BeforeValidator, Field, PositiveInt
from torch import Tensor, nn

from unmask.batch import ImageSpec
from unmask.errors import UserError
from unmask.nn import positions
from unmask.nn.blocks import Block, init_linears, layer_norm
from unmask.nn.features import Features
from unmask.nn.image_encoder import EncoderConfig, ImageEncoder
from unmask.nn.inputs import Scale
from unmask.nn.linear_layer import linear
from unmask.nn.patches import grid_of, normalise, patchify, take, unpatchify


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Pair = Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_pair)]
"""(height, width) in pixels, both above 0; a single number means a square."""


class ViTConfig(EncoderConfig):
    """Settings of a vision transformer. `patch` is (height, width) in pixels; heads must divide width.

    positions: MAE's fixed sine-cosine table, a learned one (ViT, BEiT's paper), or absent. relative_bias: one relative
    position bias for all blocks (BEiT's code), or one for each (its fine-tuning). layer_scale: initial value of BEiT's
    LayerScale, None for no LayerScale. norm_eps: eps of every LayerNorm; imported weights may need a value other than
    1e-6.
    """

    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    patch: Pair = (16, 16)
    mlp_ratio: float = Field(default=4.0, gt=0)
    positions: Literal["sincos", "learned", "absent"] = "sincos"
    relative_bias: bool | Literal["each_block"] = False
    layer_scale: float | None = Field(default=None, gt=0)
    norm_eps: float = Field(default=1e-6, gt=0)

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.patch


class PatchEmbed(nn.Module):
    """Linear projection of patches, stored as a convolution like in the official code: `proj.weight` (D, C, h, w).

    Xavier-uniform initialisation of the weight's (D, P) view; the bias keeps torch's default, as in the official code.
    """

    def __init__(self, channels: int, width: int, patch: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))

    def forward(self, patches: Float[Tensor, "B K P"]) -> Float[Tensor, "B K D"]:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P): the patch vector is (h, w, C)
        return linear(patches.to(weight.dtype), weight, self.proj.bias)


class ViT(ImageEncoder):
    """See the module docstring. Raises UserError unless the patch divides the image and the heads divide the width."""

    mean: Tensor
    std: Tensor
    depth: int

    def __init__(self, config: ViTConfig, images: ImageSpec) -> None:
        super().__init__()
        self.spec = images
        self.patch = config.patch
        self.grid = grid_of(images.size, config.patch)
        self.width, self.depth = config.width, config.depth
        self.register_buffer("mean", torch.tensor(images.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(images.std, dtype=torch.float32))
        self.patch_embed = PatchEmbed(images.channels, config.width, config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = make_positions(config, self.grid)  # (1, 1 + N, D), class token first
        self.relative_bias = positions.RelativeBias(self.grid, config.heads) if config.relative_bias is True else None
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.mlp_ratio, config.layer_scale) for _ in range(config.depth)
        )
        self.norm = layer_norm(config.width)
        if config.relative_bias == "each_block":
            for block in self.blocks:
                assert isinstance(block, Block)
                block.relative_bias = positions.RelativeBias(self.grid, config.heads)
        for part in self.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = config.norm_eps
        nn.init.normal_(self.cls_token, std=0.02)
        init_linears(self)

    def images(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B C H W"]:
        """Convert normalised patches to float32 images in the files' own units: the inverse of `patches`."""
        images = unpatchify(patches.float(), self.grid, self.patch)
        return images * self.std[:, None, None] + self.mean[:, None, None]

    def patches(self, images: Shaped[Tensor, "B C H W"]) -> Float[Tensor, "B N P"]:
        """Convert images in the files' own units and dtype to normalised float32 patches, channel fastest."""
        self.require_shape(images)
        return patchify(normalise(images, self.mean, self.std), self.patch)

    def embed(
        self,
        patches: Float[Tensor, "B K P"],
        where: Int[Tensor, "B K"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Project patches and add positions. where: indices of the given patches (None: all patches in raster order).

        Each patch has the position of its place in the image, so embedding only the kept patches equals embedding all
        and then dropping some. grid: given if the images are larger or smaller than in training.
        """
        return self.place(self.patch_embed(patches), where, grid)

    def place(
        self,
        tokens: Float[Tensor, "B K D"],
        where: Int[Tensor, "B K"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Add positions to tokens as `embed` does, for mask tokens, which replace projected patches."""
        if self.pos_embed is None:
            return tokens.to(self.cls_token.dtype)  # the dtype of tokens + positions, also under autocast
        table = positions.resize(self.pos_embed[:, 1:], self.grid, grid or self.grid)
        return tokens + (table if where is None else take(table.expand(tokens.shape[0], -1, -1), where))

    def run(
        self,
        tokens: Float[Tensor, "B K D"],
        where: Int[Tensor, "B K"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B K1 D"]:
        """Prepend the class token and apply all blocks and the final norm: (B, K, D) -> (B, 1 + K, D).

        where, grid: as in `embed`; used by relative position biases only.
        """
        for x in self.layers(tokens, where, grid):
            last = x
        return self.norm(last)

    def layers(
        self,
        tokens: Float[Tensor, "B K D"],
        where: Int[Tensor, "B K"] | None = None,
        grid: tuple[int, int] | None = None,
        paths: Float[Tensor, "L 2 B 1 1"] | None = None,
    ) -> Iterator[Float[Tensor, "B K1 D"]]:
        """Run the blocks as `run` does, but yield the input of the first block and the output of each block: depth + 1
        tensors.

        paths: result of `blocks.draw_paths`, for training with stochastic depth.
        """
        cls = self.cls_token if self.pos_embed is None else self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], 1)
        bias = None if self.relative_bias is None else self.relative_bias(where, grid)
        yield x
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            own = block.relative_bias
            x = block(x, bias if own is None else own(where, grid), None if paths is None else paths[number])
            yield x

    def forward(self, images: Shaped[Tensor, "B C H W"], scale: Scale | None = None) -> Features:
        """Encode all patches, without a mask. Sizes other than the training size get interpolated positions.

        scale: see `ImageEncoder.accept`. Raises UserError for images that do not match the training data.
        """
        return self.features(self.accept(images, scale))

    def features(self, images: Shaped[Tensor, "B C H W"]) -> Features:
        """Encode all patches like `forward`, without checking the range of the values, for training."""
        grid = grid_of((images.shape[2], images.shape[3]), self.patch)
        tokens = self.run(self.embed(self.patches(images), grid=grid), grid=grid)
        # ONNX graphs can only return tensors, so the grid is left out.
        grid = (0, 0)[:0] if torch.onnx.is_in_onnx_export() else grid
        return Features(cls=tokens[:, 0], patches=tokens[:, 1:], grid=grid)  # type: ignore[arg-type]

    def feature_layers(
        self, images: Shaped[Tensor, "B C H W"], hidden: Bool[Tensor, "B N"] | None = None, scale: Scale | None = None
    ) -> Iterator[Features]:
        """Yield features as described in `ImageEncoder.feature_layers`; the last layer includes the final norm. Raises
        UserError if `hidden` is given.
        """
        if hidden is not None:
            raise UserError("got hidden tokens; a ViT is evaluated on whole images; leave hidden out")
        images = self.accept(images, scale)
        grid = grid_of((images.shape[2], images.shape[3]), self.patch)
        for number, x in enumerate(self.layers(self.embed(self.patches(images), grid=grid), grid=grid)):
            tokens = self.norm(x) if number == len(self.blocks) else x
            yield Features(cls=tokens[:, 0], patches=tokens[:, 1:], grid=grid)

    def depth_of(self, name: str) -> int:
        """Depth of a parameter for layer-wise decay: 0 for embeddings, i + 1 for block i, depth + 1 for `norm`."""
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return len(self.blocks) + 1


def make_positions(config: ViTConfig, grid: tuple[int, int]) -> nn.Parameter | None:
    """Return (1, 1 + N, D) positions: fixed, with zero for the class token; or learned, from N(0, 0.02^2); or None."""
    if config.positions == "absent":
        return None
    if config.positions == "learned":
        return nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], config.width).normal_(std=0.02))
    table = torch.cat([torch.zeros(1, config.width), positions.sincos(config.width, grid)])
    return nn.Parameter(table[None], requires_grad=False)
