"""The encoder's options: learned positions, BEiT's relative position bias and LayerScale. Options that are off change
nothing.
"""

import pytest
import torch

from unmask.batch import ImageSpec
from unmask.nn.blocks import attend
from unmask.nn.positions import RelativeBias
from unmask.nn.vit import ViT, ViTConfig

SPEC = ImageSpec(3, (8, 12), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))  # a grid of 2 x 3


def vit(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(width=16, depth=2, heads=2, patch=(4, 4), **options), SPEC).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_options_that_are_off_have_no_effect():
    names = set(vit().state_dict())
    assert not [name for name in names if "relative_bias" in name or "ls1" in name or "ls2" in name]
    assert "pos_embed" in names
    assert "pos_embed" not in vit(positions="absent").state_dict()


@torch.no_grad()
def test_without_positions_the_order_of_patches_does_not_matter():
    for positions, alike in (("absent", True), ("sincos", False), ("learned", False)):
        encoder = vit(positions=positions)
        patches = encoder.patches(images())
        order = torch.tensor([5, 3, 4, 0, 2, 1])
        straight = encoder.run(encoder.embed(patches))[:, 1:]
        shuffled = encoder.run(encoder.embed(patches[:, order]))[:, 1:]
        assert torch.allclose(straight[:, order], shuffled, atol=1e-5) == alike, positions


def test_learned_positions_are_trained_and_small():
    table = vit(positions="learned").pos_embed
    assert table.requires_grad
    assert table.shape == (1, 7, 16)
    assert 0.01 < float(table.detach().std()) < 0.03
    assert not vit().pos_embed.requires_grad


def test_relative_bias_matches_values_computed_by_hand():
    """On 2 x 3 patches there are 3 x 5 offsets, and three entries for the class token."""
    bias = RelativeBias((2, 3), heads=1)
    assert bias.table.shape == (18, 1)
    assert bias.table.eq(0).all()
    with torch.no_grad():
        bias.table.copy_(torch.arange(18.0)[:, None])
    found = bias()[0].detach()  # (7, 7)
    assert found.shape == (7, 7)
    assert found[0, 1:].eq(15).all(), "from the class token"
    assert found[1:, 0].eq(16).all(), "to the class token"
    assert found[0, 0] == 17
    assert found[1:, 1:].diagonal().eq(7).all(), "no offset: row 1 of 3, column 2 of 5"
    assert found[1, 6] == 0, "patch 0 (row 0, column 0) to patch 5 (row 1, column 2): offsets -1, -2"
    assert found[6, 1] == 14
    assert found[2, 1] == 8, "one column to the right of the other"


def test_relative_bias_of_selected_patches_is_part_of_the_bias_of_all_patches():
    bias = RelativeBias((2, 3), heads=2)
    torch.nn.init.normal_(bias.table)
    where = torch.tensor([[4, 0, 2], [1, 3, 5]])
    some, every = bias(where), bias()
    assert some.shape == (2, 2, 4, 4)
    for image, kept in enumerate(where):
        places = torch.cat([torch.zeros(1, dtype=torch.int64), kept + 1])
        assert torch.equal(some[image], every[:, places][:, :, places])


@torch.no_grad()
def test_encoding_some_patches_equals_masking_attention_to_all_others():
    encoder = vit(relative_bias=True)
    torch.nn.init.normal_(encoder.relative_bias.table)
    patches = encoder.patches(images())
    order = torch.tensor([[2, 0, 1, 5, 3, 4]]).expand(2, -1)
    taken = patches.gather(1, order[:, :, None].expand(-1, -1, patches.shape[2]))
    shuffled = encoder.run(encoder.embed(taken, order), order)[:, 1:]
    straight = encoder.run(encoder.embed(patches))[:, 1:]
    assert torch.allclose(straight.gather(1, order[:, :, None].expand(-1, -1, 16)), shuffled, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"relative_bias": True}, {"relative_bias": True, "positions": "absent"}])
def test_other_image_sizes_interpolate_the_relative_bias(options):
    encoder = vit(**options)
    torch.nn.init.normal_(encoder.relative_bias.table)
    assert encoder(images()).patches.shape == (2, 6, 16)
    larger = encoder(torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8))
    assert larger.patches.shape == (1, 16, 16)
    assert larger.patches.isfinite().all()
    wide = encoder.relative_bias(None, (4, 4))
    assert wide.shape == (2, 17, 17)
    assert torch.equal(wide[:, 0, 1], encoder.relative_bias()[:, 0, 1]), (
        "entries of the class token are not interpolated"
    )


@torch.no_grad()
def test_an_interpolated_bias_keeps_rows_and_columns_apart():
    """A bias that depends on the column offset only still does after interpolation to another grid."""
    bias = RelativeBias((2, 3), heads=1)
    bias.table[:-3] = torch.arange(5.0).repeat(3)[:, None]  # There are 3 x 5 offsets.
    wide = bias(None, (4, 4))[0, 1:, 1:].unflatten(1, (4, 4))[0]  # Bias from patch 0 to each patch, (rows, cols).
    assert torch.allclose(wide, wide[:1].expand(4, -1), atol=1e-5)
    assert wide[0].diff().lt(-0.3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_added_to_the_scores(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 8).to(dtype) for _ in range(3))
    bias = torch.randn(2, 5, 5)
    scores = q.float() @ k.float().transpose(-1, -2) / 8**0.5 + bias
    expected = scores.softmax(-1) @ v.float()
    assert torch.allclose(attend(q, k, v, bias).float(), expected, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert (attend(q, k, v).float() - expected).abs().max() > 0.2


@torch.no_grad()
def test_layer_scale_has_its_initial_value_and_scales_the_block():
    encoder = vit(layer_scale=1e-5)
    assert encoder.blocks[0].ls1.gamma.eq(1e-5).all()
    tokens = encoder.embed(encoder.patches(images()))
    first, *_, last = list(encoder.layers(tokens))
    assert torch.allclose(first, last, atol=1e-3)
    first, *_, last = list(vit().layers(tokens))
    assert (first - last).abs().max() > 0.1


def test_layer_decay_treats_bias_tables_like_the_last_norm():
    encoder = vit(relative_bias=True)
    assert encoder.depth_of("relative_bias.table") == encoder.depth_of("norm.weight") == 3
