"""Undocumented features of torch that the engine uses.

If a test in this file fails, a new version of torch has changed one of these features.
"""

import pytest
import torch

from unmask import optim
from unmask.engine import operation_sizes
from unmask.engine.flops import typical_images
from unmask.engine.measure import bytes_per_image
from unmask.recipes.catalogue import find


def test_fused_kernel_supports_found_inf():
    assert optim.fused_kernel_has_gate(), (
        "without this feature, training waits for the device at every step, which is slower"
    )


@pytest.mark.parametrize("finite", [True, False])
def test_without_found_inf_the_host_decides_with_the_same_results(monkeypatch, finite):
    weights = []
    for has_gate in (True, False):
        monkeypatch.setattr(optim, "fused_kernel_has_gate", lambda has_gate=has_gate: has_gate)
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([{"params": [weight], "lr_scale": 1.0}], fused=True)
        for loss in (1.0, 1.0 if finite else float("nan"), 1.0):
            weight.grad = torch.tensor([1.0, -2.0, 3.0])
            optim.update(optimizer, 0.1, torch.tensor(loss), clip=None)
        weights.append(weight.detach().clone())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.ones(3))


def test_sizes_of_operations_are_recorded():
    assert operation_sizes.TorchDispatchMode is not None, (
        "without this feature, the memory estimate leaves out the largest temporary tensor"
    )
    with operation_sizes.recorder() as made:
        torch.ones(3, dtype=torch.float32) + 1
    assert made.bytes[-1] == 12


def test_memory_is_estimated_without_a_dispatch_mode(monkeypatch):
    config = find("mae_nano")
    method = config.build(typical_images(config))
    whole = bytes_per_image(method, typical_images(config), "fp32", "cpu")
    monkeypatch.setattr(operation_sizes, "TorchDispatchMode", None)
    assert 0 < bytes_per_image(method, typical_images(config), "fp32", "cpu") < whole
