"""The paper's linear probe trains only its head, and bad batches do not change its BatchNorm statistics."""

from dataclasses import replace

import pytest
import torch

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.method import Clock
from unmask.nn.vit import ViTConfig
from unmask.rng import Draws
from unmask.tasks.linear_probe import Config, LinearProbe

SPEC = ImageSpec(3, (16, 16), "uint8", (120.0,) * 3, (60.0,) * 3)


def make():
    torch.manual_seed(0)
    config = Config(encoder=ViTConfig(width=32, depth=2, heads=2, patch=(4, 4)), classes=("a", "b"))
    return LinearProbe(config, SPEC)


def batch(count=8, seed=0):
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    index = torch.arange(count)
    return Batch(images, index, torch.zeros_like(index), labels=index % 2)


def loss(method, of):
    return method(of, Clock(0, 1, Draws(0, of.epoch, of.index))).value


def test_only_the_head_has_a_gradient():
    method = make()
    loss(method, batch()).backward()
    assert {name for name, p in method.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


def test_running_statistics_match_torch_batchnorm():
    method, own = make(), torch.nn.BatchNorm1d(32, eps=1e-6, affine=False)
    for seed in range(3):
        loss(method, batch(seed=seed))
        with torch.no_grad():
            own(method.encoder(batch(seed=seed).images).cls)
    torch.testing.assert_close(method.norm.running_mean, own.running_mean)
    torch.testing.assert_close(method.norm.running_var, own.running_var)


def test_non_finite_tokens_do_not_change_running_statistics():
    method = make()
    loss(method, batch())
    before = method.norm.running_mean.clone(), method.norm.running_var.clone()
    method.remember(torch.full((4, 32), float("nan")))
    assert torch.equal(method.norm.running_mean, before[0])
    assert torch.equal(method.norm.running_var, before[1])


def test_a_batch_with_a_non_finite_image_does_not_change_running_statistics():
    method, bad = make(), batch()
    loss(method, bad)
    before = method.norm.running_mean.clone(), method.norm.running_var.clone()
    images = bad.images.float()
    images[3] = float("nan")
    assert not loss(method, replace(bad, images=images)).isfinite()
    assert torch.equal(method.norm.running_mean, before[0])
    assert torch.equal(method.norm.running_var, before[1])


def test_micro_batch_of_one_image_is_rejected():
    with pytest.raises(UserError, match="at least two"):
        loss(make(), batch(1))
