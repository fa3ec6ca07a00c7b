"""Three-bit colours: known numbers, round trips, and values outside the range."""

import pytest
import torch

from unmask.nn.colours import LEVELS, colour_ids, colours_of


@pytest.mark.parametrize(
    ("rgb", "number"),
    [
        ((0, 0, 0), 0),
        ((255, 255, 255), 511),
        ((255, 0, 0), 448),
        ((0, 255, 0), 56),
        ((0, 0, 255), 7),
        ((31, 31, 31), 0),  # level 0: 8 x 31 / 255 = 0.97 < 1
        ((32, 31, 32), 64 + 1),
        ((128, 128, 128), 4 * 73),
        ((127, 128, 223), 64 * 3 + 8 * 4 + 6),
        ((200, 100, 50), 64 * 6 + 8 * 3 + 1),
    ],
)
def test_colours_match_values_computed_by_hand(rgb, number):
    assert int(colour_ids(torch.tensor(rgb) / 255)) == number


def test_colours_round_trip_through_the_centres_of_their_cells():
    ids = torch.arange(512).reshape(2, 256)
    colours = colours_of(ids, 3)
    assert colours.shape == (2, 256, 3)
    assert torch.equal(colour_ids(colours), ids)
    assert torch.equal(colour_ids(colours + 0.49 / LEVELS), ids)
    assert torch.equal(colour_ids(colours - 0.49 / LEVELS), ids)
    assert colours_of(torch.tensor(448), 3).tolist() == [15 / 16, 1 / 16, 1 / 16]


def test_one_channel_has_8_levels_and_values_outside_are_clipped():
    values = torch.tensor([-3.0, 0.0, 0.124, 0.125, 0.5, 0.999, 1.0, 7.0])
    assert colour_ids(values[:, None]).tolist() == [0, 0, 0, 1, 4, 7, 7, 7]
    assert colours_of(torch.tensor([0, 7]), 1).tolist() == [[1 / 16], [15 / 16]]
