"""A table's numbers beside the paper's: `table.json` and `table.html`, made from the folder of `unmask ablate` alone.

Our accuracies are probes of small models on small images, the paper's are ViT-L on ImageNet, so what compares is the
order of the cells and the shape of the curve, not the height. Every number stands with a 95 % interval: a t-interval
over seeds where there are two or more, else the Wilson interval of the test images, which says nothing of what another
seed would change.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from itertools import combinations
from math import sqrt
from pathlib import Path
from typing import Any

from markupsafe import Markup

from unmask.comparison.paper_tables import SHARED
from unmask.evals.statistics import PRETRAINED, RANDOM_INIT, RAW_PIXELS
from unmask.metrics.intervals import wilson
from unmask.report.run_page import GUESSES, LOSS, drawn, page
from unmask.results import find_score
from unmask.run import Run, replace_file

POOL = "mean"  # over patches: every encoder has it, and one pool for all cells leaves nothing to choose on test images
KINDS = {"linear": "linear probe", "knn": "kNN"}
IN_WORDS = {"linear": "linear probe", "fine_tuned": "fine-tuned"}  # what cells can be compared by
MOST_PAIRS = 8
TABLE_JSON, TABLE_HTML = "table.json", "table.html"


def write_table(folder: Path, state: str) -> dict[str, Any]:
    """Write both files and return what the JSON holds. A table with a cell that could not be made is "failed"."""
    summary = gather(folder, state)
    replace_file(folder / TABLE_JSON, json.dumps(summary, indent=2).encode("ascii") + b"\n")
    html = page("table.html.jinja", table=summary, groups=_groups(summary), picture=picture(summary))
    replace_file(folder / TABLE_HTML, html)
    return summary


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
        found["state"] = run.status().get("state", "waiting")
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


def training_seconds(trained: Sequence[dict[str, Any]]) -> float:
    """Time spent training: the logged images at the logged pace, so time between a stop and a resume is not in it."""
    before, seconds = 0, 0.0
    for row in trained:
        seconds += (row["images"] - before) / max(1e-9, row["images_per_second"])
        before = row["images"]
    return seconds


def last_loss(trained: Sequence[dict[str, Any]]) -> float:
    """Mean of the last twentieth of the logged rows."""
    return statistics.mean(row["loss"] for row in trained[-max(1, len(trained) // 20) :])


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


def t_half_width(values: Sequence[float]) -> float:
    """Half the 95 % t-interval of the mean of two or more values."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / sqrt(len(values))


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


# ---------------------------------------------------------------------------------------------------------- agreement


def agreement(rows: Sequence[dict[str, Any]], *, published: bool, measure: str = "linear") -> dict[str, Any]:
    """In how many pairs of cells ours differ in the direction of the paper's, and which are noise."""
    if not published:
        return {
            "pairs": 0, "agree": 0, "within_noise": [],
            "sentence": "The published numbers are of models of very different sizes, so no order is compared.",
        }  # fmt: skip
    known = [row for row in rows if row[measure] is not None and row["paper"][measure] is not None]
    agree, against, noise, pairs = [], [], [], 0
    for one, other in combinations(known, 2):
        paper = one["paper"][measure] - other["paper"][measure]
        if paper == 0:
            continue
        pairs += 1
        value, low, high = difference(one[measure], other[measure])
        better, worse = (one, other) if paper > 0 else (other, one)
        named = f"{better['label']} over {worse['label']}"
        if value * paper > 0:
            agree.append(named)
        if low <= 0 <= high:
            noise.append(named)
        elif value * paper < 0:
            against.append(named)
    return {
        "pairs": pairs,
        "agree": len(agree),
        "clear": pairs - len(noise),
        "clear_agree": pairs - len(noise) - len(against),
        "within_noise": noise,
        "against": against,
        "sentence": _agreement_sentence(pairs, len(agree), noise, against, IN_WORDS[measure]),
    }


def _agreement_sentence(pairs: int, agree: int, noise: list[str], against: list[str], measured: str) -> str:
    if not pairs:
        return "No two cells are measured yet."
    said = f"{agree} of {pairs} pairs of cells stand in the paper's order ({measured}). "
    clear = pairs - len(noise)
    if not clear:
        return said + "But every difference lies within the noise: this table shows no order."
    said += f"Of the {clear} whose difference is larger than the noise, {clear - len(against)} do. "
    if against:
        said += f"Clearly against the paper, which has {_listed(against)}. "
    if noise:
        said += f"Within the noise, in the paper's order: {_listed(noise)}."
    return said.strip()


def _listed(pairs: Sequence[str]) -> str:
    more = f"; and {len(pairs) - MOST_PAIRS} more" if len(pairs) > MOST_PAIRS else ""
    return "; ".join(pairs[:MOST_PAIRS]) + more


def difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float, float]:
    """(one - other, low, high). With two or more seeds in common a t-interval of their differences seed by seed.

    With one it is Newcombe's interval (1998, method 10) for two shares as if on different test images, because which
    images each got right is not kept: on the same images the true one is a little narrower.
    """
    common = sorted(set(one["by_seed"]) & set(other["by_seed"]))
    if len(common) > 1:
        values = [one["by_seed"][seed] - other["by_seed"][seed] for seed in common]
        mean, half = statistics.mean(values), t_half_width(values)
        return mean, mean - half, mean + half
    value = one["mean"] - other["mean"]
    if one["interval"] == other["interval"] == "test images":
        (l1, u1), (l2, u2) = (wilson(score["correct"], score["total"]) for score in (one, other))
    else:  # one of the two lacks its second seed
        (l1, u1), (l2, u2) = ((score["low"], score["high"]) for score in (one, other))
    p1, p2 = one["mean"], other["mean"]
    return value, value - sqrt((p1 - l1) ** 2 + (u2 - p2) ** 2), value + sqrt((u1 - p1) ** 2 + (p2 - l2) ** 2)


# ---------------------------------------------------------------------------------------------------------------- page


def _groups(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as they stand on the page; the family in two parts, with MAE in both."""
    rows = summary["rows"]
    compute = [row for row in rows if row["equal"] == "compute"]
    if not compute:
        return [{"title": "", "rows": rows}]
    base = [row for row in rows if row["base"]]
    return [
        {"title": "As many steps as MAE", "rows": [row for row in rows if row["equal"] == "steps"]},
        {"title": "As many training FLOPs as MAE", "rows": [*compute, *base]},
    ]


def picture(summary: dict[str, Any]) -> Markup | None:
    """Ours on the left, the paper's on the right, over the same axis: the shapes compare, not the heights."""
    measure = summary["measure"]
    rows = [row for row in summary["rows"] if row["paper"][measure] is not None]
    measured = [row for row in rows if row[measure] is not None]
    if len(measured) < 2 or summary["table"] == "family":
        return None
    numeric = all(row["at"] is not None for row in rows)
    at = {row["name"]: row["at"] if numeric else float(place) for place, row in enumerate(rows)}

    def draw(figure: Any) -> None:
        ours, paper = figure.subplots(1, 2)
        kinds, published, here = {**KINDS}, ("linear", "fine_tuned"), "here: frozen features"
        if measure == "fine_tuned":
            kinds, published, here = {measure: IN_WORDS[measure]}, (measure,), "here: fine-tuned"
        for kind, colour in zip(kinds, (LOSS, GUESSES[1]), strict=False):
            have = [row for row in rows if row[kind] is not None]
            x, y = [at[row["name"]] for row in have], [100 * row[kind]["mean"] for row in have]
            down = [100 * (row[kind]["mean"] - row[kind]["low"]) for row in have]
            up = [100 * (row[kind]["high"] - row[kind]["mean"]) for row in have]
            style = "-" if numeric else ""
            ours.errorbar(x, y, [down, up], fmt="o" + style, color=colour, markersize=4, capsize=3, label=kinds[kind])
        for key, colour in zip(published, (LOSS, GUESSES[2]), strict=False):
            x, y = [at[row["name"]] for row in rows], [row["paper"][key] for row in rows]
            paper.plot(x, y, "o" + ("-" if numeric else ""), color=colour, markersize=4, label=IN_WORDS[key])
        for axes, title in ((ours, here), (paper, "paper: ViT-L, ImageNet-1K")):
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_ylabel("top-1, %")
            axes.grid(alpha=0.15)
            # Above the axes, right of the title, where it covers no data.
            axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
            if summary["log"]:
                axes.set_xscale("log", base=2)
            labels = [_tick(row, own=axes is ours) for row in rows]
            axes.set_xticks([at[row["name"]] for row in rows], labels, rotation=0 if numeric else 12, fontsize=8)
            axes.minorticks_off()
            axes.set_xlabel(summary["axis"])

    return drawn(draw, size=(12.4, 4.2))


def _tick(row: dict[str, Any], *, own: bool) -> str:
    text = row["label"] if own or not row["theirs"] else row["theirs"]
    return text.removesuffix(" %").removesuffix(" epochs").split(" (")[0].split(":")[0]
