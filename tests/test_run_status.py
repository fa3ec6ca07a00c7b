"""`Run.status()`: the recorded state, the process that recorded it, and whether it is alive."""

import json
import os
import socket
import subprocess
import sys

import pytest
from conftest import pretrain
from faults import faults

from unmask.engine import heartbeat
from unmask.run import MetricsOffset, Run
from unmask.run_status import SLOW_AFTER, RunStatus

RUNNING = {"state": "running", "step": 3, "time": 1000.0, "total": 9, "pid": 1, "host": socket.gethostname()}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path / "run")


def test_status_names_the_process_that_recorded_it(run):
    run.set_status("running", 3, total=9, seconds=2.5)
    status = run.status()
    assert (status.state, status.step, status.steps, status.seconds) == ("running", 3, 9, 2.5)
    assert (status.pid, status.host, status.error) == (os.getpid(), socket.gethostname(), None)
    assert RunStatus.of(status.to_json(), {}, locked=False) == status


def test_status_of_an_earlier_version_is_read(run):
    (run.path / "status.json").write_text(json.dumps({"state": "stopped", "step": 7, "time": 5.0, "total": 9}))
    status = Run(run.path).status()
    assert (status.state, status.step, status.steps, status.time) == ("stopped", 7, 9, 5.0)
    assert (status.pid, status.host, status.heartbeat, status.seconds) == (None, None, None, 0.0)
    assert status.health() == "ended"


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"state": 3, "step": "x", "pid": null}'])
def test_missing_or_damaged_status_is_empty(run, content):
    if content is not None:
        (run.path / "status.json").write_text(content)
    assert Run(run.path).status() == RunStatus()


@pytest.mark.parametrize(
    ("locked", "beat", "host", "health"),
    [
        (True, 1990.0, None, "training"),
        (True, 1000.0, None, "slow"),
        (False, 1990.0, None, "dead"),
        (False, 1990.0, "elsewhere", "training"),
        (False, 1000.0, "elsewhere", "slow"),
    ],
)
def test_health_distinguishes_slow_and_dead_processes(locked, beat, host, health):
    recorded = RUNNING if host is None else {**RUNNING, "host": host}
    status = RunStatus.of(recorded, {"time": beat, "step": 5}, locked=locked)
    assert status.step == 5, "the heartbeat is newer than the status"
    assert status.health(now=2000.0) == health
    assert status.shown_state == ("running" if locked else "interrupted")


def test_run_that_has_just_begun_is_not_slow():
    status = RunStatus.of(RUNNING, {}, locked=True)
    assert status.health(now=1000.0 + SLOW_AFTER) == "training"
    assert status.health(now=1001.0 + SLOW_AFTER) == "slow"


def test_heartbeat_is_written_during_training_and_removed_at_the_end(images, tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.0)
    seen = []

    def look(job, at):
        seen.append(Run.open(job.run.path).status())

    settings = ["train.steps=3", "train.checkpoint_every=100", "train.log_every=100", "train.batch_size=8"]
    with faults(before_step=look):
        run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=settings)
    assert [status.step for status in seen] == [0, 1, 2]
    assert all(status.health() == "training" and status.locked for status in seen)
    assert not run.heartbeat_file.exists()
    assert run.status().health() == "ended"


def test_failed_heartbeat_does_not_stop_training(run, monkeypatch):
    monkeypatch.setattr(run, "write_heartbeat", lambda step: (_ for _ in ()).throw(OSError(28, "full")))
    heartbeat.Heartbeat(run).beat(1)


def test_heartbeats_are_written_at_intervals(run):
    beats = heartbeat.Heartbeat(run)
    beats.beat(1)
    beats.beat(2)
    assert json.loads(run.heartbeat_file.read_text())["step"] == 1


def test_killed_process_is_dead(run):
    code = f"""
import os, signal
from unmask.run import Run
run = Run({str(run.path)!r})
with run.lock():
    run.set_status("running", 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    status = Run(run.path).status()
    assert (status.health(), status.shown_state) == ("dead", "interrupted")


def test_metrics_since_an_offset_reads_only_new_rows(run):
    assert run.metrics().offset == MetricsOffset(0, 0)
    run.log({"step": 1})
    first = run.metrics()
    assert list(first) == [{"step": 1}]
    assert list(run.metrics(since=first.offset)) == []
    run.log({"step": 2})
    second = run.metrics(since=first.offset)
    assert (list(second), second.restarted) == ([{"step": 2}], False)
    assert list(run.metrics()) == [{"step": 1}, {"step": 2}]


def test_partial_line_is_read_when_it_is_complete(run):
    run.log({"step": 1})
    with run.metrics_file.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    first = run.metrics()
    assert list(first) == [{"step": 1}]
    with run.metrics_file.open("ab") as file:
        file.write(b'ss": 0.5}\n')
    assert list(run.metrics(since=first.offset)) == [{"step": 2, "loss": 0.5}]


def test_all_rows_are_read_after_a_truncation(run):
    for step in (1, 2, 3):
        run.log({"step": step})
    before = run.metrics()
    run.truncate_metrics(1)
    run.log({"step": 2, "again": True})
    run.log({"step": 3, "again": True})
    after = run.metrics(since=before.offset)
    assert after.restarted
    assert list(after) == [{"step": 1}, {"step": 2, "again": True}, {"step": 3, "again": True}]
