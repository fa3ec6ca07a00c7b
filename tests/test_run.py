"""The run folder: files are written atomically, each step is logged once, and one process trains at a time."""

import errno
import json
import multiprocessing
import os
import signal
import time

import pytest

from unmask.run import Run, RunError, RunInUse
from unmask.system.atomic_files import replace_file


@pytest.fixture
def run(tmp_path):
    made = Run.create(tmp_path / "run")
    made.write("config.json", {})
    return made


def test_non_empty_folder_is_rejected_and_unchanged(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RunError, match=r"not empty.*another --out"):
        Run.create(tmp_path)
    with pytest.raises(RunError, match="is a file"):
        Run.create(tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_error_for_an_existing_run_suggests_resume(run):
    with pytest.raises(RunError, match="unmask resume"):
        Run.create(run.path)


def test_opening_a_folder_that_is_not_a_run_is_an_error(run, tmp_path):
    with pytest.raises(RunError, match="not a folder"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"no config\.json; did you mean .*run"):
        Run.open(tmp_path)
    assert Run.open(run.path).path == run.path


def test_json_files_round_trip_and_damaged_ones_are_rejected(run):
    run.write("evals/probe.json", {"a": 1.5, "name": "caf\udce9"})  # a file name that is not UTF-8
    assert run.read("evals/probe.json") == {"a": 1.5, "name": "caf\udce9"}
    (run.path / "evals/probe.json").write_text("{")
    with pytest.raises(RunError, match=r"probe\.json cannot be read: .*delete it and measure again"):
        run.read("evals/probe.json")
    (run.path / "evals/probe.json").write_text("[]")
    with pytest.raises(RunError, match="holds a list; expected a JSON object"):
        run.read("evals/probe.json")
    with pytest.raises(RunError, match="missing"):
        run.read("plan.json")


def test_failed_write_keeps_the_old_file(run, monkeypatch):
    run.write("status.json", {"old": True})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        run.write("status.json", {"old": False})
    monkeypatch.undo()
    assert run.read("status.json") == {"old": True}
    assert not list(run.path.glob(".*partial"))


def test_metrics_keep_each_step_once_and_survive_a_truncated_line(run):
    for step in range(1, 6):
        run.log({"step": step, "loss": step / 3})
    with run.metrics_file.open("ab") as file:
        file.write(b'{"step": 6, "lo')  # a line that a crash truncated
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    run.log({"step": 7, "loss": 0.0})  # the next row must be written on a new line
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 7]
    run.truncate_metrics(3)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert run.metrics()[0]["loss"] == 1 / 3  # exactly


def test_quarantine_keeps_file_names_that_are_not_utf8(run):
    run.add_quarantine({"name": "bad\udcff.png", "code": "EMPTY", "detail": ""})
    assert run.quarantine()[0]["name"] == "bad\udcff.png"
    run.quarantine_file.read_bytes().decode("ascii")


def test_status(run):
    run.set_status("running", 7, total=10)
    status = run.read("status.json")
    assert (status["state"], status["step"], status["total"]) == ("running", 7, 10)


def _hold(path, ready):
    with Run.open(path).lock():
        ready.set()
        time.sleep(60)


def test_lock_allows_one_process_and_is_released_if_it_is_killed(run):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(run.path, ready))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(RunInUse, match=f"in use by process {holder.pid}"), run.lock():
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    with run.lock():
        assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()


def test_replace_file_writes_the_whole_content(tmp_path):
    replace_file(tmp_path / "a", b"x" * 100_000)
    assert (tmp_path / "a").read_bytes() == b"x" * 100_000


def test_full_disk_error_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # like errors of write and fsync, without a file name

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        replace_file(tmp_path / "a.json", b"{}")
    assert raised.value.filename == str(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_read_as_empty_and_a_damaged_one_is_an_error(tmp_path):
    run = Run.create(tmp_path / "run")
    assert run.read_if_present("evals/notes.json") == {}
    run.write("evals/notes.json", {"a": 1})
    assert run.read_if_present("evals/notes.json") == {"a": 1}
    (run.evals / "notes.json").write_text("{")
    with pytest.raises(RunError):
        run.read_if_present("evals/notes.json")
