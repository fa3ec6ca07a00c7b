"""Pre-training: invalid settings are rejected early, settings are combined, and runs resume with changed data."""

import multiprocessing
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, pretrain, write_images
from faults import faults, signal_after

from unmask.config import ConfigError, override
from unmask.console import Console
from unmask.data.scan.scan import scan
from unmask.engine import pretraining as pretrain_module
from unmask.engine import resolve, run_training
from unmask.engine.continue_run import resume
from unmask.engine.edit_run import set_values
from unmask.engine.load import load
from unmask.engine.samples import BASELINES
from unmask.engine.train import TrainingFailed
from unmask.engine.training_data import DataError
from unmask.errors import UserError
from unmask.recipes.catalogue import find
from unmask.run import Run, RunError, RunInUse


def start(data, out, *settings, recipe="mae_nano", **more):
    return pretrain(data, recipe=recipe, out=out, settings=[*SMALL_RUN, *settings], **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": ["train.step=3"]}, "did you mean train.steps"),
        ({"settings": ["train.steps=3", "train.epochs=2"]}, "both train.steps and train.epochs"),
        ({"settings": ["train.steps=3"], "budget": 5.0}, "both a time budget and train.steps"),
        ({"settings": ["train.epochs=3"], "budget": 5.0}, "both a time budget and train.epochs"),
        ({"recipe": "mae_nanno"}, "did you mean mae_nano"),
        ({"settings": ["data.source=elsewhere"]}, "data.source cannot be set: give the images as the DATA"),
        ({"settings": ["recipe=mine"]}, "recipe cannot be set: .*--recipe NAME"),
        (
            {"settings": ["data.crop.kind=center", "data.crop.scale=[0.5,1]"]},
            r"data\.crop\.scale was set, but .*'center'",
        ),
        ({"settings": ["data.crop.ratio=[1,1]"], "recipe": "demo_shapes"}, r"data\.crop\.ratio was set, but"),
        ({"settings": ["train.device=cuda:77"]}, "got device 'cuda:77'; expected one of this machine"),
        ({"settings": ["optim.betas=[0.9,1.5]"]}, "less than 1"),
        ({"settings": ["data.mean=[1,2]", "data.std=[1,2,3]"]}, "2 means and 3 standard deviations for 2 channels"),
        ({"settings": ["data.channels=1", "data.mean=[1,2]"]}, "2 means and 1 standard deviations for 1 channels"),
        ({"settings": ["train.micro_batch=5"], "recipe": "mae_nano"}, "micro_batch=5 does not divide .*=128; use 4"),
        ({"settings": ["data.size=30"], "recipe": "mae_nano"}, "30 is not a multiple of patch size 4"),
        ({"settings": ["data.size=30", "method.encoder.patch=4"]}, "30 is not a multiple of patch size 4"),
        ({"settings": ["method.encoder.patch=0"]}, "greater than 0"),
        ({"settings": ["method.encoder.heads=7"]}, "7"),
        (
            {"settings": ["method.mask_ratio=0.999"], "recipe": "mae_nano"},
            "a mask ratio of 0.999, which leaves nothing visible",
        ),
        ({"settings": ["method.mask_ratio=0.9999"]}, "a mask ratio of 0.9999, which leaves nothing visible"),
    ],
)
def test_invalid_settings_are_rejected_before_files_are_read(images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(pretrain_module, "open_source", pytest.fail)
    with pytest.raises(UserError, match=message):
        pretrain(images, out=tmp_path / "run", **arguments)


@pytest.mark.parametrize(
    "settings",
    [
        [], ["data.size=100"], ["data.size=[81,121]", "method.encoder.patch=[3,11]"], ["method.encoder.patch=14"],
        ["data.size=121"], ["method.encoder.heads=16", "method.decoder.heads=16"], ["method.mask_ratio=0.99"],
    ],
)  # fmt: skip
def test_settings_that_auto_can_complete_are_accepted(settings):
    assert resolve.draft_config(None, "auto", settings, None).recipe == "mae_nano"


def test_settings_resolve_equally_from_a_recipe_and_from_a_run():
    base = override(find("mae_nano"), ["train.steps=500"])
    assert resolve.resolve_config(base, []).train.steps == 500
    epochs = resolve.resolve_config(base, ["train.epochs=3"])
    assert (epochs.train.steps, epochs.train.epochs) == (None, 3)
    for nothing in ("none", "null", "None"):
        kept = resolve.resolve_config(base, [f"train.epochs={nothing}", "train.steps=7"], proposals=["train.steps=9"])
        assert (kept.train.steps, kept.train.epochs) == (7, None)
        assert resolve.resolve_config(base, [f"train.steps={nothing}"], budget=3.0).train.steps is None


@pytest.mark.parametrize("nothing", ["none", "null"])
def test_auto_does_not_propose_steps_that_were_unset(images, nothing):
    source = pretrain_module.open_source(images)
    found = scan(source)
    config, reasons, proposals = resolve.choose_config(
        source, found, "auto", [f"train.steps={nothing}"], "cpu", budget=None
    )
    assert config.train.steps is None
    assert "3000 steps" not in " ".join(reasons)
    assert not [item for item in proposals if item.startswith("train.steps")]
    assert config.data.source == source.location


def test_given_epochs_override_the_steps_of_a_run(images, tmp_path):
    first = start(images, tmp_path / "first", "train.steps=3")
    second = pretrain(images, out=tmp_path / "second", from_run=first.path, settings=["train.epochs=0.5"])
    assert second.read("plan.json")["steps"] == 2
    with pytest.raises(ConfigError, match="of the initial weights; use"):
        pretrain(images, out=tmp_path / "third", from_run=first.path, settings=["data.size=33"])
    with pytest.raises(ConfigError, match="both --from and graft"):
        pretrain(images, out=tmp_path / "third", from_run=first.path, settings=["graft=[]"])


def test_default_folder_gets_a_number_if_it_exists(tmp_path, monkeypatch):
    write_images(tmp_path / "2024", 8)
    monkeypatch.chdir(tmp_path)
    assert start("2024", "run", "train.steps=1").read("config.json")["data"]["source"].endswith("2024")


def test_existing_folder_is_rejected_before_files_are_read(images, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_module, "open_source", pytest.fail)
    with pytest.raises(RunError, match=r"not empty.*another --out"):
        start(images, images)
    with pytest.raises(RunError, match=r"cannot be created|is a file"):
        Run.create("/proc/version/run")


def test_budget_or_epochs_override_the_steps_of_auto(images, tmp_path, monkeypatch):
    """`auto` proposes 3000 steps for so few images; a budget or epochs from the user override them."""
    monkeypatch.setattr("unmask.engine.make_plan.time_steps", lambda *_, **__: [0.5])
    monkeypatch.setattr("unmask.engine.time_budget.clock", lambda: 0.0)
    run = start(images, tmp_path / "a", recipe="auto", budget=3.0)  # the clock does not move
    assert run.read("plan.json")["steps"] == 5
    assert "3000 steps" not in " ".join(run.read("plan.json")["reasons"])
    run = start(images, tmp_path / "b", "train.epochs=1", recipe="auto")
    assert run.read("plan.json")["steps"] == 4
    assert "recipe mae_nano, chosen by auto:" in run.read("plan.json")["reasons"]


def test_budget_or_epochs_override_the_steps_of_a_recipe(images, tmp_path, monkeypatch):
    from unmask.recipes import catalogue

    steady = catalogue.find("mae_nano").model_copy(update={"train": catalogue.find("mae_nano").train})
    with_steps = override(steady, ["train.steps=500"])
    monkeypatch.setattr(catalogue, "find", lambda _: with_steps)
    monkeypatch.setattr("unmask.engine.make_plan.time_steps", lambda *_, **__: [0.5])
    monkeypatch.setattr("unmask.engine.time_budget.clock", lambda: 0.0)
    assert start(images, tmp_path / "a", budget=4.0).read("plan.json")["steps"] == 7
    assert start(images, tmp_path / "b", "train.epochs=1").read("plan.json")["steps"] == 4


def test_given_number_of_channels_determines_the_statistics(images, tmp_path):
    run = start(images, tmp_path / "run", "train.steps=1", "data.channels=1")
    spec = run.read("plan.json")["images"]
    assert (spec["channels"], len(spec["mean"])) == (1, 1)
    with pytest.raises(ConfigError, match=r"2 means and 3 standard deviations for 3 channels"):
        start(images, tmp_path / "run2", "train.steps=1", "data.mean=[1,2]")


def test_run_in_use_is_rejected_and_unchanged(images, tmp_path):
    with signal_after(2):
        run = start(images, tmp_path / "run", "train.steps=4")
    before = run.read("status.json")
    with run.lock(), pytest.raises(RunInUse, match=rf"in use by this very process \({os.getpid()}\)"):
        resume(run.path)
    assert run.read("status.json") == before
    assert resume(run.path).read("status.json")["state"] == "finished"


def test_changed_data_are_rejected_or_recorded_if_allowed(images, tmp_path):
    (images / "0000x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with signal_after(2):
        run = start(images, tmp_path / "run", "train.steps=6")
    assert run.read("plan.json")["excluded"] == [1]
    (images / "0000.png").unlink()  # now the broken file is row 0
    shutil.copy(images / "0007.png", images / "new.png")
    with pytest.raises(DataError, match=r"have changed.*31 files then, 31 now.*--allow-dataset-change"):
        resume(run.path)
    with signal_after(4):
        resume(run.path, allow_dataset_change=True)
    assert (run.read("plan.json")["excluded"], run.read("plan.json")["num_images"]) == ([0], 30)
    resume(run.path)  # the new files have been recorded
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_missing_device_raises_a_clear_error_on_resume(images, tmp_path):
    with signal_after(1):
        run = start(images, tmp_path / "run", "train.steps=4")
    run.write("plan.json", {**run.read("plan.json"), "device": "cuda:0"})
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="got device 'cuda:0'; expected one of this machine"):
            resume(run.path)


def test_unwritable_folder_raises_a_clear_error(images, tmp_path):
    with signal_after(1):
        run = start(images, tmp_path / "run", "train.steps=4")
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()  # like chmod, but also effective for root
    with pytest.raises(RunError, match=r"cannot be written to: .*make it writable"):
        resume(run.path)


def test_deleted_run_folder_fails_at_the_end_of_training(images, tmp_path):
    taken = []

    def vanishing(job, step):
        taken.append(step.number)
        if step.number == 3:
            shutil.rmtree(tmp_path / "run")
        return step

    with (
        faults(after_step=vanishing),
        pytest.raises(TrainingFailed, match=r"was deleted, moved or replaced .*unmask resume"),
    ):
        start(images, tmp_path / "run", "train.steps=6", "train.picture_every=2")
    assert not (tmp_path / "run").exists(), "the folder is not created again with only a status.json"
    assert taken == [1, 2, 3, 4, 5, 6]


def test_killed_loader_worker_error_suggests_a_working_fix(images, tmp_path):
    def killing(job, at):
        if at.step == 3:
            for worker in multiprocessing.active_children():
                worker.kill()

    settings = ("train.steps=40", "train.checkpoint_every=2", "data.workers=1", "data.cache=false")
    message = r"killed by signal 9; if it ran out of memory.*unmask set .*run data\.workers=0"
    with faults(before_step=killing), pytest.raises(TrainingFailed, match=message):
        start(images, tmp_path / "run", *settings)
    run = Run(tmp_path / "run")
    assert run.read("status.json")["state"] == "failed"
    set_values(run.path, ["data.workers=0"])
    assert resume(run.path).read("status.json")["state"] == "finished"
    whole = start(images, tmp_path / "whole", "train.steps=40")
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in whole.metrics()]


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_data_raise_a_clear_error(images, tmp_path, workers):
    def emptying(job, at):
        if at.step == 1:
            for path in images.iterdir():
                path.write_bytes(b"")

    settings = ("train.steps=60", "data.cache=false", f"data.workers={workers}", "data.max_bad_fraction=1")
    gone = pytest.raises(TrainingFailed, match="the data set seems to be gone")
    with faults(before_step=emptying), gone as caught:
        start(images, tmp_path / "run", *settings)
    assert "Traceback" not in str(caught.value)


def test_unreadable_file_in_the_picture_sample_is_skipped(tmp_path):
    """The scan may read only a sample of the files; an unreadable file outside the sample must not stop the run."""
    images = write_images(tmp_path / "images", 30)
    (images / "0005.png").write_bytes(b"no image")
    run = start(images, tmp_path / "run", "train.steps=5", "data.scan_sample=2", "data.cache=false")
    assert run.read("status.json")["state"] == "finished"
    assert [row["name"] for row in run.quarantine()] == ["0005.png"], "the file is recorded when it is first read"


def test_from_run_copies_weights_and_normalisation(images, tmp_path):
    first = start(images, tmp_path / "first", "train.steps=3")
    other = write_images(tmp_path / "others", 12, seed=3)
    run = pretrain(
        other, out=tmp_path / "second", from_run=first.path, settings=["train.steps=1", "optim.base_lr=1e-30"]
    )
    before, after = load(first.path), load(run.path)
    assert all((after.method.state_dict()[name] - value).abs().max() < 1e-20
               for name, value in before.method.state_dict().items())  # fmt: skip
    assert after.plan.images == before.plan.images
    assert after.config.data.source == str(other)
    shutil.rmtree(first.path)
    assert resume(run.path).read("status.json")["state"] == "finished", "resuming does not need the run of --from"


def test_from_run_with_a_recipe_copies_only_the_encoder(images, tmp_path):
    first = start(images, tmp_path / "first", "train.steps=2")
    decoder = ["method.decoder.width=24", "train.steps=1", "optim.base_lr=1e-30"]
    run = start(images, tmp_path / "second", *decoder, from_run=first.path)
    before, after = load(first.path).method.state_dict(), load(run.path).method.state_dict()
    assert all(
        (after[name] - value).abs().max() < 1e-20 for name, value in before.items() if name.startswith("encoder.")
    )
    assert after["decoder.embed.weight"].shape[0] == 24


def test_from_run_that_does_not_fit_is_rejected_before_a_run_is_made(images, tmp_path):
    first = start(images, tmp_path / "first", "train.steps=2")
    with pytest.raises(ValueError, match=r"the weights do not fit: .*encoder"):
        start(images, tmp_path / "second", "train.steps=1", "method.encoder.width=64", from_run=first.path)
    floats = tmp_path / "floats"
    floats.mkdir()
    for number in range(4):
        np.save(floats / f"{number}.npy", np.random.default_rng(number).random((16, 16, 3), np.float32))
    with pytest.raises(UserError, match=r"got float32 images; expected uint8"):
        pretrain(floats, out=tmp_path / "second", from_run=first.path, settings=["train.steps=1"])
    with pytest.raises(RunError, match="is not a run"):
        pretrain(images, out=tmp_path / "second", from_run=images)
    assert not (tmp_path / "second").exists()


def test_batch_far_larger_than_the_data_is_rejected(images, tmp_path):
    with pytest.raises(ConfigError, match=r"got train.batch_size=100000000 for 30 images: .* use at most 7680"):
        start(images, tmp_path / "run", "train.batch_size=100000000", "train.micro_batch=8")
    assert not (tmp_path / "run").exists()


def test_loss_above_the_baseline_is_reported_at_the_end(images, tmp_path, capsys):
    run = start(images, tmp_path / "run", "train.steps=2", console=Console())
    err = " ".join(capsys.readouterr().err.split())
    assert re.search(r"images of the pictures is \d\.\d+, and that of an untrained baseline \(\w+ \w+\)", err)
    assert f"unmask set {run.path} train.steps=3000" in err


@pytest.mark.parametrize(
    ("guesses", "losses", "warned"),
    [
        ({"visible_mean": 0.8, "true_patch_mean": 0.1}, [[2, 0.7]], False),
        ({"visible_mean": 0.8, "true_patch_mean": 0.1}, [[2, 0.8]], True),
        ({"visible_mean": 0.8}, [[1, 0.9]], False),  # not the last step
        ({"true_patch_mean": 0.1}, [[2, 0.9]], False),
        ({"visible_mean": 0.8}, [], False),
        ({"visible_mean": "low"}, [[2, 0.9]], False),  # not a valid record
    ],
)
def test_which_losses_count_as_above_the_baseline(images, tmp_path, capsys, guesses, losses, warned):
    run = start(images, tmp_path / "run", "train.steps=2", console=Console(quiet=True))
    run.write(BASELINES, {"record": "baselines", "images": 8, "guesses": guesses, "losses": losses})
    capsys.readouterr()
    run_training.warn_above_baseline(run, Console())
    assert ("an untrained baseline (visible mean)" in capsys.readouterr().err) == warned


def test_images_without_valid_pixels_are_rejected(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(12):
        np.save(tmp_path / "images" / f"{number}.npy", np.full((16, 16, 3), np.nan, np.float32))
    with pytest.raises(DataError, match=r"all pixels of the 12 images .* are absent"):
        start(tmp_path / "images", tmp_path / "run")
    assert not (tmp_path / "run").exists()
