"""Convert results in RUN/evals that versions before 0.2 wrote to the current format.

Such results lack the key `record`. The type of a result is determined from its keys, never from its file name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.errors import UserError

TITLES = {
    "knn": "k nearest neighbours", "linear": "Linear probe", "attentive": "Attentive probe",
    "paper-linear": "Linear probe by the paper's protocol",
}  # fmt: skip
HELD_OUT_SENTENCE = "a held-out fifth of "
METRIC_WORDS = {
    "accuracy": "accuracy", "mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy", "ap50": "AP50", "ap": "AP",
}  # fmt: skip
"""Names of metrics in texts, for results of fine-tuned runs that do not contain them."""
SHARES = ("accuracy", "mean_iou", "pixel_accuracy", "ap", "ap50", "ap75")  # keys of fine-tuned.json


def from_earlier_version(found: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a JSON object without the key `record` to an object that `results.from_json` accepts.

    Raises UserError.
    """
    if {"losses", "guesses", "images"} <= found.keys():
        return {"record": "baselines", **found}
    tuned = "rows" not in found and found.get("metric", "accuracy") in found
    missing = [key for key in ("data", "test", *(() if tuned else ("kind", "shots", "rows"))) if key not in found]
    if missing:
        raise UserError(
            f"got a result without {', '.join(missing)}; expected a result that this or the previous version wrote; "
            "measure again with `unmask probe`, and remove this file"
        )
    try:
        return _earlier_score(found) if tuned else _earlier_probe(found)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"got a result of an earlier version with a missing or invalid key ({error}); measure again with "
            "`unmask probe`"
        ) from None


def _earlier_images(found: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    data, test = (str(found[key]) for key in ("data", "test"))
    paths = found.get("paths", (None, None))
    if test.startswith(HELD_OUT_SENTENCE):
        identity: dict[str, Any] = {"held_out": 0.2, "seed": seed}
    else:
        identity = {"images": {"name": test, "path": paths[1]}}
    return {"data": {"name": data, "path": paths[0]}, "test": identity}


def _earlier_probe(found: Mapping[str, Any]) -> dict[str, Any]:
    same = ("kind", "shots", "draws", "step", "layer", "task", "metric", "train_images", "test_images",
            "chance", "interval", "shared", "verdict", "protocol", "precision", "command", "run")  # fmt: skip
    kept = {key: found[key] for key in same if found.get(key) is not None}
    curve = "draws" in found
    about = {"record": "curve" if curve else "probe", "seed": found.get("seed", 0)}
    about |= {"title": TITLES.get(found["kind"], found["kind"]), "mask_votes": found.get("masks")}
    about |= {"names": found.get("classes", found.get("columns", ()))}
    about |= {"against": found.get("against", ()), "rows": [_earlier_row(row) for row in found["rows"]]}
    if found.get("targets") is not None:
        about["targets"] = {
            "path": found["targets"], "test_path": found.get("test_targets"), "columns": found.get("target_columns"),
            "reason": found.get("why", ""), "images_without_row": found.get("without_target", 0),
        }  # fmt: skip
    if (best := found.get("best")) is not None:
        about["best"] = {"step": best["step"], "value": best["accuracy"]}
    return kept | about | _earlier_images(found, about["seed"])


def _earlier_row(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: row[key] for key in ("features", "pool", "low", "high", "total", "correct", "layer", "votes")
            if key in row}  # fmt: skip
    if "points" in row:
        points = [{**point, "values": point["accuracies"]} for point in row["points"]]
        return kept | {"points": points}
    fit = {key: row[key] for key in ("c", "rate") if row.get(key) is not None}
    targets = [
        {**column, "value": column["average_precision"] if "positives" in column else column["r2"]}
        for column in row.get("columns", ())
    ]
    value = row["accuracy"] if "accuracy" in row else row["value"]
    return kept | {"value": value, "fit": fit, "targets": targets, "converged": row.get("converged", True)}


def _earlier_score(found: Mapping[str, Any]) -> dict[str, Any]:
    same = ("step", "low", "high", "correct", "confusion", "classes", "train_images", "test_images", "averaged",
            "recipe", "last_blocks")  # fmt: skip
    metric = found.get("metric", "accuracy")
    best = found.get("best")
    return {
        "record": "finetune",
        **{key: found[key] for key in same if found.get(key) is not None},
        **_earlier_images(found, None),
        "task": found.get("task", "classify"),
        "metric": metric,
        "numbers": {key: found[key] for key in SHARES if key in found},
        "by_class": found.get("ious") or found.get("ap50_of_class") or {},
        "best": None if best is None else {"step": best["step"], "value": best[metric]},
        "initial_run": found.get("from"),
    }
