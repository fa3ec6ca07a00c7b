"""What the benchmarks share: alternating timings of rivals, and a result file that says where it came from.

Rivals are timed in turns, so that a slow minute of a busy machine hits all of them; what is reported is the median of
each and the ratio of medians.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def medians(rivals: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of one call of each, timed in turns."""
    for _ in range(warmup):
        for call in rivals.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, call in rivals.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write `results/<name>-<cpu|cuda>.json` with device, versions and command, and print the rows."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {}
    for package in ("torch", "transformers", "numpy", "pillow", "simplejpeg"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    origin = {"date": time.strftime("%Y-%m-%d"), "device": device_name(), "versions": versions, "command": command}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{kind}.json"
    path.write_text(json.dumps({**origin, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    print(f"written to {path}")
