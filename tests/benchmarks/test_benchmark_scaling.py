"""Test that benchmarks/scaling.py trains with --tiny in one and two processes, and its rows of given times."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "scaling.py"), *arguments],
        cwd=BENCHMARKS, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    return scaling


@pytest.fixture
def task(scaling):
    return scaling.Task("unmask", 1, "none", "mae_nano", 8, "fp32", threads=1, steps=2, tiny=True)


def test_one_and_two_processes_do_the_same_work_and_nothing_is_written():
    before = sorted((BENCHMARKS / "results").iterdir())
    done = run("--tiny", "--json", "--parts", "processes", "overhead")
    assert done.returncode == 0, done.stderr
    assert sorted((BENCHMARKS / "results").iterdir()) == before, "a tiny run must not write a result"
    found = json.loads(done.stdout)
    assert {"date", "device", "versions", "command", "cores", "load", "rows"} <= found.keys()
    assert not [row for row in found["rows"] if "failed" in row]
    ours = {row["processes"]: row for row in found["rows"] if row["who"] == "unmask" and row["part"] == "processes"}
    assert ours.keys() == {1, 2}
    assert ours[2]["first_loss"] == pytest.approx(ours[1]["first_loss"], rel=1e-3)
    assert all(row["fastest_ms"] <= row["ms"] <= row["slowest_ms"] for row in ours.values())
    assert all(0 <= row["loading"] < 1 and row["cpu_s"] > 0 for row in ours.values())
    overhead = {row["engine"]: row for row in found["rows"] if row["part"] == "overhead"}
    assert overhead.keys() == {"none", "none again", "ddp"}
    assert all(row["same_losses"] for row in overhead.values()), "DDP in a group of one process changes no bit"


@pytest.mark.slow
def test_checkpoints_are_measured_in_turns_and_the_first_step_is_timed():
    done = run("--tiny", "--json", "--processes", "1", "--parts", "saving", "checkpoint", "start")
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(done.stdout)["rows"] if row["who"] == "unmask"]
    assert not [row for row in rows if "failed" in row]
    saving = {row["mode"]: row for row in rows if row["part"] == "saving"}
    assert list(saving) == ["none", "background", "foreground"]
    assert saving["none"]["pause_share"] == saving["none"]["lost_s"] == 0
    assert saving["none"]["write_s"] is None
    assert saving["background"]["write_s"] > 0
    assert saving["foreground"]["pause_ms"] > 1e3 * saving["foreground"]["write_s"], "training waits for the file"
    dense, shards = (row for row in rows if row["part"] == "checkpoint")
    assert (dense["form"], dense["files"], shards["form"], shards["files"]) == ("dense", 4, "dcp", 3)
    assert shards["mib"] == pytest.approx(dense["mib"], rel=0.05)
    (start,) = (row for row in rows if row["part"] == "start")
    assert 0 < start["fastest_s"] == start["median_s"]


def test_gpus_that_the_machine_does_not_have_are_rejected():
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    done = run("--gpus", str(found + 1))
    assert done.returncode == 2
    assert f"got --gpus {found + 1}; this machine has {found or 'no'} GPUs that torch can use" in done.stderr


def test_steps_before_the_warm_up_has_ended_do_not_count(scaling, task):
    one = {"ended": {"1": 50.0, "2": 60.0, "3": 61.0, "4": 64.0}, "used": {"1": 9.0, "2": 10.0, "3": 11.0, "4": 13.0}}
    waited = {"waited": {"1": 40.0, "2": 9.0, "3": 0.25, "4": 0.75}}
    found = scaling.timed_steps(task, [{**one, **waited}, {**one, **waited}])
    assert found == {"seconds": 2.0, "cpu": 3.0, "loading": 0.25, "first_loss": None}


def test_lightnings_loading_is_the_time_between_two_steps(scaling, task):
    found = scaling.timed_steps(
        replace(task, who="lightning"),
        [{"begun": {"3": 61.0, "4": 64.0}, "ended": {"2": 60.0, "3": 63.0, "4": 64.0}, "used": {"2": 0.0, "4": 1.0}}],
    )
    assert found["loading"] == pytest.approx(0.5)


def test_modes_of_saving_take_turns_after_every_few_steps(scaling, task):
    task = replace(task, every=2, modes=("none", "background", "foreground"))
    assert task.last_step == 8
    modes = {step: scaling.mode_of(task, step) for step in range(1, 9)}
    assert {step: mode for step, mode in modes.items() if mode != "none"} == {4: "background", 6: "foreground"}
    assert {scaling.mode_of(replace(task, every=0, modes=()), step) for step in range(1, 9)} == {"none"}


def test_pause_is_compared_with_steps_without_a_checkpoint(scaling, task, monkeypatch):
    """A step takes 10 s. The pauses are 0, 1 and 4 s, and the background save delays the next steps by 0.5 s each."""
    task, now, begun, ended = replace(task, every=2, modes=scaling.MODES), 0.0, {}, {}
    for step in range(1, 9):
        begun[str(step)] = now
        now += 10 + (0.5 if step in (5, 6) else 0)
        ended[str(step)] = now
        now += {4: 1.0, 6: 4.0}.get(step, 0)
    saves = [{"step": 4, "pause": 1.0, "write": 3.0}, {"step": 6, "pause": 1.0, "write": 2.0, "bytes": 2**21}]
    ranks = [{"begun": begun, "ended": ended, "used": {str(step): 20.0 * step for step in range(9)}, "saves": saves}]
    monkeypatch.setattr(scaling, "run_in_processes", lambda task: ranks)
    rows = []
    scaling.saving_rows(task, rows.extend)
    found = {row["mode"]: row for row in rows}
    assert {mode: row["pause_share"] for mode, row in found.items()} == {
        "none": 0, "background": pytest.approx(0.1), "foreground": pytest.approx(0.4),
    }  # fmt: skip
    assert {mode: row["lost_s"] for mode, row in found.items()} == {
        "none": 0, "background": pytest.approx(2), "foreground": pytest.approx(4),
    }  # fmt: skip
    assert (found["background"]["write_s"], found["foreground"]["mib"]) == (3.0, 2.0)


def test_ratios_compare_with_one_process_and_with_lightning(scaling):
    def row(who, engine, processes, rate, cpu):
        return {"who": who, "engine": engine, "processes": processes, "images_per_s": rate, "cpu_s": cpu, "batch": 8}

    rows = [
        row("unmask", "none", 1, 10.0, 2.0),
        row("unmask", "ddp", 2, 9.0, 2.5),
        row("lightning", "ddp", 2, 6.0, 5.0),
    ]
    rows.append({"who": "lightning", "engine": "none", "processes": 1, "failed": "no output"})
    found = {one["who"]: (one["ratio"], one["cpu_ratio"]) for one in scaling.process_ratios(rows)}
    assert found == {
        "2 processes (ddp) over 1, unmask": (0.9, 0.8), "unmask over lightning, 2 processes (ddp)": (1.5, 2.0),
    }  # fmt: skip


def test_a_process_that_fails_ends_the_others(scaling, monkeypatch):
    monkeypatch.setattr(scaling, "GRACE", 0.1)
    sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)
    assert scaling.wait([sleeping, failing]) == [-9, 3]
