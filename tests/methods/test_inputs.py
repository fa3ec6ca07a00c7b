"""Images passed to a trained encoder, for every method: other ranges, layouts, dtypes and sizes."""

import inspect

import pytest
import torch
from PIL import Image
from test_contract import METHODS, batch_for, make

from unmask.batch import Batch, ImageSpec
from unmask.config import method_class, method_module
from unmask.errors import UserError
from unmask.method import Clock
from unmask.nn.inputs import in_data_units
from unmask.nn.vit import ViTConfig
from unmask.rng import Draws

PHOTOGRAPHS = ImageSpec(3, (16, 16), "uint8", (120.0, 115.0, 100.0), (58.0, 57.0, 60.0))


@pytest.fixture(params=METHODS)
def method(request):
    return make(request.param).eval()


@torch.no_grad()
def test_unit_range_is_rejected_unless_scale_is_given(method):
    images = batch_for(method).images
    wanted = method.encoder(images).patches
    unit = images.float() / 255
    with pytest.raises(UserError, match=r"values from 0\.\d+ to 0\.9\d*; expected .*uint8, 0 to 255.*scale=\"unit\""):
        method.encoder(unit)
    torch.testing.assert_close(method.encoder(unit, scale="unit").patches, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(method.encoder(images.float()).patches, wanted)
    assert not torch.allclose(method.encoder(unit, scale="data").patches, wanted, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_normalised_images_are_rejected(method):
    images = batch_for(method).images.float()
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for wrong in ((images / 255 - mean) / std, images / 127.5 - 1, images - 120):
        with pytest.raises(UserError, match="scale="):
            method.encoder(wrong)


@torch.no_grad()
def test_black_images_are_accepted_in_every_dtype(method):
    black = torch.zeros_like(batch_for(method).images)
    wanted = method.encoder(black).patches
    for same in (black.float(), black.double(), black.half(), black.long()):
        assert torch.equal(method.encoder(same).patches, wanted)
    assert torch.equal(
        method.encoder(torch.ones_like(black)).patches, method.encoder(torch.ones(4, 3, 16, 16), scale="data").patches
    )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_of_encoder_and_images_are_accepted(method, dtype):
    images = batch_for(method).images
    wanted = method.encoder(images)
    assert torch.allclose(method.encoder(images.to(dtype)).patches.float(), wanted.patches, atol=1e-5)
    encoder = method.encoder.to(dtype)
    for given in (images, images.float(), images.to(dtype)):
        found = encoder(given)
        assert found.patches.dtype == dtype
        near = torch.nn.functional.cosine_similarity(found.patches.float().flatten(1), wanted.patches.flatten(1))
        assert near.min() > 0.99
        assert (found.cls is None) == (wanted.cls is None)


@torch.no_grad()
def test_empty_batch_has_empty_features(method):
    found = method.encoder(batch_for(method).images[:0])
    wanted = method.encoder(batch_for(method).images)
    assert found.patches.shape == (0, *wanted.patches.shape[1:])
    assert found.grid == wanted.grid


def test_errors_for_other_layouts_name_the_permutation(method):
    images = batch_for(method).images
    array = images[0].permute(1, 2, 0).numpy()
    wrong = {
        r"got images of shape \(4, 16, 16, 3\); expected \(B, 3, H, W\).*permute\(0, 3, 1, 2\)": images.permute(
            0, 2, 3, 1
        ),
        r"shape \(3, 16, 16\); .*images\[None\]": images[0],
        r"shape \(16, 16, 3\); .*permute\(2, 0, 1\)\[None\]": images[0].permute(1, 2, 0),
        r"shape \(4, 1, 16, 16\); .*expand": images[:, :1],
        r"shape \(4, 4, 16, 16\); .*alpha": torch.cat([images, images[:, :1]], 1),
        r"shape \(4, 2, 16, 16\); .*3-channel": images[:, :2],
        r"shape \(16, 16\)": images[0, 0],
        r"numpy\.ndarray of shape \(16, 16, 3\); .*from_numpy\(array\)\.permute\(2, 0, 1\)\[None\]": array,
        r"got PIL\.Image; .*numpy\.array\(image\)\)\.permute\(2, 0, 1\)\[None\]": Image.fromarray(array),
        r"got list; .*torch\.Tensor": [1, 2],
        r"torch\.bool": images > 100,
    }
    for message, value in wrong.items():
        with pytest.raises(UserError, match=message):
            method.encoder.accept(value)  # `forward` calls accept() first


@torch.no_grad()
def test_other_image_sizes_are_accepted_or_the_error_names_an_accepted_size(method):
    images = torch.nn.functional.interpolate(batch_for(method).images.float(), (24, 32))
    if method.encoder.one_size:
        with pytest.raises(UserError, match=r"got images of shape \(4, 3, 24, 32\); expected \(B, 3, 16, 16\)"):
            method.encoder(images)
    else:
        rows, cols = method.encoder(images).grid
        assert method.encoder(images).patches.shape[1] == rows * cols == 6 * 8
        with pytest.raises(UserError, match=r"height 23; expected a multiple of the patch size 4; .* 20 or 24"):
            method.encoder(images[:, :, :23])


@torch.no_grad()
def test_16_bit_images_are_checked():
    method = make("mae", channels=1, dtype="uint16").eval()
    images = batch_for(method).images
    wanted = method.encoder(images).patches
    assert torch.equal(method.encoder(images.to(torch.int32)).patches, wanted)
    torch.testing.assert_close(
        method.encoder(images.float() / 65535, scale="unit").patches, wanted, rtol=1e-3, atol=1e-3
    )
    with pytest.raises(UserError, match="uint16, 0 to 65535"):
        method.encoder(images.float() / 65535)
    with pytest.raises(UserError, match="times 257"):
        method.encoder((images.float() / 257).to(torch.uint8))
    half = method.encoder.half()
    assert half.mean.dtype == half.std.dtype == torch.float32
    assert half(images).patches.isfinite().all()


def terrain(mean: float = 250.0, std: float = 60.0) -> ImageSpec:
    return ImageSpec(1, (16, 16), "float32", (mean,), (std,))


def test_float_images_are_compared_with_the_mean_of_the_data():
    heights = 250 + 60 * torch.randn(2, 1, 16, 16)
    assert in_data_units(heights, terrain()) is heights
    for wrong in (torch.rand(2, 1, 16, 16), (heights - 250) / 60):
        with pytest.raises(UserError, match="float32; mean 250, standard deviation 60"):
            in_data_units(wrong, terrain())
        assert in_data_units(wrong, terrain(), "data") is wrong
    with pytest.raises(UserError, match="no full range"):
        in_data_units(torch.rand(2, 1, 16, 16), terrain(), "unit")
    with pytest.raises(UserError, match="convert the values"):  # images have values of 0 to 255, the data 0 to 1
        in_data_units(255 * torch.rand(2, 1, 16, 16), terrain(0.5, 0.25))
    sea_level = torch.rand(2, 1, 16, 16)  # heights: mean near 0, so values below 1 are typical
    assert in_data_units(sea_level, terrain(50.0, 60.0)) is sea_level
    assert in_data_units(sea_level, terrain(0.5, 0.25)) is sea_level


def test_non_finite_images_are_rejected_with_a_way_to_fill_them():
    holes = torch.full((1, 3, 16, 16), 100.0)
    holes[0, 0, 3, 3] = float("nan")
    with pytest.raises(UserError, match=r"not finite.*torch\.where"):
        in_data_units(holes, PHOTOGRAPHS)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.full((1, 3, 16, 16), 255.0) + 30, "overshoot of bicubic resampling"),
        (torch.linspace(-40, 270, 768).reshape(1, 3, 16, 16), "overshoot at both ends"),
        (torch.full((1, 3, 16, 16), 3.0), "a dark image"),
        (torch.full((1, 3, 16, 16), 250.0), "a flat image"),
    ],
)
def test_images_in_the_range_of_the_data_are_accepted(images, reason):
    assert in_data_units(images, PHOTOGRAPHS) is images, reason


def test_class_maps_of_ones_and_zeros_are_accepted():
    maps = ImageSpec(1, (16, 16), "uint8", (0.3,), (0.46,))
    images = (torch.rand(2, 1, 16, 16) > 0.7).float()
    assert in_data_units(images, maps) is images


def test_unknown_or_wrong_scale_is_rejected():
    images = torch.zeros(1, 3, 16, 16)
    with pytest.raises(UserError, match='expected None, "data" or "unit"'):
        inspect.unwrap(in_data_units)(images, PHOTOGRAPHS, "0..1")  # unwrap removes the type checks that the tests add
    with pytest.raises(UserError, match="expected floats"):
        in_data_units(images.to(torch.uint8), PHOTOGRAPHS, "unit")
    with pytest.raises(UserError, match="values from 0 to 200"):
        in_data_units(images.index_fill(2, torch.tensor(0), 200.0), PHOTOGRAPHS, "unit")


class Patches(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder(images).patches


@torch.no_grad()
def test_training_and_graphs_do_not_read_the_values(monkeypatch):
    method = make("mae").eval()
    looked = []
    real = torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda *given, **named: looked.append(1) or real(*given, **named))
    batch = batch_for(method)
    method.encoder(batch.images)
    method.encoder.features(batch.images.float())
    assert not looked
    torch.export.export(Patches(method.encoder), (batch.images.float(),))
    assert not looked
    method.encoder(batch.images.float())
    assert looked


@torch.no_grad()
@pytest.mark.parametrize("task", ["classify", "linear_probe", "segment", "detect"])
def test_tasks_check_images_in_inference_but_not_in_training(task):
    settings = {"classes": ("one", "two"), "encoder": ViTConfig(width=32, depth=4, heads=2, patch=(4, 4))}
    method = method_class(task)(method_module(task).Config(**settings), PHOTOGRAPHS).eval()
    ask = getattr(method, "logits", None) or method.predict
    images = torch.full((2, 3, 16, 16), 99, dtype=torch.uint8)
    ask(images)
    with pytest.raises(UserError, match='scale="unit"'):
        ask(images / 255)
    if hasattr(method, "logits"):
        assert torch.allclose(ask(images / 255, scale="unit"), ask(images), atol=1e-4)
    zeros = torch.zeros(2, dtype=torch.int64)
    about = {"labels": zeros, "maps": torch.zeros(2, 16, 16, dtype=torch.int64), "boxes": torch.ones(2, 1, 4)}
    batch = Batch(images / 255, zeros, zeros, **about, box_labels=zeros[:, None])
    method.loss(batch, Clock(0, 1, Draws(0, zeros, zeros)))
