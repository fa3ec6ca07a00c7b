"""Learning rate, parameter groups, and the gate that skips a non-finite step on the device."""

import math

import pytest
import torch

from unmask.batch import ImageSpec
from unmask.config import override
from unmask.optim import OptimConfig, learning_rate, make_optimizer, peak_lr
from unmask.recipes.catalogue import find


def test_base_lr_rule_is_per_256_images_of_the_global_batch():
    assert peak_lr(OptimConfig(base_lr=1.5e-4), 4096) == pytest.approx(2.4e-3)
    assert peak_lr(OptimConfig(base_lr=1.5e-4), 64) == pytest.approx(1.5e-4 / 4)


def test_schedule_is_per_iteration_from_zero_to_peak_to_zero():
    def lr(step):
        return learning_rate(step, steps=100, warmup_steps=10, peak=2.0)

    assert lr(0) == 0
    assert lr(5) == 1.0
    assert lr(10) == 2.0
    assert lr(55) == pytest.approx(1.0)
    assert lr(99) == pytest.approx(1 + math.cos(math.pi * 89 / 90), abs=1e-9)
    assert lr(100) == pytest.approx(0)
    rates = [lr(step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(0, steps=10, warmup_steps=0, peak=2.0) == 2.0
    assert learning_rate(100, steps=100, warmup_steps=10, peak=2.0, final=0.2) == pytest.approx(0.2)


def test_biases_and_gains_are_not_decayed_but_tokens_are_and_tables_are_not_trained():
    spec = ImageSpec(3, (32, 32), "uint8", (1.0,) * 3, (1.0,) * 3)
    method = override(find("mae_nano"), ["method.encoder.depth=1"]).build(spec)
    optimizer = make_optimizer(method, OptimConfig())
    names = {id(p): n for n, p in method.named_parameters()}
    decayed, plain = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} <= decayed
    assert all(name.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight")) for name in plain)
    assert not {"encoder.pos_embed", "decoder.pos_embed"} & (decayed | plain)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


@pytest.mark.parametrize("finite", [True, False])
def test_the_fused_gate_leaves_weights_and_moments_bitwise_alone(finite):
    module = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(module, OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = [p.clone() for p in module.parameters()] + [
        v.clone() for s in optimizer.state.values() for v in s.values()
    ]
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0 if finite else 1.0), None
    optimizer.step()
    after = list(module.parameters()) + [v for s in optimizer.state.values() for v in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == (not finite)
