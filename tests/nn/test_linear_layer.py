"""The linear layer equals torch's in the forward and backward pass, with oneDNN and with MKL."""

import pytest
import torch

from unmask.nn import linear_layer as products
from unmask.nn import torch_internals
from unmask.nn.linear_layer import Linear, linear


@pytest.fixture
def asked(monkeypatch) -> list[tuple[int, ...]]:
    """Record the shapes of oneDNN products, and use oneDNN on every processor."""
    if torch_internals.onednn_linear() is None:
        pytest.skip("this torch has no oneDNN")
    seen, real = [], torch_internals.multiply_by_onednn
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "FEWEST", 1000)

    def watched(x, *rest):
        seen.append(tuple(x.shape))
        return real(x, *rest)

    monkeypatch.setattr(torch_internals, "multiply_by_onednn", watched)
    return seen


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_match_torch(asked, bias):
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40, bias=bias), torch.nn.Linear(24, 40, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 24, requires_grad=True)
    same = x.detach().double().requires_grad_()
    weight = torch.randn(3, 5, 40)
    (ours(x) * weight).sum().backward()
    (theirs(same) * weight).sum().backward()
    assert asked == [(15, 24), (15, 40), (40, 15)], "one forward product, and gradients of input and weights"
    assert torch.allclose(ours(x).double(), theirs(same), atol=1e-5)
    pairs = [(x, same), *zip(ours.parameters(), theirs.parameters(), strict=True)]
    for found, expected in pairs:
        assert torch.allclose(found.grad.double(), expected.grad, atol=1e-4)


def test_slices_and_transposed_inputs_need_no_copy(asked):
    torch.manual_seed(0)
    weight, x = torch.randn(60, 24, requires_grad=True), torch.randn(4, 24, 9).transpose(1, 2)
    out = linear(x, weight[20:], None)
    assert torch.allclose(out, torch.nn.functional.linear(x, weight[20:]), atol=1e-5)
    out.sum().backward()
    assert weight.grad[:20].eq(0).all()
    assert torch.allclose(weight.grad[20:], x.flatten(0, 1).sum(0).expand(40, 24), atol=1e-4)
    assert len(asked) == 2, "the input needs no gradient"


def test_small_or_non_float32_products_and_autocast_use_torch(asked):
    layer = Linear(24, 40)
    layer(torch.randn(1, 24))
    layer.double()(torch.randn(30, 24, dtype=torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(torch.randn(30, 24)).dtype == torch.bfloat16
    layer.to("meta")(torch.empty(30, 24, device="meta"))
    assert asked == []
    Linear(24, 40)(torch.randn(30, 24))
    assert asked == [(30, 24)]


@pytest.mark.parametrize(
    ("vendor", "unit", "slow"),
    [("AuthenticAMD", "AVX512", True), ("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX2", False)],
)
def test_onednn_is_used_on_amd_with_avx512_only(vendor, unit, slow, monkeypatch):
    class File:
        def __init__(self, path):
            assert path == "/proc/cpuinfo"

        def exists(self):
            return True

        def read_text(self):
            return f"processor : 0\nvendor_id : {vendor}\n"

    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has only one of the two")
    monkeypatch.setattr(products, "Path", File)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: unit)
    assert products.mkl_is_slow.__wrapped__() == slow
