"""Images held out of pre-training: they are chosen, not trained on, and their loss is reported."""

import json

import numpy as np
import pytest
from conftest import SMALL_RUN, pretrain, write_images
from faults import error_before

from unmask.config import ConfigError, override
from unmask.console import Console
from unmask.engine.continue_run import resume
from unmask.engine.edit_run import set_values
from unmask.engine.load import read_plan
from unmask.engine.training_data import held_out_for_loss
from unmask.recipes.catalogue import find
from unmask.report.run_page import loss_note, write_report
from unmask.results import from_json

SETTINGS = [*SMALL_RUN, "train.picture_every=2"]


def rows_for(count, *settings, recipe="mae_nano"):
    return held_out_for_loss(np.arange(count), override(find(recipe), list(settings)))


@pytest.mark.parametrize(("count", "held"), [(999, 0), (1_000, 64), (20_000, 200), (1_000_000, 256)])
def test_default_number_of_held_out_images(count, held):
    rows = rows_for(count)
    assert len(rows) == held == len(set(rows.tolist()))
    if held:
        assert (rows[0], rows[-1]) == (0, count - 1)


def test_held_out_can_be_a_number_or_zero():
    assert len(rows_for(30, "data.held_out=7")) == 7
    assert len(rows_for(5_000, "data.held_out=0")) == 0
    assert len(rows_for(5_000, recipe="finetune_few")) == 0
    with pytest.raises(ConfigError, match="fewer than there are"):
        rows_for(30, "data.held_out=30")
    with pytest.raises(ConfigError, match="supervised runs hold out test images"):
        rows_for(30, "data.held_out=3", recipe="finetune_few")


@pytest.fixture
def run(images, tmp_path):
    settings = [*SETTINGS, "train.steps=4", "data.held_out=6"]
    return pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=settings, console=Console(quiet=True))


def held_out_losses(run):
    return {row["step"]: row["held_out_loss"] for row in run.metrics() if "held_out_loss" in row}


def test_held_out_images_are_not_trained_on_and_their_loss_is_reported(run):
    plan = read_plan(run)
    assert len(plan.held_out) == 6
    assert set(plan.held_out) <= set(plan.excluded)
    assert plan.num_images == 24
    losses = held_out_losses(run)
    assert set(losses) == {0, 1, 2, 4}
    assert losses[4] < losses[0]
    kept = run.read("evals/baselines.json")
    assert kept["held_out_images"] == 6
    assert kept["held_out_losses"] == [[step, loss] for step, loss in losses.items()]
    trained = [row for row in run.metrics() if row.get("loss") is not None]
    assert f"{losses[4]:.3f} at step 4" in loss_note(trained, from_json(kept))
    assert "held-out images" in write_report(run.path).read_text()


def test_changed_held_out_image_changes_its_loss_but_no_training_step(images, tmp_path, run):
    """Negative control: a changed training image does change the training."""
    plan, before = read_plan(run), [row["loss"] for row in run.metrics() if "loss" in row]
    names = sorted(path for path in images.iterdir())
    others = write_images(tmp_path / "others", 30, seed=1)
    found = {}
    for what, row in (("held out", plan.held_out[2]), ("trained on", next(iter({*range(30)} - {*plan.excluded})))):
        original = names[row].read_bytes()
        names[row].write_bytes((others / names[row].name).read_bytes())
        statistics = [f"data.mean={json.dumps(plan.images.mean)}", f"data.std={json.dumps(plan.images.std)}"]
        settings = [*SETTINGS, *statistics, "train.steps=4", "data.held_out=6"]
        again = pretrain(images, recipe="mae_nano", out=tmp_path / what, settings=settings, console=Console(quiet=True))
        found[what] = [row["loss"] for row in again.metrics() if "loss" in row], held_out_losses(again)
        names[row].write_bytes(original)
    assert found["held out"][0] == before
    assert found["held out"][1] != held_out_losses(run)
    assert found["trained on"][0] != before


def test_held_out_images_stay_held_out_after_a_resume(images, tmp_path, run):
    settings = [*SETTINGS, "train.steps=4", "data.held_out=6", "train.checkpoint_every=2"]
    with error_before(3, RuntimeError("stopped here")), pytest.raises(RuntimeError, match="stopped here"):
        pretrain(images, recipe="mae_nano", out=tmp_path / "cut", settings=settings, console=Console(quiet=True))
    again = resume(tmp_path / "cut", console=Console(quiet=True))
    assert held_out_losses(again) == held_out_losses(run)
    assert len(again.read("evals/baselines.json")["held_out_losses"]) == 4


def test_progress_line_shows_epoch_losses_and_time(images, tmp_path, capsys):
    settings = [*SETTINGS, "train.steps=4", "data.held_out=6"]
    pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=settings)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("step 4/4"))
    for part in ("epoch 1.3/1.3", "held out 0.", "baseline (", "so far", "images/s"):
        assert part in line.replace("held out 1.", "held out 0."), line


def test_held_out_images_stay_held_out_by_name_if_the_data_change(images, tmp_path, run):
    names = sorted(path.name for path in images.iterdir())
    held = [names[row] for row in read_plan(run).held_out]
    gone = [name for name in names if name not in held][:3] + held[-1:]  # makes the last held-out row out of range
    for name in gone:
        (images / name).unlink()
    set_values(run.path, ["train.steps=6"])
    resume(run.path, allow_dataset_change=True, console=Console(quiet=True))
    plan, left = read_plan(run), sorted(path.name for path in images.iterdir())
    assert [left[row] for row in plan.held_out] == held[:-1]
    assert set(plan.held_out) <= set(plan.excluded)
    assert plan.num_images == len(names) - 3 - len(held)
    assert run.read("evals/baselines.json")["held_out_images"] == len(held) - 1
