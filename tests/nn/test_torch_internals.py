"""Check that the private parts of torch used by `nn/torch_internals.py` still work, and so do the fallbacks."""

import pytest
import torch
from torch.func import vmap

from unmask.nn import linear_layer, torch_internals

CHANGED = "torch {} changed {}: adapt nn/torch_internals.py, or leave it to the fall-back"


def changed(name: str) -> str:
    return CHANGED.format(torch.__version__, name)


def test_onednn_still_multiplies():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    assert torch_internals.onednn_linear() is not None, changed("torch.ops.mkldnn._linear_pointwise")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(6, 4), torch.randn(3, 4), torch.randn(3)
    found = torch_internals.multiply_by_onednn(x, weight, bias)
    assert torch.allclose(found, torch.nn.functional.linear(x, weight, bias), atol=1e-6), changed("_linear_pointwise")


def test_torch_func_transforms_are_detected():
    seen = []

    def look(x):
        seen.append(torch_internals.in_transform(x))
        return x * 2

    x = torch.ones(2, 3)
    look(x)
    vmap(look)(x)
    assert seen == [False, True], changed("torch._C._functorch.is_functorch_wrapped_tensor")


def test_tensors_without_values_are_detected():
    seen = []

    class Look(torch.nn.Module):
        def forward(self, x):
            seen.append(torch_internals.has_no_values(x))
            return x + 1

    torch.export.export(Look(), (torch.ones(2),))
    assert True in seen, changed("torch._subclasses.fake_tensor.FakeTensor")
    assert torch_internals.has_no_values(torch.empty(2, device="meta"))
    assert not torch_internals.has_no_values(torch.ones(2))


def test_fallbacks_work_without_private_functions_of_torch(monkeypatch):
    monkeypatch.setattr(torch_internals, "onednn_linear", lambda: None)
    assert not linear_layer.mkl_is_slow.__wrapped__()
    monkeypatch.setattr(torch_internals.torch, "_C", object())
    assert not torch_internals.in_transform(torch.ones(1))
    monkeypatch.setattr(torch_internals, "FakeTensor", None)
    assert not torch_internals.has_no_values(torch.ones(1))
