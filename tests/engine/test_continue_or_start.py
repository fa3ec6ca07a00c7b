"""`--resume auto`: the same command continues its run, and a command with other settings is refused."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL_RUN, pretrain, small, write_images
from faults import signal_after

from unmask.config import ConfigError
from unmask.console import Console
from unmask.engine import continue_or_start, edit_run
from unmask.engine.load import read_config
from unmask.recipes.catalogue import find
from unmask.run import Run, RunError, RunInUse

QUIET = Console(quiet=True)
WAIT = 60


def again(images, out, *settings, **options):
    """Pre-train a small run with `--resume auto`; the last of equal keys in `settings` counts."""
    settings = [*SMALL_RUN, "train.steps=4", *settings]
    return pretrain(
        images, out=out, resume_auto=True, console=QUIET, settings=settings, **{"recipe": "mae_nano"} | options
    )


def weights(run: Path, step: int) -> str:
    return hashlib.sha256((run / f"checkpoints/step-{step:08d}/model.safetensors").read_bytes()).hexdigest()


def refused(*arguments, **options) -> str:
    with pytest.raises(ConfigError) as error:
        again(*arguments, **options)
    return str(error.value)


@pytest.fixture
def begun(images, tmp_path, monkeypatch):
    """A finished run of four steps; the folder of its images is `images`."""
    monkeypatch.chdir(tmp_path)
    return again(images, "run").path


def test_a_command_after_kill_9_continues_and_gives_the_same_weights(unmask, images, tmp_path):
    steps = small("train.steps=40", "train.checkpoint_every=5")
    command = ["pretrain", str(images), "--recipe", "mae_nano", "--out", "run", *steps, "--resume", "auto"]
    process = subprocess.Popen([sys.executable, "-m", "unmask", *command], stderr=subprocess.PIPE, cwd=tmp_path)
    deadline = time.monotonic() + WAIT
    try:
        while not list((tmp_path / "run/checkpoints").glob("step-*[1-9]?/MANIFEST.json")):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    reached = Run(tmp_path / "run").metrics()[-1]["step"]
    assert reached < 40, "the run finished before it was killed: the test shows nothing"
    code, _, err = unmask(*command)
    assert code == 0, err
    run = Run(tmp_path / "run")
    assert [row["step"] for row in run.metrics()] == list(range(1, 41))
    assert unmask("pretrain", images, "--recipe", "mae_nano", "--out", "whole", *steps)[0] == 0
    assert weights(tmp_path / "run", 40) == weights(tmp_path / "whole", 40)


def test_the_same_command_does_not_scan_again(begun, images, monkeypatch):
    def scan(*arguments, **options):
        raise AssertionError("the images were scanned again")

    monkeypatch.setattr("unmask.engine.pretraining.scan_source", scan)
    assert again(images, "run").finished
    assert again(Path("images"), "run").finished  # a relative path of the same images
    assert again(images, "run", "data.workers=0").finished  # the same settings, not the same command
    assert "train.steps=5" in refused(images, "run", "train.steps=5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.steps=5"], "got train.steps=5; the run in run has train.steps=4; use the same value, another --out, "
                            "or unmask set run train.steps=5"),
        (["train.seed=3"], "got train.seed=3; the run in run has train.seed=0; use the same value, or another --out"),
        (["train.seed=3", "train.steps=5"], "got train.steps=5, train.seed=3; the run in run has train.steps=4, "
                                            "train.seed=0; use the same values, or another --out"),
        (["data.size=[32,32]"], "got data.size=[32, 32]; the run in run has data.size=[16, 16]; use the same value, "
                                "or another --out"),
        (["train.micro_batch=4"], "got train.micro_batch=4; the run in run has train.micro_batch=none; use the same "
                                  "value, another --out, or unmask set run train.micro_batch=4"),
        (["train.precision=bf16"], "got train.precision=bf16; the run in run has train.precision=auto; use the same "
                                   "value, another --out, or unmask set run train.precision=bf16"),
    ],
)  # fmt: skip
def test_a_difference_is_refused_with_exactly_the_settings_that_differ(begun, images, settings, message):
    assert refused(images, "run", *settings) == message


def test_other_images_options_and_methods_are_refused(begun, images, tmp_path):
    other = write_images(tmp_path / "other", 30, seed=1)
    assert refused(other, "run") == (
        f"got data={other}; the run in run has data={images}; use the same value, another --out, or if the images "
        f"have moved: unmask resume run --data {other}"
    )
    assert 'got --exclude ["0001*"]; the run in run has --exclude none' in refused(images, "run", exclude=["0001*"])
    plain = [value for value in SMALL_RUN if "decoder" not in value]
    with pytest.raises(ConfigError) as error:
        pretrain(images, recipe="simmim_nano", settings=plain, out="run", resume_auto=True)
    assert str(error.value).startswith(
        "got recipe=simmim_nano, method.name=simmim; the run in run has recipe=mae_nano, method.name=mae"
    )


def test_defaults_that_were_chosen_from_the_images_agree(images, tmp_path, monkeypatch):
    """The recipe auto chooses size, patch, batch and steps; a size that was given and is left out later differs."""
    monkeypatch.chdir(tmp_path)
    chosen = [value for value in SMALL_RUN if "size" not in value] + ["train.epochs=1"]
    pretrain(images, settings=chosen, out="run", resume_auto=True)
    config = read_config(Run("run"))
    assert (config.recipe, config.data.size, config.train.batch_size) == ("mae_nano", (20, 20), 16)
    for same in (chosen, [*chosen, "train.batch_size=16"], [*chosen, "data.size=[20,20]"]):
        assert pretrain(images, settings=same, out="run", resume_auto=True).finished
    with pytest.raises(ConfigError, match=r"got train.batch_size=8; the run in run has train.batch_size=16"):
        pretrain(images, settings=[*chosen, "train.batch_size=8"], out="run", resume_auto=True)
    pretrain(images, settings=[*chosen, "data.size=[32,32]"], out="larger", resume_auto=True)
    with pytest.raises(ConfigError, match=r"data.size=\[20, 20\]; the run in larger .*data.size=\[32, 32\]"):
        pretrain(images, settings=chosen, out="larger", resume_auto=True)


def stopped(images, *settings):
    with signal_after(2):
        run = again(images, "run", "train.steps=6", *settings)
    assert run.status().state == "stopped"
    return run


def test_settings_that_change_no_result_may_differ_and_those_that_the_command_sets_apply(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopped(images)
    run = again(images, "run", "train.steps=6", "train.log_every=2", "train.checkpoint_every=3", "data.cache=false")
    assert run.finished
    assert [row["step"] for row in run.metrics()] == [1, 2, 4, 6]
    config = read_config(run)
    assert (config.train.log_every, config.train.checkpoint_every, config.data.cache) == (2, 3, False)
    assert again(images, "run", "train.steps=6").finished
    assert read_config(run).train.log_every == 2, "a setting that a command leaves out is not reset"


def test_every_setting_is_either_compared_or_known_to_be_free():
    known = edit_run.keys(find("mae_nano"))
    assert set(continue_or_start.FREE) <= set(known)
    assert not {"train.precision", "train.micro_batch", "train.seed", "data.held_out"} & set(continue_or_start.FREE)


def test_a_change_by_unmask_set_is_kept_by_the_old_command_and_accepted_from_a_new_one(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopped(images)
    edit_run.set_values("run", ["train.steps=8"])
    assert "got train.steps=7; the run in run has train.steps=8" in refused(images, "run", "train.steps=7")
    assert again(images, "run", "train.steps=6").status().step == 8
    assert again(images, "run", "train.steps=8").finished


def test_a_time_budget_is_compared(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*SMALL_RUN, "data.scan_sample=30"]
    pretrain(images, recipe="mae_nano", settings=settings, out="run", budget=6, resume_auto=True)
    assert pretrain(images, recipe="mae_nano", settings=settings, out="run", budget="6s", resume_auto=True).finished
    with pytest.raises(ConfigError, match=r"got --budget 8 s; the run in run has --budget 6 s; use the same value, or"):
        pretrain(images, recipe="mae_nano", settings=settings, out="run", budget=8, resume_auto=True)


def test_a_run_that_starts_from_another_continues_although_the_other_went_on_or_is_gone(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = again(images, "first").path
    pretrain(images, from_run=first, out="run", settings=["train.steps=3"], resume_auto=True)
    edit_run.set_values(first, ["train.steps=6"])
    again(images, first, "train.steps=6")
    assert pretrain(images, from_run=first, out="run", settings=["train.steps=3"], resume_auto=True).finished
    equal = ["train.steps=3", "data.workers=0"]
    assert pretrain(images, from_run=first, out="run", settings=equal, resume_auto=True).finished
    with pytest.raises(ConfigError, match="got graft="):
        pretrain(images, from_run="run", out="run", settings=["train.steps=3"], resume_auto=True)
    first.rename("gone")
    assert pretrain(images, from_run=first, out="run", settings=["train.steps=3"], resume_auto=True).finished


def test_an_empty_or_unfinished_folder_begins_and_a_foreign_one_is_refused(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert again(images, "empty").finished
    whole = Run("empty")
    unfinished = Run.create("unfinished").path
    (unfinished / "config.json").write_bytes((whole.path / "config.json").read_bytes())
    assert again(images, "unfinished").finished
    Path("foreign").mkdir()
    Path("foreign/photo.png").write_bytes(b"x")
    with pytest.raises(RunError, match=r"foreign is a folder that is not empty; .* choose another --out$"):
        again(images, "foreign")
    assert sorted(Path("foreign").iterdir()) == [Path("foreign/photo.png")]
    with pytest.raises(ConfigError, match=r"got --resume auto without --out; .*--out RUN"):
        again(images, None)


def test_a_run_without_a_record_of_its_command_is_refused_with_the_command_that_continues_it(begun, images):
    run = Run(begun)
    made = run.read("provenance.json")
    run.write("provenance.json", {key: value for key, value in made.items() if key != "request"})
    with pytest.raises(RunError, match=r"without a record of its command .*continue it with: unmask resume run"):
        again(images, "run")


def test_a_run_in_use_is_not_begun_again(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = stopped(images)
    with run.lock(), pytest.raises(RunInUse):
        again(images, "run", "train.steps=6")


def test_on_the_command_line(unmask, images):
    command = ["pretrain", images, "--recipe", "mae_nano", "--out", "run", *small("train.steps=4")]
    assert unmask(*command, "--resume", "auto")[0] == 0
    code, _, err = unmask(*command, "--resume", "auto")
    assert code == 0
    assert "run is finished (4 steps); nothing to do" in err
    code, _, err = unmask(*command)
    assert code == 2
    assert "unmask resume run, or the command that began it with --resume auto" in err
    code, _, err = unmask(*command, "--set", "train.steps=5", "--resume", "auto")
    assert code == 2
    assert "unmask set run train.steps=5" in err
    assert "expected never or auto" in unmask(*command, "--resume", "always")[2]
