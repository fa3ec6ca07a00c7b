"""Corruptions: share and values of the corrupted components; all other values are bit-equal."""

import pytest
import torch

from unmask.nn.corrupt import drop_channel, gaussian, gray, masking, num_components, salt_and_pepper, single_channel

PIXELS = torch.rand(6, 3, 8, 12, generator=torch.Generator().manual_seed(0)) + 0.1


def draws(count: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(6, count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("grain", "components"), [(None, 288), ((1, 1), 96), ((4, 4), 6), ((2, 4), 12)])
def test_masking_hides_a_fixed_number_of_components_of_every_image(grain, components):
    assert num_components(3, (8, 12), grain) == components
    found, touched = masking(PIXELS, draws(components), 0.25, grain)
    values = round(0.25 * components) * 288 // components
    assert touched.sum((1, 2, 3)).tolist() == [values] * 6
    assert found[touched].eq(0).all()
    assert torch.equal(found[~touched], PIXELS[~touched])
    if grain is not None:
        assert torch.equal(touched[:, 0], touched[:, 2]), "all channels of a cell are corrupted together"
        rows = touched[:, 0].unfold(1, grain[0], grain[0]).unfold(2, grain[1], grain[1]).flatten(3)
        assert (rows.all(-1) | ~rows.any(-1)).all(), "whole cells"


def test_salt_and_pepper_set_either_extreme_with_equal_probability():
    ends = (torch.full((3, 1, 1), -2.0), torch.tensor([3.0, 4.0, 5.0])[:, None, None])
    found, touched = salt_and_pepper(PIXELS, draws(288), draws(288, 2), 0.5, None, ends)
    assert touched.sum((1, 2, 3)).tolist() == [144] * 6
    low = found == -2
    assert (low | (found == ends[1])).eq(touched).all()
    assert float(low[touched].float().mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(found[~touched], PIXELS[~touched])


def test_gaussian_noise_has_the_given_standard_deviation_and_is_finite():
    pixels = torch.zeros(6, 3, 64, 64)
    found, touched = gaussian(pixels, draws(3 * 64 * 64), 0.3)
    assert touched.all()
    assert float(found.std()) == pytest.approx(0.3, rel=0.02)
    assert float(found.mean()) == pytest.approx(0, abs=0.01)
    assert (
        gaussian(pixels[:, :, :1, :1], torch.tensor([[0.0, 0.5, 1 - 2.0**-24]]).expand(6, -1), 1.0)[0].isfinite().all()
    )


def test_gray_keeps_the_brightness_and_removes_the_colour():
    found, touched = gray(PIXELS)
    assert touched.all()
    assert torch.equal(found[:, 0], found[:, 2])
    assert torch.allclose(found.mean(1), PIXELS.mean(1))


def test_single_channel_keeps_one_channel_and_drop_channel_all_others():
    which = torch.tensor([0.0, 0.34, 0.67, 0.999, 0.1, 0.5])[:, None]
    found, touched = single_channel(PIXELS, which)
    for image, channel in enumerate([0, 1, 2, 2, 0, 1]):
        assert torch.equal(found[image, channel], PIXELS[image, channel])
        assert touched[image].flatten(1).any(1).tolist() == [number != channel for number in range(3)]
    assert found[touched].eq(0).all()
    dropped, gone = drop_channel(PIXELS, which)
    assert torch.equal(gone, ~touched)
    assert dropped[gone].eq(0).all()
    assert torch.equal(dropped[~gone], PIXELS[~gone])
