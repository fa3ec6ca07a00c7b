"""`data.repeats` takes several samples from each decoded image, and an epoch has the same number of samples."""

import pytest
from conftest import SMALL_RUN, pretrain

from unmask.config import ConfigError, override
from unmask.engine.continue_run import resume
from unmask.engine.make_plan import choose_micro_batch
from unmask.recipes.catalogue import find


def config(*settings):
    return override(find("mae_nano"), ["train.batch_size=12", *settings])


@pytest.mark.parametrize(("fit", "micro"), [(100, 12), (11, 6), (5, 3), (1, 3)])
def test_repeats_are_never_split_between_micro_batches(monkeypatch, fit, micro):
    monkeypatch.setattr("unmask.engine.make_plan.free_memory", lambda device: 1000 * fit / 0.6)
    assert choose_micro_batch(config("data.repeats=3"), 1000, "cpu")[0] == micro


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.repeats=5"], r"train\.batch_size=12 is not a multiple of data\.repeats=5.*use 15"),
        (["data.repeats=3", "train.micro_batch=4"], r"train\.micro_batch=4 is not a multiple.*use 6"),
    ],
)
def test_batch_that_splits_repeats_is_rejected_before_images_are_opened(settings, message):
    with pytest.raises(ConfigError, match=message):
        pretrain("nowhere", recipe="mae_nano", settings=["train.batch_size=12", *settings])


def test_run_with_repeats_counts_samples_and_resumes_exactly(images, tmp_path, monkeypatch):
    settings = [*SMALL_RUN, "train.steps=6", "train.checkpoint_every=3", "data.repeats=4"]
    whole = pretrain(images, recipe="mae_nano", out=tmp_path / "whole", settings=settings)
    plan = whole.read("plan.json")
    assert plan["epochs"] == 6 * 8 / 30  # an epoch has as many samples as images
    assert any("once in 4 epochs" in reason for reason in plan["reasons"])
    broken = tmp_path / "broken"

    def stop(row, *_):
        if row.get("step") == 5:
            raise KeyboardInterrupt

    true_log = type(whole).log
    monkeypatch.setattr(type(whole), "log", lambda self, row: (stop(row), true_log(self, row))[1])
    with pytest.raises(KeyboardInterrupt):
        pretrain(images, recipe="mae_nano", out=broken, settings=settings)
    monkeypatch.setattr(type(whole), "log", true_log)
    gone_on = resume(broken)
    losses = [[(row["step"], row["loss"]) for row in run.metrics() if "loss" in row] for run in (whole, gone_on)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
