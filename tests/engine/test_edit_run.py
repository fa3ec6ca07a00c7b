"""`unmask set`: which settings of a run can be changed, and runs still resume exactly afterwards."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_RUN, pretrain, write_images

from unmask.batch import ImageSpec
from unmask.config import ConfigError, override
from unmask.console import Console
from unmask.engine import edit_run
from unmask.engine.continue_run import resume
from unmask.engine.edit_run import require_same_weights, set_values
from unmask.engine.load import load, read_config, read_plan
from unmask.finetuning.configure import finetuning_config
from unmask.recipes.catalogue import find
from unmask.report.run_page import write_report
from unmask.run import Run

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    settings = [*SMALL_RUN, "train.steps=20", "train.checkpoint_every=4", "optim.warmup=0.2"]
    pretrain(
        write_images(folder / "images", 12), recipe="mae_nano", out=folder / "run", settings=settings, console=QUIET
    )
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.size=[32,32]", "the weights were trained with this setting"),
        ("method.encoder.heads=1", "trained with this setting"),
        ("train.seed=3", "the order of the images"), ("data.source=x", "keeps its images"),
        ("data.nodata=0", "trained with this setting"), ("data.alpha=drop", "trained with this setting"),
        ("data.pages=first", "trained with this setting"), ("data.axes=CHW", "trained with this setting"),
        ("data.held_out=3", "when a run begins"), ("optim.name=lars", "moments"),
        ("train.steps=10", "has done 20 already"), ("train.steps=none", "expected a number"),
        ("train.stps=30", "did you mean"),
        ("train.micro_batch=3", "does not divide"), ("train.test_every=2", "is not tested"),
    ],
)  # fmt: skip
def test_forbidden_changes_are_rejected_and_nothing_is_written(run, setting, message):
    before = {name: (run / name).read_bytes() for name in ("config.json", "plan.json", "provenance.json")}
    with pytest.raises(ConfigError, match=message):
        set_values(run, [setting], console=QUIET)
    assert before == {name: (run / name).read_bytes() for name in before}


@pytest.mark.parametrize("setting", ["method.last_blocks=1", "method.last_blocks=0"])
def test_change_of_the_trained_weights_is_rejected(setting):
    """The shapes of all weights stay the same, but `resume` would reject the stored optimiser state."""
    config = finetuning_config(find("mae_nano"), ("one", "other"), "finetune_few")
    plan = SimpleNamespace(images=ImageSpec(3, config.data.size, "uint8", (0.0,) * 3, (1.0,) * 3))
    require_same_weights(config, override(config, ["method.mixup=0"]), plan)
    with pytest.raises(ConfigError, match=r"encoder\..* would no longer be trained"):
        require_same_weights(config, override(config, [setting]), plan)


def test_finished_run_can_be_trained_longer_and_resumed_exactly(run, tmp_path):
    set_values(run, ["train.steps=40"], console=QUIET)
    plan = read_plan(Run(run))
    assert (plan.steps, plan.since, plan.ramp) == (40, 20, 4)
    assert [plan.lr(step) for step in range(20)] == [plan.earlier.lr(step) for step in range(20)]
    assert plan.lr(19) < plan.lr(20) < plan.lr(24), "the learning rate rises to the new curve"
    assert plan.lr(24) == pytest.approx(plan.peak_lr / 2, rel=0.3)
    assert plan.lr(39) < plan.lr(30)
    assert Run(run).status().state == "stopped"
    other = shutil.copytree(run, tmp_path / "other")
    assert resume(run, console=QUIET).finished
    shutil.rmtree(other / "checkpoints/step-00000020")  # resumes from step 16, which used the old schedule
    assert resume(other, console=QUIET).finished
    first, second = (load(folder).method.state_dict() for folder in (run, other))
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert [row["step"] for row in Run(run).metrics() if "loss" in row] == list(range(1, 41))


def test_a_change_is_recorded_and_shown(run):
    set_values(run, ["train.log_every=5", "method.mask_ratio=0.6"], console=QUIET)
    (edit,) = Run(run).read("provenance.json")["edits"]
    assert edit["changes"] == {"train.log_every": [1, 5], "method.mask_ratio": [0.75, 0.6]}
    assert edit["step"] == 20
    assert "method.mask_ratio from 0.75 to 0.6" in write_report(run).read_text()
    assert set_values(run, ["train.log_every=5"], console=QUIET) == {}
    assert load(run).step == 20, "the checkpoints still belong to the run"


def test_engine_and_recomputing_can_be_changed_at_any_time(run):
    assert read_plan(Run.open(run)).parallel == "ddp"
    set_values(run, ["train.parallel=fsdp", "train.recompute=true"], console=QUIET)
    assert (read_plan(Run.open(run)).parallel, read_config(Run.open(run)).train.recompute) == ("fsdp", True)
    set_values(run, ["train.parallel=auto"], console=QUIET)
    assert read_plan(Run.open(run)).parallel == "fsdp"


def test_settings_that_a_run_of_an_earlier_version_lacks_have_their_defaults(run):
    folder = Run.open(run)
    config = folder.read("config.json")
    del config["train"]["parallel"], config["train"]["recompute"]
    folder.write("config.json", config)
    assert read_config(folder).train.parallel == "auto"
    set_values(run, ["train.steps=24"], console=QUIET)
    assert resume(run, console=QUIET).finished


@pytest.mark.parametrize("after", [1, 2, 3])
def test_interrupted_change_is_completed(run, monkeypatch, after):
    real, written = Run.write, []

    def dying(self, name, value):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(name)
        real(self, name, value)

    monkeypatch.setattr(Run, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        set_values(run, ["train.steps=24"], console=QUIET)
    monkeypatch.undo()
    assert (run / edit_run.JOURNAL).exists()
    assert resume(run, console=QUIET).finished
    assert not (run / edit_run.JOURNAL).exists()
    assert read_config(Run(run)).train.steps == read_plan(Run(run)).steps == 24
    assert len(Run(run).read("provenance.json")["edits"]) == 1


def test_message_about_an_unset_length_names_the_setting_in_effect(run, capsys):
    set_values(run, ["train.steps=30"], console=Console())
    err = capsys.readouterr().err
    assert "None" not in err
    assert "train.steps: 20 -> 30" in err
    set_values(run, ["train.epochs=40"], console=Console())
    assert "train.steps: 30 -> none (train.epochs is set)" in capsys.readouterr().err


def test_repeated_length_changes_at_one_step_keep_one_earlier_plan(run):
    before = read_plan(Run.open(run))
    for steps in (29, 30, 29, 29, 30):
        set_values(run, [f"train.steps={steps}"], console=QUIET)
    assert set_values(run, ["train.steps=30"], console=QUIET) == {}
    plan = read_plan(Run.open(run))
    assert plan.steps == 30
    assert plan.earlier is not None
    assert plan.earlier.earlier is None
    assert [plan.lr(step) for step in range(before.steps)] == [before.lr(step) for step in range(before.steps)]
