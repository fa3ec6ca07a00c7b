"""Test that benchmarks/products.py compares torch's float32 products with oneDNN's."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "products.py"


def test_products_benchmark_reports_the_rates_of_both_libraries():
    done = subprocess.run([sys.executable, SCRIPT, "--tiny", "--json"], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 3
    for row in rows:
        assert row["torch_gflops"] > 0
        assert row["onednn_gflops"] > 0
