"""RandAugment: operations depend on their random draws, return values in [0, 1], and match Pillow and timm."""

import numpy as np
import pytest
import torch

from unmask.nn.rand_augment import ALL, DRAWS, ERASE_DRAWS, erase, rand_augment

FILL = torch.full((3, 1, 1), 0.5)


def unit(count=6, channels=3):
    return torch.from_numpy(np.random.default_rng(0).random((count, channels, 16, 20), np.float32))


def draws(count=6, seed=0):
    return np.random.default_rng(seed).random((count, DRAWS))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_same_draws_give_the_same_image_and_other_draws_do_not(channels):
    x, fill = unit(channels=channels), FILL[:1].expand(channels, 1, 1)
    once, again = (rand_augment(x, draws(), 9.0, fill) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, rand_augment(x, draws(seed=1), 9.0, fill))
    assert once.shape == x.shape
    assert ((once >= 0) & (once <= 1)).all()
    assert torch.equal(x, unit(channels=channels)), "the input is not modified"


def test_an_image_without_an_operation_is_unchanged():
    no = draws()
    no[2, [1, 5]] = 0.9
    after = rand_augment(unit(), no, 9.0, FILL)
    assert torch.equal(after[2], unit()[2])
    assert not torch.equal(after, unit())


def test_augmentation_of_an_image_does_not_depend_on_the_batch():
    together = rand_augment(unit(), draws(), 9.0, FILL)
    alone = rand_augment(unit()[3:4], draws()[3:4], 9.0, FILL)
    torch.testing.assert_close(together[3:4], alone)


@pytest.mark.parametrize("name", ALL)
def test_every_operation_changes_an_image(name):
    x = unit() * 0.8 + 0.1
    after = ALL[name](x, np.full(6, 0.9), np.array([1.0, -1] * 3), FILL)
    assert after.shape == x.shape
    assert ((after - x).abs().mean((1, 2, 3)) > 1e-3).all()


def test_geometric_operations_move_a_pixel_in_the_expected_direction():
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 10] = 1
    fill, strength, sign = torch.zeros(1, 1, 1), np.array([2 / 21 / 0.45]), np.array([1.0])
    assert ALL["translate x"](x, strength, sign, fill)[0, 0, 10, 12] == pytest.approx(1, abs=1e-3)
    assert ALL["translate y"](x, strength, sign, fill)[0, 0, 12, 10] == pytest.approx(1, abs=1e-3)
    assert ALL["rotate"](x, np.array([0.7]), sign, fill)[0, 0, 10, 10] == pytest.approx(1, abs=1e-3)
    moved = ALL["translate x"](torch.ones(1, 1, 8, 8), np.array([1.0]), sign, torch.full((1, 1, 1), 0.25))
    assert moved[0, 0, 4, 0] == pytest.approx(0.25)


def pillow(pixels, matrix):
    """Apply Pillow's bicubic affine transform to (H, W, 3) pixels, filled with gray."""
    from PIL import Image

    picture = Image.fromarray(pixels)
    moved = picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(127, 127, 127)
    )
    return np.asarray(moved, np.float32)


def pixels_of(x):
    return (x[0] * 255).clamp(0, 255).permute(1, 2, 0).numpy()


def smooth_pixels(height=40, width=56):
    """Return a smooth (H, W, 3) uint8 image, so that rounding errors of coordinates have little effect."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / (4 + n) + n) * np.cos(columns / (5 - n)) for n in range(3)]
    return (127.5 + 120 * np.stack(waves, 2)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("shear x", (1, -0.27, 0, 0, 1, 0)),
        ("shear y", (1, 0, 0, -0.27, 1, 0)),
        ("translate x", (1, 0, -0.45 * 0.9 * 56, 0, 1, 0)),
        ("translate y", (1, 0, 0, 0, 1, -0.45 * 0.9 * 40)),
    ],
)
def test_geometric_operations_match_timm_with_pillow(name, matrix):
    pixels, fill = smooth_pixels(), torch.full((3, 1, 1), 127 / 255)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    got = pixels_of(ALL[name](x, np.array([0.9]), np.array([1.0]), fill))
    assert np.abs(got - pillow(pixels, matrix)).max() < 1.5, "levels, of 255"


def test_rotation_matches_pillow():
    from PIL import Image

    pixels, fill = smooth_pixels(), torch.full((3, 1, 1), 127 / 255)
    picture = Image.fromarray(pixels).rotate(27, Image.Resampling.BICUBIC, fillcolor=(127, 127, 127))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    got = pixels_of(ALL["rotate"](x, np.array([0.9]), np.array([-1.0]), fill))
    assert np.abs(got - np.asarray(picture, np.float32)).max() < 1.5


def test_shear_keeps_the_corner_and_moves_the_far_edge_most():
    x = torch.zeros(1, 1, 224, 224)
    x[0, 0, [2, 221], 100] = 1
    moved = ALL["shear x"](x, np.array([0.9]), np.array([1.0]), torch.zeros(1, 1, 1))[0, 0]
    assert int(moved[2].argmax()) == pytest.approx(100, abs=1)
    assert int(moved[221].argmax()) == pytest.approx(100 + 0.27 * 221.5, abs=1), (
        "shear about the corner: 60 pixels; about the centre: 30"
    )


def test_colour_operations_match_their_definition():
    x, one = unit(), np.ones(6)
    torch.testing.assert_close(ALL["invert"](x, one, one, FILL), 1 - x)
    assert ALL["posterise"](x, np.full(6, 0.5), one, FILL).mul(255).round().remainder(64).abs().max() == 0
    stretched = ALL["auto contrast"](x * 0.5 + 0.2, one, one, FILL)
    assert stretched.amin((2, 3)).abs().max() < 1e-5
    assert (stretched.amax((2, 3)) - 1).abs().max() < 1e-5


def test_erasing_puts_noise_into_a_box_of_some_images():
    images = torch.full((64, 3, 32, 32), 9.0)
    given = np.random.default_rng(0).random((64, ERASE_DRAWS))
    mean, std = torch.tensor([100.0, 110, 120]), torch.tensor([10.0, 10, 10])
    seeds = np.arange(64)
    after = erase(images, given, 0.25, mean, std, seeds=seeds)
    changed = (after != 9).flatten(1).any(1)
    assert 0.1 < changed.float().mean() < 0.4
    assert torch.equal(changed, torch.from_numpy(given[:, 0] < 0.25) & changed)
    noise = after[changed][after[changed] != 9]
    assert noise.mean() == pytest.approx(110, abs=2)
    assert torch.equal(after, erase(images, given, 0.25, mean, std, seeds=seeds))
    assert not torch.equal(after, erase(images, given, 0.25, mean, std, seeds=seeds + 1))
    assert torch.equal(after[40:], erase(images[40:], given[40:], 0.25, mean, std, seeds=seeds[40:])), (
        "the noise of an image does not depend on the other images of the batch"
    )
    share = (after[changed] != 9).float().mean((1, 2, 3))
    assert share.min() > 0.015
    assert share.max() < 0.36


def test_sharpness_matches_pillow():
    from PIL import Image, ImageEnhance

    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    want = np.asarray(ImageEnhance.Sharpness(Image.fromarray(pixels)).enhance(0.55), np.float32)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    got = ALL["sharpness"](x, np.array([0.5]), np.array([-1.0]), FILL)[0].permute(1, 2, 0) * 255
    assert np.abs(got.numpy()[1:-1, 1:-1] - want[1:-1, 1:-1]).max() < 1.5, "Pillow does not change the edge"


def test_only_augmented_images_are_clipped_to_the_range():
    x = unit() * 3 - 1
    no = draws()
    no[2, [1, 5]] = 0.9
    after = rand_augment(x, no, 9.0, FILL)
    assert torch.equal(after[2], x[2])
