"""Test benchmarks/measure.py: rivals are timed in turns, warm-up is excluded, and results record their origin."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measure

    return measure


@pytest.fixture
def rivals(measure, monkeypatch):
    """Two rivals on a fake clock: calls of `slow` take 5, 7 and 30 s, calls of `quick` 1, 2 and 9 s."""
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def rival(name, seconds):
        left = iter(seconds)

        def call():
            calls.append(name)
            now[0] += next(left)

        return call

    return {"slow": rival("slow", [100, 5, 30, 7]), "quick": rival("quick", [100, 9, 1, 2])}, calls


def test_rivals_are_timed_in_turns_after_a_warm_up_call(measure, rivals):
    found = measure.timings(rivals[0], rounds=3)
    assert found == {"slow": [5, 30, 7], "quick": [9, 1, 2]}
    assert rivals[1] == ["slow", "quick"] * 4


def test_median_fastest_and_slowest_are_reported(measure, rivals):
    assert measure.medians(rivals[0], rounds=3) == {"slow": 7, "quick": 2}
    assert measure.spread([5, 30, 7]) == {"median": 7, "fastest": 5, "slowest": 30}


def test_result_records_its_origin_and_is_written_with_keep(measure, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/step.py", "--rounds", "3", "a b"])
    about = measure.origin(("numpy", "no-such-package"))
    assert about["command"] == "python benchmarks/step.py --rounds 3 'a b'"
    assert about["versions"]["no-such-package"] == "not installed"
    measure.conclude("step", [{"ms": 1.5}], about, as_json=True, keep=False)
    assert json.loads(capsys.readouterr().out) == {**about, "rows": [{"ms": 1.5}]}
    assert not list(tmp_path.iterdir())
    measure.conclude("step", [{"ms": 1.5}], about, as_json=True, keep=True)
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())["rows"] == [{"ms": 1.5}]


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results_record_their_origin(path):
    found = json.loads(path.read_text())
    assert {"date", "device", "versions", "command", "rows"} <= found.keys()
    assert (BENCHMARKS.parent / found["command"].split()[1]).is_file(), "the recorded command names an existing script"
    assert found["rows"]
