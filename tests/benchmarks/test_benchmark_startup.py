"""Test that the benchmarks startup.py, scale.py and evaluator.py run with --tiny; speed is not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def rows_of(script: str, *arguments: str) -> list[dict]:
    before = sorted((BENCHMARKS / "results").iterdir())
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--tiny", "--json", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted((BENCHMARKS / "results").iterdir()) == before, "a tiny run must not write a result"
    found = json.loads(done.stdout)
    assert {"date", "device", "versions", "command", "rows"} <= set(found)
    return found["rows"]


def test_startup_benchmark_runs():
    rows = rows_of("startup.py")
    assert [row["command"] for row in rows] == ["python", "unmask --help"]
    assert all(0 < row["fastest_s"] <= row["median_s"] <= row["slowest_s"] for row in rows)
    assert {row["torch"] for row in rows} == {"False"}


def test_scale_benchmark_runs():
    rows = rows_of("scale.py")
    by_part = {part: [row for row in rows if row["part"] == part] for part in {row["part"] for row in rows}}
    assert {part: len(found) for part, found in by_part.items()} == {
        "index": 2, "order": 2, "loading": 2, "encoder": 6, "encoder, line through tokens": 1,
    }  # fmt: skip
    assert [row["files"] for row in by_part["index"]] == [20, 40]
    assert [row["tokens"] for row in by_part["encoder"]] == [4, 7, 17, 33, 49, 65]
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()


@pytest.mark.skipif(os.name == "nt", reason="measures memory in a forked process")
def test_evaluator_benchmark_runs(tmp_path):
    rows = rows_of("evaluator.py")
    assert [row["probe"] for row in rows] == ["knn", "linear"]
    assert rows[0]["agree"] == 1.0
    assert all(row["ours_accuracy"] > 0.1 for row in rows)
    rng = np.random.default_rng(0)
    for name, count in (("train.npz", 60), ("test.npz", 20)):
        mean = rng.normal(size=(count, 4)).astype(np.float32)
        np.savez(tmp_path / name, mean=mean, label=np.where(mean[:, 0] > 0, "cat", "dog"))
    features = rows_of("evaluator.py", "--features", str(tmp_path / "train.npz"), str(tmp_path / "test.npz"))
    assert [(row["train"], row["test"], row["width"]) for row in features] == [(60, 20, 4)] * 2
    assert all(row["ours_accuracy"] > 0.8 for row in features)
