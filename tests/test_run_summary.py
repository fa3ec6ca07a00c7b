"""Test how a run is displayed in Python and in notebooks."""

import base64
import os
import sys
import threading
import time
import types

from sample_run import make_run

from unmask import console
from unmask.console import Console
from unmask.report.run_page import write_report
from unmask.run import Run
from unmask.run_summary import summarise
from unmask.system import folder_lock


def test_repr_of_a_run_shows_state_and_progress(tmp_path):
    run = make_run(tmp_path / "run")
    assert repr(run) == f"Run('{run.path}', finished, step 40/40, mae_nano, loss 0.0500, linear 80.0 % on birds)"


def test_notebook_shows_a_table_and_the_newest_picture(tmp_path):
    run = make_run(tmp_path / "<run>")
    shown = run._repr_html_()
    assert "<th>state</th><td>finished</td>" in shown
    assert "30 of 16 x 24 pixels" in shown
    assert "&lt;run&gt;" in shown
    assert "<run>" not in shown
    newest = base64.b64encode((run.pictures / "step-00000040.png").read_bytes()).decode()
    assert newest in shown


def test_repr_of_a_folder_that_is_not_a_run(tmp_path):
    assert repr(Run(tmp_path / "nothing")) == f"Run('{tmp_path / 'nothing'}', damaged)"
    (tmp_path / "config.json").write_text("{")
    assert "damaged" in repr(Run(tmp_path))


def test_files_deleted_during_a_summary_are_skipped(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    before, walk = summarise(run), os.walk

    def with_one_that_is_gone(folder):
        for inside, folders, names in walk(folder):
            yield inside, folders, [*names, ".plan.json.7.partial"]

    monkeypatch.setattr(os, "walk", with_one_that_is_gone)
    assert summarise(run) == before
    assert before.bytes == sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())


def test_progress_in_a_notebook_replaces_one_line(monkeypatch):
    shown = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    ipython = types.SimpleNamespace(
        get_ipython=lambda: types.SimpleNamespace(kernel=object()),
        display=types.SimpleNamespace(display=lambda data, raw, display_id: handle),
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    with Console().progress("step", 3) as bar:
        for step in (1, 2, 3):
            bar.update(step, "loss 1")
    assert [line.split("  ")[0] for line in shown] == ["step 1/3", "step 2/3", "step 3/3"]
    with Console(quiet=True).progress("step", 3) as bar:
        bar.update(3)
    assert len(shown) == 3


def test_work_of_unknown_length_reports_elapsed_time(monkeypatch, capsys):
    monkeypatch.setattr(console, "PLAIN_INTERVAL", 0.01)
    with Console().working("fitting"):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert set(lines) == {"fitting: 0 s so far"}
    threads = threading.active_count()
    with Console(quiet=True).working("fitting"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    assert threading.active_count() == threads


def test_killed_run_is_not_shown_as_running(tmp_path):
    run = make_run(tmp_path / "run")
    run.set_status("running", 7, total=40)
    assert summarise(run).state == "interrupted"
    report = write_report(run.path).read_text()
    assert "interrupted at step 7 of 40" in report
    with run.lock():
        assert summarise(run).state == "running"
    assert summarise(run).state == "interrupted"
    run.set_status("stopped", 7, total=40)
    assert summarise(run).state == "stopped"


def test_reading_a_run_creates_no_lock_and_does_not_block_others(tmp_path):
    assert not folder_lock.is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with folder_lock.locked(tmp_path, grace=0):
        assert folder_lock.is_held(tmp_path)
    assert not folder_lock.is_held(tmp_path)
    with folder_lock.locked(tmp_path, grace=0):
        pass
