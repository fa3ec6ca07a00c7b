"""Masked patch prediction: corruption, the three targets, and the loss on corrupted patches only."""

import math

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock
from unmask.methods.mpp import MPP, Config, corrupt
from unmask.nn.colours import LEVELS
from unmask.nn.masks import random_mask
from unmask.nn.patches import put, take
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig, make_optimizer, update
from unmask.recipes.mpp import mpp_base
from unmask.rng import Draws, Stream

IMAGENET = ImageSpec(3, (224, 224), "uint8", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
TARGETS = ("mean_colour", "colours_4x4", "pixels")


def spec(channels: int = 3, dtype: str = "uint8", mean: float = 110.0, std: float = 60.0) -> ImageSpec:
    return ImageSpec(channels, (16, 24), dtype, (mean,) * channels, (std,) * channels)


def small(target: str = "mean_colour", images: ImageSpec | None = None, patch: tuple[int, int] = (4, 4)) -> MPP:
    torch.manual_seed(0)
    encoder = ViTConfig(width=32, depth=2, heads=2, patch=patch)
    return MPP(Config(encoder=encoder, target=target), images or spec())


def small_batch(count: int = 4, channels: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, 16, 24), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch, seed: int = 0) -> Clock:
    return Clock(0, 10, Draws(seed, batch.epoch, batch.index))


def draws(count: int) -> Draws:
    return Draws(0, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def test_40_percent_of_the_patches_are_masked_5_swapped_and_5_unchanged():
    change = corrupt(2000, (14, 14), 0.5, draws(2000))
    assert change.where.shape == (2000, 98)
    assert len(change.where[0].unique()) == 98
    swapped = change.source != change.where
    assert not (swapped & change.masked).any()
    share = {"masked": change.masked, "swapped": swapped, "unchanged": ~change.masked & ~swapped}
    share = {name: float(flags.sum()) / (2000 * 196) for name, flags in share.items()}
    assert share == pytest.approx({"masked": 0.40, "swapped": 0.05, "unchanged": 0.05}, abs=0.003)


def test_swapped_patch_is_any_other_patch_of_the_image():
    change = corrupt(2000, (3, 4), 0.5, draws(2000))
    swapped = change.source != change.where
    fate = draws(2000).uniform(12, Stream.REPLACE)[:, :6]
    assert torch.equal(swapped, (fate >= 0.8) & (fate < 0.9)), "never itself"
    steps = ((change.source - change.where) % 12)[swapped]
    assert steps.unique().tolist() == list(range(1, 12))
    counts = steps.bincount()[1:]
    assert counts.min() > 0.7 * counts.float().mean()
    assert change.source.min() == 0
    assert change.source.max() == 11


def test_places_and_kinds_of_corruption_use_separate_random_streams():
    change = corrupt(3, (4, 6), 0.5, draws(3))
    assert torch.equal(change.where, random_mask(3, (4, 6), 0.5, draws(3)).drop)
    assert torch.equal(change.masked, draws(3).uniform(24, Stream.REPLACE)[:, :12] < 0.8)


@pytest.mark.parametrize(("target", "outputs"), [("mean_colour", 512), ("colours_4x4", 16 * 512), ("pixels", 768)])
def test_heads_have_the_sizes_of_the_paper(target, outputs):
    config = mpp_base().method.model_copy(update={"target": target})
    with torch.device("meta"):
        method = MPP(config, IMAGENET)
    assert method.head.out_features == outputs
    assert method.head.in_features == 768
    assert sum(p.numel() for p in method.encoder.parameters()) == 85_798_656  # size of ViT-B/16 without classifier


def test_the_recipe_has_the_settings_of_the_paper():
    config = mpp_base()
    assert config.method.corrupt_ratio == 0.5
    assert config.method.target == "mean_colour"
    assert config.train.batch_size == 4096
    assert config.optim.base_lr * 4096 / 256 == pytest.approx(2e-4)
    assert config.optim.warmup * config.train.steps == 10_000
    assert config.method.encoder.positions == "learned"


@pytest.mark.parametrize("target", TARGETS)
def test_training_reduces_the_loss_with_every_target(target):
    method, batch = small(target), small_batch(8)
    flat = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 255
    batch = Batch((flat + batch.images / 16).clamp(0, 255).to(torch.uint8), batch.index, batch.epoch)
    optimizer, losses = make_optimizer(method, OptimConfig()), []
    for step in range(40):
        loss = method(batch, Clock(step, 40, clock(batch).rng))
        loss.value.backward()
        update(optimizer, 3e-3, loss.value.detach(), None)
        losses.append(float(loss.value.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert ("colour_accuracy" in loss.logs) == (target != "pixels")
    if loss.logs:
        assert 0.3 < float(loss.logs["colour_accuracy"]) <= 1


@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_the_loss_is_on_the_corrupted_patches_only(target, monkeypatch):
    method, batch = small(target), small_batch()
    loss = float(method(batch, clock(batch)).value)
    mask = random_mask(4, (4, 6), 0.5, clock(batch).rng)
    real = method.target
    for where, counts in ((mask.keep, False), (mask.drop, True)):

        def shifted(images, valid=None, where=where):
            truth = real(images)
            return put(truth, where, (take(truth, where) + 1) % 512)

        monkeypatch.setattr(method, "target", shifted)
        assert (float(method(batch, clock(batch)).value) != loss) == counts


@torch.no_grad()
def test_encoder_sees_neither_masked_nor_original_swapped_patches():
    method, batch = small(), small_batch()
    change = corrupt(4, (4, 6), 0.5, clock(batch).rng)
    patches = method.encoder.patches(batch.images)
    guess = method.guess(patches, change)
    assert guess.shape == (4, 12, 512)

    sources = torch.zeros(4, 24).scatter_add(1, change.source, (~change.masked).float()) > 0
    unseen = torch.zeros(4, 24, dtype=torch.bool).scatter(1, change.where, True) & ~sources
    assert unseen.sum() > 20
    changed = torch.where(unseen[..., None], torch.randn(4, 24, 48), patches)
    assert torch.equal(method.guess(changed, change), guess)
    changed = torch.where(unseen[..., None], patches, torch.randn(4, 24, 48))
    assert not torch.allclose(method.guess(changed, change), guess)

    everything_from = change._replace(masked=torch.zeros_like(change.masked), source=change.where[:, :1].expand(-1, 12))
    by_hand = put(patches, change.where, take(patches, everything_from.source))
    tokens = method.encoder.run(method.encoder.embed(by_hand))[:, 1:]
    assert torch.allclose(method.guess(patches, everything_from), method.head(take(tokens, change.where)), atol=1e-5)


@torch.no_grad()
def test_targets_match_known_images():
    method = small()
    images = torch.zeros(1, 3, 16, 24, dtype=torch.uint8)
    images[0, 0, :4, :4] = 255  # The first patch is red.
    images[0, 1, :2, 4:8] = 255  # The second is half green: its mean of 127.5 is level 4.
    images[0, :, 4:8, :4] = 100  # The patch below the first is grey, which is level 3 of each channel.
    target = method.target(images)
    assert target.shape == (1, 24, 1)
    assert target[0, [0, 1, 6, 2], 0].tolist() == [448, 8 * 4, 3 * 73, 0]

    cells = small("colours_4x4").target(images)
    assert cells.shape == (1, 24, 16)
    assert cells[0, 1].tolist() == [56] * 8 + [0] * 8, "at patch 4 a cell is a pixel"
    assert small("colours_4x4", patch=(8, 8)).target(images)[0, 0].tolist() == [
        *(448, 448, 56, 56, 448, 448, 0, 0),
        *(219, 219, 0, 0, 219, 219, 0, 0),
    ]
    assert torch.equal(small("pixels").target(images), small("pixels").encoder.patches(images))


def test_patches_that_do_not_shrink_to_4x4_are_rejected():
    with pytest.raises(UserError, match="patches of 8 x 6 pixels, which cannot be shrunk to 4 x 4 whole cells"):
        small("colours_4x4", patch=(8, 6))
    small("mean_colour", patch=(8, 6))


@pytest.mark.parametrize(("channels", "outputs"), [(1, 8), (2, 64), (3, 512), (4, 4 * 8), (5, 5 * 8)])
@torch.no_grad()
def test_other_channel_counts_have_one_softmax_or_one_per_channel(channels, outputs):
    method, batch = small(images=spec(channels)), small_batch(channels=channels)
    assert method.head.out_features == outputs
    painted = method.encoder.images(method.paint(method.target(batch.images)))
    cell_mean = torch.nn.functional.avg_pool2d(batch.images.float(), 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (painted - cell_mean).abs().max() <= 255 / LEVELS / 2 + 1e-3
    assert sorted(small("colours_4x4", spec(channels)).target(batch.images).shape) == sorted(
        (4, 24, 16 * outputs // 8 ** (channels if channels < 4 else 1))
    )


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@torch.no_grad()
def test_16_bit_and_float_images_are_quantised_within_two_standard_deviations(dtype):
    method = small(images=spec(1, dtype, mean=1000.0, std=100.0))
    values = torch.tensor([700.0, 801, 849, 851, 999, 1001, 1199, 1300])
    images = values.repeat_interleave(2)[None, None, None].expand(1, 1, 16, 16)[..., :16]
    images = torch.cat([images, images[..., :8]], -1).to(getattr(torch, dtype))
    method = small(images=spec(1, dtype, mean=1000.0, std=100.0), patch=(16, 2))
    assert method.target(images)[0, :8, 0].tolist() == [0, 0, 0, 1, 3, 4, 7, 7]


@torch.no_grad()
def test_picture_shows_the_corruption_and_reports_a_baseline():
    method, batch = small(), small_batch()
    picture = method.picture(batch, clock(batch))
    assert list(picture.panels) == ["original", "corrupted", "pasted", "perfect"]
    assert float(picture.numbers["loss"]) == pytest.approx(float(method(batch, clock(batch)).value), rel=1e-5)
    original, corrupted, pasted, perfect = (method.encoder.patches(panel) for panel in picture.panels.values())
    change = corrupt(4, (4, 6), 0.5, clock(batch).rng)
    shown = take(corrupted, change.where)
    assert shown[change.masked].abs().max() < 1e-3
    assert (shown - take(original, change.source))[~change.masked].abs().max() < 1e-3
    kept = random_mask(4, (4, 6), 0.5, clock(batch).rng).keep
    for panel in (corrupted, pasted, perfect):
        assert (take(panel, kept) - take(original, kept)).abs().max() < 1e-3
    assert list(small("pixels").picture(batch, clock(batch)).panels) == ["original", "corrupted", "pasted"]


@torch.no_grad()
def test_the_entropy_of_colours_matches_a_value_computed_by_hand():
    one = small()
    truth = torch.tensor([[3, 3, 3, 7]])[..., None]
    quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert float(one.marginal_entropy(truth)) == pytest.approx(quarter, rel=1e-5)
    five = small(images=spec(5))
    constant = torch.zeros(1, 4, 5, dtype=torch.int64)
    constant[0, :, 2] = torch.tensor([3, 3, 3, 7])
    assert float(five.marginal_entropy(constant)) == pytest.approx(quarter / 5, rel=1e-5), (
        "the entropy is the mean over channels"
    )
