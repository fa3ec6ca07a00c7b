"""The engine that `train.parallel=auto` chooses."""

import pytest

from unmask.engine.choose_parallel import LEAST_IMAGES, choose_parallel, state_bytes

MILLION, MIB, GIB = 10**6, 2**20, 2**30


def chosen(memory, *, ranks=32, ranks_per_node=8, parameters=1000 * MILLION, image=100 * MIB, **more):
    return choose_parallel(
        parameters=parameters,
        trainable=parameters,
        bytes_per_image=image,
        memory=int(memory),
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        **more,
    )


def test_state_is_16_bytes_per_trainable_parameter_with_adamw():
    assert state_bytes(100, 100) == 1600
    assert state_bytes(100, 100, average=True) == 2000
    assert state_bytes(100, 100, moments=1) == 1200
    assert state_bytes(100, 25) == 400 + 25 * 12


def test_ddp_is_chosen_exactly_if_state_and_activations_fit_a_device():
    need = 16 * 1000 * MILLION + LEAST_IMAGES * 100 * MIB
    assert chosen(need)[0] == "ddp"
    assert chosen(need - 1)[0] == "hsdp"


def test_hsdp_is_chosen_while_one_node_can_hold_the_model_and_fsdp_above():
    need = 16 * 1000 * MILLION // 8 + LEAST_IMAGES * 100 * MIB
    assert chosen(need)[0] == "hsdp"
    assert chosen(need - 1)[0] == "fsdp"


def test_only_ddp_needs_memory_for_bfloat16_copies_of_all_weights():
    need = 16 * 1000 * MILLION + LEAST_IMAGES * 100 * MIB
    assert chosen(need, copies=2000 * MILLION)[0] == "hsdp"
    assert chosen(need + 2000 * MILLION, copies=2000 * MILLION)[0] == "ddp"
    need = 16 * 1000 * MILLION // 8 + LEAST_IMAGES * 100 * MIB
    assert chosen(need, copies=2000 * MILLION)[0] == "hsdp"
    assert chosen(need, copies=2000 * MILLION, root_copies=1)[0] == "fsdp"


def test_fsdp_is_chosen_on_one_node_and_on_nodes_with_one_device():
    engine, why = chosen(10 * GIB, ranks=8)
    assert engine == "fsdp"
    assert "divided among the 8 of the node" in why
    engine, why = chosen(10 * GIB, ranks=8, ranks_per_node=1)
    assert engine == "fsdp"
    assert "divided among all 8" in why


def test_a_model_that_fits_nowhere_is_reported_with_advice():
    assert "out of memory; use more devices or smaller images" in chosen(GIB)[1]
    engine, why = chosen(GIB, largest_block=MILLION)
    assert engine == "fsdp"
    assert "expect to run out of memory; use train.recompute=true" in why


def test_images_and_gathered_blocks_count():
    need = 16 * 1000 * MILLION
    assert chosen(need + 100 * MIB, images=1)[0] == "ddp"
    assert chosen(need + 100 * MIB, images=2)[0] == "hsdp"
    assert chosen(need + LEAST_IMAGES * 100 * MIB, images=4096)[0] == "ddp", "more images need more micro-batches"
    edge = need // 8 + LEAST_IMAGES * 100 * MIB
    assert chosen(edge, largest_block=MILLION)[0] == "fsdp"
    assert chosen(edge + 8 * MILLION, largest_block=MILLION)[0] == "hsdp"


def test_one_process_divides_nothing():
    assert chosen(1, ranks=1, ranks_per_node=1) == ("ddp", "ddp: one process, so nothing is divided")


@pytest.mark.parametrize(("memory", "engine"), [(80 * GIB, "ddp"), (12 * GIB, "hsdp"), (2 * GIB, "fsdp")])
def test_the_reason_begins_with_the_engine_and_states_sizes(memory, engine):
    found, why = chosen(memory)
    assert found == engine
    assert why.startswith(f"{engine}: model, gradients and moments (14.9 GiB) and activations of 8 images (800.0 MiB)")
    assert f"{memory / GIB:.1f} GiB usable per device" in why
