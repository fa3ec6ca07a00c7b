"""SimMIM: whole cells are hidden, mask tokens go through the encoder, and the loss is the official one."""

import pytest
import torch
import torch.nn.functional as F

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock
from unmask.methods.simmim import Config, SimMIM, cell_mask, num_hidden
from unmask.nn.patches import put, take
from unmask.nn.vit import ViTConfig
from unmask.recipes.simmim import simmim_base
from unmask.rng import Draws

IMAGENET = ImageSpec(3, (224, 224), "uint8", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
SMALL = ImageSpec(3, (16, 24), "uint8", (120.0, 110.0, 100.0), (60.0, 50.0, 40.0))


def small(**changes) -> SimMIM:
    torch.manual_seed(0)
    return SimMIM(Config(encoder=ViTConfig(width=32, depth=2, heads=2, patch=(4, 4)), **changes), SMALL)


def small_batch(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch, seed: int = 0) -> Clock:
    return Clock(0, 10, Draws(seed, batch.epoch, batch.index))


def draws(count: int) -> Draws:
    return Draws(0, torch.zeros(count, dtype=torch.int64), torch.arange(count))


@pytest.mark.parametrize(
    ("cells", "ratio", "hidden"),
    [(49, 0.6, 30), (36, 0.6, 22), (16, 0.6, 10), (6, 0.6, 4), (5, 0.6, 3), (25, 0.28, 7), (4, 0.01, 1)],
)
def test_the_number_of_cells_is_rounded_up(cells, ratio, hidden):
    assert num_hidden(cells, ratio) == hidden


@pytest.mark.parametrize("cell", [(2, 2), (2, 1), (1, 7)])
def test_whole_cells_are_hidden(cell):
    mask = cell_mask(50, (14, 14), cell, 0.6, draws(50))
    hidden = mask.hidden().reshape(50, 14 // cell[0], cell[0], 14 // cell[1], cell[1])
    cells = hidden[:, :, :1, :, :1]
    assert torch.equal(hidden, cells.expand_as(hidden))
    assert set(cells.flatten(1).sum(1).tolist()) == {num_hidden(196 // (cell[0] * cell[1]), 0.6)}
    assert torch.equal(torch.cat([mask.keep, mask.drop], 1).sort().values, torch.arange(196).expand(50, -1))
    assert cells.flatten(1).unique(dim=0).shape[0] == 50, "masks differ between images"
    often = cells.float().mean(0)
    assert often.min() > 0.2
    assert often.max() < 0.95


def test_cells_that_do_not_fit_are_rejected_with_a_fitting_size():
    with pytest.raises(
        UserError, match=r"cells of 3 x 4 patches, which do not tile the grid of 4 x 6 .*mask_cell=\[1,2\]"
    ):
        small(mask_cell=(3, 4))
    small(mask_cell=(1, 2))
    with pytest.raises(UserError, match=r"hides 6 of 6 cells.*at most 0.833"):
        small(mask_ratio=0.9)
    with pytest.raises(UserError, match=r"smaller method.mask_cell"):
        small(mask_cell=(4, 6))


@torch.no_grad()
def test_loss_and_head_are_the_official_ones():
    """The official head is a 1 x 1 convolution and a pixel shuffle; its loss divides by hidden pixels and channels."""
    method, batch = small(), small_batch()
    mask = cell_mask(4, (4, 6), (2, 2), 0.6, clock(batch).rng)
    encoder = method.encoder
    patches = encoder.patches(batch.images)
    tokens = encoder.patch_embed(patches)
    hidden = mask.hidden()
    tokens = tokens * ~hidden[..., None] + method.mask_token * hidden[..., None]
    tokens = encoder.run(encoder.place(tokens))[:, 1:]
    maps = tokens.transpose(1, 2).reshape(4, 32, 4, 6)
    weight = method.head.weight.reshape(4, 4, 3, 32).permute(2, 0, 1, 3).reshape(48, 32, 1, 1)
    bias = method.head.bias.reshape(4, 4, 3).permute(2, 0, 1).flatten()
    rebuilt = F.pixel_shuffle(F.conv2d(maps, weight, bias), 4)
    images = (batch.images - encoder.mean[:, None, None]) / encoder.std[:, None, None]
    flags = hidden.reshape(4, 4, 6).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].float()
    official = ((images - rebuilt).abs() * flags).sum() / (flags.sum() + 1e-5) / 3
    assert flags.mean() == pytest.approx(4 / 6)
    assert float(method(batch, clock(batch)).value) == pytest.approx(float(official), rel=1e-5)


@torch.no_grad()
def test_prediction_depends_on_the_mask_token_but_not_on_hidden_pixels():
    method, batch = small(), small_batch()
    mask = cell_mask(4, (4, 6), (2, 2), 0.6, clock(batch).rng)
    patches = method.encoder.patches(batch.images)
    guess = method.guess(patches, mask)
    assert guess.shape == (4, 16, 48)
    assert torch.equal(method.guess(put(patches, mask.drop, torch.randn(4, 16, 48)), mask), guess)
    assert not torch.allclose(method.guess(put(patches, mask.keep, torch.randn(4, 8, 48)), mask), guess)
    method.mask_token += 1 + torch.arange(32)
    assert not torch.allclose(method.guess(patches, mask), guess)
    assert (guess[:, 0] - guess[:, 5]).abs().max() > 1e-4, "predictions depend on the position"


def test_the_encoder_of_the_recipe_has_a_shared_relative_bias_and_layer_scale_and_no_positions():
    with torch.device("meta"):
        encoder = simmim_base().build(IMAGENET).encoder
    plain = 85_798_656 - 197 * 768
    assert sum(p.numel() for p in encoder.parameters()) == plain + (27 * 27 + 3) * 12 + 12 * 2 * 768
    assert encoder.pos_embed is None


def test_the_recipe_has_the_settings_of_the_paper():
    config = simmim_base()
    assert (config.optim.betas, config.optim.clip, config.optim.weight_decay) == ((0.9, 0.999), 5.0, 0.05)
    # The official code has a learning rate of 1e-4 x 2048 / 512.
    assert config.optim.base_lr * config.train.batch_size / 256 == pytest.approx(4e-4)
    assert config.data.crop.scale == (0.67, 1.0)
    assert (config.train.epochs, config.optim.warmup * config.train.epochs) == (800, 10)
    assert (config.method.mask_ratio, config.method.mask_cell) == (0.6, (2, 2))


@torch.no_grad()
def test_the_mask_token_starts_within_one_standard_deviation():
    assert small().mask_token.abs().max() <= 0.02
    assert float(small().mask_token.abs().max()) > 0.01


@torch.no_grad()
def test_picture_pastes_predictions_and_reports_baselines():
    method, batch = small(), small_batch()
    picture = method.picture(batch, clock(batch))
    assert list(picture.panels) == ["original", "masked 67%", "prediction", "pasted"]
    assert float(picture.numbers["loss"]) == pytest.approx(float(method(batch, clock(batch)).value), rel=1e-5)
    mask = cell_mask(4, (4, 6), (2, 2), 0.6, clock(batch).rng)
    original, masked, prediction, pasted = (method.encoder.patches(panel) for panel in picture.panels.values())
    assert take(masked, mask.drop).abs().max() < 1e-3
    assert take(prediction, mask.keep).abs().max() < 1e-3
    assert (take(pasted, mask.keep) - take(original, mask.keep)).abs().max() < 1e-3
    assert torch.allclose(take(pasted, mask.drop), method.guess(original, mask), atol=1e-3)
    truth = take(original, mask.drop)
    means = truth.unflatten(2, (16, 3)).mean(2, keepdim=True)
    spread = (truth.unflatten(2, (16, 3)) - means).abs().mean()
    assert float(picture.numbers["true_patch_mean"]) == pytest.approx(float(spread), rel=1e-4)
    assert set(picture.numbers) == {"loss", "true_patch_mean", "visible_mean", "nearest_visible"}
