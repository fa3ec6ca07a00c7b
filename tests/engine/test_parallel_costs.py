"""Memory and traffic of one rank agree with what torch's `fully_shard` allocates and computes."""

import re
import time
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from unmask.config import override
from unmask.engine import fake_ranks
from unmask.engine.build import build_method
from unmask.engine.choose_parallel import Devices
from unmask.engine.cluster_plan import Cluster
from unmask.engine.compile import BLOCKS
from unmask.engine.device import autocast
from unmask.engine.fake_ranks import fake_group, fake_tensors, move_to_fake_cpu, sharded_bytes
from unmask.engine.flops import build_unallocated, typical_images
from unmask.engine.measure import bytes_per_image, example_batch
from unmask.engine.parallel_costs import Kept, Model, ParameterFacts, cast_bytes, pass_sizes, rank_memory, traffic
from unmask.engine.recipe_costs import costs_and_plan, stand_in_tokenizer
from unmask.engine.sharding import mesh_of, shard
from unmask.engine.world import World
from unmask.errors import UserError
from unmask.method import Clock
from unmask.nn.blocks import fused_attention
from unmask.optim import make_optimizer
from unmask.recipes.catalogue import find
from unmask.rng import Draws

MAE = ["data.size=[48,64]", "method.encoder.depth=2", "method.decoder.depth=1"]
RECIPES = [("mae_nano", []), ("mae_base", MAE), ("igpt_nano", []), ("beit_nano", []), ("crossmae_nano", [])]


def resolved(recipe, settings=()):
    _, stand_in = stand_in_tokenizer(recipe, settings)
    return override(find(recipe), [*stand_in, *settings])


def unallocated(recipe, settings=()):
    config = resolved(recipe, settings)
    return build_unallocated(config, typical_images(config))


def persistent(memory):
    return {"parameters": memory.parameters, "gradients": memory.gradients, "moments": memory.moments}


def costs(model, engine, nodes, gpus, *, whole_gradients=False, **kept):
    return rank_memory(model, engine, Devices(0, nodes, gpus), Kept(**kept), whole_gradients=whole_gradients)


@pytest.mark.parametrize(("recipe", "settings"), RECIPES)
@pytest.mark.parametrize(
    ("engine", "nodes", "gpus"), [("ddp", 2, 2), ("fsdp", 1, 7), ("fsdp", 3, 5), ("hsdp", 3, 5), ("hsdp", 1, 4)]
)
def test_sizes_are_those_of_torch(recipe, settings, engine, nodes, gpus):
    expected = costs(Model.of(unallocated(recipe, settings)), engine, nodes, gpus)
    assert sharded_bytes(unallocated(recipe, settings), engine, nodes, gpus) == persistent(expected)


def test_positions_and_tokens_are_divided_among_the_gpus_of_a_node():
    model = Model.of(unallocated("mae_huge"))
    single = [shard for shard in model.root if shard.shape[0] == 1 and len(shard.shape) > 1]
    assert {shard.shape for shard in single} >= {(1, 1, 1280), (1, 1, 512)}
    for parameter in single:
        assert parameter.part(8) == parameter.numel // 8
        assert parameter.part(4096) == parameter.numel, "no dimension is a multiple of 4,096"


def test_a_wrong_number_of_gpus_is_noticed():
    """Negative control: the comparison above depends on how the parameters are divided."""
    found = sharded_bytes(unallocated("mae_nano"), "fsdp", 1, 7)
    assert found != persistent(costs(Model.of(unallocated("mae_nano")), "fsdp", 1, 6))


def test_one_parameter_of_each_shape_is_sharded(monkeypatch):
    method, sharded, real = unallocated("beit_large"), [], fake_ranks.shard
    every = list(method.parameters())
    expected = costs(Model.of(method), "fsdp", 512, 8)
    monkeypatch.setattr(
        fake_ranks, "shard", lambda part, *about: (sharded.extend(part.parameters()), real(part, *about))
    )
    assert sharded_bytes(method, "fsdp", 512, 8) == persistent(expected)
    shapes = {(value.shape, value.requires_grad) for value in every}
    assert len(shapes) <= len(sharded) < len(shapes) + 10 < len(every) / 4, (
        "the same shape may be in a block and outside"
    )


@pytest.mark.parametrize("engine", ["fsdp", "hsdp"])
def test_a_plan_for_4096_gpus_is_checked_within_10_seconds(engine, capsys):
    settings = (f"train.parallel={engine}", "train.batch_size=4096")
    start = time.process_time()  # of the processor, because other programs may use the machine
    _, plan = costs_and_plan("mae_huge", settings=settings, cluster=Cluster(nodes=512, gpus=8), verify=True)
    seconds = time.process_time() - start
    with capsys.disabled():
        print(f"\nmae_huge, {engine} on 4,096 GPUs: {seconds:.1f} s ", end="")
    assert plan.exact
    assert seconds < 10


class LossValue(nn.Module):
    """Return the loss as a tensor, because `fully_shard` does not find tensors in a `Loss`."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, batch, clock):
        return self.method(batch, clock).value


@pytest.mark.parametrize("recipe", ["mae_nano", "igpt_nano", "beit_nano"])
@pytest.mark.parametrize(("engine", "nodes", "gpus"), [("fsdp", 1, 3), ("hsdp", 2, 3)])
def test_a_simulated_step_leaves_gradients_and_moments_of_these_sizes(recipe, engine, nodes, gpus):
    config = resolved(recipe)
    images = typical_images(config)
    method = build_unallocated(config, images)
    expected = costs(Model.of(method), engine, nodes, gpus)
    with fake_group(nodes * gpus), ExitStack() as stack:
        mesh = mesh_of(engine, World(size=nodes * gpus, local_size=gpus), "cpu")
        stack.enter_context(fake_tensors())
        move_to_fake_cpu(method)
        module = LossValue(method)
        shard(module, mesh, "bf16")
        optimizer = make_optimizer(method, config.optim)
        batch = example_batch(images, 2, "cpu")
        with autocast("bf16", "cpu"):
            loss = module(batch, Clock(0, 1, Draws(0, batch.epoch, batch.index)))
        loss.backward()
        optimizer.step()
        gradients = [p.grad for p in method.parameters() if p.grad is not None]
        moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        found = {
            "parameters": sum(p.to_local().nbytes for p in method.parameters()),
            "gradients": sum(g.to_local().nbytes for g in gradients),
            "moments": sum(m.to_local().nbytes for m in moments),
        }
    assert found == persistent(expected)


@pytest.mark.parametrize("recipe", ["mae_nano", "beit_nano", "igpt_nano", "dvae_nano", "ae_nano"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_activations_without_memory_are_those_of_a_real_pass(recipe, precision):
    config = resolved(recipe)
    images = typical_images(config)
    found = pass_sizes(config, images, precision)
    with fused_attention():
        method = build_method(config, images)
        assert found.per_image == bytes_per_image(method, images, precision, "cpu")
        assert found.cast == (cast_bytes(method, images) if precision == "bf16" else {})


def test_a_loss_that_depends_on_values_is_measured_on_real_tensors(monkeypatch):
    config = resolved("mae_nano")
    images = typical_images(config)
    expected = pass_sizes(config, images, "bf16")
    monkeypatch.setattr(fake_ranks, "FakeTensorMode", None)
    assert pass_sizes(config, images, "bf16") == expected


@pytest.mark.parametrize("recipe", ["mae_nano", "simmim_nano", "crossmae_nano", "igpt_nano"])
def test_recomputing_blocks_keep_their_inputs_and_one_block(recipe):
    config = resolved(recipe)
    images = typical_images(config)
    method = config.build(images)
    plain = bytes_per_image(method, images, "fp32", "cpu")
    few = bytes_per_image(method, images, "fp32", "cpu", recompute=True)
    assert few < 0.75 * plain
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in method.modules())
    inputs = sum(isinstance(part, BLOCKS) for part in method.encoder.modules()) * method.encoder.width * 4
    assert few > inputs, "each block keeps at least one token"


def test_weights_cast_to_bfloat16_are_the_matrices():
    method = resolved("mae_nano").build(typical_images(find("mae_nano")))
    cast = cast_bytes(method, typical_images(find("mae_nano")))
    shapes = dict(method.named_parameters())
    assert all(size == 2 * shapes[name].numel() for name, size in cast.items())
    assert "encoder.blocks.0.mlp.fc2.weight" in cast
    assert not [name for name in cast if "norm" in name]


SMALL = Model(
    blocks=(((ParameterFacts((10, 4), True)), ParameterFacts((3,), True)),) * 2,
    root=(ParameterFacts((1, 6), False), ParameterFacts((5, 2), True)),
)


def test_memory_of_a_small_model_by_hand():
    ddp = costs(SMALL, "ddp", 1, 4)
    assert (ddp.parameters, ddp.gradients, ddp.moments) == (4 * 102, 4 * 96, 8 * 96)
    assert ddp.gathered == ddp.accumulated == ddp.cast == ddp.average == 0
    fsdp = costs(SMALL, "fsdp", 1, 4, average=True)
    # Rank 0 holds 3 of 10 rows, 1 of 3 numbers, 1 of 1 row, 2 of 5 rows.
    assert fsdp.parameters == 4 * (2 * (3 * 4 + 1) + 6 + 2 * 2)
    assert fsdp.gradients == fsdp.average == 4 * (2 * (3 * 4 + 1) + 2 * 2)
    root, trained, block = 4 * 4 * (6 + 4), 4 * 4 * 4, 4 * 13
    assert fsdp.gathered == root + 2 * trained + block * (2 * 2 + 2 + 4)
    assert fsdp.total == sum(vars(fsdp).values())
    assert costs(SMALL, "fsdp", 1, 4, whole_gradients=True).accumulated == 4 * 86
    assert costs(SMALL, "fsdp", 1, 4, moments=1).moments == fsdp.gradients


def test_traffic_of_a_small_model_by_hand():
    def sent(engine, nodes, gpus, **more):
        return traffic(SMALL, engine, Devices(0, nodes, gpus), Kept(), **more)

    ddp = sent("ddp", 1, 4)
    assert (ddp.all_reduce, ddp.total, ddp.between_nodes) == (2 * 3 * 4 * 96 // 4, 2 * 3 * 4 * 96 // 4, 0)
    assert sent("ddp", 2, 2).between_nodes == ddp.all_reduce
    assert sent("ddp", 1, 4, accumulation=3) == ddp, "gradients are averaged once per step"
    assert sent("ddp", 1, 1).total == 0
    fsdp = sent("fsdp", 1, 4)
    assert fsdp.all_gather == 3 * (4 * 10 + 2 * 2 * 2 * 13)
    assert fsdp.reduce_scatter == 3 * 4 * (2 * 13 + 4)
    more = sent("fsdp", 1, 4, accumulation=5)
    assert (more.all_gather, more.reduce_scatter) == (5 * fsdp.all_gather, fsdp.reduce_scatter)
    more = sent("fsdp", 1, 4, accumulation=5, divide_gradients=True)
    assert (more.all_gather, more.reduce_scatter) == (5 * fsdp.all_gather, 5 * fsdp.reduce_scatter)
    assert sent("fsdp", 2, 2).between_nodes == fsdp.total
    hsdp = sent("hsdp", 3, 4)
    assert (hsdp.all_gather, hsdp.reduce_scatter) == (fsdp.all_gather, fsdp.reduce_scatter)
    assert hsdp.all_reduce == 2 * 2 * 4 * 30 // 3
    assert hsdp.between_nodes == 4 * hsdp.all_reduce
    more = sent("hsdp", 3, 4, accumulation=5, divide_gradients=True)
    assert (more.reduce_scatter, more.all_reduce) == (5 * hsdp.reduce_scatter, hsdp.all_reduce)


def test_process_group_is_left_and_missing_parts_are_explained(monkeypatch):
    with fake_group(8):
        assert torch.distributed.get_world_size() == 8
        with pytest.raises(UserError, match="belongs to a group of processes already"), fake_group(2):
            pass
    assert not torch.distributed.is_initialized()
    monkeypatch.setitem(__import__("sys").modules, "torch.testing._internal.distributed.fake_pg", None)
    with (
        pytest.raises(UserError, match=re.escape("cannot simulate a group of processes; leave out --verify")),
        fake_group(2),
    ):
        pass
