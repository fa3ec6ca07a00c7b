"""Block-wise, grid and pattern masks: exact counts, shapes, and rejected settings."""

import math

import pytest
import torch

from unmask.errors import UserError
from unmask.nn import masks
from unmask.nn.masks import block_mask, grid_mask, pattern_mask, random_mask, read_patterns
from unmask.rng import Draws


def draws(count: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def neighbours(hidden: torch.Tensor, grid: tuple[int, int]) -> float:
    """Return the share of hidden patches whose right neighbour is hidden, too."""
    hidden = hidden.reshape(-1, *grid)
    return float((hidden[:, :, :-1] & hidden[:, :, 1:]).sum() / hidden[:, :, :-1].sum())


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (4, 6)])
@pytest.mark.parametrize("ratio", [0.4, 0.5, 0.75])
def test_block_masks_hide_as_many_patches_as_random_masks(grid, ratio):
    mask = block_mask(32, grid, ratio, draws(32))
    assert mask.drop.shape == random_mask(32, grid, ratio, draws(32)).drop.shape
    everything = torch.arange(grid[0] * grid[1]).expand(32, -1)
    assert torch.equal(mask.order.sort(1).values, everything)
    assert len({tuple(row.tolist()) for row in mask.hidden()}) > 28, "masks differ between images"


def test_block_masks_hide_neighbouring_patches():
    """With block masks, neighbours of hidden patches are hidden far more often than with random masks."""
    grid = (14, 14)
    assert neighbours(random_mask(64, grid, 0.4, draws(64)).hidden(), grid) == pytest.approx(0.4, abs=0.03)
    assert neighbours(block_mask(64, grid, 0.4, draws(64)).hidden(), grid) > 0.75


def test_a_block_has_the_sampled_area_and_aspect(monkeypatch):
    """The first proposed block, computed by hand, has area 16 + (78 - 16) / 2 = 47 and aspect 1: it is 7 x 7 at row 4,
    column 0. All other proposals are too large.
    """
    script = torch.full((1, 4 * masks.BLOCK_PROPOSALS + 196), 0.0)
    script[0, :4] = torch.tensor([0.5, 0.5, 0.5, 0.0])
    script[0, 4 : 4 * masks.BLOCK_PROPOSALS] = 0.999  # blocks of 14 rows or more, which are rejected
    script[0, 4 * masks.BLOCK_PROPOSALS :] = torch.linspace(0, 0.999, 196)
    monkeypatch.setattr(Draws, "uniform", lambda self, count: script)
    hidden = block_mask(1, (14, 14), 0.4, draws(1)).hidden().reshape(14, 14)
    assert hidden[4:11, :7].all()
    rest = hidden.clone()
    rest[4:11, :7] = False
    assert rest.sum() == 196 - masks.num_kept(196, 0.4) - 49, "single patches complete the number"
    assert rest.flatten()[-1], "the patch with the most noise is hidden"


def test_no_block_is_smaller_than_the_minimum_unless_fewer_patches_remain_to_be_hidden():
    big = neighbours(block_mask(64, (14, 14), 0.5, draws(64), smallest=60).hidden(), (14, 14))
    small = neighbours(block_mask(64, (14, 14), 0.5, draws(64), smallest=1).hidden(), (14, 14))
    assert big > small + 0.02


def test_block_mask_depends_on_the_image_only():
    one = block_mask(8, (8, 8), 0.5, draws(8))
    other = block_mask(1, (8, 8), 0.5, Draws(0, torch.zeros(1, dtype=torch.int64), torch.tensor([5])))
    assert torch.equal(one.drop[5], other.drop[0])
    assert not torch.equal(block_mask(8, (8, 8), 0.5, draws(8, seed=1)).drop, one.drop)


@pytest.mark.parametrize(
    ("grid", "ratio", "smallest", "message"),
    [
        ((8, 8), 0.5, 80, r"80 patches; .* hides only 32 of the 8 x 8 patches; .*=32 or less$"),
        (
            (8, 8),
            0.5,
            40,
            r"got a smallest block of 40 patches; method.mask_ratio=0.5 hides only 32 of the 8 x 8 patches; set "
            r"method.smallest_block=32 or less, or method.mask_ratio=0.625 or more$",
        ),
    ],
)
def test_blocks_that_do_not_fit_are_rejected(grid, ratio, smallest, message):
    with pytest.raises(UserError, match=message):
        masks.require_blocks(grid, ratio, smallest)
    masks.require_blocks(grid, ratio, 32)
    masks.require_blocks((8, 8), 0.625, 40)  # the fixes that the error proposes are accepted


def test_smallest_block_matches_beit():
    assert masks.smallest_block((14, 14)) == 16
    assert masks.smallest_block((2, 2)) == 1


def test_grid_masks_keep_the_upper_left_of_every_four():
    mask = grid_mask(3, (4, 6), 0.75, draws(3))
    assert mask.keep[0].tolist() == [0, 2, 4, 12, 14, 16]
    assert torch.equal(mask.keep, mask.keep[:1].expand(3, -1))
    assert mask.drop.shape == (3, 18)


@pytest.mark.parametrize(
    ("grid", "ratio", "message"),
    [((4, 4), 0.5, "ratio of 0.5; it keeps.*0.75"), ((4, 5), 0.75, "both numbers must be even")],
)
def test_impossible_grids_are_rejected(grid, ratio, message):
    with pytest.raises(UserError, match=message):
        grid_mask(1, grid, ratio, draws(1))


def test_patterns_are_sampled_equally_often():
    patterns = read_patterns([["##..", "##.."], ["..##", "..##"]], (2, 4))
    mask = pattern_mask(patterns, 4, draws(400))
    assert math.isclose((mask.drop[:, 0] == 0).float().mean(), 0.5, abs_tol=0.08)
    assert {tuple(row) for row in mask.drop.tolist()} == {(0, 1, 4, 5), (2, 3, 6, 7)}
    assert {tuple(row) for row in mask.keep.tolist()} == {(0, 1, 4, 5), (2, 3, 6, 7)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["##", "##", ".."]], "pattern 1 of 3 x 2 characters; expected 2 x 2"),
        ([["##", "#"]], "pattern 1 of 2 x unequal characters"),
        ([["#x", ".."]], r"got \['x'\] in mask pattern 1"),
        ([["##", "##"]], "hide 4 of 4"),
        ([["..", ".."]], "hide 0 of 4"),
        ([["#.", ".."], ["##", ".."]], "hide 1 or 2 of 4 patches; make all patterns hide the same number"),
    ],
)
def test_impossible_patterns_are_rejected(rows, message):
    with pytest.raises(UserError, match=message):
        read_patterns(rows, (2, 2))
