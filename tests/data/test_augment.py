"""Crop boxes, flips, resampling and colour jitter."""

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image, ImageEnhance

from unmask.batch import ImageSpec
from unmask.data.augment import (
    CROP_DRAWS,
    PILLOW,
    CropConfig,
    _cut_fractions,
    _cut_from_pixels,
    center_boxes,
    crop_boxes,
    cut,
    decode_size,
    jitter_colours,
)
from unmask.data.device_crops import to_device
from unmask.data.image_reader import ImageReader
from unmask.data.order import SampleIndices
from unmask.data.sources.open_source import open_source
from unmask.rng import Stream, uniform


def draws(count, seed=0):
    return uniform(seed, Stream.CROP, np.zeros(count, np.int64), np.arange(count), CROP_DRAWS)


def test_random_resized_crops_have_the_configured_area_and_aspect():
    sizes = np.tile([[240, 320]], (4000, 1))
    boxes = crop_boxes(sizes, (224, 224), CropConfig(), draws(4000))
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 240).all()
    assert (left + width <= 320).all()
    area, ratio = height * width / (240 * 320), width / height
    assert area.min() == pytest.approx(0.2, abs=0.01)
    assert area.max() > 0.9
    assert ratio.min() == pytest.approx(0.75, abs=0.03)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.03)
    assert abs(np.log(ratio).mean()) < 0.06  # wide boxes fit into a wide image slightly more often


def test_largest_centred_box_is_used_if_no_try_fits():
    boxes = crop_boxes(np.array([[10, 1000]]), (32, 32), CropConfig(scale=(0.9, 1.0)), draws(1))
    assert boxes[0].tolist() == [0, 493, 10, 13]


def test_crop_aspect_is_relative_to_the_target():
    boxes = crop_boxes(np.tile([[180, 480]], (500, 1)), (64, 160), CropConfig(), draws(500))
    ratio = boxes[:, 3] / boxes[:, 2]
    assert np.median(ratio) == pytest.approx(2.5, rel=0.1)


def test_one_pixel_image_can_be_cropped():
    boxes = crop_boxes(np.array([[1, 1]]), (8, 8), CropConfig(), draws(1))
    assert cut(np.full((1, 1, 3), 9, np.uint8), boxes[0], (8, 8), False).tolist() == np.full((8, 8, 3), 9).tolist()


def test_center_boxes_have_the_shape_of_the_target():
    boxes = center_boxes(np.array([[100, 200], [200, 100], [50, 50]]), (50, 50))
    assert boxes.tolist() == [[0, 50, 100, 100], [50, 0, 100, 100], [0, 0, 50, 50]]
    assert center_boxes(np.array([[256, 256]]), (224, 224), 0.875)[0].tolist() == [16, 16, 224, 224]


@pytest.mark.parametrize("box", [(3, 5, 50, 61), (0.25, 7.5, 60.3, 41), (5.5, 5.5, 20, 20)])
@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
def test_resampling_agrees_with_pillow(name, box):
    image = np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)
    top, left, height, width = box
    picture = Image.fromarray(image)
    if all(float(edge).is_integer() for edge in box):  # boxes in whole pixels are cropped before resampling
        picture, (top, left) = picture.crop((left, top, left + width, top + height)), (0, 0)
    want = picture.resize((40, 48), PILLOW[name], box=(left, top, left + width, top + height))
    other = picture.resize((40, 48), Image.Resampling.NEAREST, box=(left, top, left + width, top + height))
    found = cut(image, np.array(box), (48, 40), False, interpolation=name).astype(int)
    assert np.abs(found - np.asarray(want, int)).mean() < 2
    assert np.abs(found - np.asarray(other, int)).mean() > 5
    odd = cut(image[:, :, :2].astype(np.float32), np.array(box), (48, 40), False, interpolation=name)
    if box[0] == int(box[0]):  # other channel counts and dtypes are cropped at whole pixels
        assert np.abs(odd - np.asarray(want, int)[:, :, :2]).mean() < 2


def test_interpolation_setting_only_affects_training(tmp_path):
    write_images(tmp_path, 3, size=(40, 50))
    source, spec = open_source(tmp_path), ImageSpec(3, (16, 16), "uint8", (0.0,) * 3, (1.0,) * 3)
    taken = SampleIndices(np.arange(3), np.zeros(3, np.int64))

    def drawn(interpolation, **more):
        images = ImageReader(source, np.arange(3), spec, CropConfig(interpolation=interpolation), **more)
        return to_device(images[taken].batch, "cpu").images

    assert not torch.equal(drawn("bicubic"), drawn("bilinear"))
    assert torch.equal(drawn("bicubic", training=False), drawn("bilinear", training=False))
    on_device = drawn("bilinear", on_device=True).int()
    assert (on_device - drawn("bilinear").int()).abs().float().mean() < 0.5, "resampling on the device agrees"


TARGETS = [(28, 28), (32, 32), (64, 64), (96, 96), (112, 112), (224, 224), (224, 304)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(
    "config",
    [CropConfig(kind="center"), CropConfig(kind="random"), CropConfig(kind="random", eval_share=0.875), CropConfig()],
    ids=["center", "random", "random 0.875", "resized"],
)
def test_boxes_lie_within_images_of_any_size(target, config):
    square = np.arange(8, 301).repeat(2).reshape(-1, 2)
    sizes = np.concatenate([square, np.random.default_rng(0).integers(8, 301, (600, 2))])
    boxes = crop_boxes(sizes, target, config, draws(len(sizes)))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    if config.kind == "center":
        for size, box in zip(sizes, boxes, strict=True):
            assert cut(np.zeros((*size, 1), np.uint8), box, target, False).shape == (*target, 1)
        assert (boxes[:293, 2:] == square).all() or target[0] != target[1], "the box covers all of a square image"


def test_a_thin_image_gets_a_box_of_at_least_a_pixel():
    boxes = crop_boxes(np.array([[1, 1], [1, 50], [50, 1]]), (32, 8), CropConfig(scale=(1, 1)), draws(3))
    assert (boxes[:, 2:] >= 1).all()


def test_fixed_size_crops_have_random_positions():
    config = CropConfig(kind="random", eval_share=0.5)
    boxes = crop_boxes(np.tile([[100, 100]], (200, 1)), (32, 32), config, draws(200))
    assert (boxes[:, 2:] == 50).all()
    assert boxes[:, 0].std() > 10
    assert boxes[:, 0].max() <= 50


def test_a_box_of_the_target_size_is_copied_exactly():
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    assert (cut(image, np.array([2, 3, 8, 9]), (8, 9), False) == image[2:10, 3:12]).all()
    assert (cut(image, np.array([2, 3, 8, 9]), (8, 9), True) == image[2:10, 3:12][:, ::-1]).all()


@pytest.mark.parametrize(
    ("dtype", "channels"), [("uint8", 1), ("uint8", 3), ("uint8", 7), ("uint16", 1), ("float32", 4)]
)
def test_resampling_preserves_values_for_every_dtype_and_channel_count(dtype, channels):
    top = {"uint8": 255, "uint16": 65535, "float32": 3.5}[dtype]
    ramp = np.linspace(0, top, 64)[None, :, None].repeat(48, 0).repeat(channels, 2).astype(dtype)
    out = cut(ramp, np.array([0, 0, 48, 64]), (24, 32), False)
    assert out.dtype == ramp.dtype
    assert out.shape == (24, 32, channels)
    expected = np.linspace(0, top, 64).reshape(32, 2).mean(1)
    assert np.abs(out[12, :, -1].astype(float) - expected).max() < 0.02 * top
    assert out.min() >= ramp.min()
    assert out.max() <= ramp.max()


def test_integer_and_float_resampling_agree():
    smooth = np.add.outer(np.linspace(0, 100, 40), np.linspace(0, 100, 50))[:, :, None].repeat(3, 2)
    box = np.array([4, 6, 30, 36])
    pillow = cut(smooth.astype(np.uint8), box, (16, 16), False).astype(float)
    torch_branch = cut(smooth.astype(np.float32), box, (16, 16), False)
    assert np.abs(pillow - torch_branch).max() < 2


def picture(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    """Return enlarged coarse noise, which has edges but no very fine detail."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return large[:, :, :channels].copy()


def by_pillow(image: np.ndarray, target: tuple[int, int], box=None) -> np.ndarray:
    shown = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    found = shown.resize((target[1], target[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(found).reshape(*target, -1).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("target", [(32, 48), (100, 30), (224, 224)])
def test_boxes_in_whole_pixels_agree_with_pillow(channels, target):
    image = picture(301, 203, channels, seed=channels)
    for top, left, height, width in ((0, 0, 301, 203), (5, 7, 290, 190), (100, 100, 40, 20), (3, 0, 64, 203)):
        ours = cut(image, np.array([top, left, height, width]), target, False)
        part = np.ascontiguousarray(image[top : top + height, left : left + width])
        assert np.abs(ours - by_pillow(part, target)).mean() < 0.3


@pytest.mark.parametrize("channels", [1, 3])
def test_boxes_in_fractions_of_pixels_agree_with_pillow(channels):
    image = picture(301, 203, channels, seed=channels)
    for top, left, height, width in ((0, 0, 300.5, 202.3), (0.25, 7.5, 290, 190), (100.1, 100.9, 40.2, 20.7)):
        ours = cut(image, np.array([top, left, height, width]), (64, 48), False)
        difference = np.abs(ours - by_pillow(image, (64, 48), (left, top, left + width, top + height)))
        assert difference.max() <= 2  # Pillow's boxes are in single precision
        assert difference.mean() < 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_most_fractional_boxes_use_the_fast_kernel_and_agree_with_pillow(channels):
    image, rng, fast, differences = picture(150, 110, channels, seed=channels), np.random.default_rng(0), 0, []
    for _ in range(300):
        target = tuple(rng.choice([8, 31, 64, 100], 2).tolist())
        height, width = rng.uniform(8, 150), rng.uniform(8, 110)
        box = (rng.uniform(0, 150 - height), rng.uniform(0, 110 - width), height, width)
        found, wanted = _cut_from_pixels(image, box, target), _cut_fractions(image, box, target)
        if found is not None:
            fast += 1
            differences.append(np.abs(found - wanted.astype(float)).mean())
    assert 200 < fast < 300
    assert np.mean(differences) < 0.6
    assert max(differences) < 2


@pytest.mark.parametrize(("first", "height", "width"), [(20.5, 41.5, 38.25), (0.5, 41.0, 38.25)])
def test_as_many_samples_as_pixels_are_still_resampled(first, height, width):
    """The kernel does not resample an axis if input and output have the same length, even if the step is not 1."""
    image = picture(80, 70, 3, seed=0)
    compared = 0
    for size in range(20, 80):
        found = _cut_from_pixels(image, (first, 3.0, height, width), (size, 33))
        wanted = _cut_fractions(image, (first, 3.0, height, width), (size, 33))
        if found is not None:
            assert np.abs(found - wanted.astype(float)).mean() < 2
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("box", [[4, 6, 30, 36], [4.5, 6, 30, 36], [4, 6, 16, 20]])
@pytest.mark.parametrize(
    ("dtype", "channels"),
    [("uint8", 3), ("uint8", 1), ("uint8", 5), ("uint16", 1), ("uint16", 3), ("uint16", 4), ("float32", 2)],
)
def test_crop_is_written_to_out_and_flipped(box, dtype, channels):
    image = np.random.default_rng(0).integers(0, 255, (40, 50, channels)).astype(dtype)
    out = np.zeros((2, 16, 20, channels), dtype)
    cut(image, np.array(box), (16, 20), True, out[1])
    assert not out[0].any()
    assert (out[1] == cut(image, np.array(box), (16, 20), False)[:, ::-1]).all()


def test_decode_size_preserves_the_resolution_of_the_crop():
    assert decode_size((3000, 4000), np.array([0, 0, 3000, 4000]), (224, 224)) == (224, 224)
    assert decode_size((3000, 4000), np.array([0, 0, 300, 400]), (224, 224)) == (2240, 2240)
    assert decode_size((100, 100), np.array([0, 0, 50, 50]), (224, 224)) == (100, 100)


def jitter_by_hand(image: np.ndarray, bright: float, contrast: float, saturation: float) -> np.ndarray:
    """Apply Pillow's three corresponding operations to one RGB uint8 image."""
    picture = Image.fromarray(image)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color),
        (bright, contrast, saturation),
        strict=True,
    ):
        picture = enhance(picture).enhance(factor)
    return np.asarray(picture)


def test_jitter_agrees_with_pillow_up_to_rounding():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)
    draws = np.random.default_rng(1).random((5, 3), np.float32)
    ours = jitter_colours(images, 0.4, draws)
    for image, draw, found in zip(images, draws, ours, strict=True):
        theirs = jitter_by_hand(image, *(1 + 0.4 * (2 * draw - 1)))
        assert np.abs(found.astype(int) - theirs).max() <= 3  # Pillow rounds after each of the three operations
    assert np.abs(ours.astype(int) - images).mean() > 5


def test_jitter_with_factor_one_changes_nothing():
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535), (np.float32, 1)):
        for channels in (1, 3, 5):
            images = (np.random.default_rng(0).random((2, 4, 4, channels)) * top).astype(dtype)
            same = jitter_colours(images, 0.4, np.full((2, 3), 0.5, np.float32))
            assert same.dtype == dtype
            assert np.allclose(same, images, rtol=1e-5, atol=1)


def test_saturation_does_not_change_gray_images():
    gray = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 1), dtype=np.uint8).repeat(3, 3)
    draws = np.array([[0.5, 0.5, 1.0]], np.float32)
    assert np.abs(jitter_colours(gray, 0.4, draws).astype(int) - gray).max() <= 1
