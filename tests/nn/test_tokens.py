"""Patches, positions, masks: layouts and golden values."""

import numpy as np
import pytest
import torch

from unmask.batch import ImageSpec
from unmask.nn import positions
from unmask.nn.blocks import attend
from unmask.nn.masks import Mask, mask_from_noise, nearest_visible, num_kept, random_mask
from unmask.nn.patches import grid_of, normalise, patchify, put, take, unpatchify
from unmask.nn.targets import patch_statistics
from unmask.nn.vit import ViT, ViTConfig
from unmask.rng import Draws, Stream, uniform


def test_patch_layout_is_row_column_channel_with_channel_fastest():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    patches = patchify(images, (2, 3))
    assert patches.shape == (2, 4, 18)
    # patch 1 of image 0 is rows 0-1, columns 3-5
    expected = [int(images[0, c, y, x]) for y in (0, 1) for x in (3, 4, 5) for c in range(3)]
    assert patches[0, 1].tolist() == expected
    assert torch.equal(unpatchify(patches, (2, 2), (2, 3)), images)


def test_indivisible_size_is_rejected_with_fitting_sizes():
    with pytest.raises(ValueError, match=r"image height 30 is not a multiple of patch size 4; use 28 or 32.*patch=5"):
        grid_of((30, 32), (4, 4))
    with pytest.raises(ValueError, match="image width 3 "):
        grid_of((8, 3), (4, 4))


def test_take_and_put_are_inverse():
    tokens, index = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 2]])
    taken = take(tokens, index)
    assert torch.equal(taken[0, 0], tokens[0, 4])
    assert torch.equal(put(tokens, index, taken), tokens)
    assert torch.equal(take(put(tokens, index, taken * 0), index), taken * 0)


def test_normalise_expects_the_files_units():
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    assert normalise(images, torch.tensor([127.5]), torch.tensor([127.5])).flatten().tolist() == [-1, 1]


def test_sincos_has_the_golden_values_of_the_official_table():
    table = positions.sincos(8, (2, 2))
    assert table[1].numpy() == pytest.approx([0.84147, 0.01, 0.5403, 0.99995, 0, 0, 1, 1], abs=1e-5)  # row 0, column 1
    assert table[2].numpy() == pytest.approx([0, 0, 1, 1, 0.84147, 0.01, 0.5403, 0.99995], abs=1e-5)  # row 1, column 0
    assert positions.sincos(768, (14, 14)).norm(dim=1).numpy() == pytest.approx(np.full(196, np.sqrt(384)), rel=1e-5)


def test_sincos_on_a_wide_grid_is_distinct_at_every_position():
    table = positions.sincos(16, (2, 5))
    assert table.shape == (10, 16)
    assert len({tuple(row.tolist()) for row in table}) == 10
    assert torch.equal(table[3, :8], table[8, :8])  # patches of one column: equal first half
    with pytest.raises(ValueError, match="multiple of 4"):
        positions.sincos(10, (2, 2))


def test_sincos_golden_values_on_a_wide_grid():
    table = positions.sincos(8, (2, 3))
    column, row = [0.909297, 0.0199987, -0.416147, 0.9998], [0.841471, 0.00999983, 0.540302, 0.99995]
    assert table[5].numpy() == pytest.approx(column + row, abs=1e-5)  # row 1, column 2
    assert table.dtype == torch.float32


def test_resizing_keeps_rows_and_columns_apart_and_does_nothing_for_the_same_grid():
    table = torch.zeros(1, 6, 4)
    table[0, :, 0] = torch.arange(6) // 3  # Row number of each patch on a 2 x 3 grid.
    table[0, :, 1] = torch.arange(6) % 3  # Column number.
    assert positions.resize(table, (2, 3), (2, 3)) is table
    bigger = positions.resize(table, (2, 3), (4, 6)).reshape(4, 6, 4)
    assert (bigger[:, :, 0].std(1) < 1e-5).all()  # row numbers do not change along columns
    assert (bigger[:, :, 1].std(0) < 1e-5).all()
    assert (bigger[0, :, 1].diff() > 0).all()


@pytest.mark.parametrize(
    ("n", "ratio", "kept"),
    [
        (196, 0.75, 49),
        (256, 0.75, 64),
        (196, 0.8, 39),
        (196, 0.6, 78),
        (100, 0.9, 10),
        (400, 0.9, 40),
        (60, 0.9, 6),
        (10, 0.75, 2),
        (100, 0.8, 20),
        (1000, 0.9, 100),
    ],
)
def test_mask_ratio_determines_the_number_of_kept_patches(n, ratio, kept):
    assert num_kept(n, ratio) == kept


@pytest.mark.parametrize("ratio", [0.9999, 0.0])
def test_a_ratio_that_hides_all_or_nothing_is_rejected(ratio):
    with pytest.raises(ValueError, match=r"nothing (visible|hidden)"):
        num_kept(16, ratio)


def test_mask_parts_cover_the_grid_and_ties_go_to_the_lower_index():
    mask = mask_from_noise(torch.zeros(2, 8), 0.75)
    assert mask.keep.tolist() == [[0, 1], [0, 1]]
    draws = Draws(0, torch.zeros(3, dtype=torch.int64), torch.arange(3))
    mask = random_mask(3, (4, 5), 0.75, draws)
    assert mask.keep.shape == (3, 5)
    assert torch.cat([mask.keep, mask.drop], 1).sort(1).values.tolist() == [list(range(20))] * 3
    assert mask.hidden().sum(1).tolist() == [15, 15, 15]
    assert not mask.hidden().gather(1, mask.keep).any()
    assert len({tuple(row) for row in mask.keep.sort(1).values.tolist()}) > 1  # masks differ between images


def test_every_patch_is_hidden_equally_often():
    draws = Draws(0, torch.zeros(4000, dtype=torch.int64), torch.arange(4000))
    share = random_mask(4000, (4, 4), 0.75, draws).hidden().float().mean(0)
    assert (share - 0.75).abs().max() < 0.03


def test_nearest_visible_patches_of_a_small_mask():
    mask = Mask(keep=torch.tensor([[5, 0]]), drop=torch.tensor([[1, 2, 3, 4]]))
    assert nearest_visible(mask, (1, 6)).tolist() == [[0, 0, 5, 5]]
    assert nearest_visible(mask, (2, 3)).tolist() == [[0, 5, 0, 5]]


def test_nearest_visible_against_brute_force():
    grid = (5, 7)
    mask = random_mask(6, grid, 0.75, Draws(3, torch.zeros(6, dtype=torch.int64), torch.arange(6)))
    found = nearest_visible(mask, grid)
    for image in range(6):
        keep = sorted(mask.keep[image].tolist())
        for place, hidden in enumerate(mask.drop[image].tolist()):
            row, col = divmod(hidden, grid[1])
            expected = min(keep, key=lambda k: ((k // grid[1] - row) ** 2 + (k % grid[1] - col) ** 2, k))
            assert found[image, place] == expected


def test_mask_matches_numpy():
    index = np.arange(9)
    noise = uniform(4, Stream.MASK, np.zeros(9, np.int64), index, 30)
    order = noise.argsort(1, kind="stable")
    mask = random_mask(9, (5, 6), 0.8, Draws(4, torch.zeros(9, dtype=torch.int64), torch.from_numpy(index)))
    assert torch.cat([mask.keep, mask.drop], 1).tolist() == order.tolist()
    assert mask.keep.shape == (9, 6)


def test_the_eps_of_patch_statistics_is_inside_the_root():
    nearly_flat = torch.tensor([[[0.0, 2e-3]]])  # unbiased variance 2e-6
    assert float(patch_statistics(nearly_flat).std) == pytest.approx((2e-6 + 1e-6) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explicit_attention_equals_fused_attention(dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 10, 8).to(dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert torch.allclose(attend(q, k, v).double(), expected, atol=1e-5 if dtype == torch.float32 else 0.03)


def test_patch_statistics_are_unbiased_joint_over_channels_and_flat_patches_give_zero():
    patches = torch.randn(2, 3, 12) * 4 + 7
    stats = patch_statistics(patches)
    assert torch.allclose(stats.std, (patches.var(-1, correction=1, keepdim=True) + 1e-6).sqrt())
    assert torch.allclose(stats.restore(stats.remove(patches)), patches, atol=1e-5)
    flat = torch.full((1, 1, 12), 3.0)
    assert patch_statistics(flat).remove(flat).abs().max() == 0
    assert patch_statistics(patches.bfloat16()).std.dtype == torch.float32


SPEC = ImageSpec(3, (32, 48), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))
CONFIG = ViTConfig(width=32, depth=2, heads=2, patch=(8, 8))


def test_encoder_on_a_wide_grid_returns_features():
    features = ViT(CONFIG, SPEC)(torch.randint(0, 255, (2, 3, 32, 48), dtype=torch.uint8))
    assert features.grid == (4, 6)
    assert features.patches.shape == (2, 24, 32)
    assert features.pooled.shape == features.cls.shape == (2, 32)
    assert torch.equal(features.map[1, :, 2, 3], features.patches[1, 2 * 6 + 3])


def test_patch_projection_equals_a_convolution():
    encoder, images = ViT(CONFIG, SPEC), torch.randint(0, 255, (2, 3, 32, 48), dtype=torch.uint8)
    proj = encoder.patch_embed.proj
    conv = proj(normalise(images, encoder.mean, encoder.std)).flatten(2).transpose(1, 2)
    assert torch.allclose(encoder.embed(encoder.patches(images)), conv + encoder.pos_embed[:, 1:], atol=1e-5)


def test_embedding_only_kept_patches_equals_embedding_all_and_dropping():
    encoder = ViT(CONFIG, SPEC)
    patches = encoder.patches(torch.randint(0, 255, (2, 3, 32, 48), dtype=torch.uint8))
    keep = torch.tensor([[3, 20, 7], [0, 1, 23]])
    assert torch.allclose(encoder.embed(take(patches, keep), keep), take(encoder.embed(patches), keep), atol=1e-6)


def test_other_image_sizes_get_interpolated_positions():
    features = ViT(CONFIG, SPEC)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert features.grid == (8, 8)


def test_wrong_channels_and_heads_are_rejected():
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 48\); expected.*3-channel"):
        ViT(CONFIG, SPEC)(torch.zeros(1, 1, 32, 48))
    with pytest.raises(ValueError, match="5 heads do not divide a token width of 32; use 4 heads"):
        ViT(ViTConfig(width=32, depth=1, heads=5, patch=8), SPEC)


@torch.no_grad()
def test_only_other_sizes_resize_the_position_table():
    encoder = ViT(CONFIG, SPEC).eval()
    big = torch.randint(0, 255, (1, 3, 48, 32), dtype=torch.uint8)
    table = positions.resize(encoder.pos_embed[:, 1:], (4, 6), (6, 4))
    tokens = encoder.embed(encoder.patches(big), grid=(6, 4))
    assert torch.allclose(tokens - encoder.patch_embed(encoder.patches(big)), table, atol=1e-5)
    assert encoder(big).grid == (6, 4)
    with pytest.raises(ValueError, match=r"height 50; expected a multiple of the patch size 8; .* 48 or 56"):
        encoder(torch.zeros(1, 3, 50, 48))


def test_every_layer_norm_has_the_eps_of_the_official_code():
    encoder = ViT(CONFIG, SPEC)
    norms = [part for part in encoder.modules() if isinstance(part, torch.nn.LayerNorm)]
    assert len(norms) == 5
    assert {part.eps for part in norms} == {1e-6}


@torch.no_grad()
def test_initialisation_follows_the_official_code():
    torch.manual_seed(0)
    spec = ImageSpec(3, (224, 224), "uint8", (1.0,) * 3, (1.0,) * 3)
    encoder = ViT(ViTConfig(width=768, depth=1, heads=12), spec)
    proj, block = encoder.patch_embed.proj, encoder.blocks[0]
    assert float(proj.weight.abs().max()) == pytest.approx(0.0625, rel=0.01)
    assert 0.03 < proj.bias.abs().max() <= 0.0361
    assert float(block.attn.qkv.weight.abs().max()) == pytest.approx((6 / (4 * 768)) ** 0.5, rel=0.01)
    assert block.attn.qkv.bias.abs().max() == 0
    assert float(block.mlp.fc1.weight.abs().max()) == pytest.approx((6 / (5 * 768)) ** 0.5, rel=0.01)
    assert float(block.attn.proj.weight.abs().max()) == pytest.approx((6 / (2 * 768)) ** 0.5, rel=0.01)
    assert float(encoder.cls_token.std()) == pytest.approx(0.02, rel=0.15)
    assert encoder.norm.eps == 1e-6
    assert not encoder.pos_embed.requires_grad
    assert encoder.pos_embed[:, 0].abs().max() == 0
    assert encoder.pos_embed[:, 1:].abs().sum() > 0


def test_layer_decay_assigns_a_depth_to_every_parameter():
    encoder = ViT(CONFIG, SPEC)
    depth = {name: encoder.depth_of(name) for name, _ in encoder.named_parameters()}
    assert {depth["cls_token"], depth["pos_embed"], depth["patch_embed.proj.weight"]} == {0}
    assert depth["blocks.1.mlp.fc1.weight"] == 2
    assert depth["norm.weight"] == 3
