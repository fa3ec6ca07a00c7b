"""Test the report of new, probed and damaged runs, and of names with HTML characters."""

import re
import subprocess
import sys

import pytest
from sample_run import BASELINES, PROBE, make_run

from unmask.report.probe_section import probe_section, probe_title
from unmask.report.run_page import loss_note, write_report
from unmask.report.training_log import smooth
from unmask.results import FeatureScore, ImageSet, ProbeResult, TestIdentity, from_json
from unmask.run import RunError


def test_report_of_a_finished_run_has_pictures_curve_table_and_verdict(tmp_path):
    path = write_report(make_run(tmp_path / "run").path)
    html = path.read_text()
    assert "Pre-training helps." in html
    assert "80.0%" in html
    assert "74.0% to 85.0%" in html
    assert re.findall(r"<figcaption>(.*?)</figcaption>", html) == [
        "before training",
        "after 20 steps",
        "after 40 steps",
    ]
    assert html.count("data:image/png;base64,") == 3
    assert "<svg" in html
    assert "a copy of the nearest visible patch: 1.500" in html
    assert "unmask pretrain birds" in html


def test_report_needs_no_network_and_escapes_file_names(tmp_path):
    run = make_run(tmp_path / "run")
    run.add_quarantine({"name": "<script>alert(1)</script>\\xff.png", "code": "EMPTY", "detail": "no bytes"})
    html = write_report(run.path).read_text()
    assert "a <b>bold</b> folder" not in html
    assert "a &lt;b&gt;bold&lt;/b&gt; folder" in html
    assert "<script>" not in html
    assert "EMPTY" in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html), "the page loads no other files"


def test_report_of_a_new_or_failed_run_is_written(tmp_path):
    run = make_run(tmp_path / "run", trained=False)
    assert "No step has been logged yet" in write_report(run.path).read_text()
    run.set_status("failed", 3, error="TrainingFailed: the disk is full")
    assert "the disk is full" in write_report(run.path).read_text()
    run.log({"step": 1, "loss": None, "skipped": ["a.png"]})
    assert "1 step was skipped" in write_report(run.path).read_text()


def test_result_of_an_unsupported_version_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    run.write("evals/baselines.json", {"step": 40, "images": 8, "loss": 0.5, "patch_mean": 1.0})
    warnings = []
    page = write_report(run.path, log=warnings.append).read_text()
    assert "Final training loss" in page
    assert "Dots:" not in page
    assert "Not shown: " in page
    assert "baselines.json: got a result without" in warnings[0]


def test_run_inside_a_run_is_a_section_of_the_page(tmp_path):
    make_run(tmp_path / "run")
    make_run(tmp_path / "run" / "digits")
    html = write_report(tmp_path / "run").read_text()
    assert html.count("<section>") == 2
    assert "<h1>digits</h1>" in html


def test_folder_that_is_not_a_run_is_rejected(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run")
    (run.path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json cannot be read"):
        write_report(run.path)


def test_loss_note_compares_the_loss_with_the_baselines():
    rows = [{"step": step, "loss": 0.25} for step in range(1, 41)]
    note = loss_note(rows, from_json(BASELINES))
    assert "Final training loss 0.250" in note
    assert "64 fixed images" in note
    assert "0.400 at step 40" in note
    assert "Better than: a copy of the nearest visible patch (1.500)" in note
    assert "Not better than: the mean of all visible patches (0.300)" in note, "both losses are of the same images"
    assert loss_note(rows, None) == "Final training loss 0.250 (mean of the last 5 % of the logged steps)."


def test_smoothing_keeps_the_mean():
    steps, losses = smooth(list(range(1, 601)), [float(i) for i in range(600)])
    assert len(steps) == len(losses) == 60
    assert sum(losses) / 60 == pytest.approx(299.5)


def test_report_does_not_load_torch(tmp_path):
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from unmask.report.run_page import write_report; write_report(sys.argv[1]); "
        "sys.exit(any(name.split('.')[0] == 'torch' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run.path)], check=False).returncode == 0


def test_title_of_a_probe_names_options_that_differ_from_the_defaults():
    assert probe_title(from_json(PROBE)) == "Linear probe on birds, tested on birds-test"
    asked = from_json(PROBE | {"kind": "knn", "shots": 1, "seed": 2, "layer": "0", "masks": 0})
    assert probe_title(asked) == (
        "k nearest neighbours on birds, tested on birds-test, 1 label per class, seed 2, layer 0, 0 masks"
    )


def test_bars_of_scores_above_one_are_relative_to_the_highest_score():
    rows = tuple(
        FeatureScore(features=name, pool="mean", value=value)
        for name, value in (("pre-trained", 40.0), ("random", 10.0))
    )
    record = ProbeResult(
        kind="rank", data=ImageSet(name="birds"), test=TestIdentity(held_out=0.2), task="unlabelled", metric="rank",
        rows=rows,
    )  # fmt: skip
    section = probe_section(record)
    assert [row.bar.length for row in section.rows] == [1.0, 0.25]
    assert [row.interval for row in section.rows] == ["", ""]
    assert (section.reference, section.reference_at) == ("", None)


def test_suggested_command_names_the_run_as_given(tmp_path, monkeypatch):
    run = make_run(tmp_path / "runs" / "a b")
    for file in run.evals.glob("probe-*"):
        file.unlink()
    monkeypatch.chdir(tmp_path)
    assert "unmask probe &#39;runs/a b&#39; DATA" in write_report("runs/a b").read_text()
