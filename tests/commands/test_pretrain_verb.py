"""Test `unmask pretrain`: the run folder, and settings of other runs."""

import json

import pytest
from conftest import small

from unmask.commands import options


def test_json_prints_one_object_on_stdout(unmask, images, tmp_path):
    code, out, err = unmask("pretrain", images, "--recipe", "mae_nano", "--out", "a", "--json", *small("train.steps=3"))
    assert code == 0, err
    summary = json.loads(out)
    assert summary["state"] == "finished"
    assert summary["step"] == 3
    assert (tmp_path / "a" / "report.html").exists()
    assert "\r" not in err
    assert "\x1b" not in err, "no colours and no cursor movements outside a terminal"


def test_default_run_folder_is_named_after_data_and_recipe(unmask, images, tmp_path):
    for name in ("images-mae_nano", "images-mae_nano-2"):
        code, _, err = unmask("pretrain", images, "--recipe", "mae_nano", *small("train.steps=1"))
        assert code == 0, err
        assert (tmp_path / "runs" / name / "config.json").exists()


def test_config_of_another_run_gives_the_same_losses(unmask, run_folder, images):
    code, _, err = unmask("pretrain", images, "--config", "run", "--out", "again")
    assert code == 0, err
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_folder, run_folder.with_name("again"))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1
    code, _, err = unmask("pretrain", images, "--config", "run/config.json", "--out", "more", "--set", "train.steps=2")
    assert code == 0, err
    assert "2 steps" in err


def test_config_of_a_budgeted_run_gives_the_same_steps(unmask, images, tmp_path, monkeypatch):
    monkeypatch.setattr("unmask.engine.time_budget.clock", lambda: options.started())  # stands still
    monkeypatch.setattr("unmask.engine.make_plan.time_steps", lambda *_, **__: [0.1])
    code, _, err = unmask("pretrain", images, "--recipe", "mae_nano", "--out", "a", "--budget", "1s", *small())
    assert code == 0, err
    code, _, err = unmask("pretrain", images, "--config", "a", "--out", "b")
    assert code == 0, err
    steps = [json.loads((tmp_path / name / "plan.json").read_text())["steps"] for name in "ab"]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("more", [["--recipe", "mae_nano"], ["--from", "run"]], ids=["recipe", "from"])
def test_two_sources_of_settings_are_rejected(unmask, run_folder, images, more):
    code, _, err = unmask("pretrain", images, "--config", "run", *more)
    assert code == 2
    assert "leave one of them out" in err
