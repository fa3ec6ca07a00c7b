"""CrossMAE's decoder: sizes, mixtures of feature maps, and independence of the queries."""

import math

import pytest
import torch
from torch import nn

from unmask.errors import UserError
from unmask.nn.cross import CrossAttention, CrossDecoder, InterBlock
from unmask.nn.decoders import DecoderConfig


def decoder(sources: int | None = 4) -> CrossDecoder:
    torch.manual_seed(0)
    return CrossDecoder(DecoderConfig(width=16, depth=3, heads=2), seen_width=24, sources=sources, grid=(4, 6), out=5)


def feature_maps(sources: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 7, 24, generator=generator) for _ in range(sources)]


def test_the_decoder_for_vit_b_has_the_official_number_of_parameters():
    """The number of parameters was counted by hand from the official modules, for a decoder of 512 x 12 with 16 heads
    that reads 13 feature maps of width 768.
    """
    with torch.device("meta"):
        made = CrossDecoder(
            DecoderConfig(width=512, depth=12, heads=16), seen_width=768, sources=13, grid=(14, 14), out=768
        )
    norm, square = 2 * 512, 512 * 512 + 512
    attention = square + (768 * 1024 + 1024) + square
    mlp = (512 * 2048 + 2048) + (2048 * 512 + 512)
    blocks = 12 * (norm + attention + norm + mlp)
    inter_block = 12 * 13 + 12 * 2 * 768
    trainable = 512 + blocks + inter_block + norm + (512 * 768 + 768)
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == trainable == 41_388_444
    assert made.pos_embed.shape == (1, 196, 512)


@torch.no_grad()
def test_attention_matches_torch():
    torch.manual_seed(0)
    ours = CrossAttention(16, 4, 24)
    theirs = nn.MultiheadAttention(16, 4, kdim=24, vdim=24, batch_first=True)
    key, value = ours.kv.weight.chunk(2)
    weights = {
        "q_proj_weight": ours.q.weight,
        "k_proj_weight": key,
        "v_proj_weight": value,
        "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
        "out_proj.weight": ours.proj.weight,
        "out_proj.bias": ours.proj.bias,
    }
    theirs.load_state_dict(weights)
    queries, seen = torch.randn(2, 5, 16), torch.randn(2, 7, 24)
    assert torch.allclose(ours(queries, seen), theirs(queries, seen, seen)[0], atol=1e-6)


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_other_queries():
    made, layers = decoder(), feature_maps()
    where = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    every = made(layers, where)
    assert every.shape == (2, 24, 5)
    assert torch.allclose(made(layers, where[:, 3:8]), every[:, 3:8], atol=1e-6)
    assert torch.allclose(made(layers, where.flip(1)), every.flip(1), atol=1e-6)
    assert (every[:, 0] - every[:, 1]).abs().max() > 1e-3, "predictions at two positions differ"


@torch.no_grad()
def test_block_reads_its_own_normalised_weighted_sum_of_all_maps():
    mix, layers = InterBlock(4, 3, 24), feature_maps()
    mix.weight.copy_(torch.tensor([[0, 1, 0, 0], [0.5, 0, 0, 2], [0, 0, 0, 0]]))
    mix.norms[1].bias.fill_(3)
    first, second, third = mix(layers)
    assert torch.allclose(first, nn.functional.layer_norm(layers[1], (24,), eps=1e-6), atol=1e-5)
    expected = nn.functional.layer_norm(0.5 * layers[0] + 2 * layers[3], (24,), eps=1e-6) + 3
    assert torch.allclose(second, expected, atol=1e-5)
    assert torch.equal(third, torch.zeros_like(third))


def test_initial_weights_match_the_official_code():
    """The official code overwrites its constructor's normal weights with Xavier-uniform ones over (blocks, maps)."""
    torch.manual_seed(0)
    weight = torch.cat([InterBlock(13, 12, 8).weight.detach() for _ in range(50)])
    bound = math.sqrt(6 / (13 + 12))
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.98 * bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=0.01)


@torch.no_grad()
def test_a_decoder_without_mixtures_reads_only_the_last_feature_map():
    made, layers = decoder(sources=None), feature_maps()
    where = torch.arange(6).expand(2, -1)
    assert torch.equal(made(layers, where), made(layers[-1:], where))
    mixed = decoder()
    changed = [layers[0] + 1 + torch.arange(24), *layers[1:]]
    assert not torch.allclose(mixed(layers, where), mixed(changed, where))


def test_heads_that_do_not_divide_the_width_are_rejected():
    with pytest.raises(UserError, match="5 heads do not divide a decoder width of 16"):
        CrossDecoder(DecoderConfig(width=16, depth=1, heads=5), seen_width=24, sources=None, grid=(4, 4), out=5)
