"""MAE compared with the published parameter counts and an independent implementation."""

import warnings

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.method import Clock
from unmask.methods.mae import MAE, Config
from unmask.nn.decoders import DecoderConfig
from unmask.nn.losses import mean_square
from unmask.nn.masks import mask_from_noise, nearest_visible, random_mask
from unmask.nn.patches import take
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig, learning_rate, make_optimizer, update
from unmask.recipes.mae import mae_base, mae_huge, mae_large
from unmask.rng import Draws, Stream, uniform

IMAGENET = ImageSpec(3, (224, 224), "uint8", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
SMALL = ImageSpec(3, (16, 24), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))


def small_mae(**changes) -> MAE:
    encoder = ViTConfig(width=32, depth=2, heads=2, patch=(4, 4))
    return MAE(Config(encoder=encoder, decoder=DecoderConfig(width=16, depth=1, heads=2), **changes), SMALL)


def small_batch(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch, step: int = 0, seed: int = 0) -> Clock:
    return Clock(step, 10, Draws(seed, batch.epoch, batch.index))


@pytest.mark.parametrize(
    ("recipe", "with_positions", "trainable"),
    [(mae_base, 111_907_840, 111.66e6), (mae_large, 329_541_888, 329.24e6), (mae_huge, 657_074_508, 656.61e6)],
)
def test_parameter_counts_of_the_paper(recipe, with_positions, trainable):
    with torch.device("meta"):
        method = recipe().build(IMAGENET)
    assert sum(p.numel() for p in method.parameters()) == with_positions
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == pytest.approx(trainable, abs=0.01e6)


def test_the_recipe_has_the_settings_of_table_8():
    config = mae_large()
    assert config.train.batch_size == 4096
    assert config.optim.base_lr * config.train.batch_size / 256 == pytest.approx(2.4e-3)
    assert (config.optim.betas, config.optim.weight_decay, config.optim.warmup) == ((0.9, 0.95), 0.05, 0.05)
    assert config.method.target == "norm_pixels"
    assert config.method.mask_ratio == 0.75
    assert (config.data.crop.scale, config.data.crop.flip) == ((0.2, 1.0), 0.5)


def test_predictions_at_two_hidden_places_differ_at_the_start():
    method, batch = small_mae(), small_batch()
    patches = method.encoder.patches(batch.images)
    guess = method.guess(patches, mask_from_noise(torch.rand(4, 24), 0.75))
    assert guess.shape == (4, 18, 48)
    assert (guess[:, 0] - guess[:, 1]).abs().max() > 1e-3


@torch.no_grad()
def test_the_mask_of_an_image_does_not_depend_on_its_place_in_the_batch():
    method, batch = small_mae().eval(), small_batch()
    flipped = Batch(batch.images.flip(0), batch.index.flip(0), batch.epoch)
    assert float(method(batch, clock(batch)).value) == pytest.approx(
        float(method(flipped, clock(flipped)).value), rel=1e-6
    )
    assert method(batch, clock(batch, seed=1)).value != method(batch, clock(batch)).value


def test_loss_of_flat_images_is_finite_and_plain_pixels_are_the_target():
    batch = small_batch()
    flat = Batch(torch.full_like(batch.images, 7), batch.index, batch.epoch)
    assert torch.isfinite(small_mae()(flat, clock(flat)).value)
    assert small_mae(target="pixels").target(torch.ones(1, 2, 48), flat.images).eq(1).all()


@torch.no_grad()
def test_picture_pastes_the_prediction_into_the_visible_patches():
    method, batch = small_mae(), small_batch()
    picture = method.picture(batch, clock(batch))
    panels = list(picture.panels)
    assert panels == ["original", "masked 75%", "prediction", "pasted", "pasted, nearest stats"]
    original, masked, prediction, pasted, _ = picture.panels.values()
    assert (original - batch.images).abs().max() < 1e-3
    grey = method.encoder.mean[:, None, None]
    visible = (masked - original).abs().amax(1) < 1e-3
    assert 0.2 < visible.float().mean() < 0.3
    assert (pasted - original).abs().amax(1)[visible].max() < 1e-3
    assert ((prediction - grey).abs().amax(1)[visible]).max() < 1e-3
    assert "TRUE mean" in picture.note
    assert set(picture.numbers) == {"loss", "true_patch_mean", "visible_mean", "nearest_visible"}
    assert float(picture.numbers["loss"]) == pytest.approx(float(method(batch, clock(batch)).value), rel=1e-5)


@torch.no_grad()
def test_baselines_match_values_computed_by_hand():
    """The images are 0 on the left and 1 on the right (normalised), so all values can be computed by hand."""
    method, batch = small_mae(target="pixels"), small_batch(2)
    images = torch.zeros(2, 3, 16, 24)
    images[..., 12:] = 1
    images = images * method.encoder.std[:, None, None] + method.encoder.mean[:, None, None]
    batch = Batch(images, batch.index, batch.epoch)
    numbers = method.picture(batch, clock(batch)).numbers
    right = (torch.arange(24) % 6 >= 3).float()
    mask = random_mask(2, (4, 6), 0.75, clock(batch).rng)
    expected = torch.stack(
        [(right[mask.keep[b]].mean() - right[mask.drop[b]]).square().mean() for b in range(2)]
    ).mean()
    assert float(numbers["true_patch_mean"]) == pytest.approx(0, abs=1e-6)
    assert float(numbers["visible_mean"]) == pytest.approx(float(expected), rel=1e-4)
    near = right[nearest_visible(mask, (4, 6))]
    assert float(numbers["nearest_visible"]) == pytest.approx(
        float((near - right[mask.drop]).square().mean()), rel=1e-4, abs=1e-6
    )


def test_a_perfect_prediction_pastes_the_original():
    method, batch = small_mae(), small_batch()
    patches = method.encoder.patches(batch.images)
    mask = mask_from_noise(torch.rand(4, 24), 0.75)
    truth = take(method.target(patches, batch.images), mask.drop)
    drawn = method.target.draw(truth, patches, batch.images, mask)
    assert torch.allclose(drawn["pasted"], take(patches, mask.drop), atol=1e-4)


GOLDEN_LOSSES = [
    1.402073,
    1.402073,
    1.187048,
    1.138580,
    1.086595,
    1.037501,
    1.008342,
    0.994563,
    0.988638,
    0.986269,
]


def test_golden_loss_curve():
    """Train ten steps in float32 from a fixed seed on generated tensors: a refactoring must not change the losses."""
    torch.manual_seed(0)
    method = small_mae()
    pixels = uniform(0, Stream.SHAPES_NOISE, torch.zeros(16, dtype=torch.int64), torch.arange(16), 3 * 16 * 24) * 255
    batch = Batch(pixels.reshape(16, 3, 16, 24).to(torch.uint8), torch.arange(16), torch.zeros(16, dtype=torch.int64))
    optimizer, losses = make_optimizer(method, OptimConfig()), []
    for step in range(10):
        loss = method(batch, clock(batch, step)).value
        loss.backward()
        update(optimizer, learning_rate(step, steps=10, warmup_steps=2, peak=1e-2), loss.detach(), None)
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(GOLDEN_LOSSES, rel=1e-4)


def hugging_face(config: Config, norm_pix: bool):
    """Return transformers' ViTMAE of the same size, and a function that copies our weights into it."""
    transformers = pytest.importorskip("transformers")
    encoder, decoder = config.encoder, config.decoder
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=encoder.width,
            num_hidden_layers=encoder.depth,
            num_attention_heads=encoder.heads,
            intermediate_size=4 * encoder.width,
            image_size=224,
            patch_size=encoder.patch[0],
            decoder_hidden_size=decoder.width,
            decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.heads,
            decoder_intermediate_size=4 * decoder.width,
            norm_pix_loss=norm_pix,
            mask_ratio=config.mask_ratio,
            layer_norm_eps=1e-6,
            hidden_act="gelu",
        )
    )

    def copy(ours: MAE) -> None:
        def block(prefix_theirs: str, prefix_ours: str) -> dict[str, torch.Tensor]:
            part = {k.removeprefix(prefix_ours): v for k, v in ours.state_dict().items() if k.startswith(prefix_ours)}
            names = {
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
                "attn.proj": "attention.o_proj",
            }
            out = {
                f"{prefix_theirs}{t}.{leaf}": part[f"{o}.{leaf}"]
                for o, t in names.items()
                for leaf in ("weight", "bias")
            }
            for leaf in ("weight", "bias"):
                for name, value in zip("qkv", part[f"attn.qkv.{leaf}"].chunk(3), strict=True):
                    out[f"{prefix_theirs}attention.{name}_proj.{leaf}"] = value
            return out

        state = ours.state_dict()
        copied = {
            "vit.embeddings.cls_token": state["encoder.cls_token"],
            "vit.embeddings.position_embeddings": state["encoder.pos_embed"],
            "decoder.mask_token": state["decoder.mask_token"],
            "decoder.decoder_pos_embed": state["decoder.pos_embed"],
        }
        pairs = [
            ("vit.embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"),
            ("vit.layernorm", "encoder.norm"),
            ("decoder.decoder_embed", "decoder.embed"),
            ("decoder.decoder_norm", "decoder.norm"),
            ("decoder.decoder_pred", "decoder.pred"),
        ]
        for t, o in pairs:
            for leaf in ("weight", "bias"):
                copied[f"{t}.{leaf}"] = state[f"{o}.{leaf}"]
        for i in range(encoder.depth):
            copied |= block(f"vit.layers.{i}.", f"encoder.blocks.{i}.")
        for i in range(decoder.depth):
            copied |= block(f"decoder.decoder_layers.{i}.", f"decoder.blocks.{i}.")
        theirs.load_state_dict(copied)  # raises for missing and unexpected keys

    return theirs.eval(), copy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "depths"),
    [(mae_base, None), (mae_huge, None)],
    ids=["B/16", "H/14"],
)
def test_agrees_with_transformers_on_copied_weights(recipe, depths):
    """Loss and prediction equal those of transformers to 1e-5 relative in float32, with and without norm_pix, at full
    size.
    """
    config = recipe().method
    torch.manual_seed(0)
    ours = MAE(config, IMAGENET).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, copy = hugging_face(config, norm_pix=True)
    copy(ours)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    noise = torch.rand(2, ours.encoder.grid[0] * ours.encoder.grid[1])
    mask = mask_from_noise(noise, 0.75)
    with torch.no_grad():
        patches = ours.encoder.patches(images)
        guess = ours.guess(patches, mask)
        normalised = (images - ours.encoder.mean[:, None, None]) / ours.encoder.std[:, None, None]
        for norm_pix in (True, False):
            ours.target.per_patch = theirs.config.norm_pix_loss = norm_pix
            out = theirs(normalised, noise=noise)
            loss = mean_square(guess, take(ours.target(patches, images), mask.drop))
            assert float(loss) == pytest.approx(float(out.loss), rel=1e-5)
        expected = take(out.logits, mask.drop)
    assert ((guess - expected).norm() / expected.norm()) < 1e-5
    assert (guess - expected).abs().max() < 1e-5 * expected.abs().max() * 5


VARIANTS = [
    {"mask": "block", "mask_ratio": 0.5},
    {"mask": "block", "smallest_block": 6},
    {"mask": "grid"},
    {"mask": "pattern", "mask_ratio": 0.5, "pattern": (("###...",) * 4, ("...###",) * 4)},
    {"mask_tokens": "encoder"},
    {"target": "pixels"},
    {"target": "pca"},
    {"target": "pca", "pca_coefficients": 12, "pca_whiten": True},
    {"loss_on": "all"},
    {"loss_on": "all", "mask_tokens": "encoder", "target": "pca", "mask": "block"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items())[:40])
def test_every_variant_of_table_1_trains_and_restores_its_state(changes):
    torch.manual_seed(0)
    method, batch = small_mae(**changes), small_batch(16)
    if method.num_prepare:
        method.prepare(batch.images)
    optimizer, losses = make_optimizer(method, OptimConfig()), []
    for step in range(40):
        loss = method(batch, clock(batch, 0)).value
        loss.backward()
        if step == 0:
            silent = [n for n, p in method.named_parameters() if p.requires_grad and not p.grad.abs().max() > 0]
            assert not silent
        update(optimizer, 3e-3, loss.detach(), None)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    with torch.no_grad():
        picture = method.eval().picture(batch, clock(batch))
        assert all(panel.shape == batch.images.shape and panel.isfinite().all() for panel in picture.panels.values())
        assert float(picture.numbers["loss"]) == pytest.approx(float(method(batch, clock(batch)).value), rel=1e-5)
        torch.manual_seed(1)
        other = small_mae(**changes).eval()
        other.load_state_dict(method.state_dict())
        assert float(other(batch, clock(batch)).value) == float(method(batch, clock(batch)).value)


def test_the_state_dict_contains_principal_components_as_fixed_state():
    assert [n for n in small_mae(target="pca").state_dict() if n.startswith(MAE.fixed)] == [
        "target.center", "target.basis", "target.unit",
    ]  # fmt: skip
    assert not [n for n in small_mae().state_dict() if n.startswith(MAE.fixed)]


@torch.no_grad()
def test_mask_tokens_in_the_encoder_reveal_positions_but_no_hidden_pixels():
    method, batch = small_mae(mask_tokens="encoder"), small_batch()
    patches = method.encoder.patches(batch.images)
    mask = method.sample(clock(batch))
    seen = method.see(patches, mask)
    assert seen.shape == (4, 1 + 24, 32)
    hidden_changed = patches.scatter_add(
        1, mask.drop[:, :, None].expand(-1, -1, 48), torch.ones(4, mask.drop.shape[1], 48)
    )
    assert torch.equal(method.see(hidden_changed, mask), seen)
    assert method.decoder.mask_token is None
    expected = method.encoder.place(method.mask_token.expand(4, mask.drop.shape[1], -1), mask.drop)
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 0.1, "mask tokens have the positions of their patches"


@torch.no_grad()
def test_loss_on_all_is_the_mean_of_both_parts():
    batch = small_batch()
    torch.manual_seed(0)
    everywhere = small_mae(loss_on="all")
    torch.manual_seed(0)
    hidden = small_mae()
    patches, mask = hidden.encoder.patches(batch.images), hidden.sample(clock(batch))
    guess = everywhere.guess(patches, mask, everywhere=True)
    truth = take(hidden.target(patches, batch.images), mask.order)
    visible, rest = mean_square(guess[:, :6], truth[:, :6]), mean_square(guess[:, 6:], truth[:, 6:])
    assert float(everywhere(batch, clock(batch)).value) == pytest.approx(float(visible / 4 + 3 * rest / 4), rel=1e-5)
    assert float(hidden(batch, clock(batch)).value) == pytest.approx(float(rest), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "grid", "mask_ratio": 0.5}, "got grid sampling with a mask ratio of 0.5"),
        ({"mask": "block", "smallest_block": 30}, "30 patches; .* hides only 18 of the 4 x 6 patches"),
        ({"mask": "block", "mask_ratio": 0.1, "smallest_block": 4}, "4 patches; .* hides only 3 of"),
        ({"mask": "pattern"}, "got only one of mask=pattern and pattern"),
        ({"pattern": (("###...",) * 4,)}, "got only one of mask=pattern and pattern"),
        ({"mask": "pattern", "pattern": (("###...",) * 4,)}, "hides 12 of 24 .* set method.mask_ratio=0.5"),
        (
            {"mask": "pattern", "mask_ratio": 0.5, "pattern": (("##..",) * 4,)},
            "got mask pattern 1 of 4 x 4 characters; expected 4 x 6",
        ),
        ({"smallest_block": 4}, "smallest_block applies to mask=block; got mask=random"),
        ({"pca_coefficients": 4}, "apply to target=pca; got target=norm_pixels"),
        ({"target": "pca", "pca_coefficients": 49}, "a patch has only 48 values"),
    ],
)
def test_contradictory_settings_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        small_mae(**changes)
