"""The dVAE: sizes of DALL-E, loss against values computed by hand, schedules, codebook usage, and the tokenizer."""

import math
import re

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock
from unmask.methods.dvae import (
    DVAE,
    Config,
    even_steps,
    gumbel_softmax,
    half_cosine,
    kl_to_uniform,
    logit_laplace,
    usage,
)
from unmask.nn.conv_vae import ConvDecoder, ConvEncoder, ConvVAEConfig, Tokenizer, squeeze
from unmask.recipes.dvae import dvae_dalle, dvae_nano
from unmask.rng import Draws, Stream

SPEC = ImageSpec(3, (16, 24), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))


def dvae(**changes) -> DVAE:
    torch.manual_seed(0)
    network = ConvVAEConfig(**({"codes": 16, "width": 16, "depth": 1, "patch": 4} | changes.pop("encoder", {})))
    return DVAE(Config(encoder=network, **changes), SPEC)


def batch_of(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch, step: int = 0, total: int = 100) -> Clock:
    return Clock(step, total, Draws(0, batch.epoch, batch.index))


def test_the_published_architecture_has_the_published_size():
    config = dvae_dalle().method.encoder
    with torch.device("meta"):
        encoder = ConvEncoder(config, ImageSpec(3, (256, 256), "uint8", (120.0,) * 3, (60.0,) * 3))
        decoder = ConvDecoder(config, 3)
        ids = torch.zeros(1, 32, 32, dtype=torch.int64)
        assert encoder.logits(torch.zeros(1, 3, 256, 256)).shape == (1, 8192, 32, 32)
        assert decoder(torch.zeros(1, 8192, *ids.shape[1:])).shape == (1, 6, 256, 256)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(53.79, abs=0.005)
    assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(43.83, abs=0.005)
    assert encoder.hidden[1].gain == 1 / 64
    assert [layer.kernel_size[0] for layer in encoder.hidden[1].layers[1::2]] == [3, 3, 3, 1]
    assert [layer.kernel_size[0] for layer in decoder.layers[1].layers[1::2]] == [1, 3, 3, 3]
    assert encoder.hidden[1].layers[1].weight.shape[:2] == (64, 256), "a quarter inside"


def test_convolutions_start_as_in_the_published_code():
    torch.manual_seed(0)
    first = ConvEncoder(ConvVAEConfig(arch="dalle", codes=64, width=32, patch=8), SPEC).hidden[0]
    assert float(first.weight.detach().std()) == pytest.approx((3 * 49) ** -0.5, rel=0.05)
    assert first.bias.detach().eq(0).all()


def test_temperature_and_kl_weight_follow_the_schedules_of_the_paper():
    """In 3 M steps, the temperature falls from 1 to 1/16 within 150,000 steps and the KL weight rises from 0 to 6.6 /
    192 within 5,000, both along half a cosine.
    """
    config = dvae_dalle()
    with torch.device("meta"):
        method = DVAE(config.method, ImageSpec(3, (256, 256), "uint8", (120.0,) * 3, (60.0,) * 3))
    total = config.train.steps
    assert method.schedules(0.0) == (1.0, 0.0)
    assert method.schedules(75_000 / total)[0] == pytest.approx((1 + 1 / 16) / 2)
    assert method.schedules(150_000 / total)[0] == pytest.approx(1 / 16)
    assert method.schedules(2_500 / total)[1] == pytest.approx(3.3 / 192)
    assert method.schedules(5_000 / total)[1] == method.schedules(1.0)[1] == pytest.approx(6.6 / 192)
    assert half_cosine(1.0, 0.0, 0.25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert (config.optim.base_lr * 512 / 256, config.optim.final_lr * 1e-4) == (1e-4, pytest.approx(1.25e-6))


def test_logit_laplace_is_a_density_over_pixels():
    """The density integrates to 1 over (0, 1) and matches the formula."""
    x = torch.linspace(1e-4, 1 - 1e-4, 20_001)
    for center, log_scale in ((0.0, 0.0), (1.0, -1.0)):
        guess = torch.tensor([center, log_scale]).reshape(1, 2, 1, 1)
        density = torch.stack([(-logit_laplace(guess, v.reshape(1, 1, 1, 1))).exp() for v in x[::20]])
        assert float(torch.trapezoid(density, x[::20])) == pytest.approx(1, abs=0.01)
    b, z = math.exp(-1.0), math.log(0.3 / 0.7)
    expected = abs(z - 1) / b + math.log(2 * b * 0.3 * 0.7)
    found = logit_laplace(torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1), torch.full((1, 1, 1, 1), 0.3))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_kl_is_zero_for_uniform_scores_and_log_v_for_certain_ones():
    assert float(kl_to_uniform(torch.zeros(2, 8, 3, 3))) == pytest.approx(0, abs=1e-6)
    certain = torch.zeros(2, 8, 3, 3)
    certain[:, 3] = 100
    assert float(kl_to_uniform(certain)) == pytest.approx(math.log(8), rel=1e-5)


def test_codebook_usage_matches_values_computed_by_hand():
    perplexity, used = usage(torch.tensor([[[0, 0], [1, 1]]]), 8)
    assert (float(perplexity), float(used)) == (pytest.approx(2), 0.25)


def test_gumbel_choices_follow_the_softmax_and_harden_with_the_temperature():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).reshape(1, 3, 1, 1).expand(4000, -1, 1, 1)
    draws = Draws(0, torch.zeros(4000, dtype=torch.int64), torch.arange(4000))
    soft, hard = gumbel_softmax(logits, 1.0, draws), gumbel_softmax(logits, 1 / 16, draws)
    assert soft.sum(1).sub(1).abs().max() < 1e-5
    share = torch.bincount(hard.argmax(1).flatten(), minlength=3) / 4000
    assert share.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert hard.amax(1).mean() > soft.amax(1).mean() + 0.1
    assert torch.equal(gumbel_softmax(logits[:1], 1.0, Draws(0, draws.epoch[7:8], draws.index[7:8])), soft[7:8])


def test_extreme_draws_stay_finite(monkeypatch):
    streams = []
    ends = torch.tensor([[0.0, 1 - 2.0**-24]])
    monkeypatch.setattr(Draws, "uniform", lambda self, count, stream: streams.append(stream) or ends)
    found = gumbel_softmax(torch.zeros(1, 2, 1, 1), 1 / 16, clock(batch_of()).rng)
    assert found.isfinite().all()
    assert streams == [Stream.CODES], "codes have their own random stream"


@torch.no_grad()
def test_the_loss_is_reconstruction_plus_weighted_kl():
    method, batch = dvae(kl_weight=0.5, kl_share=0.1, temperature_share=0.1), batch_of()
    for step in (0, 5, 50):
        loss = method(batch, clock(batch, step))
        logs = {name: float(value) for name, value in loss.logs.items()}
        assert float(loss.value) == pytest.approx(logs["reconstruction"] + logs["kl_weight"] * logs["kl"], rel=1e-5)
        assert logs["kl_weight"] == pytest.approx(half_cosine(0.0, 0.5, step / 10))
        assert logs["temperature"] == pytest.approx(half_cosine(1.0, 1 / 16, step / 10))
        perplexity, used = usage(method.encoder.logits(batch.images).argmax(1), 16)
        assert (logs["perplexity"], logs["codes_used"]) == (float(perplexity), float(used))


@torch.no_grad()
def test_with_logit_laplace_the_picture_is_in_the_files_units():
    method, batch = dvae(encoder={"loss": "logit_laplace"}), batch_of()
    picture = method.eval().picture(batch, clock(batch))
    rebuilt = picture.panels["from its codes"]
    assert rebuilt.shape == batch.images.shape
    assert 0 <= rebuilt.min() <= rebuilt.max() <= 255
    guess = torch.randn(4, 6, 16, 24)
    expected = logit_laplace(guess, 0.1 + 0.8 * batch.images / 255)
    assert float(method.reconstruction(guess, batch.images)) == pytest.approx(float(expected), rel=1e-5)
    assert method.encoder.unit(batch.images).min() >= 0
    assert squeeze(torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)).flatten().tolist() == pytest.approx([0.1, 0.9])
    assert re.search(r"In these 4 images \d+% of the codes occur", picture.note)
    one = batch_of(1)
    assert re.search(r"In this image \d+% of the codes occur", method.picture(one, clock(one)).note)


@torch.no_grad()
def test_tokenizer_with_the_weights_of_a_dvae_has_the_same_codes():
    method, batch = dvae(), batch_of()
    torch.manual_seed(5)
    tokenizer = Tokenizer(method.config.encoder, SPEC, (4, 4))
    assert not torch.equal(tokenizer.ids(batch.images), method.encoder.logits(batch.images).argmax(1).flatten(1))
    tokenizer.load_state_dict(method.state_dict())
    ids = method.encoder.logits(batch.images).argmax(1)
    assert torch.equal(tokenizer.ids(batch.images), ids.flatten(1))
    painted = method.encoder.images(method.decoder.paint(ids))
    assert torch.equal(tokenizer.paint(ids.flatten(1), (16, 24)), painted)


@torch.no_grad()
def test_the_picture_shows_the_likeliest_codes():
    method, batch = dvae(), batch_of()
    ids = method.encoder.logits(batch.images).argmax(1)
    picture = method.eval().picture(batch, clock(batch))
    shares = torch.nn.functional.one_hot(ids, 16).permute(0, 3, 1, 2).float()
    assert torch.allclose(picture.panels["from its codes"], method.encoder.images(method.decoder(shares)), atol=0.01)
    drawn = picture.panels["codes"][:, :, 2::4, 2::4]  # the colour of one pixel of each code
    for code in ids.unique():
        assert len(drawn.movedim(1, -1)[ids == code].unique(dim=0)) == 1, "a code has one colour"
    truth = (batch.images.float() - 120 + torch.tensor([0.0, 10, 20])[:, None, None]) / 60
    assert float(picture.numbers["data_mean_colour"]) == pytest.approx(float(truth.square().mean()), rel=1e-5)


@pytest.mark.parametrize(("channels", "apart"), [(1, 0.001), (3, 0.1), (5, 0.2)])
def test_codes_have_distinct_colours(channels, apart):
    colours = (torch.arange(256)[:, None] * even_steps(channels)).frac().double()
    assert colours.shape == (256, channels)
    assert torch.pdist(colours).min() > apart


def test_features_are_the_hidden_map_in_raster_order():
    method, batch = dvae(), batch_of()
    features = method.encoder(batch.images)
    assert features.grid == (4, 6)
    assert torch.equal(features.map, method.encoder.features(batch.images))
    assert features.cls is None
    assert method.encoder.depth_of("head.weight") == len(method.encoder.hidden)
    assert method.encoder.depth_of("hidden.0.weight") == 0


def test_impossible_networks_and_other_channels_are_rejected():
    with pytest.raises(UserError, match="use 2, 4, 8 or 16"):
        dvae(encoder={"patch": 3})
    with pytest.raises(UserError, match="dalle has one code per 8 x 8"):
        dvae(encoder={"arch": "dalle", "depth": None})
    with pytest.raises(UserError, match="this encoder was trained on 3-channel images"):
        dvae().encoder(torch.zeros(1, 1, 16, 24))


def test_nano_recipe_has_one_code_per_patch_of_other_nano_recipes():
    config = dvae_nano()
    assert config.method.encoder.patch == (4, 4)
    assert config.method.encoder.codes == 256
