"""Test that benchmarks/loader.py runs on a few small images and reports all fields; speed is not tested."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "loader.py"


def test_loader_benchmark_runs_and_compares_the_same_crops():
    command = [sys.executable, str(SCRIPT), "--tiny", "--workers", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"torch", "pillow", "simplejpeg"} <= set(found["versions"])
    assert found["device"]
    alone = {row["images"]: row for row in found["rows"] if row["workers"] == 0}
    assert list(alone) == ["as they are", "0.012288 megapixels, noise 4", "0.012288 megapixels, noise 4, packed"]
    for row in alone.values():
        assert row["unmask_per_s"] > 0
        assert row["reference_per_s"] > 0
    assert alone["as they are"]["pixel_difference"] < 0.5  # tens of levels if crops or flips differed
    assert all(row["pixel_difference"] < 3 for row in alone.values())
    packed = alone["0.012288 megapixels, noise 4, packed"]
    assert packed["full_size"] == [96, 128]
    assert packed["bytes"] < alone["0.012288 megapixels, noise 4"]["bytes"]
    assert len([row for row in found["rows"] if row["workers"] == 1 and 0 <= row["waiting"] < 1]) == 3
