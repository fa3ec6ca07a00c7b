"""What all benchmarks share: rivals take turns, warm-up is not counted, and a result says where it came from."""

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
    """Two rivals on a clock of their own: the calls of `slow` take 5, 7 and 30 s, those of `quick` 1, 2 and 9 s."""
    now, calls = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def rival(name, seconds):
        left = iter(seconds)

        def call():
            calls.append(name)
            now[0] += next(left)

        return call

    return {"slow": rival("slow", [100, 5, 30, 7]), "quick": rival("quick", [100, 9, 1, 2])}, calls


def test_rivals_take_turns_and_the_first_call_of_each_is_not_counted(measure, rivals):
    found = measure.timings(rivals[0], rounds=3)
    assert found == {"slow": [5, 30, 7], "quick": [9, 1, 2]}
    assert rivals[1] == ["slow", "quick"] * 4


def test_of_each_the_median_counts(measure, rivals):
    assert measure.medians(rivals[0], rounds=3) == {"slow": 7, "quick": 2}
    assert measure.spread([5, 30, 7]) == {"median": 7, "fastest": 5, "slowest": 30}


def test_a_result_says_where_it_came_from_and_is_written_on_request(measure, monkeypatch, tmp_path, capsys):
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
def test_the_committed_results_say_where_they_came_from(path):
    found = json.loads(path.read_text())
    assert {"date", "device", "versions", "command", "rows"} <= found.keys()
    assert (BENCHMARKS.parent / found["command"].split()[1]).is_file(), "the command can be run again"
    assert found["rows"]
