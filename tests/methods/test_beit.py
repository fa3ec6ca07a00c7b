"""BEiT compared with an independent implementation; its tokenizer is frozen, stored once, and never random."""

import pytest
import torch
from conftest import pretrain, write_images

from unmask.batch import Batch, ImageSpec
from unmask.config import ConfigError
from unmask.engine.checkpoint import load_model
from unmask.engine.load import load
from unmask.errors import UserError
from unmask.method import Clock
from unmask.methods.beit import BEiT, Config
from unmask.methods.mae import MAE
from unmask.methods.mae import Config as MAEConfig
from unmask.nn.conv_vae import ConvVAEConfig
from unmask.nn.masks import Mask, block_mask, random_mask
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig, make_optimizer
from unmask.recipes.beit import beit_base, beit_large
from unmask.rng import Draws

SMALL = ImageSpec(3, (16, 24), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))
SQUARE = ImageSpec(3, (16, 16), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))
TOKENIZER = ConvVAEConfig(codes=16, width=8, depth=1, patch=(4, 4))


def beit(images: ImageSpec = SMALL, encoder: dict | None = None, **changes) -> BEiT:
    size = ViTConfig(**({"width": 32, "depth": 2, "heads": 2, "patch": 4} | (encoder or {})))
    tokenizer = None if changes.get("target") == "pixels" else TOKENIZER
    return BEiT(Config(encoder=size, **({"tokenizer": tokenizer} | changes)), images)


def batch_of(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch) -> Clock:
    return Clock(0, 10, Draws(0, batch.epoch, batch.index))


@pytest.mark.parametrize(
    "options",
    [{"positions": "learned"}, {"positions": "absent", "relative_bias": True, "layer_scale": 0.1}],
    ids=["paper", "code"],
)
@torch.no_grad()
def test_agrees_with_transformers_on_copied_weights(options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = beit(SQUARE, encoder=options).eval()
    theirs = transformers.BeitForMaskedImageModeling(
        transformers.BeitConfig(
            vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            image_size=16, patch_size=4, layer_norm_eps=1e-6, use_mask_token=True,
            use_absolute_position_embeddings=options["positions"] == "learned",
            use_shared_relative_position_bias="relative_bias" in options,
            layer_scale_init_value=options.get("layer_scale", 0.0), drop_path_rate=0.0,
        )
    ).eval()  # fmt: skip
    if ours.encoder.relative_bias is not None:
        torch.nn.init.normal_(ours.encoder.relative_bias.table)
    theirs.load_state_dict(as_transformers(ours), strict=True)
    images = batch_of().images[..., :16]  # square: transformers cannot change the aspect ratio of positions
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    hidden[:, 3:13] = True
    mask = Mask(keep=(~hidden).nonzero()[:, 1].reshape(4, -1), drop=hidden.nonzero()[:, 1].reshape(4, -1))
    normalised = (images - ours.encoder.mean[:, None, None]) / ours.encoder.std[:, None, None]
    expected = theirs(normalised, bool_masked_pos=hidden).logits[:, 3:13]
    found = ours.guess(ours.encoder.patches(images), mask)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-4


def as_transformers(ours: BEiT) -> dict[str, torch.Tensor]:
    """Return our weights under transformers' names, without the bias of keys, which the softmax cancels."""
    encoder, out = ours.encoder, {}
    state = encoder.state_dict()
    out["beit.embeddings.cls_token"] = state["cls_token"]
    out["beit.embeddings.mask_token"] = ours.mask_token
    out["beit.embeddings.patch_embeddings.projection.weight"] = state["patch_embed.proj.weight"]
    out["beit.embeddings.patch_embeddings.projection.bias"] = state["patch_embed.proj.bias"]
    if encoder.pos_embed is not None:
        out["beit.embeddings.position_embeddings"] = state["pos_embed"]
    if encoder.relative_bias is not None:
        out["beit.shared_position_bias.relative_position_bias_table"] = state["relative_bias.table"]
    for number in range(len(encoder.blocks)):
        here, there = f"blocks.{number}.", f"beit.layers.{number}."
        for part, values in zip("qkv", state[here + "attn.qkv.weight"].chunk(3), strict=True):
            out[f"{there}attention.{part}_proj.weight"] = values
        for part, values in zip("qkv", state[here + "attn.qkv.bias"].chunk(3), strict=True):
            if part != "k":
                out[f"{there}attention.{part}_proj.bias"] = values
        names = {
            "attn.proj": "attention.o_proj", "norm1": "layernorm_before", "norm2": "layernorm_after",
            "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        }  # fmt: skip
        for our_name, their_name in names.items():
            for kind in ("weight", "bias"):
                out[f"{there}{their_name}.{kind}"] = state[f"{here}{our_name}.{kind}"]
        for scale in ("1", "2"):
            if f"{here}ls{scale}.gamma" in state:
                out[f"{there}lambda_{scale}"] = state[f"{here}ls{scale}.gamma"]
    out |= {"layernorm.weight": state["norm.weight"], "layernorm.bias": state["norm.bias"]}
    return out | {"lm_head.weight": ours.head.weight, "lm_head.bias": ours.head.bias}


def test_sizes_and_settings_of_the_paper():
    spec = ImageSpec(3, (224, 224), "uint8", (120.0,) * 3, (60.0,) * 3)
    dalle = ConvVAEConfig(arch="dalle", codes=8192, width=256, patch=8, loss="logit_laplace")
    for recipe, millions in ((beit_base, 91.8), (beit_large, 311.8)):
        config = recipe()
        with torch.device("meta"):
            method = BEiT(config.method.model_copy(update={"tokenizer": dalle}), spec)
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        assert trained / 1e6 == pytest.approx(millions, rel=0.01)
        assert method.target.tokenizer.size == (112, 112)
        assert method.encoder.relative_bias.table.shape == (27 * 27 + 3, config.method.encoder.heads)
        batch = Batch(torch.zeros(2, 3, 224, 224), torch.arange(2), torch.zeros(2, dtype=torch.int64))
        assert method.sample(clock(batch)).drop.shape == (2, 75)
        assert config.optim.base_lr * 2048 / 256 == pytest.approx(1.5e-3)
        assert config.optim.final_lr * 1.5e-3 == pytest.approx(1e-5)


def test_the_output_layers_of_a_block_are_scaled_by_depth():
    torch.manual_seed(0)
    blocks = beit(encoder={"width": 128, "depth": 4}).encoder.blocks
    for weights in ([block.mlp.fc2.weight for block in blocks], [block.attn.proj.weight for block in blocks]):
        spreads = [float(weight.detach().std()) for weight in weights]
        assert spreads[0] / spreads[3] == pytest.approx(2, rel=0.05)
        assert float(weights[0].detach().abs().max()) == pytest.approx(0.02 / 2**0.5, rel=0.01)
    assert float(blocks[0].mlp.fc1.weight.detach().abs().max()) <= 0.02


@pytest.mark.parametrize(
    "options",
    [{"positions": "learned"}, {"positions": "absent", "relative_bias": True, "layer_scale": 0.1}],
    ids=["paper", "code"],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradient_reaches_the_optional_parts_of_the_encoder(options, precision):
    """test_contract.py tests the nano recipe, which has no learned positions, relative bias or LayerScale."""
    torch.manual_seed(0)
    method, batch = beit(encoder=options), batch_of()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        loss = method(batch, clock(batch)).value
    loss.backward()
    assert not [name for name, p in method.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
    added = [name for name, _ in method.encoder.named_parameters() if name.split(".")[-1] in ("table", "gamma")]
    assert len(added) == (5 if "relative_bias" in options else 0), (
        "one bias table for all blocks, two LayerScales for each block"
    )


def test_learned_positions_start_as_in_the_released_code():
    torch.manual_seed(0)
    learned = beit(encoder={"positions": "learned"}).encoder.pos_embed.detach()
    assert 0.01 < float(learned.abs().max()) <= 0.02
    assert float(beit().encoder.pos_embed.abs().max()) == 1, "sine-cosine positions are not changed"


def test_the_loss_depends_on_hidden_patches_only():
    method, batch = beit(), batch_of()
    mask = method.sample(clock(batch))
    truth = method.target(method.encoder.patches(batch.images), batch.images)
    assert truth.shape == (4, 24, 1)
    scores = method.guess(method.encoder.patches(batch.images), mask)
    likeliest = (scores.argmax(-1) == truth.gather(1, mask.drop[..., None])[..., 0]).float().mean()
    assert float(method(batch, clock(batch)).logs["code_accuracy"]) == pytest.approx(float(likeliest))
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), truth.gather(1, mask.drop[..., None]).flatten())
    assert float(method(batch, clock(batch)).value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_ids_are_the_likeliest_codes_and_the_tokenizer_is_frozen():
    method, batch = beit(), batch_of()
    tokenizer = method.target.tokenizer
    logits = tokenizer.encoder.logits(batch.images)  # (B, V, R, S)
    assert torch.equal(tokenizer.ids(batch.images), logits.argmax(1).flatten(1))
    assert not [name for name, p in method.named_parameters() if name.startswith("target.") and p.requires_grad]
    optimised = sum(len(group["params"]) for group in make_optimizer(method, OptimConfig()).param_groups)
    assert optimised == sum(p.requires_grad for p in method.parameters())
    method(batch, clock(batch)).value.backward()
    assert all(p.grad is None for p in tokenizer.parameters())


@torch.no_grad()
def test_tokenizer_with_smaller_patches_gets_smaller_images():
    method = beit(encoder={"patch": 8}, images=ImageSpec(3, (32, 48), "uint8", (120.0,) * 3, (60.0,) * 3))
    tokenizer = method.target.tokenizer
    assert tokenizer.size == (16, 24)
    smooth = torch.linspace(0, 255, 48).expand(1, 3, 32, 48).contiguous()
    seen = torch.nn.functional.interpolate(smooth, (16, 24), mode="area")
    assert (tokenizer.ids(smooth) == tokenizer.ids(seen)).float().mean() > 0.8
    assert tokenizer.paint(tokenizer.ids(smooth), (32, 48)).shape == (1, 3, 32, 48)


@pytest.mark.parametrize("make", [lambda **k: beit(**k), lambda **k: mae(**k)], ids=["beit", "mae"])
def test_without_a_tokenizer_the_error_names_the_command_to_train_one(make):
    with pytest.raises(UserError, match=r"no tokenizer was given; train one with .*dvae_nano.* --tokenizer"):
        make(tokenizer=None)


def mae(**changes) -> MAE:
    size = ViTConfig(width=32, depth=2, heads=2, patch=4)
    return MAE(MAEConfig(encoder=size, target="tokens", **changes), SMALL)


@pytest.mark.parametrize(
    ("patch", "tokenizer", "message"),
    [
        (
            (2, 2),
            {},
            r"one code per 4 x 4 pixels for patches of 2 x 2; .* set method.encoder.patch=4 here, or",
        ),
        ((4, 8), {}, "for patches of 4 x 8; expected patches of the same shape"),
        ((4, 8), {"patch": (4, 8)}, "got a patch of 4 x 8; a dVAE"),
        ((8, 8), {"arch": "dalle", "depth": None, "patch": (4, 4)}, "dalle has one code per 8 x 8 pixels"),
    ],
)
def test_a_grid_of_codes_that_differs_from_the_patches_is_rejected(patch, tokenizer, message):
    with pytest.raises(UserError, match=message):
        beit(encoder={"patch": patch}, tokenizer=TOKENIZER.model_copy(update=tokenizer))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "random", "smallest_block": 4}, "smallest_block applies to mask=block"),
        ({"target": "pixels", "tokenizer": TOKENIZER}, "a tokenizer applies to target=tokens"),
        ({"smallest_block": 11}, "got a smallest block of 11 patches; .* hides only 10"),
    ],
)
def test_ignored_or_impossible_settings_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        beit(**changes)


def test_the_ablations_of_the_paper_can_be_built():
    batch = batch_of()
    pixels = beit(target="pixels")
    assert pixels.head.out_features == 48
    assert pixels(batch, clock(batch)).value > 0
    assert not [name for name in pixels.state_dict() if name.startswith("target.")]
    patches = pixels.encoder.patches(batch.images)
    assert torch.equal(pixels.target(patches, batch.images), patches), "pixels are not normalised within a patch"
    rng, grid, ratio = clock(batch).rng, (4, 6), 75 / 196
    blocks, shuffled = beit().sample(clock(batch)), beit(mask="random").sample(clock(batch))
    assert torch.equal(blocks.drop, block_mask(4, grid, ratio, rng).drop)
    assert torch.equal(shuffled.drop, random_mask(4, grid, ratio, rng).drop)
    assert shuffled.drop.shape == blocks.drop.shape


@torch.no_grad()
def test_the_picture_pastes_decoded_predicted_and_true_codes():
    method, batch = beit().eval(), batch_of()
    tokenizer, mask = method.target.tokenizer, method.sample(clock(batch))
    ids = tokenizer.ids(batch.images)
    guess = method.guess(method.encoder.patches(batch.images), mask)
    hidden = mask.hidden().unflatten(1, (4, 6)).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]  # of pixels
    picture = method.picture(batch, clock(batch))
    for caption, codes in (("pasted", ids.scatter(1, mask.drop, guess.argmax(-1))), ("pasted, true codes", ids)):
        expected = torch.where(hidden, tokenizer.paint(codes, (16, 24)), batch.images.float())
        assert torch.allclose(picture.panels[caption], expected, atol=0.01), caption
    _, counts = ids.gather(1, mask.drop).unique(return_counts=True)
    shares = counts / counts.sum()
    assert float(picture.numbers["code_frequencies"]) == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-5)


# Tokenizers in a Run

VERY_SMALL = ["train.batch_size=8", "data.workers=0", "data.size=[16,16]", "train.checkpoint_every=1"]
NETWORK = ["method.encoder.width=8", "method.encoder.depth=1", "method.encoder.codes=16"]
ENCODER = ["method.encoder.width=32", "method.encoder.depth=1", "method.encoder.heads=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    images = write_images(folder / "images", 12)
    dvae = pretrain(images, recipe="dvae_nano", out=folder / "dvae", settings=[*VERY_SMALL, *NETWORK, "train.steps=2"])
    return folder, images, dvae


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("beit_nano", []), ("mae_nano", ["method.target=tokens", "method.decoder.width=16", "method.decoder.heads=2"])],
)
def test_run_stores_the_dvae_once_and_unchanged(runs, recipe, more):
    folder, images, dvae = runs
    settings = [*VERY_SMALL, *ENCODER, *more, "train.steps=3"]
    run = pretrain(images, recipe=recipe, out=folder / recipe, tokenizer=dvae.path, settings=settings)
    assert len(list(run.checkpoints.glob("fixed-*.safetensors"))) == 1
    weights, theirs = load_model(run)[1], load_model(dvae)[1]
    ours = {name.removeprefix("target.tokenizer."): w for name, w in weights.items() if name.startswith("target.")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load(run.path).method.target.tokenizer.encoder.spec.size == (16, 16)


def test_a_tokenizer_without_weights_is_rejected(runs):
    folder, images, _ = runs
    settings = [*VERY_SMALL, *ENCODER, 'method.tokenizer={"codes": 16, "width": 8, "depth": 1, "patch": [4, 4]}']
    with pytest.raises(ConfigError, match=r"without weights for it; .*--tokenizer RUN"):
        pretrain(images, recipe="beit_nano", out=folder / "none", settings=settings)
    with pytest.raises(UserError, match="no tokenizer was given"):
        pretrain(images, recipe="beit_nano", out=folder / "none", settings=[*VERY_SMALL, *ENCODER])
    assert not (folder / "none").exists()


def test_pretraining_from_a_run_keeps_its_tokenizer_and_rejects_another(runs):
    folder, images, dvae = runs
    settings = [*VERY_SMALL, *ENCODER, "train.steps=1"]
    first = pretrain(images, recipe="beit_nano", out=folder / "first", tokenizer=dvae.path, settings=settings)
    second = pretrain(images, out=folder / "second", from_run=first.path, settings=["train.steps=1"])
    assert load_model(second)[1].keys() == load_model(first)[1].keys()
    with pytest.raises(ConfigError, match="keeps its own tokenizer"):
        pretrain(images, out=folder / "third", from_run=first.path, tokenizer=dvae.path)
    third = pretrain(
        images, recipe="mae_nano", out=folder / "third", from_run=first.path, tokenizer=dvae.path,
        settings=[*settings, "method.target=tokens", "method.encoder.patch=4"],
    )  # fmt: skip
    assert third.read("status.json")["state"] == "finished"
