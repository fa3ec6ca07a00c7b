"""The denoising autoencoder: corruptions train, the target is clean, full emphasis on patches is the loss of MAE."""

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock
from unmask.methods.dae import DAE, Config
from unmask.nn.corrupt import masking
from unmask.nn.dense import DenseConfig
from unmask.nn.losses import mean_square
from unmask.nn.patches import patchify, take
from unmask.optim import OptimConfig, make_optimizer, update
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
def test_full_emphasis_with_masking_noise_on_patches_is_the_masked_only_loss():
    """As MAE's: mean square over the pixels of hidden patches, the same number hidden in every image."""
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
def test_double_emphasis_weighs_corrupted_and_untouched_values():
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
        {"loss": "bce"},
    ],
    ids=str,
)
def test_every_corruption_trains_and_is_drawn(changes):
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


@torch.no_grad()
def test_an_image_is_corrupted_alike_wherever_it_stands():
    method, batch = dae(corruption="gaussian"), batch_of()
    turned = Batch(batch.images.flip(0), batch.index.flip(0), batch.epoch)
    ours = method.corrupt(method.encoder.pixels(batch.images), clock(batch).rng)[0]
    theirs = method.corrupt(method.encoder.pixels(turned.images), clock(turned).rng)[0]
    assert torch.equal(ours, theirs.flip(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruption": "gaussian", "share": 0.5}, "share and grain are for masking and salt_and_pepper"),
        ({"corruption": "gray", "grain": 4}, "share and grain are for"),
        ({"sigma": 0.1}, "sigma is for gaussian, but corruption=masking"),
        ({"corruption": "gray", "beta": 0.0}, "gray touches all"),
        ({"alpha": 0.0}, "alpha=0 came"),
        ({"grain": 5}, "is not a multiple of patch size 5"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dae(**changes)


@pytest.mark.parametrize("corruption", ["gray", "single_channel"])
def test_colours_cannot_be_taken_from_gray_images(corruption):
    gray = ImageSpec(1, (8, 12), "uint8", (120.0,), (60.0,))
    with pytest.raises(UserError, match="these images have one channel"):
        dae(gray, corruption=corruption)
