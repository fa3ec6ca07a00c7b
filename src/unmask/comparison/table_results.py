"""What the runs of a table measured: one row per cell, with intervals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.comparison.agreement import IN_WORDS, agreement, t_half_width
from unmask.comparison.paper_tables import SHARED
from unmask.report.training_log import last_loss, training_seconds
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS, find_score
from unmask.run import Run

POOL = "mean"  # over patches: every encoder has it, and one pool for all cells leaves nothing to choose on test images
KINDS = {"linear": "linear probe", "knn": "kNN"}


def gather(folder: Path, state: str) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    decided = Run(folder).read("ablation.json")
    failures = Run(folder).read("failures.json") if (folder / "failures.json").exists() else {}
    rows = [_row(folder, decided, cell, failures) for cell in decided["cells"]]
    base = next(row for row in rows if row["base"])
    for row in rows:
        row["flops_ratio"] = row["flops"]["training"] / base["flops"]["training"]
        row["time_ratio"] = (
            base["images_per_second"] / row["images_per_second"]
            if base["images_per_second"] and row["images_per_second"]
            else None
        )
    if state == "finished" and any(row["state"] == "failed" for row in rows):
        state = "failed"
    asked, measure = decided["asked"], decided["measure"]
    controls = _controls(rows)
    return {
        "table": asked["table"],
        "title": decided["title"],
        "axis": decided["axis"],
        "note": decided["note"],
        "log": decided["log"],
        "state": state,
        "asked": asked,
        "base": decided["base"],
        "missing": decided["missing"],
        "steps": decided["steps"],
        "reason": decided["reason"],
        "shots": decided["shots"],
        "pool": POOL,
        "measure": measure,
        "rows": rows,
        "controls": controls,
        "helped": helped(rows, controls),
        "not_comparable": sizes_differ(rows),
        "agreement": agreement(rows, published=asked["table"] != "family", measure=measure),
        "device": decided["device"],
        "versions": decided["versions"],
        "command": decided["command"],
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }


def find_probe(run: Run, kind: str, decided: dict[str, Any], *, controls: bool) -> dict[str, Any] | None:
    """The Run's probe with this table's images and labels, of its last weights; None where it is still to be made."""
    asked = decided["asked"]
    want = {
        "kind": kind, "data": asked["data"], "shots": decided["shots"], "seed": 0, "layer": None, "masks": None,
        "test": asked["test"] or f"a held-out fifth of {asked['data']}", "step": run.read("plan.json")["steps"],
    }  # fmt: skip
    results, _ = run.results(f"probe-{kind}-*")  # a damaged one is no result: the probe is made again
    for _, found in sorted(results.items()):
        if all(found.get(key) == value for key, value in want.items()):
            if controls and not any(row["features"] == RANDOM_INIT for row in found["rows"]):
                continue
            return found
    return None


def _row(folder: Path, decided: dict[str, Any], cell: dict[str, Any], failures: dict[str, str]) -> dict[str, Any]:
    """One cell with what its Runs hold."""
    names = (
        [cell["name"]]
        if cell["name"] in SHARED
        else [f"{cell['name']}-seed-{s}" for s in range(decided["asked"]["seeds"])]
    )
    tuned = cell["fine_tunes"]
    runs = [_run(folder, name, seed, decided, failures, tuned=tuned) for seed, name in enumerate(names)]
    controls = [control for run in runs for control in run.pop("controls")]
    row = {
        **cell,
        "runs": runs,
        "state": _state([run["state"] for run in runs]),
        "loss": _median([run["loss"] for run in runs]),
        "images_per_second": _median([run["images_per_second"] for run in runs]),
        "seconds": sum(run["seconds"] or 0.0 for run in runs),
        **{kind: _score([run["probes"].get(kind, {}).get(POOL) for run in runs]) for kind in KINDS},
        "fine_tuned": _score([run["fine_tuned"] for run in runs]),
        "how": "; ".join(dict.fromkeys(run["how"] for run in runs if run["how"])),
        "linear_cls": _score([run["probes"].get("linear", {}).get("cls") for run in runs]),
        "controls_measured": controls,
    }
    row["sentence"] = _sentence(row, "fine_tuned" if tuned else "linear")
    return row


def how_measured(row: dict[str, Any]) -> str:
    """What is unusual about a probe's features: another layer than the last, tokens hidden as in training."""
    said = []
    if "layer" in row:
        said.append(f"layer {row['layer']['number']} of {row['layer']['last']}")
    if "votes" in row:
        said.append("under one mask" if row["votes"] == 1 else f"majority over {row['votes']} masks")
    return ", ".join(said)


def _run(
    folder: Path, name: str, seed: int, decided: dict[str, Any], failures: dict[str, str], *, tuned: bool
) -> dict[str, Any]:
    run = Run(folder / name)
    found: dict[str, Any] = {
        "seed": seed, "folder": name, "state": "waiting", "error": failures.get(name), "loss": None,
        "images_per_second": None, "seconds": None, "size": None, "probes": {}, "fine_tuned": None, "controls": [],
        "how": "",
    }  # fmt: skip
    if (run.path / "plan.json").exists():
        found["size"] = run.read("plan.json")["images"]["size"]
        found["state"] = run.status().state or "waiting"
        trained = [row for row in run.metrics() if row.get("loss") is not None]
        if trained:
            found["loss"] = last_loss(trained)
            found["images_per_second"] = _median([row["images_per_second"] for row in trained])
            found["seconds"] = training_seconds(trained)
        if tuned:
            found["fine_tuned"] = find_score(run)
        for kind in () if tuned else KINDS:
            probe = find_probe(run, kind, decided, controls=False)
            for row in [] if probe is None else probe["rows"]:
                score = {key: row[key] for key in ("accuracy", "low", "high", "correct", "total")}
                if row["features"] == PRETRAINED:
                    found["probes"].setdefault(kind, {})[row["pool"]] = score
                    found["how"] = how_measured(row)
                elif row["pool"] in (POOL, "pixels"):
                    found["controls"].append({"features": row["features"], "kind": kind, **score})
        measured = found["fine_tuned"] is not None if tuned else len(found["probes"]) == len(KINDS)
        if found["state"] == "finished" and name not in SHARED and not measured:
            found["state"] = "trained"
    if found["error"] is not None:
        found["state"] = "failed"
    return found


def _controls(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Raw pixels, which are the same beside every cell, and the untrained encoders, each with one score for a kind."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        for control in row.pop("controls_measured"):
            cell = "" if control["features"] == RAW_PIXELS else row["label"]
            about = {"features": control["features"], "cell": cell, **dict.fromkeys(KINDS)}
            score = {key: control[key] for key in ("accuracy", "low", "high", "correct", "total")}
            found.setdefault((control["features"], cell), about)[control["kind"]] = score
    return list(found.values())


def _state(states: Sequence[str]) -> str:
    for worst in ("failed", "running", "stopped", "trained", "waiting"):
        if worst in states:
            return worst
    return "finished"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _score(scores: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The mean over seeds with its interval; None where nothing has been measured."""
    known = [(seed, score) for seed, score in enumerate(scores) if score is not None]
    if not known:
        return None
    values = [score["accuracy"] for _, score in known]
    by_seed = {str(seed): score["accuracy"] for seed, score in known}
    if len(values) == 1:
        only = known[0][1]
        return {
            "mean": values[0], "low": only["low"], "high": only["high"], "interval": "test images",
            "by_seed": by_seed, "correct": only["correct"], "total": only["total"],
        }  # fmt: skip
    mean, half = statistics.mean(values), t_half_width(values)
    return {"mean": mean, "low": mean - half, "high": mean + half, "interval": "seeds", "by_seed": by_seed}


def _sentence(row: dict[str, Any], measure: str) -> str:
    said = f"{row['label']}{', as many FLOPs' if row['equal'] == 'compute' else ''}: "
    if row[measure] is None:
        errors = "; ".join(run["error"] for run in row["runs"] if run["error"])
        return said + (f"failed: {errors}" if errors else row["state"])
    said += f"{IN_WORDS[measure]} {_percent(row[measure])}"
    if row["knn"] is not None:
        said += f", kNN {_percent(row['knn'])}"
    if measure == "fine_tuned":
        return said + f"; paper {row['paper']['fine_tuned']}"
    if row["paper"]["linear"] is not None:
        said += f"; paper {row['paper']['linear']} linear"
        said += f", {row['paper']['fine_tuned']} fine-tuned" if row["paper"]["fine_tuned"] is not None else ""
    return said


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['mean']:.1f} % ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def sizes_differ(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence where cells were trained on images of different sizes, which no table varies."""
    sizes: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        for run in row["runs"]:
            if run["size"] is not None and row["name"] not in SHARED:
                sizes.setdefault(tuple(run["size"]), []).append(run["folder"])
    if len(sizes) < 2:
        return []
    said = "; ".join(f"{' x '.join(map(str, size))}: {', '.join(names)}" for size, names in sizes.items())
    return [f"The cells were trained on images of different sizes, so they cannot be compared: {said}."]


def helped(rows: Sequence[dict[str, Any]], controls: Sequence[dict[str, Any]]) -> str:
    """How many cells are above the best control by linear probe: an order of cells that learnt nothing says nothing."""
    measured = [row["linear"]["mean"] for row in rows if row["linear"] is not None]
    beside = {f"{c['features']}": c["linear"]["accuracy"] for c in controls if c.get("linear")}
    if not measured or not beside:
        return ""
    best = max(beside, key=lambda name: beside[name])
    above = sum(value > beside[best] for value in measured)
    said = f"{above} of {len(measured)} cells are above {best} ({beside[best]:.1%}, linear probe)."
    return said if above else said + " So pre-training has not helped in any cell, and their order says little."
