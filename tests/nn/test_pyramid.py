"""The feature pyramid: strides of its levels, and their alignment with the patches."""

import pytest
import torch

from unmask.nn.pyramid import ChannelNorm, Pyramid, scales_of


@pytest.mark.parametrize(
    ("patch", "grid", "strides"),
    [
        ((16, 16), (14, 14), [4, 8, 16, 32]),
        ((14, 14), (16, 16), [7, 14, 28]),
        ((8, 8), (8, 8), [4, 8, 16]),
        ((4, 4), (8, 8), [4, 8]),
        ((2, 2), (8, 8), [2, 4]),
        ((16, 16), (1, 4), [4, 8, 16]),
    ],
)
def test_no_level_has_cells_below_four_pixels_unless_the_patches_are_smaller(patch, grid, strides):
    assert [patch[0] / scale for scale in scales_of(patch, grid)] == strides
    assert [high for high, _ in Pyramid(8, 8, patch, grid).strides] == strides


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_maps_have_the_size_of_their_stride(grid):
    patch = (16, 32)
    pyramid = Pyramid(8, 12, patch, grid)
    maps = pyramid(torch.randn(2, 8, *grid))
    assert pyramid.strides == ((4, 8), (8, 16), (16, 32), (32, 64))
    for found, (high, wide) in zip(maps, pyramid.strides, strict=True):
        assert found.shape == (2, 12, -(-grid[0] * patch[0] // high), -(-grid[1] * patch[1] // wide))


def test_a_cell_of_the_pyramid_depends_on_nearby_patches_only():
    torch.manual_seed(0)
    pyramid, x = Pyramid(8, 12, (16, 16), (8, 8)), torch.randn(1, 8, 8, 8)
    other = x.clone()
    other[:, :, 1, 6] += 1  # the patch at y 16 to 32, x 96 to 112
    changes = [(b - a).abs().amax((0, 1)) > 1e-6 for a, b in zip(pyramid(x), pyramid(other), strict=True)]
    for changed, (high, wide) in zip(changes, pyramid.strides, strict=True):
        rows, cols = changed.nonzero(as_tuple=True)
        assert len(rows)
        around = high  # the 3x3 convolution reads one more cell on either side
        assert (rows.min() + 1) * high > 16 - around
        assert rows.max() * high < 32 + around
        assert (cols.min() + 1) * wide > 96 - around
        assert cols.max() * wide < 112 + around


def test_norm_is_over_the_channels_of_each_position():
    x = torch.randn(2, 32, 3, 4) * 5 + 7
    found = ChannelNorm(32)(x)
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 3, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(1, correction=0), torch.ones(2, 3, 4), atol=1e-4, rtol=0)
