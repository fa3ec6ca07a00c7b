"""Test that the benchmarks step.py and attention.py run and report all fields; speed is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.slow
def test_step_benchmark_runs_and_all_models_compute_the_same_loss():
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "step.py", "--tiny", "--compiled", "--rivals", "transformers", "--json"],
        cwd=BENCHMARKS, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert {"date", "device", "versions", "command", "rows"} == found.keys()
    rows = {row["who"]: row for row in found["rows"]}
    assert rows.keys() == {
        "products", "square", "unmask", "unmask compiled", "transformers", "transformers compiled",
        "unmask over transformers", "unmask compiled over transformers compiled", "loss of transformers",
    }  # fmt: skip
    assert not [row for row in found["rows"] if "failed" in row]
    assert rows["loss of transformers"]["loss"] < 1e-5
    for who in ("unmask", "transformers"):
        assert rows[who]["fastest_ms"] <= rows[who]["ms"] <= rows[who]["slowest_ms"]
        assert rows[who]["peak_mib"] > 1


def test_attention_benchmark_with_tiny_runs_and_writes_nothing():
    kept = (BENCHMARKS / "results" / "attention-cpu.json").read_bytes()
    done = subprocess.run(
        [sys.executable, "attention.py", "--tiny", "--json"], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 6
    assert all(row["fused_ms"] > 0 and row["ours_ms"] > 0 for row in rows)
    assert (BENCHMARKS / "results" / "attention-cpu.json").read_bytes() == kept
