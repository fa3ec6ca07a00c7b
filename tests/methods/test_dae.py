"""Denoising autoencoder: all corruptions, clean targets, and the equality of full emphasis on patches with MAE."""

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.config import override
from unmask.errors import UserError
from unmask.method import Clock
from unmask.methods.dae import DAE, Config
from unmask.nn.corrupt import masking
from unmask.nn.dense import DenseConfig
from unmask.nn.losses import mean_square
from unmask.nn.patches import patchify, take
from unmask.optim import OptimConfig, make_optimizer, update
from unmask.recipes.dae import dae_nano
from unmask.rng import Draws

SPEC = ImageSpec(3, (8, 12), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))


def dae(images: ImageSpec = SPEC, **changes) -> DAE:
    torch.manual_seed(0)
    network = DenseConfig(hidden=(32,), code=16, loss=changes.pop("loss", "mse"))
    return DAE(Config(encoder=network, **changes), images)


def batch_of(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch) -> Clock:
    return Clock(0, 10, Draws(0, batch.epoch, batch.index))


@torch.no_grad()
def test_full_emphasis_on_masked_patches_equals_the_loss_of_mae():
    """As in MAE, the loss is the mean squared error over the pixels of hidden patches, equally many in every image."""
    method, batch = dae(grain=4, share=0.5, beta=0.0), batch_of()
    pixels = method.encoder.pixels(batch.images)
    corrupted, touched = masking(pixels, clock(batch).rng.uniform(6), 0.5, (4, 4))
    hidden = patchify(touched, (4, 4)).all(-1)  # (B, N)
    assert hidden.sum(1).tolist() == [3] * 4
    where = hidden.nonzero()[:, 1].reshape(4, 3)
    guess = method.decoder(method.encoder.code(corrupted))
    expected = mean_square(take(patchify(guess, (4, 4)), where), take(patchify(pixels, (4, 4)), where))
    assert float(method(batch, clock(batch)).value) == pytest.approx(float(expected), rel=1e-6)
    everything = float(dae(grain=4, share=0.5)(batch, clock(batch)).value)
    assert everything != pytest.approx(float(expected), rel=1e-3)


@torch.no_grad()
def test_double_emphasis_weights_corrupted_and_unchanged_values():
    batch = batch_of()
    method = dae(share=0.25, beta=0.5)
    pixels = method.encoder.pixels(batch.images)
    corrupted, touched = method.corrupt(pixels, clock(batch).rng)
    errors = (method.decoder(method.encoder.code(corrupted)) - pixels).square()
    expected = (errors[touched].sum() + 0.5 * errors[~touched].sum()) / (touched.sum() + 0.5 * (~touched).sum())
    assert float(method(batch, clock(batch)).value) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share": 0.75, "grain": 4, "beta": 0.0},
        {"corruption": "salt_and_pepper", "share": 0.1},
        {"corruption": "salt_and_pepper", "loss": "bce", "grain": 1},
        {"corruption": "gaussian", "sigma": 0.5},
        {"corruption": "gray"},
        {"corruption": "single_channel", "beta": 0.0},
        {"corruption": "drop_channel", "beta": 0.0},
        {"tied": True},
        {"loss": "bce"},
    ],
    ids=str,
)
def test_training_reduces_the_loss_with_every_corruption_and_the_picture_shows_it(changes):
    method, batch = dae(**changes), batch_of(16)
    optimizer, losses = make_optimizer(method, OptimConfig()), []
    for _ in range(60):
        loss = method(batch, clock(batch)).value
        loss.backward()
        update(optimizer, 1e-2, loss.detach(), None)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    with torch.no_grad():
        picture = method.picture(batch, clock(batch))
    assert float(picture.numbers["loss"]) < float(picture.numbers["data_mean_colour"])
    original, corrupted, rebuilt = picture.panels.values()
    assert (original - corrupted).abs().max() > 5
    assert (original - rebuilt).abs().max() > 1
    assert {panel.shape for panel in picture.panels.values()} == {batch.images.shape}


@pytest.mark.parametrize("corruption", ["masking", "salt_and_pepper", "gaussian", "single_channel", "drop_channel"])
@torch.no_grad()
def test_corruption_does_not_depend_on_the_place_in_the_batch(corruption):
    method, batch = dae(corruption=corruption), batch_of()
    turned = Batch(batch.images.flip(0), batch.index.flip(0), batch.epoch)
    ours = method.corrupt(method.encoder.pixels(batch.images), clock(batch).rng)[0]
    theirs = method.corrupt(method.encoder.pixels(turned.images), clock(turned).rng)[0]
    assert torch.equal(ours, theirs.flip(0))
    later = Batch(batch.images, batch.index, batch.epoch + 1)
    assert not torch.equal(ours, method.corrupt(method.encoder.pixels(later.images), clock(later).rng)[0])


@torch.no_grad()
def test_a_copy_of_the_noisy_input_has_a_loss_equal_to_the_variance_of_the_noise():
    batch = batch_of(16)
    numbers = dae(corruption="gaussian", sigma=0.5).picture(batch, clock(batch)).numbers
    assert float(numbers["corrupted_input"]) == pytest.approx(0.25, rel=0.05)
    masked = dae(beta=0.0).picture(batch, clock(batch)).numbers
    assert float(masked["corrupted_input"]) == pytest.approx(float(masked["data_mean_colour"]), rel=1e-5)


@torch.no_grad()
def test_tied_weights_are_the_encoders_transposed():
    method, batch = dae(tied=True), batch_of()
    for bias in method.decoder.parameters():
        bias.normal_()
    first, second = (method.state_dict()[f"encoder.layers.{number}.weight"] for number in (0, 2))
    inner, outer = method.decoder.parameters()
    code = method.encoder.code(method.encoder.pixels(batch.images))
    expected = (torch.relu(code @ second + inner) @ first + outer).unflatten(1, (3, 8, 12))
    assert torch.allclose(method.decoder(code, method.encoder), expected, atol=1e-5)
    assert {name for name, _ in method.decoder.named_parameters()} == {"biases.0", "biases.1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruption": "gaussian", "share": 0.5}, "share and grain apply to masking and salt_and_pepper"),
        ({"corruption": "gray", "grain": 4}, "share and grain apply to"),
        ({"sigma": 0.1}, "sigma applies to gaussian; got corruption=masking"),
        ({"corruption": "gray", "beta": 0.0}, "gray corrupts all values"),
        ({"corruption": "gaussian", "alpha": 2.0}, "gaussian corrupts all values"),
        ({"share": 0.25, "grain": (8, 12)}, "share=0.25 of 1 components, which corrupts none"),
        ({"share": 0.9, "grain": (8, 12)}, "share=0.9 of 1 components, which corrupts all"),
        ({"alpha": 0.0}, "got alpha=0"),
        ({"grain": 5}, "got method.grain=5 for images of height 8; .* use one of 1, 2, 4, or leave it out"),
    ],
)
def test_settings_without_effect_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        dae(**changes)


@pytest.mark.parametrize("corruption", ["gray", "single_channel", "drop_channel"])
def test_removing_colours_of_gray_images_is_rejected(corruption):
    gray = ImageSpec(1, (8, 12), "uint8", (120.0,), (60.0,))
    with pytest.raises(UserError, match="for images of one channel"):
        dae(gray, corruption=corruption)


COMMANDS = [line for line in (dae_nano.__doc__ or "").splitlines() if "unmask pretrain" in line]


@pytest.mark.parametrize("command", COMMANDS, ids=str.strip)
def test_the_commands_of_the_recipe_are_accepted(command):
    settings = [setting.strip() for setting in command.split("--set ")[1:]]
    images = ImageSpec(3, (32, 32), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))
    assert override(dae_nano(), settings).build(images)
