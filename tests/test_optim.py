"""Learning rate, parameter groups, and skipping non-finite steps on the device."""

import math

import pytest
import torch

from unmask.batch import ImageSpec
from unmask.config import override
from unmask.optim import Lars, OptimConfig, learning_rate, make_optimizer, peak_lr, update
from unmask.recipes.catalogue import find


def test_base_lr_is_per_256_images_of_the_global_batch():
    assert peak_lr(OptimConfig(base_lr=1.5e-4), 4096) == pytest.approx(2.4e-3)
    assert peak_lr(OptimConfig(base_lr=1.5e-4), 64) == pytest.approx(1.5e-4 / 4)


def test_schedule_rises_from_zero_to_peak_and_falls_to_zero():
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


def test_weight_decay_excludes_biases_and_gains_but_not_tokens():
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
def test_skipped_fused_step_keeps_weights_and_moments_bit_identical(finite):
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


# Fine-tuning


def classifier(depth=3):
    from unmask.nn.vit import ViTConfig
    from unmask.tasks.classify import Classifier, Config

    config = Config(encoder=ViTConfig(width=32, depth=depth, heads=2, patch=(4, 4)), classes=("a", "b"))
    return Classifier(config, ImageSpec(3, (16, 16), "uint8", (0.0,) * 3, (1.0,) * 3))


def test_layer_rates_decay_towards_the_input():
    method = classifier()
    optimizer = make_optimizer(method, OptimConfig(layer_decay=0.5))
    names = {id(p): name for name, p in method.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale["head.weight"] == scale["fc_norm.weight"] == 1
    assert scale["encoder.blocks.2.mlp.fc1.weight"] == 0.5
    assert scale["encoder.blocks.0.attn.qkv.bias"] == 0.125
    assert scale["encoder.patch_embed.proj.weight"] == scale["encoder.pos_embed"] == 0.0625
    update(optimizer, 0.1, torch.zeros(()), None)
    assert {round(group["lr"] / group["lr_scale"], 9) for group in optimizer.param_groups} == {0.1}


def test_positions_and_class_token_of_a_classifier_have_no_weight_decay():
    method = classifier()
    optimizer = make_optimizer(method, OptimConfig())
    names = {id(p): name for name, p in method.named_parameters()}
    plain = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert {"encoder.cls_token", "encoder.pos_embed"} <= plain
    assert "encoder.blocks.0.mlp.fc1.weight" not in plain


def test_lars_matches_the_published_code():
    torch.manual_seed(0)
    matrix, bias = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))
    optimizer = make_optimizer(torch.nn.ParameterList([matrix, bias]), OptimConfig(name="lars", weight_decay=0))
    assert isinstance(optimizer, Lars)
    want, kept = [matrix.detach().clone(), bias.detach().clone()], [torch.zeros(4, 3), torch.zeros(4)]
    for lr in (0.5, 0.3):
        gradients = [torch.randn(4, 3), torch.randn(4)]
        matrix.grad, bias.grad = (g.clone() for g in gradients)
        for number, gradient in enumerate(gradients):
            scale = 1e-3 * want[number].norm() / gradient.norm() if number == 0 else 1.0
            kept[number] = 0.9 * kept[number] + gradient * scale
            want[number] = want[number] - lr * kept[number]
        update(optimizer, lr, torch.zeros(()), None)
        torch.testing.assert_close(matrix.detach(), want[0])
        torch.testing.assert_close(bias.detach(), want[1])


def test_lars_changes_nothing_at_a_non_finite_step():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = make_optimizer(torch.nn.ParameterList([weight]), OptimConfig(name="lars"))
    weight.grad = torch.randn(4, 3)
    update(optimizer, 0.1, torch.zeros(()), None)
    before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum"].clone()
    weight.grad = torch.full((4, 3), float("nan"))
    update(optimizer, 0.1, torch.zeros(()), None)
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["momentum"], momentum)
