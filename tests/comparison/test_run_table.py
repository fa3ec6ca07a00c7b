"""Tables of `unmask ablate`: content, stopping and continuing, failures, budgets, and agreement with the paper."""

import dataclasses
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import SMALL_RUN, write_images
from faults import faults

from unmask.comparison import run_table as ablate_module
from unmask.comparison import schedule, table_page, train_cells
from unmask.comparison.agreement import ComparedCell, RunAccuracy, agreement, cell_score, difference
from unmask.comparison.paper_tables import FAMILY, find_table
from unmask.comparison.run_table import ablate, report_results
from unmask.comparison.table_page import write_table
from unmask.comparison.table_plan import TableRequest, load_plan
from unmask.comparison.table_results import ControlRow, above_controls, find_probe
from unmask.config import ConfigError
from unmask.console import Console
from unmask.data.sources.open_source import open_source
from unmask.engine import changed_data, pretraining, training_data
from unmask.engine.load import load, read_plan
from unmask.engine.measure import Timing
from unmask.errors import TrainingFailed, UserError
from unmask.finetuning import finetune_run
from unmask.finetuning.annotated import open_annotated, split_rows
from unmask.run import Run, RunInUse
from unmask.system.shell_command import as_shell_command

SMALL = [setting for setting in SMALL_RUN if not setting.startswith("method.decoder")]
SMALL += [
    "method.decoder.width=16",
    "method.decoder.heads=2",
    "train.steps=3",
    "train.checkpoint_every=1",
    "train.picture_images=1",
]
TIMES = {"images_per_second", "seconds", "time_ratio", "command", "written", "from"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 images of two classes."""
    return str(write_images(tmp_path_factory.mktemp("ablate") / "images", 24, classes=2))


def two_depths(patch):
    """Reduce table 1a to two cells, which are enough because cells differ only in their settings."""
    table = find_table("1a")
    cells = [cell for cell in table.cells(None) if cell.name in ("depth-1", "depth-8")]
    short = dataclasses.replace(table, cells=lambda base: tuple(cells))
    patch.setattr(ablate_module, "find_table", lambda name: short if name == "1a" else find_table(name))


@pytest.fixture(autouse=True)
def few_cells(monkeypatch):
    """In all tests, reduce table 1a to two cells and draw no reports and charts (except in the fixture `unbroken`)."""
    two_depths(monkeypatch)
    monkeypatch.setattr(train_cells, "write_report", lambda path: path)
    monkeypatch.setattr(table_page, "chart", lambda table: None)


def make(data, out, *, table="1a", settings=SMALL, console=None, **more):
    paths = {key: str(more[key]) for key in ("tokenizer", "from_run") if more.get(key) is not None}
    return ablate(
        TableRequest(table=table, data=data, settings=tuple(settings), **more | paths), out=out, console=console
    )


def without_times(value):
    """Return the content of table.json without measured times and paths."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """A finished table of two cells: (folder, return value of `ablate`)."""
    folder = tmp_path_factory.mktemp("ablate") / "table"
    with pytest.MonkeyPatch.context() as patch:
        two_depths(patch)
        summary = make(data, folder)
    shutil.copy(folder / "table.html", folder.parent / "first.html")  # a copy, because other tests rewrite the page
    return folder, summary


# Content of a table


def test_the_table_has_every_cell_and_the_published_numbers(unbroken):
    folder, summary = unbroken
    assert json.loads((folder / "table.json").read_text()) == summary
    assert summary["state"] == "finished"
    assert [(row["label"], row["paper"]["linear"], row["steps"], row["state"]) for row in summary["rows"]] == [
        ("1", 65.5, 3, "finished"),
        ("8", 73.5, 3, "finished"),
    ]
    for row in summary["rows"]:
        assert row["linear"]["interval"] == row["knn"]["interval"] == "test images"
        assert row["linear"]["low"] <= row["linear"]["mean"] <= row["linear"]["high"]
        assert row["runs"][0]["probes"]["linear"].keys() == {"cls", "mean"}
        assert row["linear"]["mean"] == row["runs"][0]["probes"]["linear"]["mean"]["accuracy"]
        config = Run.open(folder / row["runs"][0]["folder"]).read("config.json")
        assert config["method"]["target"] == "pixels", "the paper's base row predicts plain pixels"
        assert str(config["method"]["decoder"]["depth"]) == row["label"]
    one, base = summary["rows"]
    assert base["flops_ratio"] == 1
    assert one["flops_ratio"] < 1
    assert one["time_ratio"] > 0


def test_the_table_lists_each_control_once(unbroken):
    pixels, untrained = unbroken[1]["controls"]
    assert (pixels["features"], pixels["cell"]) == ("raw pixels", "")
    assert (untrained["features"], untrained["cell"]) == ("random init", "8")
    for control in (pixels, untrained):
        assert control["linear"]["low"] <= control["linear"]["accuracy"] <= control["linear"]["high"]
        assert control["knn"]["total"] == 4


def test_the_page_is_one_file_and_shows_the_numbers(unbroken):
    folder, summary = unbroken
    page = html.unescape((folder.parent / "first.html").read_text())
    assert not re.search(r"""(src|href)=["']https?:""", page)
    for row in summary["rows"]:
        assert f"{100 * row['linear']['mean']:.1f}%" in page
        assert str(row["paper"]["linear"]) in page
    assert summary["agreement"]["sentence"].split(".")[0] in page
    assert "<svg" in page
    assert "prefers-color-scheme: dark" in page
    assert (folder / "depth-1-seed-0" / "report.html").exists(), "the page links to it"


def test_the_plan_records_the_request_and_all_settings(unbroken, data):
    decided = json.loads((unbroken[0] / "ablation.json").read_text())
    assert decided["asked"]["data"] == data
    assert decided["asked"]["settings"] == SMALL
    assert decided["steps"] == 3
    assert decided["shots"] == 10, "two of the 12 images of each class are held out"
    assert {"unmask", "torch"} <= set(decided["versions"])
    assert decided["cells"][0]["settings"][-1] == "method.decoder.depth=1"


# Continuing a table


def test_a_finished_table_is_not_trained_again(unbroken, data, monkeypatch, capsys):
    folder, summary = unbroken
    monkeypatch.setattr(pretraining, "pretrain", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(train_cells, "run_probes", lambda *_, **__: pytest.fail("probed again"))
    assert without_times(make(data, folder, console=Console())) == without_times(summary)
    said = capsys.readouterr().err
    assert [said.count(row["sentence"]) for row in summary["rows"]] == [1, 1]


@pytest.mark.parametrize("stopped_in", ["first cell", "second cell"])
def test_a_table_stopped_during_training_continues_with_identical_results(unbroken, data, tmp_path, stopped_in):
    """A signal during training saves and stops the run, the table is marked stopped, and repeating continues it."""
    trained, stops_at = [], 1 if stopped_in == "first cell" else 2

    def signalled(job, step):
        trained.append(job.run.path)
        if len(set(trained)) == stops_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step

    before = signal.getsignal(signal.SIGTERM)
    with faults(after_step=signalled):
        stopped = make(data, tmp_path / "table")
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped["state"] == "stopped"
    cell = 0 if stopped_in == "first cell" else 1
    assert [row["state"] for row in stopped["rows"]][cell] == "stopped"
    assert 0 < Run(tmp_path / "table" / stopped["rows"][cell]["runs"][0]["folder"]).read("status.json")["step"] < 3
    assert "Stopped" in (tmp_path / "table" / "table.html").read_text()
    assert without_times(make(data, tmp_path / "table")) == without_times(unbroken[1])


def test_a_table_stopped_between_two_runs_continues(unbroken, data, tmp_path, monkeypatch):
    real = train_cells.run_probes

    def interrupted(*_, **__):
        monkeypatch.setattr(train_cells, "run_probes", real)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(train_cells, "run_probes", interrupted)
    stopped = make(data, tmp_path / "table")
    assert stopped["state"] == "stopped"
    assert [row["state"] for row in stopped["rows"]] == ["trained", "waiting"]
    assert stopped["rows"][0]["linear"] is None
    assert without_times(make(data, tmp_path / "table")) == without_times(unbroken[1])


def test_a_run_without_a_plan_is_restarted(unbroken, data, tmp_path, monkeypatch):
    real = pretraining.pretrain

    def cut(*arguments, out, **more):
        (out / "checkpoints").mkdir(parents=True)
        (out / "config.json").write_text("{}")
        monkeypatch.setattr(pretraining, "pretrain", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "pretrain", cut)
    assert make(data, tmp_path / "table")["state"] == "stopped"
    assert without_times(make(data, tmp_path / "table")) == without_times(unbroken[1])


def test_adding_seeds_gives_intervals_over_seeds(data, tmp_path):
    settings = [*SMALL, "train.steps=1"]
    first = make(data, tmp_path / "table", settings=settings)
    second = make(data, tmp_path / "table", settings=settings, seeds=2)
    for one, two in zip(first["rows"], second["rows"], strict=True):
        values = list(two["linear"]["by_seed"].values())
        assert values[0] == one["linear"]["mean"]
        assert two["linear"]["mean"] == pytest.approx(sum(values) / 2)
        assert two["linear"]["interval"] == "seeds"
        half = 12.706 * abs(values[0] - values[1]) / 2
        assert two["linear"]["high"] - two["linear"]["mean"] == pytest.approx(half, rel=1e-3)
        seeds = [Run(tmp_path / "table" / run["folder"]).read("config.json")["train"]["seed"] for run in two["runs"]]
        assert seeds == [0, 1]
    with pytest.raises(ConfigError, match=r"was begun with 2 seeds, got 1"):
        make(data, tmp_path / "table", settings=settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": [*SMALL, "optim.base_lr=1e-3"]}, r"was begun with settings .*, got .*base_lr"),
        ({"shots": 3}, r"was begun with shots None, got 3"),
        ({"table": "fig5"}, r"was begun with table '1a', got 'fig5'"),
        ({"budget": 3600.0, "settings": [s for s in SMALL if "steps" not in s]}, r"was begun with settings"),
    ],
)
def test_continuing_with_another_request_is_rejected(unbroken, data, change, message):
    with pytest.raises(ConfigError, match=message):
        make(data, unbroken[0], **change)


def test_continuing_with_changed_images_is_rejected(tmp_path):
    data = write_images(tmp_path / "images", 16, classes=2)
    settings = [*SMALL, "train.steps=1"]
    make(str(data), tmp_path / "table", settings=settings)
    write_images(data, 18, classes=2, seed=5)
    with pytest.raises(UserError, match=r"have changed since this table was begun"):
        make(str(data), tmp_path / "table", settings=settings)


def test_a_second_ablation_in_the_same_folder_is_rejected(unbroken, data):
    with Run(unbroken[0]).lock(), pytest.raises(RunInUse, match=r"in use by this very process"):
        make(data, unbroken[0])


# Failures


def test_a_failed_cell_is_shown_with_its_error_and_the_others_continue(data, tmp_path):
    def fails(job, at):
        if job.config.method.decoder.depth == 1:
            raise TrainingFailed("the loss went up in smoke")

    with faults(before_step=fails):
        summary = make(data, tmp_path / "table")
    assert summary["state"] == "failed"
    assert [row["state"] for row in summary["rows"]] == ["failed", "finished"]
    assert summary["rows"][0]["sentence"] == "1: failed: the loss went up in smoke"
    assert "depth-1-seed-0 failed: the loss went up in smoke" in (tmp_path / "table" / "table.html").read_text()
    mended = make(data, tmp_path / "table")
    assert mended["state"] == "finished", "the same command tries it again"
    assert mended["rows"][0]["runs"][0]["error"] is None


def two_targets(patch):
    table = find_table("1d")
    cells = tuple(cell for cell in table.cells(None) if cell.name in ("pixels", "tokens"))
    patch.setattr(ablate_module, "find_table", lambda name: dataclasses.replace(table, cells=lambda base: cells))


def test_the_tokenizer_is_trained_before_cells_that_predict_tokens(data, tmp_path, monkeypatch):
    two_targets(monkeypatch)
    summary = make(data, tmp_path / "table", table="1d", settings=[*SMALL, "method.decoder.depth=1"])
    tokenizer, pixels, tokens = summary["rows"]
    assert summary["state"] == "finished", summary
    assert tokenizer["linear"] is None
    assert tokenizer["state"] == "finished"
    assert Run(tmp_path / "table" / "tokenizer").read("config.json")["method"]["name"] == "dvae"
    graft = Run(tmp_path / "table" / "tokens-seed-0").read("config.json")["graft"]
    assert [entry["run"] for entry in graft] == [str((tmp_path / "table" / "tokenizer").absolute())]
    assert Run(tmp_path / "table" / "pixels-seed-0").read("config.json")["graft"] == []
    assert tokens["flops"]["rest"] > pixels["flops"]["rest"] == 0
    again = make(data, tmp_path / "table", table="1d", settings=[*SMALL, "method.decoder.depth=1"])
    assert without_times(again) == without_times(summary)


def test_a_given_tokenizer_is_used_instead_of_training_one(data, tmp_path, monkeypatch):
    two_targets(monkeypatch)
    settings = [setting for setting in SMALL if not setting.startswith("method.")]
    pretraining.pretrain(
        data, pretraining.PretrainOptions(recipe="dvae_nano", settings=settings), out=tmp_path / "mine"
    )
    table = make(
        data, tmp_path / "table", table="1d", settings=[*SMALL, "method.decoder.depth=1"], tokenizer=tmp_path / "mine"
    )
    assert [row["name"] for row in table["rows"]] == ["pixels", "tokens"]
    assert table["state"] == "finished"
    graft = Run(tmp_path / "table" / "tokens-seed-0").read("config.json")["graft"]
    assert [entry["run"] for entry in graft] == [str((tmp_path / "mine").absolute())]


def test_a_cell_fails_when_its_tokenizer_could_not_be_trained(data, tmp_path, monkeypatch):
    two_targets(monkeypatch)

    def fails(job, at):
        if job.config.method.name == "dvae":
            raise TrainingFailed("no codes")

    with faults(before_step=fails):
        summary = make(data, tmp_path / "table", table="1d", settings=[*SMALL, "method.decoder.depth=1"])
    assert [row["state"] for row in summary["rows"]] == ["failed", "finished", "failed"]
    assert "the tokenizer could not be trained" in summary["rows"][2]["sentence"]


def test_the_family_has_rows_with_equal_steps_and_equal_compute(data, tmp_path, monkeypatch):
    """Every method has rows, and so has the tokenizer; their FLOPs are counted without training."""
    monkeypatch.setattr(ablate_module, "make_cell", lambda *_, **__: None)
    settings = ["data.size=[16,16]", "data.workers=0", "train.batch_size=8", "train.steps=100", "train.device=cpu"]
    summary = make(data, tmp_path / "table", table="family", settings=settings)
    rows = {row["name"]: row for row in summary["rows"]}
    assert summary["missing"] == []
    assert "tokenizer" in rows
    base = rows["mae-equal-steps"]
    want = base["steps"] * base["batch_size"] * base["flops"]["training"]
    for name in FAMILY:
        assert rows[f"{name}-equal-steps"]["steps"] == 100
        if name != "mae":
            row = rows[f"{name}-equal-compute"]
            one_step = row["batch_size"] * row["flops"]["training"]
            assert abs(row["steps"] * one_step - want) <= max(one_step / 2, one_step if row["steps"] == 1 else 0)
    assert {row["name"] for row in summary["rows"] if row["controls"]} == {f"{name}-equal-steps" for name in FAMILY}
    assert "the order is not compared" in summary["agreement"]["sentence"]


# Cells that are fine-tuned from one run


FINE = [*SMALL, "train.batch_size=4", "train.steps=8", "method.decoder.depth=1"]


@pytest.fixture(scope="module")
def fine_tuned(data, tmp_path_factory):
    """A finished table fig9 for an encoder with one block: (folder, return value of `ablate`)."""
    folder = tmp_path_factory.mktemp("ablate") / "fig9"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cells, "write_report", lambda path: path)
        return folder, make(data, folder, table="fig9", settings=FINE)


def test_all_numbers_of_blocks_are_fine_tuned_from_the_same_run(fine_tuned, data):
    folder, summary = fine_tuned
    assert summary["state"] == "finished", summary
    assert [(row["name"], row["steps"], row["paper"]["fine_tuned"]) for row in summary["rows"]] == [
        ("pretrained", 8, None), ("blocks-0", 1, 73.5), ("blocks-half", 1, 79.1), ("blocks-1", 1, 84.9),
    ]  # fmt: skip
    assert Run(folder / "pretrained").read("config.json")["method"]["target"] == "pixels"
    for row, blocks in zip(summary["rows"][1:], (0, 0.5, 1), strict=True):
        run = Run.open(folder / f"{row['name']}-seed-0")
        config, plan = run.read("config.json"), run.read("plan.json")
        assert config["method"]["last_blocks"] == blocks
        assert config["optim"]["betas"] == [0.9, 0.999]
        assert [entry["run"] for entry in config["graft"]] == [str((folder / "pretrained").absolute())]
        assert plan["images"] == Run(folder / "pretrained").read("plan.json")["images"]
        score = row["fine_tuned"]
        assert score["low"] <= score["mean"] == score["correct"] / 4 <= score["high"]
        assert score["interval"] == "test images"
        assert row["linear"] is None
    flops = [row["flops"]["training"] for row in summary["rows"][1:]]
    assert flops == sorted(flops)
    assert summary["rows"][-1]["flops_ratio"] == 1
    assert summary["controls"] == []
    assert "(fine-tuned)" in summary["agreement"]["sentence"]


def test_fine_tuning_uses_no_test_images_and_changes_no_frozen_weights(fine_tuned, data):
    folder, _ = fine_tuned
    annotated = open_annotated("classify", data)
    rows, held = split_rows(annotated, None, hold=True)
    assert read_plan(Run(folder / "blocks-1-seed-0")).excluded == tuple(held.tolist())
    assert len(rows) == 20
    before = load(folder / "pretrained").method.encoder.state_dict()
    same = load(folder / "blocks-0-seed-0").method.encoder.state_dict()
    assert all((before[name] == same[name]).all() for name in before)
    few, held = split_rows(annotated, 3, hold=True)
    assert (len(few), len(held)) == (6, 4)
    assert not set(few) & set(held)
    assert split_rows(annotated, None, hold=False)[1].size == 0


def test_fine_tuning_does_not_resume_with_changed_images(fine_tuned, data):
    """Test images are held out by row, so other images would change the split into training and test images."""
    run = Run(fine_tuned[0] / "blocks-1-seed-0")
    differ = SimpleNamespace(lines=lambda: "2 files are others")
    with pytest.raises(
        UserError, match=r"test images that are held out .*: 2 files are others\. Restore the old files"
    ):
        changed_data.plan_for_changed_data(open_source(data), read_plan(run), run, differ)


def test_the_page_of_fine_tuned_cells_describes_them(fine_tuned, data, monkeypatch):
    folder, _ = fine_tuned
    monkeypatch.undo()
    write_table(folder, "finished")
    page = html.unescape((folder / "table.html").read_text())
    assert "kNN" not in page
    assert "linear probe</th>" not in page
    assert "MoCo v3 reaches 77.6 with 0 tuned blocks" in page
    assert "(paper: 24 of 24)" in page
    assert "<svg" in page


def test_a_stopped_fine_tuning_table_continues_with_identical_results(fine_tuned, data, tmp_path, monkeypatch):
    real = finetune_run.measure_run

    def interrupted(*_, **__):
        monkeypatch.setattr(finetune_run, "measure_run", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_run, "measure_run", interrupted)
    stopped = make(data, tmp_path / "table", table="fig9", settings=FINE)
    assert [row["state"] for row in stopped["rows"]] == ["finished", "stopped", "waiting", "waiting"]
    again = make(data, tmp_path / "table", table="fig9", settings=FINE)
    assert without_times(again) == without_times(fine_tuned[1])


def test_a_given_run_is_fine_tuned_with_separate_test_images_and_several_seeds(fine_tuned, data, tmp_path):
    given = str(fine_tuned[0] / "pretrained")
    test = str(write_images(tmp_path / "test", 6, classes=2, seed=3))
    with pytest.raises(ConfigError, match=r"method.mask_ratio was set, but the run of --from is trained already"):
        make(data, tmp_path / "table", table="fig9", settings=["method.mask_ratio=0.5"], from_run=given)
    settings = ["train.steps=2", "train.checkpoint_every=1"]
    summary = make(
        data, tmp_path / "table", table="fig9", settings=settings, from_run=given, test=test, shots=2, seeds=2
    )
    assert summary["state"] == "finished", summary
    assert [row["name"] for row in summary["rows"]] == ["blocks-0", "blocks-half", "blocks-1"]
    for row in summary["rows"]:
        assert row["steps"] == 2
        assert row["fine_tuned"]["interval"] == "seeds"
        run = Run(tmp_path / "table" / row["runs"][1]["folder"])
        assert run.read("plan.json")["num_images"] == 4
        assert run.read("config.json")["train"]["seed"] == 1
        assert run.read("evals/fine-tuned.json")["test_images"] == 6


def test_pre_training_gets_two_thirds_of_the_training_time(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate_module, "make_cell", lambda *_, **__: None)
    monkeypatch.setattr(schedule, "measure_step_seconds", lambda *_, **__: 0.1)
    monkeypatch.setattr(schedule, "encode_seconds", lambda *_: 0.0)
    monkeypatch.setattr(training_data, "batch_seconds", lambda *_, **__: Timing(0.0, 0.0, 0.0))
    monkeypatch.setattr("unmask.engine.time_budget.clock", lambda: 0.0)  # the time of the test itself does not count
    free = [setting for setting in FINE if "steps" not in setting]
    summary = make(data, tmp_path / "table", table="fig9", settings=free, budget=100.0, seeds=2)
    first, *rest = summary["rows"]
    assert first["steps"] == pytest.approx(90 * 2 / 3 / 0.1, abs=20)
    assert len({row["steps"] for row in rest}) == 1
    assert rest[0]["steps"] == pytest.approx(first["steps"] / 2 / (2 * 3), abs=1)


# Requests rejected before training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "1g"}, r"table '1g' is not known; (did you mean|expected one of)"),
        ({"from_run": "runs/a"}, r"--from was given, but every cell of table 1a is pre-trained from scratch"),
        ({"table": "fig9", "from_run": "runs/a", "recipe": "mae_nano"}, r"got both --from and --recipe mae_nano"),
        ({"table": "fig9", "from_run": "runs/a"}, r"runs/a"),
        ({"table": "fig9", "recipe": "simmim_nano"}, r"recipe 'simmim_nano' trains simmim"),
        ({"table": "fig9", "settings": [*SMALL, "method.last_blocks=1"]}, r"method.last_blocks cannot be set"),
        ({"settings": [*SMALL, "method.decoder.depth=3"]}, r"method.decoder.depth cannot be set: table 1a varies"),
        ({"settings": [*SMALL, "train.seed=3"]}, r"train.seed cannot be set.*--seeds"),
        ({"settings": [*SMALL, "method.encoder.heads=5"]}, r"5 heads do not divide"),
        ({"settings": [*SMALL, "method.encoder.hedas=5"]}, r"is not a setting; did you mean .*heads"),
        ({"budget": 60.0}, r"both a time budget and train.steps"),
        ({"table": "fig7", "budget": 60.0}, r"train.steps cannot be set: the budget determines"),
        ({"seeds": 0}, r"got --seeds 0; expected at least 1"),
        ({"shots": 11}, r"got --shots 11, but class .* has only 10"),
        ({"recipe": "mae_nanoo"}, r"recipe 'mae_nanoo' is not known"),
        ({"table": "family", "recipe": "mae_nano"}, r"every method of the family has its own recipe"),
        ({"tokenizer": "runs/a"}, r"--tokenizer was given, but no cell of table 1a needs a tokenizer"),
        (
            {"table": "fig9", "tokenizer": "runs/a"},
            r"--tokenizer was given, but no cell of table fig9 needs a tokenizer",
        ),
    ],
)
def test_invalid_requests_are_rejected_before_training(data, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(pretraining, "pretrain", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match=message):
        make(data, tmp_path / "table", **change)
    assert not (tmp_path / "table" / "ablation.json").exists()


def test_tables_of_mae_reject_recipes_of_other_methods(data, tmp_path):
    with pytest.raises(ConfigError, match=r"recipe 'simmim_nano' trains simmim, but table 1a varies settings of mae"):
        make(data, tmp_path / "table", recipe="simmim_nano")


def test_images_without_labels_are_rejected_before_training(images, data, tmp_path):
    with pytest.raises(UserError, match=r"label|sub-folder"):
        make(str(images), tmp_path / "table")
    with pytest.raises(UserError, match=r"label|sub-folder"):
        make(data, tmp_path / "table", test=str(images))
    other = write_images(tmp_path / "other", 6, classes=3)
    with pytest.raises(UserError, match=r"has classes that .* does not have \(class2\)"):
        make(data, tmp_path / "table", test=str(other))


def test_a_folder_with_other_content_is_rejected(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty \(notes.txt\) and has no ablation.json"):
        make(data, tmp_path)


# Budgets


def test_a_budget_is_shared_by_all_cells_and_seeds(data, tmp_path, monkeypatch):
    """Training and probing all cells use nine tenths of the budget."""
    monkeypatch.setattr(ablate_module, "make_cell", lambda *_, **__: None)
    monkeypatch.setattr(schedule, "measure_step_seconds", lambda config, *_, **__: 0.1 * config.method.decoder.depth)
    monkeypatch.setattr(schedule, "encode_seconds", lambda *_: 0.0)
    monkeypatch.setattr(training_data, "batch_seconds", lambda *_, **__: Timing(0.0, 0.0, 0.0))
    free = [setting for setting in SMALL if "steps" not in setting]
    summary = make(data, tmp_path / "table", settings=free, budget=1000.0, seeds=2)
    probing = schedule.FIT_SECONDS * (2 * 2 + 2)
    assert summary["steps"] == pytest.approx((900 - probing) / (2 * 0.9), abs=5)
    assert "2 cells" not in summary["reason"]
    assert "4 runs in 16 min 40 s" in summary["reason"]
    assert {row["steps"] for row in summary["rows"]} == {summary["steps"]}
    with pytest.raises(UserError, match=r"a budget of 10 s is too short for 4 runs.*give at least"):
        make(data, tmp_path / "other", settings=free, budget=10.0, seeds=2)


def test_training_lengths_are_multiples_of_the_shortest_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate_module, "make_cell", lambda *_, **__: None)
    summary = make(data, tmp_path / "table", table="fig7", settings=[*SMALL, "method.decoder.depth=1"])
    assert [row["steps"] for row in summary["rows"]] == [3, 6, 12, 24, 48]


def test_by_default_the_base_row_has_the_length_of_the_recipe(data, tmp_path, monkeypatch):
    """The row 8x (800 epochs in the paper) has the length of the recipe, not the row 1x (100 epochs)."""
    monkeypatch.setattr(ablate_module, "make_cell", lambda *_, **__: None)
    free = [setting for setting in SMALL if "steps" not in setting]
    alone = make(data, tmp_path / "alone", table="1a", settings=free)
    lengths = make(data, tmp_path / "table", table="fig7", settings=[*free, "method.decoder.depth=1"])
    recipe = alone["steps"]
    assert [row["steps"] for row in lengths["rows"]] == pytest.approx([recipe * n / 8 for n in (1, 2, 4, 8, 16)], abs=8)
    assert "the base row 8x has the 300 steps" in lengths["reason"]


# Agreement with the paper


def cell(label, paper, *accuracies, total=1000):
    runs = [
        RunAccuracy(accuracy=share, low=share - 0.03, high=share + 0.03, correct=round(share * total), total=total)
        for share in accuracies
    ]
    return ComparedCell(label, cell_score(runs), paper)


def test_agreement_counts_pairs_and_names_those_within_the_noise():
    cells = [cell("a", 50.0, 0.3), cell("b", 60.0, 0.4), cell("c", 70.0, 0.41), cell("d", 55, 0.5)]
    found = agreement(cells, "linear")
    assert (found.pairs, found.agree, found.clear, found.clear_agree) == (6, 4, 5, 3)
    assert found.within_noise == ("c over b",)
    assert found.against == ("b over d", "c over d")
    assert found.sentence == (
        "4 of 6 pairs of cells are in the paper's order (linear probe). Of the 5 pairs whose difference is larger "
        "than the noise, 3 are in the paper's order. Clearly in the opposite order (the paper ranks b over d; c over "
        "d). Within the noise, in the paper's order: c over b."
    )


def test_agreement_ignores_unmeasured_cells_and_pairs_that_are_equal_in_the_paper():
    unmeasured = ComparedCell("x", None, 10.0)
    equal = [cell("a", 50.0, 0.3), cell("b", 50.0, 0.4), unmeasured]
    assert agreement(equal, "linear").sentence == "No two cells have been measured yet."
    same = agreement([cell("a", 50.0, 0.3), cell("b", 60.0, 0.3)], "linear")
    assert "every difference is within the noise" in same.sentence


def test_with_several_seeds_the_interval_is_of_the_differences_per_seed():
    steady, other = cell("a", 1, 0.30, 0.40, 0.50).score, cell("b", 2, 0.31, 0.41, 0.51).score
    value, low, high = difference(other, steady)
    assert value == pytest.approx(0.01)
    assert 0 < low <= value <= high, (
        "every seed shows the same difference, although scores of different seeds differ by ten points"
    )
    wide = difference(cell("c", 1, 0.30, 0.50).score, cell("d", 1, 0.50, 0.30).score)
    assert wide.low < 0 < wide.high
    one = difference(cell("e", 1, 0.40).score, cell("f", 1, 0.30).score)
    assert one.value == pytest.approx(0.1)
    assert one.low == pytest.approx(0.1 - 0.0415, abs=2e-3), "Newcombe's interval of two proportions of 1000"


def test_the_table_ignores_probes_with_other_options(unbroken):
    folder, _ = unbroken
    plan = load_plan(folder)
    run = Run.open(folder / "depth-8-seed-0")
    assert find_probe(run, "knn", plan, controls=True) is not None
    assert find_probe(Run.open(folder / "depth-1-seed-0"), "knn", plan, controls=True) is None
    assert find_probe(run, "knn", dataclasses.replace(plan, shots=9), controls=False) is None


def test_the_table_can_be_written_again_from_its_folder(unbroken):
    folder, summary = unbroken
    (folder / "table.json").unlink()
    assert without_times(write_table(folder, "finished").to_json()) == without_times(summary)


# Command line


@pytest.mark.slow
def test_a_stopped_command_exits_with_75_and_continues_when_repeated(data, tmp_path):
    settings = [flag for setting in [*SMALL, "train.steps=60"] for flag in ("--set", setting)]
    command = [sys.executable, "-m", "unmask.cli", "ablate", "1c", data, "--out", str(tmp_path / "table"), "--json"]
    running = subprocess.Popen([*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = tmp_path / "table" / "encoder-with-mask-tokens-seed-0" / "checkpoints" / "LATEST"
    limit = time.monotonic() + 120
    while not status.exists():
        assert running.poll() is None, running.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 75, err
    assert json.loads(out)["state"] == "stopped"
    assert re.search(r"stopped; continue with: unmask ablate 1c .* \(the same command\)", err)
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "finished"
    assert "encoder-with-mask-tokens-seed-0: resuming" in done.stderr


def test_the_hint_after_a_stop_repeats_the_shell_command_or_the_python_call(tmp_path, capsys, monkeypatch):
    results = SimpleNamespace(
        rows=[], agreement=SimpleNamespace(sentence=""), helped="", not_comparable=[], state="stopped"
    )
    monkeypatch.setattr(sys, "argv", ["notebook.py", "--my-flag"])
    report_results(results, tmp_path, Console())
    assert capsys.readouterr().err.endswith("stopped; repeat the same call to continue\n")
    with as_shell_command(["ablate", "1c", "my data"]):
        report_results(results, tmp_path, Console())
    assert "stopped; continue with: unmask ablate 1c 'my data' (the same command)" in capsys.readouterr().err


def test_the_page_reports_when_no_cell_is_above_the_controls():
    def row(accuracy):
        return SimpleNamespace(linear=None if accuracy is None else SimpleNamespace(mean=accuracy))

    controls = [
        ControlRow(features=name, cell="", linear=RunAccuracy(accuracy=value, low=0.0, high=1.0))
        for name, value in (("raw", 0.4), ("random", 0.3))
    ]
    assert (
        above_controls([row(0.5), row(0.35), row(None)], controls)
        == "1 of 2 cells are above raw (40.0%, linear probe)."
    )
    assert "pre-training did not help in any cell" in above_controls([row(0.35)], controls)
    assert above_controls([row(None)], controls) == above_controls([row(0.5)], []) == ""


def test_a_plan_of_an_earlier_version_can_be_read(tmp_path):
    """Versions before 0.2 wrote ablation.json without measured times and git, and with two keys in `paper`."""
    cell = {
        "name": "depth-8", "label": "8", "theirs": "8", "at": 8, "recipe": "mae_nano", "settings": ["a=1"],
        "varied": ["a=1"], "steps": 3, "equal": "steps", "base": True, "controls": True, "tokenizer": False,
        "fine_tunes": False, "paper": {"fine_tuned": 84.9, "linear": 73.5}, "batch_size": 8, "parameters": 10,
        "encoder_parameters": 5, "precision": "fp32",
        "flops": {"encoder": 1, "decoder": 2, "rest": 0, "training": 9, "whole": 4, "forward": 3},
    }  # fmt: skip
    asked = {"table": "1a", "data": "birds", "test": None, "recipe": "mae_nano", "settings": [], "budget": None,
             "seeds": 1, "shots": None, "tokenizer": None, "from_run": None}  # fmt: skip
    plan = {
        "asked": asked, "title": "Table 1a", "axis": "decoder blocks", "note": "", "log": True, "base": [],
        "missing": [], "measure": "linear", "steps": 3, "reason": "3 steps", "shots": 10, "pool": "mean",
        "device": "cpu", "fingerprint": "f", "cells": [cell], "versions": {"torch": "2"}, "git": None, "command": "c",
        "time": "2025-01-01",
    }  # fmt: skip
    Run(tmp_path).write("ablation.json", plan)
    found = load_plan(tmp_path)
    assert found.asked == TableRequest(table="1a", data="birds", recipe="mae_nano")
    base = next(cell for cell in found.cells if cell.base)
    assert base.paper.linear == 73.5
    assert base.training_flops == 9
    assert base.run_name(1) == "depth-8-seed-1"
