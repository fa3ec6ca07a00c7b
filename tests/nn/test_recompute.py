import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from unmask.nn.blocks import MLP
from unmask.nn.recompute import recomputed


def plain(mlp: MLP, x: Tensor) -> Tensor:
    return mlp.fc2(F.gelu(mlp.fc1(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_stored_activations(dtype):
    torch.manual_seed(0)
    mlp, x = MLP(24, 96), torch.randn(3, 7, 24)
    found = []
    for forward in (MLP.__call__, plain):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = forward(mlp, given)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), [given, *mlp.parameters()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_the_activation_is_freed_and_recomputed_in_the_backward_pass():
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return F.gelu(x)

    x, weight = torch.randn(5, 4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    hidden = x * 2
    made = function(hidden)
    with recomputed(function, hidden, made):
        out = F.linear(made, weight)
    kept = StorageWeakRef(made.untyped_storage())
    del made
    assert kept.expired()
    out.sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(weight.grad, F.gelu(x.detach() * 2).flatten(0, 1).sum(0).expand(8, 8))


def test_no_activation_is_stored_if_gradients_are_disabled():
    with torch.no_grad():
        x = torch.randn(2, 3)
        with recomputed(F.gelu, x, F.gelu(x)) as noted:
            assert noted is None
