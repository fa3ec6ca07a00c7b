"""`unmask check` reports what `unmask pretrain` would do."""

import json

import pytest
from conftest import write_images

from unmask.console import Console
from unmask.engine import check_data as module
from unmask.engine import pretraining
from unmask.engine.check_data import check_data


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "time_steps", lambda *_, **__: [0.5] * 4)
    monkeypatch.setattr("unmask.engine.make_plan.free_memory", lambda _: 1 << 30)


def test_recipe_depends_on_the_number_of_all_images_not_of_the_checked_ones():
    code, summary = check_data("shapes:20000", Console(quiet=True), sample=100, workers=0)
    assert code == 0
    assert (summary["checked"], summary["good"], summary["usable"]) == (100, 100, 20_000)
    text = " ".join(summary["reasons"])
    assert "about 20000 images of" in text
    assert "batch" not in " ".join(summary["settings"]), "the batch size is chosen for 20,000 images, not for 100"
    assert summary["steps"] == -(-100 * 19_800 // 128), (
        "the number of steps is computed from 20,000 images, of which one in a hundred is held out"
    )
    assert summary["forecast_seconds"] >= summary["steps"] * 0.5


def test_training_command_for_the_checked_images_is_printed(images, capsys):
    check_data([str(images)], Console(), sample=None, workers=0, settings=["data.alpha=drop"], exclude=["*_mask.png"])
    said = "".join(capsys.readouterr().err.splitlines())
    assert f"unmask pretrain {images} --exclude '*_mask.png' --set data.alpha=drop" in said


def test_number_of_images_is_exact_if_all_files_are_checked(images):
    (images / "broken.png").write_bytes(b"")
    _, summary = check_data(str(images), Console(quiet=True), sample=None, workers=0)
    assert summary["usable"] == 30
    text = " ".join(summary["reasons"])
    assert "30 images of 20 x 24 pixels (median)" in text
    assert "about 30 images" not in text


def test_forecast_uses_the_plan_of_pretrain(images, tmp_path, monkeypatch):
    _, summary = check_data(str(images), Console(quiet=True), sample=None, workers=0)
    monkeypatch.setattr("unmask.engine.start_run.train_and_record", lambda *_: None)
    run = pretraining.pretrain(images, out=tmp_path / "run")
    plan = run.read("plan.json")
    assert (summary["steps"], summary["reasons"]) == (plan["steps"], plan["reasons"])
    assert summary["recipe"] == run.read("config.json")["recipe"]
    assert summary["reasons"][0].startswith("images of 20 x 24 (median) are resampled to 20 x 20 pixels")


def test_forecast_uses_the_device_of_the_settings(images, monkeypatch):
    monkeypatch.setattr(
        "unmask.engine.check_data.choose_device", lambda asked: "cpu" if asked == "cpu" else pytest.fail(asked)
    )
    _, summary = check_data(str(images), Console(quiet=True), sample=None, workers=0, settings=["train.device=cpu"])
    assert summary["device"] == "cpu"


def test_forecast_caches_and_writes_nothing(images, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining.Run, "create", pytest.fail)
    code, summary = check_data(str(images), Console(quiet=True), sample=None, workers=2)
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    json.dumps(summary)


def test_too_many_bad_files_give_exit_code_two(tmp_path):
    images = write_images(tmp_path / "images", 8)
    for number in range(4):
        (images / f"{number:04d}.png").write_bytes(b"")
    code, summary = check_data(str(images), Console(quiet=True), sample=None, workers=0)
    assert (code, summary["good"]) == (2, 4)
