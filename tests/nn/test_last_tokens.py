"""If a block computes only its last tokens, their values and gradients do not change."""

import pytest
import torch

from unmask.nn.blocks import Block, draw_paths
from unmask.nn.decoders import DecoderConfig, LightDecoder
from unmask.nn.masks import mask_from_noise


@pytest.mark.parametrize("last", [1, 7, 10])
@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5}])
def test_last_tokens_equal_those_of_the_full_block(last, options):
    torch.manual_seed(0)
    block = Block(32, 4, **options).double()
    bias = torch.randn(4, 10, 10, dtype=torch.float64)
    paths = draw_paths(torch.rand(3, 2), 0.5)[0].double()
    weight = torch.randn(3, last, 32, dtype=torch.float64)
    gradients = []
    for whole in (True, False):
        x = torch.linspace(-1, 1, 3 * 10 * 32, dtype=torch.float64).sin().view(3, 10, 32).requires_grad_()
        out = block(x, bias, paths)[:, -last:] if whole else block(x, bias[:, -last:], paths, last=last)
        block.zero_grad()
        (out * weight).sum().backward()
        gradients.append([out, x.grad, *(parameter.grad.clone() for parameter in block.parameters())])
    for expected, found in zip(*gradients, strict=True):
        assert torch.allclose(expected, found, atol=1e-10)


@pytest.mark.parametrize(("depth", "fills"), [(1, True), (3, True), (2, False)])
def test_predicting_all_patches_does_not_change_hidden_ones(depth, fills):
    torch.manual_seed(0)
    decoder = LightDecoder(
        DecoderConfig(width=32, depth=depth, heads=4), seen_width=16, grid=(4, 5), out=12, fills=fills
    ).double()
    mask = mask_from_noise(torch.rand(3, 20), 0.75)
    seen = torch.randn(3, 1 + (5 if fills else 20), 16, dtype=torch.float64)
    hidden, everything = decoder(seen, mask), decoder(seen, mask, everywhere=True)
    assert (hidden.shape, everything.shape) == ((3, 15, 12), (3, 20, 12))
    assert torch.allclose(everything[:, 5:], hidden, atol=1e-12)

    x = decoder.embed(seen)  # the official decoder, in which every block computes every token
    tokens = x[:, 1:]
    if fills:
        tokens = torch.cat([tokens, decoder.mask_token.expand(3, 15, -1)], 1)
    places = torch.stack([decoder.pos_embed[0, 1:][order] for order in mask.order])
    x = torch.cat([x[:, :1] + decoder.pos_embed[:, :1], tokens + places], 1)
    for block in decoder.blocks:
        x = block(x)
    assert torch.allclose(decoder.pred(decoder.norm(x))[:, 1:], everything, atol=1e-12)
