"""Batches that several processes can divide."""

import pytest
from conftest import small

from unmask.config import ConfigError, override
from unmask.engine.make_plan import Processes, choose_micro_batch, for_processes, require_divisible, unit_of_batch
from unmask.recipes.catalogue import find


def test_the_unit_is_two_images_per_process_with_mixup_or_cutmix():
    plain = override(find("finetune_nano"), ["method.mixup=0", "method.cutmix=0"])
    for setting in ("method.mixup=0.8", "method.cutmix=1"):
        mixed = override(plain, [setting])
        assert (unit_of_batch(mixed, 4), unit_of_batch(plain, 4), unit_of_batch(mixed, 1)) == (8, 4, 1)
    assert unit_of_batch(override(find("mae_nano"), ["data.repeats=4", "train.batch_size=64"]), 2) == 8


def test_a_batch_that_cannot_be_divided_is_rejected_with_the_nearest_that_can():
    config = override(find("mae_nano"), ["train.batch_size=100"])
    require_divisible(config, 4)
    with pytest.raises(ConfigError, match=r"got train.batch_size=100 for 24 processes.*train.batch_size=96 or 120"):
        require_divisible(config, 24)
    with pytest.raises(ConfigError, match=r"train\.batch_size=128, or another"):
        require_divisible(config, 128)


def test_each_process_gets_the_same_share_of_the_chosen_micro_batch():
    config = override(find("mae_nano"), ["train.batch_size=96"])
    micro, _ = choose_micro_batch(config, 1, "cpu", Processes(3, 3), lambda micro_batches: 10)
    assert micro == 24
    assert 96 % micro == micro % 3 == 0


def test_fewer_processes_need_memory_for_the_whole_state(unmask, images, monkeypatch):
    from unmask.engine import make_plan
    from unmask.engine.load import read_config, read_plan
    from unmask.run import Run

    unmask("pretrain", images, "--recipe", "mae_nano", "--out", "run", *small("train.steps=2"))
    run = Run("run")
    plan = read_plan(run).model_copy(update={"processes": 2})
    assert for_processes(plan, read_config(run), Processes(1, 1), read=1000).processes == 1
    state = 4 * 4 * plan.parameters  # parameters, gradients and two moments in float32
    monkeypatch.setattr(make_plan, "free_memory", lambda device: 2 * state)
    for_processes(plan, read_config(run), Processes(1, 1), read=state // 2)
    with pytest.raises(ConfigError, match=r"got 1 process for a run of 2; expected .* and the checkpoint, but"):
        for_processes(plan, read_config(run), Processes(1, 1), read=2 * state)
