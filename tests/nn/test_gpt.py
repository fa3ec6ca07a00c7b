"""The network of iGPT: causality, generation compared with the forward pass, and the paper's features n^l."""

import pytest
import torch

from unmask.batch import ImageSpec
from unmask.errors import UserError
from unmask.nn.blocks import attend
from unmask.nn.gpt import GPT, GPTConfig, Norm

SPEC = ImageSpec(3, (8, 12), "uint8", (120.0,) * 3, (60.0,) * 3)


def gpt(*, causal: bool = True, **changes) -> GPT:
    torch.manual_seed(0)
    network = GPT(GPTConfig(**({"width": 16, "depth": 3, "heads": 2, "patch": 2, "colours": 8} | changes)), SPEC,
                  causal=causal)  # fmt: skip
    network.palette.copy_(torch.rand(len(network.palette), 3) * 255)
    for name, parameter in network.named_parameters():
        if "weight" not in name:
            torch.nn.init.normal_(parameter)
    return network.eval()


def ids(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 8, (count, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 7, 22])
def test_token_t_does_not_depend_on_t_or_later(changed):
    network, first = gpt(), ids()
    second = first.clone()
    second[:, changed] = (second[:, changed] + 1) % 8
    for ours, theirs in zip(network.layers(first), network.layers(second), strict=True):
        assert torch.equal(ours[:, : changed + 1], theirs[:, : changed + 1])
    assert (ours[:, changed + 1 :] - theirs[:, changed + 1 :]).abs().amax(-1).min() > 0


@torch.no_grad()
def test_bidirectional_tokens_see_all_others_but_no_hidden_content():
    network, first = gpt(causal=False), ids()
    second = first.clone()
    second[:, 20] = (second[:, 20] + 1) % 8
    assert (network.run(first) - network.run(second)).abs().amax(-1).min() > 0
    hidden = torch.zeros_like(first, dtype=torch.bool)
    hidden[:, 20] = True
    assert torch.equal(network.run(first, hidden), network.run(second, hidden))
    assert network.sos is None


@torch.no_grad()
def test_generating_step_by_step_equals_the_forward_pass():
    network, tokens = gpt(), ids()
    whole = network.run(tokens)
    token, cache = network.sos.expand(2, 1, -1), None
    for place in range(24):
        out, cache = network.step(token, place, cache)
        assert torch.allclose(out[:, 0], whole[:, place], atol=1e-5)
        token = network.tokens[tokens[:, place, None]]
    begun = torch.cat([network.sos.expand(2, 1, -1), network.tokens[tokens[:, :10]]], 1)
    out, cache = network.step(begun, 0, None)
    assert torch.allclose(out, whole[:, :11], atol=1e-5)
    out, _ = network.step(network.tokens[tokens[:, 10, None]], 11, cache)
    assert torch.allclose(out[:, 0], whole[:, 11], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explicit_causal_attention_equals_fused_attention(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 4) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = attend(q.to(dtype), k.to(dtype), v.to(dtype), causal=True).float()
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05)


@torch.no_grad()
def test_the_norm_divides_by_the_root_mean_square_and_keeps_the_mean():
    x = torch.tensor([[[3.0, 4.0]]])
    assert Norm(2)(x).flatten().tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5], rel=1e-4)


@torch.no_grad()
def test_features_are_the_normalised_input_of_the_chosen_layer():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = gpt()
    layers = list(network.layers(network.ids(images)))
    assert len(layers) == 4
    assert torch.equal(network(images).patches, layers[1]), "feature_layer=None is the middle block"
    assert torch.equal(gpt(feature_layer=3)(images).patches, layers[3])
    assert network(images).grid == (4, 6)
    with pytest.raises(UserError, match=r"feature_layer=4 for 3 blocks; use 0 to 3"):
        gpt(feature_layer=4)


@torch.no_grad()
def test_tokens_are_the_nearest_colours_of_averaged_pixels():
    network = gpt()
    colours = network.palette[ids()]  # (2, 24, 3)
    images = network.paint(ids())
    assert images.shape == (2, 3, 8, 12)
    assert torch.equal(images[0, :, 2:4, 4:6], colours[0, 8][:, None, None].expand(-1, 2, 2))
    assert torch.equal(network.ids(images), ids())
    images[:, :, ::2] += 20
    images[:, :, 1::2] -= 20
    assert torch.equal(network.ids(images), ids()), "a token is the mean of its cell"


def test_initial_weights_are_those_of_the_published_code():
    torch.manual_seed(0)
    network = GPT(GPTConfig(width=128, depth=4, heads=2, patch=2, colours=512), SPEC, causal=True)
    spreads = {
        network.blocks[0].attn.qkv.weight: 128**-0.5, network.blocks[0].attn.proj.weight: (128 * 4) ** -0.5,
        network.blocks[0].mlp.fc1.weight: 0.02, network.blocks[0].mlp.fc2.weight: 0.02,
        network.tokens: 0.02, network.positions: 0.01, network.sos: 0.02,
    }  # fmt: skip
    for weight, expected in spreads.items():
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.15)
    assert not [name for name, _ in network.named_parameters() if "bias" in name]


def test_other_image_sizes_are_rejected():
    with pytest.raises(UserError, match=r"\(1, 3, 8, 8\); expected \(B, 3, 8, 12\): an iGPT has learned positions"):
        gpt()(torch.zeros(1, 3, 8, 8))
