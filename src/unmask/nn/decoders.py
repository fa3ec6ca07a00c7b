"""Decoders, which predict hidden patches from the encoder's tokens and are discarded after pre-training."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from unmask.nn import positions
from unmask.nn.blocks import Block, init_linears, layer_norm
from unmask.nn.linear_layer import Linear
from unmask.nn.masks import Mask
from unmask.nn.patches import take
from unmask.settings import Settings


class DecoderConfig(Settings):
    """Size of the light transformer decoder (MAE: 512 x 8 with 16 heads for every encoder)."""

    width: int = Field(default=512, gt=0)
    depth: int = Field(default=8, gt=0)
    heads: int = Field(default=16, gt=0)


class LightDecoder(nn.Module):
    """MAE's decoder (section 3): narrow transformer over the visible tokens and one shared mask token per hidden patch.

    This decoder equals the official one without its redundant compute: tokens are not sorted back into raster order
    (attention does not depend on the order, each token carries its position), and the last block and the prediction
    layer compute the predicted patches only.

    out: numbers predicted for a patch. fills: False when the encoder already had mask tokens and returns all N tokens.
    """

    def __init__(
        self, config: DecoderConfig, *, seen_width: int, grid: tuple[int, int], out: int, fills: bool = True
    ) -> None:
        super().__init__()
        self.embed = Linear(seen_width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width)) if fills else None
        table = positions.sincos(config.width, grid)
        table = torch.cat([torch.zeros(1, config.width), table])[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)  # (1, 1 + N, D)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = layer_norm(config.width)
        self.pred = Linear(config.width, out)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        init_linears(self)

    def forward(self, seen: Float[Tensor, "B K1 D"], mask: Mask, *, everywhere: bool = False) -> Float[Tensor, "B Q P"]:
        """Predict the patches mask.drop, or with `everywhere` all patches in the order of mask.order.

        `seen`: the class token, then the visible tokens in the order of mask.keep; with fills=False all tokens in the
        order of mask.order.
        """
        b, hidden = mask.drop.shape
        x = self.embed(seen)
        tokens = x[:, 1:]
        if self.mask_token is not None:
            tokens = torch.cat([tokens, self.mask_token.expand(b, hidden, -1)], 1)
        # Under autocast the sum is float32, as the positions are.
        tokens = tokens + take(self.pos_embed[:, 1:].expand(b, -1, -1), mask.order)
        x = torch.cat([x[:, :1] + self.pos_embed[:, :1], tokens], 1)  # (B, 1 + N, d)
        *all_but_last, last = self.blocks
        for block in all_but_last:
            x = block(x)
        asked = mask.order.shape[1] if everywhere else hidden  # number of tokens at the end of x
        return self.pred(self.norm(last(x, last=asked)))
