"""The networks of the dVAE: units, decoding of ids, and a tokenizer that resizes its images."""

import pytest
import torch

from unmask.batch import ImageSpec
from unmask.nn.conv_vae import ConvDecoder, ConvEncoder, ConvVAEConfig, Residual, Tokenizer, squeeze

SPEC = ImageSpec(3, (32, 48), "uint8", (120.0, 110.0, 100.0), (60.0, 50.0, 40.0))
SMALL = ConvVAEConfig(codes=16, width=16, depth=1, patch=(4, 4))
DALLE = ConvVAEConfig(arch="dalle", codes=16, width=16, patch=(8, 8), loss="logit_laplace")


def images(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side", [2, 4, 8, 16])
@torch.no_grad()
def test_shapes_of_codes_and_decoded_images(side):
    config = SMALL.model_copy(update={"patch": (side, side)})
    logits = ConvEncoder(config, SPEC).logits(images())
    assert logits.shape == (4, 16, 32 // side, 48 // side)
    assert ConvDecoder(config, 3)(logits.softmax(1)).shape == (4, 3, 32, 48)


def test_depth_is_the_number_of_residual_blocks_on_either_side():
    for depth in (0, 3):
        config = SMALL.model_copy(update={"depth": depth})
        for network in (ConvEncoder(config, SPEC), ConvDecoder(config, 3)):
            assert sum(isinstance(part, Residual) for part in network.modules()) == depth


@pytest.mark.parametrize("config", [SMALL, DALLE], ids=["small", "dalle"])
@torch.no_grad()
def test_painting_ids_equals_decoding_one_hot_shares(config):
    torch.manual_seed(0)
    decoder = ConvDecoder(config, 3)
    torch.nn.init.normal_(decoder.layers[0].bias)
    ids = torch.randint(0, 16, (2, 4, 6))
    shares = torch.nn.functional.one_hot(ids, 16).permute(0, 3, 1, 2).float()
    expected = decoder(shares)
    assert (decoder.paint(ids) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_each_architecture_has_its_own_normalisation():
    """DALL-E's input is [0, 1] mapped to [0.1, 0.9]; the small network's has zero mean and unit variance."""
    whole = images()
    for config, expected in (
        (SMALL, (whole - torch.tensor(SPEC.mean)[:, None, None]) / torch.tensor(SPEC.std)[:, None, None]),
        (DALLE, 0.1 + 0.8 * whole / 255),
    ):
        encoder = ConvEncoder(config, SPEC)
        encoder.hidden = torch.nn.Identity()
        assert torch.allclose(encoder.features(whole), expected, atol=1e-5)


@torch.no_grad()
def test_values_outside_the_range_of_the_files_are_clipped():
    encoder = ConvEncoder(DALLE, SPEC)
    assert encoder.unit(torch.tensor([-20.0, 0.0, 255.0, 300.0]).expand(1, 3, 1, 4))[0, 0, 0].tolist() == [0, 0, 1, 1]


@torch.no_grad()
def test_predicted_means_are_converted_to_the_files_units():
    encoder = ConvEncoder(DALLE, SPEC)
    values = torch.cat([squeeze(encoder.unit(images())).logit(), torch.zeros(4, 3, 32, 48)], 1)
    assert (encoder.images(values) - images()).abs().max() < 0.01
    beyond = torch.full((1, 6, 2, 2), 50.0)
    assert encoder.images(beyond).eq(255).all()
    assert encoder.images(-beyond).eq(0).all()


@torch.no_grad()
def test_a_residual_block_adds_gain_times_the_output_of_its_layers():
    torch.manual_seed(0)
    block, x = Residual(8, 8, (3, 3, 1), 1.0), torch.randn(2, 8, 4, 4)
    added = block(x) - x
    block.gain = 1 / 64
    assert torch.allclose(block(x) - x, added / 64, atol=1e-6)


@torch.no_grad()
def test_a_tokenizer_keeps_the_normalisation_it_was_trained_with():
    torch.manual_seed(0)
    elsewhere = ImageSpec(3, (32, 48), "uint8", (10.0, 20.0, 30.0), (90.0, 80.0, 70.0))
    trained = Tokenizer(SMALL, elsewhere, (4, 4))
    used = Tokenizer(SMALL, SPEC, (4, 4))
    used.load_state_dict(trained.state_dict())
    assert torch.equal(used.ids(images()), trained.ids(images()))


@torch.no_grad()
def test_a_tokenizer_shrinks_without_aliasing():
    """Stripes as narrow as an output pixel become flat gray; without antialiasing they would stay visible."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(SMALL, SPEC, (16, 16))
    assert tokenizer.size == (8, 12)
    stripes = torch.tensor([255, 0, 0, 255], dtype=torch.uint8).repeat(12).expand(1, 3, 32, 48)
    seen = []
    real = tokenizer.encoder.logits
    tokenizer.encoder.logits = lambda images: seen.append(images) or real(images)
    for shown in (stripes, 255 - stripes):
        tokenizer.ids(shown)
        assert (seen[-1][..., 1:-1] - 127.5).abs().max() < 5


@torch.no_grad()
def test_ids_do_not_depend_on_the_precision():
    torch.manual_seed(0)
    tokenizer = Tokenizer(SMALL, SPEC, (4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        found = tokenizer.ids(images(16))
        assert not torch.equal(tokenizer.encoder.logits(images(16)).argmax(1).flatten(1), found), (
            "rounding matters here"
        )
    assert torch.equal(found, tokenizer.ids(images(16)))
