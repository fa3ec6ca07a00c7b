"""CrossMAE: number of predicted patches, inputs of the decoder, and trained parameters."""

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock
from unmask.methods.crossmae import Config, CrossMAE, num_asked
from unmask.nn.decoders import DecoderConfig
from unmask.nn.masks import random_mask
from unmask.nn.patches import put, take
from unmask.nn.vit import ViTConfig
from unmask.recipes.crossmae import crossmae_base
from unmask.rng import Draws

SMALL = ImageSpec(3, (16, 24), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))


def small(**changes) -> CrossMAE:
    torch.manual_seed(0)
    encoder = ViTConfig(width=32, depth=2, heads=2, patch=(4, 4))
    return CrossMAE(Config(encoder=encoder, decoder=DecoderConfig(width=16, depth=3, heads=2), **changes), SMALL)


def small_batch(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch, seed: int = 0) -> Clock:
    return Clock(0, 10, Draws(seed, batch.epoch, batch.index))


@pytest.mark.parametrize(
    ("patches", "mask_ratio", "predict_ratio", "asked"),
    [
        (196, 0.75, 0.25, 49),
        (196, 0.75, 0.75, 147),
        (196, 0.75, 0.15, 30),  # 147 hidden minus 196 x 0.60 = 117.6 rounded down
        (256, 0.75, 0.25, 64),
        (64, 0.75, 0.25, 16),
        (24, 0.75, 1e-9, 1),
        (100, 0.9, 0.3, 30),  # 90 hidden minus 60: 100 x (0.9 - 0.3) must not be truncated to 59
    ],
)
def test_predict_ratio_determines_the_number_of_predicted_patches(patches, mask_ratio, predict_ratio, asked):
    assert num_asked(patches, mask_ratio, predict_ratio) == asked


def test_predicting_more_patches_than_are_hidden_is_rejected():
    with pytest.raises(UserError, match=r"got a predict ratio of 0.8 and a mask ratio of 0.75"):
        small(predict_ratio=0.8)


def test_the_recipe_has_the_settings_of_the_paper():
    config = crossmae_base()
    assert config.method.mask_ratio == 0.75
    assert config.method.predict_ratio == 0.25
    assert config.method.weighted_features
    assert config.method.target == "norm_pixels"
    assert config.method.decoder == DecoderConfig(width=512, depth=12, heads=16)
    # The learning rate is 2.4e-3, scaled by predict ratio / mask ratio.
    assert config.optim.base_lr * config.train.batch_size / 256 == pytest.approx(2.4e-3 / 3)
    assert Config(encoder=config.method.encoder).decoder.depth == 12


@torch.no_grad()
def test_the_decoder_computes_only_the_predicted_patches(monkeypatch):
    method, batch = small(), small_batch()
    real, seen = method.decoder.forward, []
    monkeypatch.setattr(method.decoder, "forward", lambda layers, where: seen.append(where) or real(layers, where))
    loss = method(batch, clock(batch)).value
    mask = random_mask(4, (4, 6), 0.75, clock(batch).rng)
    assert mask.drop.shape == (4, 18)
    assert torch.equal(seen[0], mask.drop[:, -6:])
    # targets of other patches do not change the loss
    real_target = method.target.forward
    noise = torch.randn(4, 6, 48)
    for where, counts in ((mask.drop[:, :6], False), (seen[0], True)):
        changed = lambda patches, images, valid=None, where=where: put(real_target(patches, images), where, noise)  # noqa: E731
        monkeypatch.setattr(method.target, "forward", changed)
        assert (float(method(batch, clock(batch)).value) != float(loss)) == counts


@torch.no_grad()
def test_the_decoder_reads_the_input_and_every_block():
    method, batch = small(), small_batch()
    patches = method.encoder.patches(batch.images)
    mask = random_mask(4, (4, 6), 0.75, clock(batch).rng)
    layers = method.layers(patches, mask)
    assert [tuple(layer.shape) for layer in layers] == [(4, 7, 32)] * 3
    tokens = method.encoder.embed(take(patches, mask.keep), mask.keep)
    assert torch.equal(layers[0][:, 1:], tokens)
    assert torch.equal(layers[1], method.encoder.blocks[0](layers[0]))
    assert torch.allclose(method.encoder.norm(layers[2]), method.encoder.run(tokens), atol=1e-6)
    last = small(weighted_features=False).layers(patches, mask)
    assert torch.allclose(last[0], method.encoder.run(tokens), atol=1e-6)


@torch.no_grad()
def test_hidden_pixels_never_reach_the_prediction():
    method, batch = small(), small_batch()
    patches = method.encoder.patches(batch.images)
    mask = random_mask(4, (4, 6), 0.75, clock(batch).rng)
    other = put(patches, mask.drop, torch.randn(4, 18, 48))
    guess = method.decoder(method.layers(patches, mask), mask.drop)
    assert torch.equal(guess, method.decoder(method.layers(other, mask), mask.drop))
    visible = put(patches, mask.keep, torch.randn(4, 6, 48))
    assert not torch.allclose(guess, method.decoder(method.layers(visible, mask), mask.drop))


@pytest.mark.parametrize("weighted", [True, False])
def test_final_encoder_norm_is_trained_only_if_it_is_used(weighted):
    method, batch = small(weighted_features=weighted), small_batch()
    method(batch, clock(batch)).value.backward()
    assert method.encoder.norm.weight.requires_grad != weighted
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters() if p.requires_grad)


@torch.no_grad()
def test_picture_predicts_every_hidden_patch_and_reports_the_same_loss():
    method, batch = small(), small_batch()
    picture = method.picture(batch, clock(batch))
    assert list(picture.panels) == ["original", "masked 75%", "prediction", "pasted", "pasted, nearest stats"]
    original, masked, _, pasted, _ = picture.panels.values()
    hidden = (masked - original).abs().amax(1) > 1e-3
    assert 0.7 < hidden.float().mean() <= 0.75
    assert (pasted - original).abs().amax(1)[~hidden].max() < 1e-3
    assert (pasted - original).abs().amax(1)[hidden].min() > 1e-4
    assert float(picture.numbers["loss"]) == pytest.approx(float(method(batch, clock(batch)).value), rel=1e-5)
    assert set(picture.numbers) == {"loss", "true_patch_mean", "visible_mean", "nearest_visible"}
    assert "6 of the 18 hidden patches" in picture.note
    assert "TRUE mean" in picture.note
    assert "TRUE mean" not in small(target="pixels").picture(batch, clock(batch)).note
