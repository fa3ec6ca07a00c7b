"""Shared by all benchmarks: timings of rivals in turns, and a result file with date, device, versions and command.

Rivals are timed in turns, so that a slow minute of a busy machine affects all of them. The median of each rival and the
ratio of the medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def command_line(doc: str | None, *, rounds: int, result: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks.

    doc: the help text. result: name of the file that --keep writes.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"number of rounds; every rival runs once in each (default {rounds})"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--keep", action="store_true", help=f"write benchmarks/results/{result}-<cpu or cuda>.json")
    parser.add_argument("--tiny", action="store_true", help="run on very small data, only to test the script")
    return parser


def timings(rivals: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Time the candidates in alternation; return {name: seconds of each call}."""
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
    return times


def medians(rivals: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, float]:
    """Time the rivals in turns; return {rival: median seconds of a call}."""
    return {name: statistics.median(values) for name, values in timings(rivals, rounds=rounds, warmup=warmup).items()}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the fastest and the slowest of several measurements."""
    return {"median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}


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


def origin(packages: Sequence[str] = ("torch", "transformers", "numpy", "pillow", "simplejpeg")) -> dict[str, Any]:
    """Return the date, device, versions and command of a result."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"date": time.strftime("%Y-%m-%d"), "device": device_name(), "versions": versions, "command": command}


def keep_rows(name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> Path:
    """Write the rows and `about` to the folder `results`; return the file."""
    path = RESULTS / f"{name}-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    return path


def conclude(name: str, rows: list[dict[str, Any]], about: dict[str, Any], *, as_json: bool, keep: bool) -> None:
    """Print the rows as lines, or with as_json as one object together with `about`.

    keep: also write the object to the folder `results`.
    """
    path = keep_rows(name, rows, about) if keep else None
    if as_json:
        print(json.dumps({**about, "rows": rows}))
        return
    print(about["device"], *(f"{name} {version}" for name, version in about["versions"].items()), sep="  ")
    print_rows(rows)
    if path is not None:
        print(f"written to {path}")


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Print one line per row."""
    for row in rows:
        print("  ".join(f"{key} {_format(value)}" for key, value in row.items()))


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
