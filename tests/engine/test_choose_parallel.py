"""The engine that `train.parallel=auto` chooses."""

import pytest

from unmask.config import override
from unmask.engine.choose_parallel import LEAST_IMAGES, Devices, Needs, choose_parallel, divided_dimension
from unmask.engine.parallel_costs import Division, Model, ParameterFacts
from unmask.recipes.catalogue import find

MIB, GIB = 2**20, 2**30
STATE = {"ddp": 16 * GIB, "hsdp": 3 * GIB, "fsdp": 2 * GIB}
ACTIVATIONS = LEAST_IMAGES * 100 * MIB


def chosen(usable, *, nodes=4, gpus=8, state=STATE, **more):
    about = {"images": LEAST_IMAGES, "activations": ACTIVATIONS, **more}
    return choose_parallel(Needs(state, **about), Devices(int(usable), nodes, gpus))


@pytest.mark.parametrize(("engine", "next_engine"), [("ddp", "hsdp"), ("hsdp", "fsdp")])
def test_an_engine_is_chosen_exactly_if_all_that_it_needs_fits(engine, next_engine):
    need = STATE[engine] + ACTIVATIONS
    assert chosen(need)[0] == engine
    assert chosen(need - 1)[0] == next_engine


def test_fsdp_is_chosen_on_one_node_and_on_nodes_with_one_device():
    engine, why = chosen(10 * GIB, nodes=1)
    assert engine == "fsdp"
    assert "divided among the 8 of the node" in why
    engine, why = chosen(10 * GIB, nodes=8, gpus=1)
    assert engine == "fsdp"
    assert "divided among all 8" in why


def test_a_model_that_fits_nowhere_is_reported_with_advice():
    engine, why = chosen(GIB)
    assert engine == "fsdp"
    assert "need 2.8 GiB on each device even if divided among all 32" in why
    assert "out of memory; use more devices or smaller images" in why
    assert "expect to run out of memory; use train.recompute=true" in chosen(GIB, blocks=True)[1]


def test_if_nothing_fits_the_engine_with_the_least_memory_is_chosen():
    engine, why = chosen(GIB, state=STATE | {"fsdp": 7 * GIB})
    assert engine == "hsdp"
    assert "need 3.8 GiB on each device even if divided among the 8 of a node" in why


def test_one_process_divides_nothing():
    assert chosen(1, nodes=1, gpus=1) == ("ddp", "ddp: one process, so nothing is divided")


@pytest.mark.parametrize(("usable", "engine"), [(80 * GIB, "ddp"), (12 * GIB, "hsdp"), (3 * GIB, "fsdp")])
def test_the_reason_begins_with_the_engine_and_states_sizes(usable, engine):
    found, why = chosen(usable)
    assert found == engine
    assert why.startswith(f"{engine}: model, gradients and moments (16.0 GiB) and activations of 8 images (800.0 MiB)")
    assert f"{usable / GIB:.1f} GiB usable per device" in why
    assert "moments with bfloat16 copies (16.0 GiB)" in chosen(usable, copies=True)[1]


@pytest.mark.parametrize(
    ("shape", "shards", "dimension"),
    [
        ((512, 64), 8, 0),
        ((10, 64), 8, 0),  # padded to 16
        ((8,), 8, 0),
        ((3,), 8, 0),
        ((1, 197, 768), 8, 2),
        ((1, 1, 768), 8, 2),
        ((4, 48, 16), 16, 1),
        ((1, 197, 768), 1000, 0),
        ((), 8, 0),
    ],
)
def test_short_parameters_are_divided_along_another_dimension_if_it_is_a_multiple(shape, shards, dimension):
    assert divided_dimension(shape, shards) == dimension


BLOCK = (ParameterFacts((1024, 1024), True, cast=2 * MIB), ParameterFacts((1024,), True))
ROOT = (ParameterFacts((1, 16, 1024), True), ParameterFacts((256, 1024), True, cast=MIB // 2))


def division(usable, *, nodes=4, gpus=8, image=MIB, images=LEAST_IMAGES, blocks=4, precision="bf16", **settings):
    batch = images * nodes * gpus
    config = override(find("mae_nano"), [f"train.batch_size={batch}", *(f"{k}={v}" for k, v in settings.items())])
    return Division(config, Model((BLOCK,) * blocks, ROOT), image, precision, Devices(int(usable), nodes, gpus))


def test_ddp_needs_16_bytes_per_parameter_and_copies_in_bfloat16():
    numbers = 4 * (1024 * 1024 + 1024) + 16 * 1024 + 256 * 1024
    need = 16 * numbers + 4 * 2 * MIB + MIB // 2 + LEAST_IMAGES * MIB
    assert division(need).engine == "ddp"
    assert division(need - 1).engine == "hsdp"
    assert division(need, **{"optim.average": 0.9}).engine == "hsdp"
    assert division(need + 4 * numbers, **{"optim.average": 0.9}).engine == "ddp"
    assert division(need - 4 * numbers, **{"optim.name": "lars"}).engine == "ddp"


def test_what_is_gathered_counts_with_its_padding():
    """Each of 4,096 ranks pads a parameter to 4,096 rows, and gathers those of the root and of two blocks."""
    few, many = division(MIB, nodes=4), division(MIB, nodes=512)
    assert few.engine == "fsdp"
    assert many.engine == "hsdp", "fsdp would gather 4,096 rows of every parameter"
    assert "even if divided among the 8 of a node" in many.reason
    wide = 4096 * 1024  # padded: of the block's matrix, of the root's matrix
    gathered = 4 * 3 * (4096 * 16 * 1024 + wide) + (2 * 2 + 2 + 4) * (wide + 4096)
    forced = division(MIB, nodes=512, **{"train.parallel": "fsdp"})
    assert forced.memory().gathered == gathered


def test_more_images_than_needed_do_not_change_the_engine():
    need = division(1).memory().total
    assert division(1, images=4096).least_images == LEAST_IMAGES
    assert division(1, images=2).least_images == 2
    assert need == division(1, images=4096).memory().total


def test_gradients_are_divided_after_each_micro_batch_if_whole_ones_do_not_fit():
    of_blocks = 4 * 4 * (1024 * 1024 + 1024)
    beside = division(1, **{"train.parallel": "fsdp"}).memory().total + of_blocks

    def at(usable, **more):
        return division(usable, images=64, **{"train.parallel": "fsdp", **more})

    enough = at(beside + LEAST_IMAGES * MIB)
    assert (enough.images_that_fit(8), enough.divides_gradients(8, 8)) == (LEAST_IMAGES, False)
    assert enough.divides_gradients(9, 8), "a micro-batch that is set may leave no memory for whole gradients"
    assert not enough.divides_gradients(9, 1), "without accumulation there is nothing to keep"
    less = at(beside + LEAST_IMAGES * MIB - 1)
    more_images = (of_blocks + LEAST_IMAGES * MIB - 1) // MIB
    assert (less.images_that_fit(8), less.divides_gradients(more_images, 8)) == (more_images, True)
    assert not at(1, **{"train.parallel": "ddp"}).divides_gradients(1, 8)
