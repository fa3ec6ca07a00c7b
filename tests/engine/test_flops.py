"""FLOPs that are counted on the method match the formulas."""

import dataclasses

import pytest
import torch

from unmask.batch import ImageSpec
from unmask.config import override
from unmask.console import Console
from unmask.engine import flops as flops_module
from unmask.engine.cluster_plan import Cluster
from unmask.engine.flops import COUNTED, blocks_flops, build_unallocated, count_flops, typical_images
from unmask.engine.measure import example_batch
from unmask.engine.recipe_costs import IMAGENET, print_costs, recipe_costs
from unmask.errors import UserError
from unmask.method import Loss
from unmask.nn.blocks import Block
from unmask.recipes.catalogue import all_recipes, find

GIGA = 1e9


def by_hand(n, d):
    """FLOPs of a block: 12 n d^2 + 2 n^2 d multiply-accumulates."""
    return 2 * (12 * n * d**2 + 2 * n**2 * d)


@pytest.mark.parametrize(("n", "d"), [(196, 1024), (50, 192), (1, 32)])
def test_flops_of_a_block_match_the_formula(n, d):
    assert blocks_flops([Block(d, 4)], n, d) == by_hand(n, d)


def mae_by_hand(config, image=224, channels=3):
    """Return the FLOPs (encoder, decoder, whole, idle) of a forward pass, computed by formulas.

    Kept patches are embedded, blocks include the class token, and hidden patches are predicted. In the decoder's last
    block, queries, MLP and prediction are computed for hidden patches only. whole: encoder on all patches. idle:
    redundant compute of the published code.
    """
    encoder, decoder, patch = config.method.encoder, config.method.decoder, config.method.encoder.patch[0]
    n, values = (image // patch) ** 2, patch * patch * channels
    kept = int(n * (1 - config.method.mask_ratio) + 1e-6)
    embed = 2 * values * encoder.width
    seen = kept * embed + encoder.depth * by_hand(kept + 1, encoder.width)
    whole = n * embed + encoder.depth * by_hand(n + 1, encoder.width)
    hidden, d = n - kept, decoder.width
    last = 2 * (2 * (n + 1) * d**2 + 10 * hidden * d**2 + 2 * hidden * (n + 1) * d)
    light = 2 * (kept + 1) * encoder.width * d + (decoder.depth - 1) * by_hand(n + 1, d) + last
    idle = hidden * embed + by_hand(n + 1, d) - last + 2 * (1 + kept) * d * values
    return seen, light + 2 * hidden * d * values, whole, idle


@pytest.mark.parametrize("name", ["mae_base", "mae_large", "mae_huge"])
def test_flops_of_mae_match_the_formulas_exactly(name):
    config = find(name)
    flops = count_flops(config, typical_images(config))
    *parts, idle = mae_by_hand(config)
    assert [flops.encoder, flops.decoder, flops.whole] == parts
    assert recipe_costs(name)["flops"]["forward_with_idle_work"] == flops.forward + idle
    assert flops.rest == 0
    assert flops.masked
    assert flops.training == pytest.approx(3 * flops.forward, rel=0.005)
    assert flops.training < 3 * flops.forward, "no gradient of the pixels is computed"


@pytest.mark.parametrize(
    ("name", "whole", "visible", "decoder", "ratio"),
    [
        ("mae_base", 17.36, 4.21, 5.25, 2.39),
        ("mae_large", 61.08, 14.92, 5.25, 3.29),
        ("mae_huge", 166.43, 40.60, 6.98, 3.65),
    ],
)
def test_multiply_accumulates_match_published_numbers(name, whole, visible, decoder, ratio):
    share = recipe_costs(name)["ratios"]
    assert share["encoder_blocks_all_patches"] / 2 / GIGA == pytest.approx(whole, rel=0.01)
    assert share["encoder_blocks_visible"] / 2 / GIGA == pytest.approx(visible, rel=0.01)
    assert share["decoder_blocks"] / 2 / GIGA == pytest.approx(decoder, rel=0.01)
    assert share["blocks"] == pytest.approx(ratio, abs=0.006)


def test_mae_large_saves_a_factor_of_3_29_and_a_decoder_token_costs_9_percent():
    found = recipe_costs("mae_large", cluster=Cluster(gpus=64))
    assert round(found["ratios"]["blocks"], 2) == 3.29
    assert round(found["ratios"]["decoder_per_token"], 2) == 0.09
    assert round(found["ratios"]["encoder"], 1) == 4.1
    # The factor is 3.23 if all patches are embedded and predicted. unmask embeds visible patches and predicts hidden
    # patches only.
    assert found["ratios"]["everything"] == pytest.approx(3.26, abs=0.006)
    assert found["flops"]["training_with_idle_work"] / found["flops"]["training"] == pytest.approx(1.0116, abs=1e-4)
    assert found["parameters"]["all"] == pytest.approx(329.54e6, rel=1e-4)
    assert (found["batch_size"], found["images_per_gpu"], found["peak_lr"]) == (4096, 64, pytest.approx(2.4e-3))
    assert found["imagenet_steps"] == -(-800 * IMAGENET // 4096)
    assert found["warmup_steps"] == round(found["imagenet_steps"] / 20)


def test_number_of_gpus_that_does_not_divide_the_batch_is_rejected():
    message = (
        r"got train\.batch_size=4096 for 6 processes; expected a multiple of 6; use --set train\.batch_size=4092 or"
    )
    with pytest.raises(UserError, match=message):
        recipe_costs("mae_large", cluster=Cluster(gpus=6))
    with pytest.raises(UserError, match="got 0 GPUs; expected at least 1"):
        Cluster(gpus=0)


@pytest.mark.parametrize("setting", ["method.loss_on=all", "method.mask_tokens=encoder"])
def test_no_redundant_compute_is_reported_if_all_patches_are_predicted(setting):
    flops = recipe_costs("mae_nano", settings=[setting])["flops"]
    assert not [name for name in flops if "idle" in name]


def test_settings_change_the_costs():
    plain, deep = (
        recipe_costs("mae_nano", settings=settings)["flops"] for settings in ([], ["method.decoder.depth=4"])
    )
    assert deep["decoder"] > plain["decoder"]
    assert deep["encoder"] == plain["encoder"]
    with pytest.raises(UserError, match=r"5 heads do not divide"):
        recipe_costs("mae_nano", settings=["method.encoder.heads=5"])


def test_cost_of_mask_tokens_in_the_encoder_matches_the_paper():
    with_tokens, without = (
        recipe_costs("mae_large", settings=[f"method.mask_tokens={where}"]) for where in ("encoder", "decoder")
    )
    ratio = with_tokens["flops"]["forward"] / without["flops"]["forward"]
    assert ratio == pytest.approx(3.24, abs=0.02)
    assert with_tokens["ratios"] == {}, "an encoder that processes all tokens saves no FLOPs"


EVERY_METHOD = [(name, []) for name in all_recipes() if name.endswith("_nano")]
EVERY_TARGET = [("mae_nano", [f"method.target={target}"]) for target in ("pixels", "pca", "tokens")]


@pytest.mark.parametrize(("name", "settings"), EVERY_METHOD + EVERY_TARGET)
def test_every_method_is_counted_on_the_meta_device_and_its_costs_are_printed(name, settings, monkeypatch):
    devices = []
    monkeypatch.setattr(flops_module, "example_batch", lambda *a: devices.append(a[-1]) or example_batch(*a))
    found = recipe_costs(name, settings=settings)
    assert devices == ["meta"]
    flops = found["flops"]
    assert flops["encoder"] + flops["decoder"] + flops["rest"] == flops["forward"]
    assert 0 < flops["forward"] < flops["training"] <= 3 * flops["forward"]
    assert flops["encoder_all_patches"] > 0
    assert sum(found["parameters"][part] for part in ("encoder", "decoder", "rest")) == found["parameters"]["all"]


def test_method_that_predicts_codes_is_counted_with_a_named_tokenizer(capsys):
    found = recipe_costs("beit_nano")
    assert found["tokenizer"] == "dvae_nano"
    assert found["flops"]["rest"] > 0
    assert found["flops"]["training"] < 3 * found["flops"]["forward"], (
        "the tokenizer is frozen, so it has no backward pass"
    )
    print_costs(found, Console())
    assert "tokenizer: recipe dvae_nano" in capsys.readouterr().err
    assert recipe_costs("mae_nano")["tokenizer"] is None


def test_costs_are_printed(capsys):
    print_costs(recipe_costs("mae_large", cluster=Cluster(gpus=64)), Console())
    said = capsys.readouterr().err
    for text in (
        "329.54 M",
        "3.29 x",
        "61.08 + 5.25 to 14.92 + 5.25 GMACs",
        "8.6% of",
        "on 64 GPUs, images of each per step: 64",
        "training with the published code takes",
    ):
        assert text in said
    print_costs(recipe_costs("simmim_nano"), Console())
    assert "leaving mask tokens out" not in capsys.readouterr().err


def test_counting_allocates_no_weights_and_keeps_random_state():
    before = torch.get_rng_state()
    config = find("mae_huge")
    method = build_unallocated(config, typical_images(config))
    assert {p.device.type for p in method.parameters()} == {"meta"}
    count_flops(find("mae_nano"), typical_images(find("mae_nano")))
    assert torch.equal(torch.get_rng_state(), before)


def test_loss_that_depends_on_values_is_counted(monkeypatch):
    from unmask.methods.mae import MAE

    config = find("mae_nano")
    want = count_flops(config, typical_images(config))
    real, devices = MAE.loss, []

    def looks(self, batch, clock):
        devices.append(batch.images.device.type)
        loss = real(self, batch, clock)
        assert float(loss.value) > 0
        return Loss(loss.value)

    monkeypatch.setattr(MAE, "loss", looks)
    assert count_flops(config, typical_images(config)) == want
    assert devices == ["meta", "cpu"]


def test_counts_depend_on_channels_and_dtype_of_images():
    config = override(find("mae_nano"), ["data.size=[16,24]"])
    spec = ImageSpec(1, (16, 24), "uint16", (9.0,), (2.0,))
    gray, rgb = count_flops(config, spec), count_flops(config, typical_images(config))
    assert gray.encoder < rgb.encoder
    assert typical_images(config).channels == 3
    assert dataclasses.asdict(gray).keys() == {"encoder", "decoder", "rest", "training", "whole"}
    assert COUNTED > 1
