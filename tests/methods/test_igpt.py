"""iGPT compared with an independent implementation: sizes, both objectives, and the palette."""

import math

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock
from unmask.methods.igpt import IGPT, Config, mean_over, repeat_or_any
from unmask.nn.gpt import GPTConfig
from unmask.recipes.igpt import igpt_l, igpt_m, igpt_s
from unmask.rng import Draws

SPEC = ImageSpec(3, (8, 8), "uint8", (120.0, 110.0, 100.0), (60.0, 60.0, 60.0))


def igpt(images: ImageSpec = SPEC, **changes) -> IGPT:
    torch.manual_seed(0)
    network = GPTConfig(width=32, depth=2, heads=2, patch=2, colours=8)
    method = IGPT(Config(encoder=network, **changes), images)
    torch.nn.init.normal_(method.head.weight, std=0.3)
    return method.eval()


def batch_of(count: int = 4) -> Batch:
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch, seed: int = 0) -> Clock:
    return Clock(0, 10, Draws(seed, batch.epoch, batch.index))


def prepared(**changes) -> IGPT:
    method = igpt(**changes)
    method.prepare(batch_of().images)
    return method


@pytest.mark.parametrize(("recipe", "millions"), [(igpt_s, 76), (igpt_m, 455), (igpt_l, 1362)])
def test_the_recipes_have_as_many_parameters_as_the_paper(recipe, millions):
    config = recipe()
    with torch.device("meta"):
        method = config.build(ImageSpec(3, config.data.size, "uint8", (120.0,) * 3, (60.0,) * 3))
    assert round(sum(p.numel() for p in method.parameters()) / 1e6) == pytest.approx(millions, abs=1)
    assert method.encoder.grid == (32, 32)
    assert len(method.encoder.palette) == 512
    assert (config.train.batch_size, config.train.steps) == (128, 1_000_000)


@torch.no_grad()
def test_agrees_with_transformers_on_copied_weights():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = igpt()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs = transformers.ImageGPTForCausalImageModeling(
        transformers.ImageGPTConfig(vocab_size=9, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    ).eval()
    for module in theirs.modules():  # biases exist in transformers only; the published weights set them to 0
        if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
            torch.nn.init.zeros_(module.bias)
    encoder, core = ours.encoder, theirs.transformer
    core.wte.weight.copy_(torch.cat([encoder.tokens, encoder.sos[None]]))  # the last row of wte is the start token
    core.wpe.weight.copy_(encoder.positions)
    core.ln_f.weight.copy_(encoder.norm.weight)
    theirs.lm_head.weight.copy_(ours.head.weight)
    for here, there in zip(encoder.blocks, core.h, strict=True):
        there.ln_1.weight.copy_(here.norm1.weight)
        there.ln_2.weight.copy_(here.norm2.weight)
        there.attn.c_attn.weight.copy_(here.attn.qkv.weight.T)
        there.attn.c_proj.weight.copy_(here.attn.proj.weight.T)
        there.mlp.c_fc.weight.copy_(here.mlp.fc1.weight.T)
        there.mlp.c_proj.weight.copy_(here.mlp.fc2.weight.T)
    ids = torch.randint(0, 8, (3, 16), generator=torch.Generator().manual_seed(0))
    shifted = torch.cat([torch.full((3, 1), 8), ids[:, :-1]], 1)
    expected = theirs(input_ids=shifted).logits
    found = ours.head(encoder.run(ids))
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.1


@torch.no_grad()
def test_both_objectives_match_values_computed_by_hand():
    batch = batch_of()
    for objective in ("ar", "bert"):
        method = prepared(objective=objective)
        ids = method.encoder.ids(batch.images)
        hidden = torch.ones_like(ids, dtype=torch.bool) if objective == "ar" else method.hide(clock(batch).rng)
        logs = method.head(method.encoder.run(ids, None if objective == "ar" else hidden)).log_softmax(-1)
        of_image = []
        for image in range(4):
            places = hidden[image].nonzero()[:, 0].tolist()
            if places:
                of_image.append(-sum(float(logs[image, p, ids[image, p]]) for p in places) / len(places))
        assert float(method(batch, clock(batch)).value) == pytest.approx(sum(of_image) / len(of_image), rel=1e-5)


def test_mean_skips_images_without_hidden_tokens():
    values = torch.tensor([[1.0, 3.0, 5.0], [2.0, 2.0, 8.0], [7.0, 7.0, 7.0]])
    hidden = torch.tensor([[True, True, False], [False, False, True], [False, False, False]])
    assert float(mean_over(values, hidden)) == (2.0 + 8.0) / 2
    assert float(mean_over(values, torch.zeros_like(hidden))) == 0


def test_fifteen_percent_of_the_tokens_are_hidden():
    method, batch = igpt(objective="bert"), batch_of(2000)
    assert float(method.hide(clock(batch).rng).float().mean()) == pytest.approx(0.15, abs=0.01)


def test_the_first_loss_is_log_k_because_the_output_starts_at_zero():
    method = prepared()
    torch.nn.init.zeros_(method.head.weight)
    with torch.no_grad():
        assert float(method(batch_of(), clock(batch_of())).value) == pytest.approx(math.log(8))
    assert IGPT(Config(encoder=GPTConfig(width=8, depth=1, heads=1, patch=2)), SPEC).head.weight.eq(0).all()


def test_baseline_losses_are_in_nats():
    ids = torch.tensor([[0, 0, 0, 1, 1], [3, 3, 3, 3, 3]])  # 7 of 8 tokens equal the previous one
    by_hand = -(7 * math.log(7 / 8) + math.log(1 / 8 / 3)) / 8
    assert float(repeat_or_any(ids, 4)) == pytest.approx(by_hand)
    assert float(repeat_or_any(ids[1:], 4)) == 0
    assert float(repeat_or_any(ids[:, :1], 4)) == pytest.approx(math.log(3)), (
        "a sequence of one token has no repetition"
    )
    method = prepared()
    with torch.no_grad():
        numbers = method.picture(batch_of(), clock(batch_of())).numbers
    shares = torch.bincount(method.encoder.ids(batch_of().images).flatten()) / 64
    assert float(numbers["colour_frequencies"]) == pytest.approx(
        float(torch.distributions.Categorical(shares).entropy())
    )


@torch.no_grad()
def test_completion_keeps_given_tokens_and_follows_the_distribution():
    method = prepared()
    ids = method.encoder.ids(batch_of().images)
    many = ids[:1].expand(3000, -1)
    rng = Draws(0, torch.zeros(3000, dtype=torch.int64), torch.arange(3000))
    done = method.complete(many, 15, rng)
    assert torch.equal(done[:, :15], many[:, :15])
    expected = method.head(method.encoder.run(ids[:1]))[0, 15].softmax(-1)
    assert (torch.bincount(done[:, 15], minlength=8) / 3000 - expected).abs().max() < 0.04
    assert torch.equal(
        method.complete(many[:5], 8, Draws(0, rng.epoch[:5], rng.index[:5])), method.complete(many, 8, rng)[:5]
    )


COLOURS = tuple((float(n), 0.0, 255.0 - n) for n in range(8))


def test_a_given_palette_is_used_and_nothing_is_prepared():
    method = igpt(palette=COLOURS, palette_dtype="uint8")
    assert method.num_prepare == 0
    assert torch.equal(method.encoder.palette, torch.tensor(COLOURS))
    assert igpt().num_prepare > 0


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        (
            ImageSpec(3, (8, 8), "uint16", (1.0,) * 3, (1.0,) * 3),
            {},
            "got a palette of uint8 images; these images are uint16",
        ),
        (ImageSpec(1, (8, 8), "uint8", (1.0,), (1.0,)), {}, "got a palette of 3 channels; these images have 1"),
        (SPEC, {"palette_dtype": None}, "got only one of palette and palette_dtype"),
        (SPEC, {"palette": COLOURS[:5]}, "got a palette of 5 colours and encoder.colours=8"),
    ],
)
def test_palettes_that_do_not_fit_the_images_are_rejected(images, changes, message):
    with pytest.raises((UserError, ValueError), match=message):
        igpt(images, **({"palette": COLOURS, "palette_dtype": "uint8"} | changes))
