"""The classifier: which blocks are trained, and its loss compared with the formula in its docstring."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from unmask.batch import Batch, ImageSpec
from unmask.config import Config as Root
from unmask.config import method_class, method_names
from unmask.errors import UserError
from unmask.method import Clock
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig, make_optimizer, update
from unmask.rng import Draws
from unmask.tasks.classify import Classifier, Config

SPEC = ImageSpec(3, (16, 16), "uint8", (120.0, 120.0, 120.0), (60.0, 60.0, 60.0))
NAMES = ("ant", "bee", "cat", "dog")
HEAD = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}


def config(last_blocks=None, **more):
    return Config(
        encoder=ViTConfig(width=32, depth=3, heads=2, patch=(4, 4)), classes=NAMES, last_blocks=last_blocks, **more
    )


def make(last_blocks=None, **more):
    torch.manual_seed(0)
    return Classifier(config(last_blocks, **more), SPEC)


def batch(count=8):
    """Return images whose classes differ in brightness."""
    labels = torch.arange(count) % len(NAMES)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (count, 3, 16, 16)))
    images = (noise + 60 * labels[:, None, None, None]).to(torch.uint8)
    return Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64), labels)


def loss(method, of):
    return method(of, Clock(0, 1, Draws(0, of.epoch, of.index)))


def trained(method):
    return {name for name, parameter in method.named_parameters() if parameter.requires_grad}


def block(number, *parts):
    wanted = parts or ("norm1", "attn", "norm2", "mlp")
    every = make().encoder.blocks[number].named_parameters()
    return {f"encoder.blocks.{number}.{name}" for name, _ in every if name.split(".")[0] in wanted}


EMBEDDING = {
    f"encoder.{name}" for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
}
EXPECTED = {
    0: HEAD,
    0.5: HEAD | block(2, "norm2", "mlp"),
    1: HEAD | block(2),
    2: HEAD | block(1) | block(2),
    3: HEAD | EMBEDDING | block(0) | block(1) | block(2),
    None: HEAD | EMBEDDING | block(0) | block(1) | block(2),
}


@pytest.mark.parametrize("last_blocks", EXPECTED)
def test_last_blocks_selects_the_trained_parameters(last_blocks):
    method = make(last_blocks)
    assert trained(method) == EXPECTED[last_blocks]
    with torch.no_grad():
        nn.init.normal_(method.head.weight)  # head_std=2e-5 would give the encoder a gradient that rounds to zero
    loss(method, batch()).value.backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == trained(method)


@pytest.mark.parametrize("last_blocks", [0, 0.5, 1])
def test_step_does_not_change_frozen_parameters(last_blocks):
    method = make(last_blocks)
    with torch.no_grad():
        nn.init.normal_(method.head.weight)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    optimizer = make_optimizer(method, OptimConfig())
    value = loss(method, batch()).value
    value.backward()
    update(optimizer, 1e-2, value.detach(), None)
    changed = {name for name, now in method.state_dict().items() if not torch.equal(before[name], now)}
    assert changed == trained(method)


@pytest.mark.parametrize(("last_blocks", "std"), [(0, 0.01), (0.5, 2e-5), (None, 2e-5)])
def test_the_head_starts_as_in_the_official_code(last_blocks, std):
    many = config(last_blocks).model_copy(update={"classes": tuple(str(n) for n in range(400))})
    method = Classifier(many, SPEC)
    assert float(method.head.weight.detach().std()) == pytest.approx(std, rel=0.03)
    assert not method.head.bias.any()
    assert method.fc_norm.eps == 1e-6
    scratch = Classifier(many.model_copy(update={"head_std": 0.02}), SPEC)
    assert float(scratch.head.weight.detach().std()) == pytest.approx(0.02, rel=0.03)


def test_the_loss_matches_a_value_computed_by_hand():
    """Mean of the patch tokens before the encoder's norm, LayerNorm, linear layer, smoothed cross-entropy."""
    method, of = make(smoothing=0.2), batch()
    with torch.no_grad():
        nn.init.normal_(method.head.weight)
        nn.init.normal_(method.encoder.norm.weight)  # of no consequence
    with torch.no_grad():
        encoder = method.encoder
        x = torch.cat(
            [encoder.cls_token.expand(8, -1, -1), encoder.embed(encoder.patches(of.images))], 1
        )  # the position of the class token is a zero vector
        for one in encoder.blocks:
            x = one(x)
        pooled = x[:, 1:].mean(1)
        spread = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
        logs = (spread @ method.head.weight.T).log_softmax(1)
        right = logs[torch.arange(8), of.labels]
        want = -((1 - 0.2) * right + 0.2 / 4 * logs.sum(1)).mean()
    found = loss(method, of)
    torch.testing.assert_close(found.value.detach(), want)
    assert found.value.dtype == torch.float32
    assert float(found.logs["accuracy"]) == float((logs.argmax(1) == of.labels).float().mean())


def test_classifier_learns_and_the_picture_shows_its_accuracy():
    method, of = make(), batch()
    optimizer = make_optimizer(method, OptimConfig())
    for _ in range(60):
        value = loss(method, of).value
        value.backward()
        update(optimizer, 1e-3, value.detach(), None)
    found = loss(method, of)
    assert float(found.logs["accuracy"]) == 1
    with torch.no_grad():
        picture = method.picture(of, Clock(0, 1, Draws(0, of.epoch, of.index)))
    first, second = picture.panels.values()
    assert next(iter(picture.panels)) == "original"
    torch.testing.assert_close(first, of.images.float(), atol=1e-3, rtol=0)
    assert second.shape == first.shape
    assert picture.note.startswith("8 of 8")
    assert len(picture.names) == 8
    assert all("predicted" not in name and "%" in name for name in picture.names)
    few = picture.sampled(3)
    assert few.names == tuple(picture.names[row] for row in (0, 3, 7))
    assert torch.equal(few.panels["original"], first[[0, 3, 7]])
    assert float(picture.numbers["loss"]) == pytest.approx(float(found.value.detach()), rel=1e-5)
    assert float(picture.numbers["all_classes_alike"]) == pytest.approx(np.log(4))
    darker = (second - 120).abs() <= (first - 120).abs() + 1e-3
    assert darker.all(), "patches without evidence have the mean colour"


def test_images_without_labels_are_rejected():
    bare = batch()
    bare = Batch(bare.images, bare.index, bare.epoch)
    with pytest.raises(UserError, match=r"got images without labels.*sub-folder"):
        loss(make(), bare)


@pytest.mark.parametrize("last_blocks", [-1, 0.25, 1.5, 4])
def test_impossible_numbers_of_blocks_are_rejected(last_blocks):
    with pytest.raises(ValidationError, match=r"encoder of 3 blocks; expected 0 .* 0.5 .* whole number up to 3"):
        config(last_blocks)


def test_a_single_class_is_rejected():
    with pytest.raises(ValidationError, match=r"classes"):
        Config(encoder=config().encoder, classes=("all",))


def test_task_is_found_by_name_and_is_not_a_pre_training_method():
    assert method_class("classify") is Classifier
    assert "classify" not in method_names()
    root = Root(method=config(1))
    assert Root.model_validate_json(root.model_dump_json()) == root


def test_images_are_augmented_in_full_precision_under_autocast():
    method = make(rand_augment=9.0)
    seen = []
    real = method.augment
    method.augment = lambda *a: seen.append(torch.is_autocast_enabled("cpu")) or real(*a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss(method, batch())
    assert seen == [False]
