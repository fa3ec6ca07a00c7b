"""Under FSDP2 a process keeps whole gradients between the micro-batches of a step, or its share of them."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from unmask.config import override
from unmask.engine.build import build_method
from unmask.engine.fake_ranks import fake_group
from unmask.engine.flops import typical_images
from unmask.engine.measure import example_batch
from unmask.engine.sharding import distribute
from unmask.engine.world import World
from unmask.method import Clock
from unmask.recipes.catalogue import find
from unmask.rng import Draws

RANKS = 4


def gradient_bytes(distributed):
    """Return the bytes of the gradients that this process keeps: of its share, and of whole parameters."""
    shares = [p.grad.to_local().nbytes for p in distributed.method.parameters() if p.grad is not None]
    groups = [part._get_fsdp_state()._fsdp_param_group for part in distributed.module.modules() if is_sharded(part)]
    whole = [p._unsharded_param.grad for group in groups for p in group.fsdp_params]
    return sum(shares), sum(gradient.nbytes for gradient in whole if gradient is not None)


def is_sharded(module):
    return hasattr(module, "_get_fsdp_state")


@pytest.mark.parametrize("divide", [False, True])
def test_only_shares_of_gradients_are_kept_if_they_are_divided(divide):
    config = override(find("mae_nano"), ["method.encoder.depth=2", "method.decoder.depth=1"])
    images = typical_images(config)
    method = build_method(config, images)
    trained = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    batch = example_batch(images, 2, "cpu")
    with fake_group(RANKS):
        world = World(size=RANKS, local_size=RANKS)
        one = distribute(method, "fsdp", world, precision="fp32", device="cpu", divide_gradients=divide)
        assert all(isinstance(p, DTensor) for p in method.parameters())
        with one.accumulating(last=False), torch.enable_grad():
            one.loss(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index))).value.backward()
        shares, whole = gradient_bytes(one)
    if divide:
        assert whole == 0
        assert trained / RANKS <= shares < 1.1 * trained / RANKS
    else:
        assert shares == 0
        assert whole == trained
