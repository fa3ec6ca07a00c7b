"""The segmenter: both heads, and which blocks are trained."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from unmask.batch import IGNORED, Batch, ImageSpec
from unmask.config import method_class
from unmask.engine.device import autocast
from unmask.errors import UserError
from unmask.method import Clock
from unmask.nn.map_heads import UPerNet, levels_of
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig, make_optimizer, update
from unmask.recipes.catalogue import find
from unmask.rng import Draws
from unmask.tasks.segment import COLOURS, Config, Segmenter, colour_table, error

NAMES = ("ground", "thing", "rare")
HEADS = ("linear", "upernet")
UNITS = {"uint8": 255, "uint16": 60_000, "float32": 3.0}


def config(head="upernet", **more):
    encoder = ViTConfig(width=32, depth=4, heads=2, patch=(4, 4))
    return Config(encoder=encoder, classes=NAMES, head=head, width=16, **more)


def spec(channels=3, size=(16, 24), dtype="uint8"):
    top = UNITS[dtype]
    return ImageSpec(channels, size, dtype, (top / 2,) * channels, (top / 4,) * channels)


def make(head="upernet", images=None, seed=0, **more):
    torch.manual_seed(seed)
    return Segmenter(config(head, **more), images or spec())


def batch(count=4, images=None):
    """Return images with bright boxes as objects, and an ignored stripe."""
    images = images or spec()
    draw = np.random.default_rng(0)
    maps = torch.zeros(count, *images.size, dtype=torch.int64)
    for one in maps:
        y, x = draw.integers(0, 8, 2)
        one[y : y + 8, x : x + 8] = 1
    pixels = (maps[:, None] * 0.5 + 0.25 + torch.from_numpy(draw.random((count, 1, 1, 1)) / 8)) * UNITS[images.dtype]
    pixels = torch.from_numpy(pixels.expand(-1, images.channels, -1, -1).numpy().astype(images.dtype))
    maps[:, :, -2:] = IGNORED
    return Batch(pixels, torch.arange(count), torch.zeros(count, dtype=torch.int64), maps=maps)


def clock(of, step=0, seed=0):
    return Clock(step, 100, Draws(seed, of.epoch, of.index))


def warm(head="upernet", steps=3, rate=1e-3, of=None, **more):
    method, of = make(head, **more), of or batch()
    optimizer = make_optimizer(method, OptimConfig())
    for step in range(steps):
        value = method(of, clock(of, step)).value
        value.backward()
        update(optimizer, rate, value.detach(), None)
    return method


# Contract of tasks


def test_task_is_found_by_name():
    assert method_class("segment") is Segmenter


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("last_blocks", [None, 0, 0.5, 2])
def test_last_blocks_selects_the_parameters_with_a_gradient(head, last_blocks):
    method, of = warm(head, last_blocks=last_blocks), batch()
    method(of, clock(of)).value.backward()
    wanted = {name for name, p in method.named_parameters() if p.requires_grad}
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == wanted
    blocks = {int(name.split(".")[2]) for name in wanted if name.startswith("encoder.blocks")}
    assert blocks == {None: {0, 1, 2, 3}, 0: set(), 0.5: {3}, 2: {2, 3}}[last_blocks]
    assert ("encoder.patch_embed.proj.weight" in wanted) == (last_blocks is None)
    assert all(name in wanted for name, _ in method.named_parameters() if name.startswith("head."))
    assert not any(name.startswith("encoder.norm") for name in wanted)


@pytest.mark.parametrize("head", HEADS)
def test_segmenter_learns_and_predicts(head):
    of = batch(8)
    first = float(make(head)(of, clock(of)).value.detach())
    assert first == pytest.approx(math.log(3), rel=0.1), "the untrained head predicts a uniform distribution"
    method = warm(head, 60, 3e-3, of)
    found = method(of, clock(of))
    assert float(found.value.detach()) < 0.3 * first
    judged = of.maps != IGNORED
    guess = torch.stack(method.predict(of.images))
    share = float((guess == of.maps)[judged].float().mean())
    assert share > 0.93
    assert float(found.logs["pixel_accuracy"]) == pytest.approx(share)
    assert guess.shape == of.maps.shape
    assert guess.dtype == torch.int64


def test_upernet_resolves_edges_within_patches():
    """The edges of boxes lie within patches: UPerNet can follow them, one score for each patch cannot."""
    of = batch(8)
    linear, fine = (float(warm(head, 60, 3e-3, of)(of, clock(of)).logs["pixel_accuracy"]) for head in HEADS)
    assert fine > linear
    assert fine > 0.98


@pytest.mark.parametrize("head", HEADS)
def test_a_state_dict_round_trip_is_strict_and_exact(head):
    method, other, of = warm(head), make(head, seed=9), batch()
    assert not torch.equal(method.logits(of.images), other.logits(of.images))
    other.load_state_dict(method.state_dict())
    assert torch.equal(method.logits(of.images), other.logits(of.images))


@pytest.mark.parametrize("head", HEADS)
def test_the_prediction_of_an_image_does_not_depend_on_the_batch(head):
    method, of = warm(head).eval(), batch()
    torch.testing.assert_close(method.logits(of.images[1:2]), method.logits(of.images)[1:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("channels", "dtype", "size"), [(1, "uint8", (16, 16)), (5, "uint16", (24, 16)), (3, "float32", (4, 4))]
)
@torch.no_grad()
def test_all_channels_dtypes_and_shapes_are_supported(head, channels, dtype, size):
    images = spec(channels, size, dtype)
    method, of = make(head, images), batch(images=images)
    found = method(of, clock(of))
    assert found.value.shape == ()
    assert found.value.isfinite()
    for panel in method.picture(of, clock(of)).panels.values():
        assert panel.shape == of.images.shape
        assert panel.dtype == torch.float32
    larger = F.interpolate(of.images.float(), scale_factor=2)
    assert torch.stack(method.predict(larger)).shape == (4, size[0] * 2, size[1] * 2)


@pytest.mark.parametrize("head", HEADS)
def test_bf16_works_with_a_float32_loss(head):
    method, of = warm(head), batch()
    with autocast("bf16", "cpu"):
        loss = method(of, clock(of)).value
        assert method.picture(of, clock(of)).panels["true map"].dtype == torch.float32
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(method(of, clock(of)).value.detach()), rel=0.05)


def test_drop_path_depends_on_the_image_and_applies_to_training_only():
    method, of = make("linear", drop_path=0.9), batch()
    torch.nn.init.normal_(method.head.to_classes.weight)
    one, again, other = (float(method(of, clock(of, seed=seed)).value.detach()) for seed in (0, 0, 1))
    assert one == again != other
    assert torch.equal(torch.stack(method.predict(of.images)), torch.stack(method.predict(of.images)))
    still = make("linear")
    still.load_state_dict(method.state_dict())
    assert torch.equal(method.logits(of.images), still.logits(of.images))


# Loss and picture


def test_the_loss_matches_a_value_computed_by_hand():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    maps = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    maps[0, 0] = IGNORED
    logs = logits.log_softmax(1).gather(1, maps.clamp(max=2)[:, None])[:, 0]
    torch.testing.assert_close(error(logits, maps), -logs[maps != IGNORED].mean())
    assert float(error(logits, torch.full_like(maps, IGNORED))) == 0, (
        "the loss is 0, not nan, if all pixels are ignored"
    )


@pytest.mark.parametrize("head", HEADS)
def test_ignored_pixels_have_no_gradient(head):
    method, of = warm(head), batch()
    changed = of.maps.clone()
    changed[:, :4] = IGNORED
    fewer = Batch(of.images, of.index, of.epoch, maps=changed)
    logits = method.logits(of.images)
    logits.retain_grad()
    error(logits, fewer.maps).backward()
    assert not logits.grad[:, :, :4].any()
    assert logits.grad[:, :, 5:, :-2].abs().sum(1).all()


def test_the_picture_shows_maps_in_fixed_colours():
    method, of = warm(steps=40, rate=3e-3), batch()
    with torch.no_grad():
        picture, loss = method.picture(of, clock(of)), method(of, clock(of)).value
    original, true, guess = picture.panels.values()
    assert list(picture.panels) == ["original", "true map", "predicted map"]
    assert torch.equal(original, of.images.float())
    red, green = (torch.tensor(COLOURS[name]).float() for name in ("red", "green"))
    predicted = torch.stack(method.predict(of.images))
    for panel, maps in ((true, of.maps), (guess, torch.where(of.maps == IGNORED, of.maps, predicted))):
        pixels = panel.movedim(1, 3)
        for one, colour in ((0, red), (1, green), (IGNORED, torch.zeros(3))):
            assert (pixels[maps == one] - colour).abs().amax() < 1e-3, one
    assert "Here red is ground, green is thing." in picture.note
    assert "rare" not in picture.note
    share = (of.maps[of.maps != IGNORED] == 0).float().mean()
    wanted = -(share * share.log() + (1 - share) * (1 - share).log())
    assert float(picture.numbers["shares_of_classes"]) == pytest.approx(float(wanted))
    assert float(picture.numbers["all_classes_alike"]) == pytest.approx(math.log(3))
    assert float(picture.numbers["loss"]) == pytest.approx(float(loss))


def test_every_class_has_a_distinct_colour():
    table = colour_table(200)
    assert table.shape == (200, 3)
    assert len({tuple(row) for row in (table * 1000).round().tolist()}) == 200
    assert torch.equal(colour_table(5), table[:5])
    assert table.amax(1).min() > 0.3, "ignored pixels are black"


@torch.no_grad()
def test_loss_is_zero_if_all_pixels_are_ignored():
    method, of = make(), batch()
    empty = Batch(of.images, of.index, of.epoch, maps=torch.full_like(of.maps, IGNORED))
    assert float(method(empty, clock(empty)).value) == 0
    assert all(number.isfinite() for number in method.picture(empty, clock(empty)).numbers.values())


# Rejected settings


def test_images_without_masks_are_rejected():
    of = batch()
    with pytest.raises(UserError, match="--annotations"):
        make()(Batch(of.images, of.index, of.epoch), clock(of))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"last_blocks": 5}, "encoder of 4 blocks"),
        ({"classes": ("one",)}, "at least 2"),
        ({"classes": tuple(map(str, range(255)))}, "at most 254"),
        ({"head": "mask2former"}, "upernet"),
        ({"colours": 3}, "colours"),
    ],
)
def test_impossible_settings_are_rejected(wrong, said):
    with pytest.raises(ValidationError, match=said):
        Config.model_validate(config().model_dump() | wrong)


# UPerNet


def test_feature_blocks_match_beits_code():
    head = UPerNet(8, 8, 3, (16, 16), (14, 14))
    assert head.blocks(12) == (4, 6, 8, 12)
    assert head.blocks(24) == (8, 12, 16, 24)
    assert head.blocks(6) == (2, 3, 4, 6)
    assert head.blocks(1) == (1, 1, 1, 1)
    assert UPerNet(8, 8, 3, (16, 16), (1, 4)).blocks(12) == (6, 8, 12), (
        "with three levels, the last one reads the last block"
    )


@pytest.mark.parametrize("name", ["segment_nano", "segment_base"])
def test_recipes_use_the_blocks_of_beit_and_older_runs_use_evenly_spaced_blocks(name):
    method = find(name).method
    assert method.feature_blocks == "beit"
    older = {key: value for key, value in method.model_dump().items() if key != "feature_blocks"}
    segmenter = Segmenter(Config.model_validate(older), ImageSpec(3, (224, 224), "uint8", (0.0,) * 3, (1.0,) * 3))
    assert segmenter.head.blocks(12) == (3, 6, 9, 12)


def test_feature_blocks_are_evenly_spaced_and_include_the_last():
    head = UPerNet(8, 8, 3, (16, 16), (14, 14), "even")
    assert head.scales == (4.0, 2.0, 1.0, 0.5)
    assert head.blocks(12) == (3, 6, 9, 12)
    assert head.blocks(24) == (6, 12, 18, 24)
    assert head.blocks(1) == (1, 1, 1, 1)
    assert head.blocks(6) == (2, 3, 5, 6)


def test_there_is_no_level_finer_than_a_pixel_or_coarser_than_the_grid():
    assert levels_of((2, 4), (8, 8)) == (2.0, 1.0, 0.5)
    assert levels_of((1, 1), (8, 8)) == (1.0, 0.5)
    assert levels_of((16, 16), (1, 4)) == (4.0, 2.0, 1.0)


@pytest.mark.parametrize(("patch", "grid"), [((4, 4), (3, 5)), ((1, 2), (1, 1)), ((2, 2), (4, 4))])
def test_upernet_accepts_any_grid(patch, grid):
    head = UPerNet(8, 4, 3, patch, grid)
    maps = [torch.randn(1, 8, *grid) for _ in head.scales]
    finest = int(max(head.scales))
    assert head(maps).shape == (1, 3, grid[0] * finest, grid[1] * finest)


def test_gradient_reaches_the_map_of_every_level():
    torch.manual_seed(0)
    head = UPerNet(8, 16, 3, (4, 4), (4, 4))
    maps = [torch.randn(2, 8, 4, 4, requires_grad=True) for _ in range(4)]
    head(maps).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().max() > 0 for x in maps)
