"""Contract tests of every method in `methods/`, which are found by listing the folder.

Each method is tested with a smaller version of its `<method>_nano` recipe, so a new method needs only that recipe.
"""

import inspect
import json
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import pretrain, write_images
from faults import signal_after

from unmask.batch import Batch, ImageSpec
from unmask.config import Config, keys, method_class, method_names, override
from unmask.engine.checkpoint import load_model
from unmask.engine.continue_run import resume
from unmask.engine.device import autocast
from unmask.errors import UserError
from unmask.method import Clock, Loss, Method, Picture
from unmask.nn.image_encoder import EncoderConfig, ImageEncoder
from unmask.nn.positions import fitted
from unmask.optim import OptimConfig, make_optimizer, update
from unmask.recipes.catalogue import all_recipes, find
from unmask.rng import Draws

METHODS = method_names()
SHRUNK = {"width": "32", "depth": "1", "heads": "2", "patch": "[4,4]"}
TOKENIZER = {"codes": 32, "width": 16, "depth": 1, "patch": [4, 4]}
UNITS = {"uint8": 255, "uint16": 60_000, "float32": 3.0}


def without_recipe(methods: Iterable[str], recipes: Iterable[str]) -> list[str]:
    return [
        f"methods/{name}.py has no recipe {name}_nano: add one to recipes/ for the contract tests"
        for name in methods
        if f"{name}_nano" not in recipes
    ]


def shrunk(name: str) -> tuple[Config, list[str]]:
    """Return a smaller version of the method's nano recipe, and the settings that were changed."""
    config = find(f"{name}_nano")
    settings = [f"{key}={SHRUNK[key.split('.')[-1]]}" for key in keys(config) if key.split(".")[-1] in SHRUNK]
    settings.append("data.size=[16,16]")
    tokenizer = [f"method.tokenizer={json.dumps(TOKENIZER)}"] if needs_tokenizer(name) else []
    return override(config, [*settings, *tokenizer]), settings


def needs_tokenizer(name: str) -> bool:
    """Return whether the method predicts the codes of a dVAE, which has random weights in these tests."""
    return find(f"{name}_nano").method.needs_tokenizer


def make(
    name: str, *, channels: int = 3, dtype: str = "uint8", size: tuple[int, int] = (16, 16), seed: int = 0
) -> Method:
    """Create the small method and prepare it as at step 0 of a run."""
    top = UNITS[dtype]
    spec = ImageSpec(channels, size, dtype, (top / 2,) * channels, (top / 4,) * channels)
    torch.manual_seed(seed)
    method = shrunk(name)[0].build(spec)
    if method.num_prepare:
        method.prepare(batch_for(method, 16).images)
    return method


def batch_for(method: Method, count: int = 4) -> Batch:
    """Return smooth random images that match the method's ImageSpec."""
    spec = method.encoder.spec
    coarse = torch.from_numpy(np.random.default_rng(0).random((count, spec.channels, 4, 4), np.float32))
    images = torch.nn.functional.interpolate(coarse, spec.size, mode="bilinear") * UNITS[spec.dtype]
    images = torch.from_numpy(images.numpy().astype(spec.dtype))
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64))


def clock(batch: Batch, seed: int = 0, step: int = 0) -> Clock:
    return Clock(step, 100, Draws(seed, batch.epoch, batch.index))


def value(method: Method, seed: int = 0) -> float:
    batch = batch_for(method)
    with torch.no_grad():
        return float(method(batch, clock(batch, seed)).value)


def warm(name: str, *, seed: int = 0, steps: int = 3) -> Method:
    """Train a method for a few steps, because an output layer that starts at zero hides the layers before it."""
    method = make(name, seed=seed)
    batch = batch_for(method)
    optimizer = make_optimizer(method, OptimConfig())
    for step in range(steps):
        loss = method(batch, clock(batch, step=step)).value
        loss.backward()
        update(optimizer, 1e-3, loss.detach(), None)
    return method


def draws_in_loss(method: Method, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether the loss draws random numbers; some methods, such as the plain autoencoder, do not."""
    asked = []
    real = Draws.uniform
    monkeypatch.setattr(Draws, "uniform", lambda *arguments, **names: asked.append(1) or real(*arguments, **names))
    value(method)
    monkeypatch.undo()
    return bool(asked)


def test_every_method_has_a_nano_recipe():
    assert METHODS
    assert not without_recipe(METHODS, all_recipes()), "\n".join(without_recipe(METHODS, all_recipes()))
    assert "methods/new.py has no recipe new_nano" in without_recipe([*METHODS, "new"], all_recipes())[0]


@pytest.mark.parametrize("name", METHODS)
def test_method_is_documented_and_named_after_its_file(name):
    assert shrunk(name)[0].method.name == name
    found = method_class(name)
    assert list(inspect.signature(found).parameters) == ["config", "images"]
    assert found.__doc__
    assert len(inspect.getmodule(found).__doc__.splitlines()) > 3


@pytest.mark.parametrize("name", METHODS)
def test_public_members_are_declared(name):
    method, settings = make(name), shrunk(name)[0].method
    assert isinstance(settings.encoder, EncoderConfig)
    assert settings.encoder.patch_size in (None, (4, 4))
    assert settings.has_tokenizer == needs_tokenizer(name), "the tests pass a tokenizer to methods that need one"
    assert not settings.needs_tokenizer
    assert settings.from_files() == []
    assert set(method.undecayed) <= dict(method.named_parameters()).keys()
    assert method.evaluation_mask is None, "no nano recipe of these tests hides tokens in evaluation"
    assert method.mean_token_classifier is None
    assert method.device == torch.device("cpu")


@pytest.mark.parametrize("name", METHODS)
def test_the_encoder_declares_its_layers(name):
    method = make(name)
    encoder, batch = method.encoder, batch_for(method)
    assert isinstance(encoder, ImageEncoder)
    features = encoder(batch.images)
    assert features.grid == encoder.grid
    assert features.patches.shape == (4, encoder.grid[0] * encoder.grid[1], encoder.width)
    if encoder.depth is None:
        with pytest.raises(UserError, match="no layers to choose from"):
            encoder.feature_layers(batch.images)
        assert encoder.layer is None
        assert encoder.probe_layer is None
        return
    layers = list(encoder.feature_layers(batch.images))
    assert len(layers) == encoder.depth + 1
    assert torch.equal(layers[encoder.depth if encoder.layer is None else encoder.layer].patches, features.patches)


@pytest.mark.parametrize("name", METHODS)
def test_layer_wise_decay_orders_all_encoder_parameters_or_is_rejected(name):
    encoder = make(name).encoder
    if type(encoder).depth_of is ImageEncoder.depth_of:
        with pytest.raises(UserError, match=r"optim.layer_decay=1"):
            encoder.depth_of("anything")
        return
    depths = {key: encoder.depth_of(key) for key, _ in encoder.named_parameters()}
    assert min(depths.values()) == 0
    assert len(set(depths.values())) > 1
    assert depths[next(iter(depths))] < max(depths.values())


@pytest.mark.parametrize("name", METHODS)
def test_after_step_changes_nothing_at_a_skipped_step(name):
    method = warm(name)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.after_step(replace(clock(batch_for(method)), counted=torch.tensor(False)))
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_a_finite_scalar_and_forward_is_loss(name):
    method = make(name)
    batch = batch_for(method)
    assert type(method).forward is Method.forward
    loss = method(batch, clock(batch))
    assert isinstance(loss, Loss)
    assert loss.value.shape == ()
    assert loss.value.dtype == torch.float32
    assert loss.value.isfinite()
    assert loss.value.requires_grad
    assert all(log.shape == () and not log.requires_grad for log in loss.logs.values())
    assert torch.equal(loss.value, method.loss(batch, clock(batch)).value)


@pytest.mark.parametrize("name", METHODS)
def test_gradient_reaches_every_trainable_parameter(name):
    method = warm(name)
    batch = batch_for(method)
    method(batch, clock(batch)).value.backward()
    for parameter_name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"no gradient for {parameter_name}"
            assert parameter.grad.abs().max() > 0, f"the gradient of {parameter_name} is zero"


@pytest.mark.parametrize("name", METHODS)
def test_loss_depends_on_the_seed_alone(name, monkeypatch):
    assert value(warm(name)) == value(warm(name))
    method = warm(name)
    if draws_in_loss(method, monkeypatch):
        assert value(method, seed=1) != value(method)
    assert value(warm(name, seed=1)) != value(method), "initial weights come from torch's generator"


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_on_sixteen_images(name):
    method = make(name)
    batch = batch_for(method, 16)
    optimizer, losses = make_optimizer(method, OptimConfig()), []
    for step in range(80):
        loss = method(batch, clock(batch, step=step)).value
        loss.backward()
        update(optimizer, 3e-3, loss.detach(), None)
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("name", METHODS)
def test_a_state_dict_round_trip_is_strict_and_exact(name):
    method, other = warm(name), warm(name, seed=9)
    assert value(other) != value(method)
    other.load_state_dict(method.state_dict())
    assert value(other) == value(method)


@pytest.mark.parametrize("name", METHODS)
def test_resumed_training_equals_uninterrupted_training(name, tmp_path):
    images = write_images(tmp_path / "images", 20)
    settings = [
        *shrunk(name)[1],
        *("train.steps=6", "train.batch_size=8", "train.log_every=1", "data.workers=0", "train.device=cpu"),
    ]
    more = {}
    if needs_tokenizer(name):
        network = [f"method.encoder.{key}={value}" for key, value in TOKENIZER.items()]
        briefly = [*network, "data.size=[16,16]", "train.steps=1", "train.batch_size=8", "data.workers=0"]
        dvae = pretrain(images, recipe="dvae_nano", out=tmp_path / "dvae", settings=briefly)
        more = {"tokenizer": dvae.path}
    whole = pretrain(images, recipe=f"{name}_nano", out=tmp_path / "whole", settings=settings, **more)
    with signal_after(3):
        parts = pretrain(images, recipe=f"{name}_nano", out=tmp_path / "parts", settings=settings, **more)
    assert load_model(parts)[0] == 3
    resume(parts.path)
    assert [row["loss"] for row in parts.metrics()] == [row["loss"] for row in whole.metrics()]
    ours, theirs = load_model(parts)[1], load_model(whole)[1]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_the_picture_shows_the_images_in_their_units(name):
    method = make(name, size=(16, 24))
    batch = batch_for(method)
    picture = method.eval().picture(batch, clock(batch))
    assert isinstance(picture, Picture)
    assert len(picture.note) > 20
    assert "loss" in picture.numbers
    assert all(number.shape == () and number.isfinite() for number in picture.numbers.values())
    assert len(picture.panels) >= 2
    for caption, panel in picture.panels.items():
        assert panel.shape == (4, 3, 16, 24), caption
        assert panel.dtype == torch.float32, caption
        assert panel.isfinite().all(), caption
        assert panel.min() > -255, caption
        assert panel.max() < 2 * 255, caption
    assert (next(iter(picture.panels.values())) - batch.images).abs().max() < 0.01, "the first panel is the original"
    assert {panel.shape[0] for panel in picture.sampled(2).panels.values()} == {2}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("channels", "dtype", "size"),
    [
        (1, "uint8", (16, 16)),
        (5, "uint8", (16, 16)),
        (3, "uint16", (16, 16)),
        (3, "float32", (16, 16)),
        (3, "uint8", (16, 24)),
        (5, "uint16", (24, 16)),
    ],
)
def test_all_channels_dtypes_and_shapes_are_supported(name, channels, dtype, size):
    method = make(name, channels=channels, dtype=dtype, size=size)
    batch = batch_for(method)
    assert np.isfinite(value(method))
    with torch.no_grad():
        features = method.encoder(batch.images)
        panels = method.eval().picture(batch, clock(batch)).panels.values()
    assert features.patches.isfinite().all()
    assert all(panel.isfinite().all() for panel in panels)
    assert (next(iter(panels)) - batch.images.float()).abs().max() < 1e-3 * UNITS[dtype], (
        "the original has the units of the files"
    )
    assert len(features.patches) == len(batch)
    assert features.grid[0] * features.grid[1] == features.patches.shape[1]
    assert {panel.shape for panel in panels} == {(4, channels, *size)}


@pytest.mark.parametrize("name", METHODS)
def test_bf16_works_with_a_float32_loss(name):
    method = make(name)
    batch = batch_for(method)
    with autocast("bf16", "cpu"):
        loss = method(batch, clock(batch)).value
        with torch.no_grad():
            picture = method.picture(batch, clock(batch))
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(value(method), rel=0.03)
    assert {panel.dtype for panel in picture.panels.values()} == {torch.float32}
    loss.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


DENSE = ("ae", "dae")  # dense layers fit one image size only


@pytest.mark.parametrize("name", [name for name in METHODS if name not in DENSE])
@pytest.mark.parametrize("size", [(24, 16), (32, 32)])
def test_weights_transfer_to_another_image_size(name, size):
    """`pretrain --from RUN --set data.size=...`: parameters that belong to positions of the grid are interpolated."""
    before, after = make(name), make(name, size=size)
    grids = [method.encoder.grid for method in (before, after)]
    moved = {key: fitted(key, value, *grids) for key, value in before.state_dict().items()}
    after.load_state_dict(moved)
    assert np.isfinite(value(after))
