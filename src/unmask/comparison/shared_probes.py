"""The measurements that several runs have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from unmask.comparison.agreement import difference
from unmask.report.probe_titles import probe_title
from unmask.results import POOLS, PRETRAINED
from unmask.run import Run

# What two probes must have in common to be one measurement.
SAME = ("kind", "data", "test", "shots", "seed", "layer", "masks")


def probes(run: Run) -> list[dict[str, Any]]:
    """The Run's probes, but for damaged files; of one measurement at several steps only the latest."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _, found in sorted(run.results("probe-*", "attentive-*")[0].items()):
        probe = {"layer": None, "masks": None} | found
        if all(key in probe for key in SAME):
            key = tuple(probe[name] for name in SAME)
            if key not in latest or probe["step"] > latest[key]["step"]:
                latest[key] = probe
    return list(latest.values())


def damaged(runs: Iterable[Run]) -> list[str]:
    """Results that are not shown because their files have changed since they were written."""
    return [fault for run in runs for fault in run.results("probe-*", "attentive-*")[1]]


def _measurement(probe: dict[str, Any]) -> tuple[Any, ...]:
    return (*(probe[key] for key in SAME), probe["test_images"], probe["train_images"], tuple(probe["classes"]))


def shared(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The measurements that every Run has, each with one row for a Run: the mean over patches (of a kind without it
    what there is), and all pools.

    Ranked is one pool for all: the better of two, chosen on the test images, would favour encoders with a class token.
    """
    keyed = {name: {_measurement(probe): probe for probe in each} for name, each in found.items()}
    first, *others = keyed.values()
    tables = []
    for key, probe in first.items():
        if not all(key in other for other in others):
            continue
        rows = []
        for name, each in keyed.items():
            pools = {row["pool"]: row for row in each[key]["rows"] if row["features"] == PRETRAINED}
            ranked = pools.get("mean") or next(iter(pools.values()))
            score = {part: ranked[part] for part in ("accuracy", "low", "high", "correct", "total", "pool")}
            rows.append({"name": name, "step": each[key]["step"], **score, "pools": pools})
        rows.sort(key=lambda row: -row["accuracy"])
        about_all = {part: probe[part] for part in (*SAME, "test_images", "train_images", "chance")}
        tables.append({"title": probe_title(probe), **about_all, "rows": rows, "sentence": _sentence(rows)})
    return tables


def _sentence(rows: list[dict[str, Any]]) -> str:
    """Who leads, and whom the choice of test images alone could put in front."""
    first, *others = rows
    said = f"{first['name']} leads with {first['accuracy']:.1%} ({POOLS.get(first['pool'], first['pool'])})"
    scores = [
        {"mean": row["accuracy"], "interval": "test images", "by_seed": {}, **{k: row[k] for k in ("correct", "total")}}
        for row in rows
    ]
    close = [row["name"] for row, score in zip(others, scores[1:], strict=True) if difference(scores[0], score)[1] <= 0]
    if not close:
        return said + ", by more than the choice of test images would explain; another seed of the training may differ"
    return said + f", but within the noise of the test images lie {', '.join(close)}"


def not_shared(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A sentence for every measurement that only some of the Runs have."""
    names: dict[tuple[Any, ...], list[str]] = {}
    titles: dict[tuple[Any, ...], str] = {}
    for name, each in found.items():
        for probe in each:
            names.setdefault(_measurement(probe), []).append(name)
            titles[_measurement(probe)] = probe_title(probe)
    lines = [
        f"{titles[key]} ({key[len(SAME)]} test images) was measured for {', '.join(have)} only."
        for key, have in names.items()
        if len(have) < len(found)
    ]
    if not any(len(have) == len(found) for have in names.values()):
        lines.append(
            "No probe is shared by all of these runs, so nothing says which features are better; measure one with: "
            "unmask compare RUN... --data DATA --test DATA"
        )
    return lines
