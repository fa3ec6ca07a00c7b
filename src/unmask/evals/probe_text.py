"""The result of a probe for people: its protocol in a sentence, and the table on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.console import Console
from unmask.data.annotations.label_tables import CLASSES, MULTILABEL, REGRESSION
from unmask.evals.probes.attentive import ATTENTIVE, BATCH, EPOCHS, LEAST_STEPS
from unmask.evals.probes.linear import FINAL_ITERATIONS
from unmask.evals.statistics import ACCURACY, MEAN_AP, POOLS, PRETRAINED, RAW_PIXELS, show

NOT_CONVERGED = (
    f"; the fit stopped at its limit of {FINAL_ITERATIONS:,} iterations, so the number may be too low: compare it with "
    "--kind knn, or give more labels"
)


def protocol(summary: Mapping[str, Any]) -> str:
    """One sentence: the features, what is fitted to them, the images, and what the intervals cover."""
    kind, task, rows = summary["kind"], summary["task"], summary["rows"]
    chosen = "chosen on a fifth of the training images"
    how = {
        ("knn", CLASSES): "the 20 nearest training images by cosine vote with weight exp(s / 0.07)",
        ("knn", MULTILABEL): "share of the votes of the 20 nearest training images by cosine, weight exp(s / 0.07)",
        ("knn", REGRESSION): "mean of the 20 nearest training images by cosine, weight exp(s / 0.07)",
        ("linear", CLASSES): f"logistic regression (L-BFGS) on standardised features, C {chosen}",
        ("linear", MULTILABEL): f"a logistic regression for each label on standardised features, one C {chosen}",
        ("linear", REGRESSION): f"ridge regression on standardised features, its penalty {chosen}",
    }.get(
        (kind, task),
        f"one learned query that attends to all tokens and a linear head (AdamW, batch {BATCH}, {EPOCHS} epochs but at "
        f"least {LEAST_STEPS} steps, learning rate {chosen})",
    )
    pools = " and ".join(dict.fromkeys(POOLS[row["pool"]] for row in rows if row["features"] != RAW_PIXELS))
    layers = {
        row["features"]: f"layer {row['layer']['number']} of {row['layer']['last']}" for row in rows if "layer" in row
    }
    where = layers.get(PRETRAINED, "the encoder's output")
    if len(set(layers.values())) > 1:
        where = ", ".join(f"{name}: {layer}" for name, layer in layers.items())
    shots = summary["shots"]
    labels = "" if shots is None else f", {shots} labels per class"
    if not isinstance(shots, int | None):
        labels = f", {', '.join(str(n) for n in shots)} labels per class, {summary['draws']} draws of each"
    train = f"{summary['train_images']} training images of {summary['data']}{labels}"
    test = f"{summary['test_images']} test images: {summary['test']}"
    table = f", targets of {summary['targets']}" if "targets" in summary else ""
    return (
        f"Frozen features ({pools}; {where}), {how}; {train}; {test}{table}; seed {summary['seed']}; 95 % intervals: "
        f"{summary['interval']}."
    )


def say_probe(summary: Mapping[str, Any], console: Console) -> None:
    """The table and the verdict, for a person."""
    what = {"knn": "k nearest neighbours", "linear": "linear probe", ATTENTIVE: "attentive probe"}[summary["kind"]]
    metric, task = summary["metric"], summary["task"]
    shots = f" ({summary['shots']} per class)" if isinstance(summary["shots"], int) else ""
    named = (
        f"{len(summary['classes'])} classes" if task == CLASSES else f"{task} of {', '.join(summary['columns'][:6])}"
    )
    up_to = "up to " if "draws" in summary else ""
    console.say(
        f"{what} on {summary['data']}: {up_to}{summary['train_images']} training images{shots}, "
        f"{summary['test_images']} test images, {named}"
        + (f", chance {show(summary['chance'], metric)}" if metric in (ACCURACY, MEAN_AP) else "")
    )
    if "draws" in summary:
        _say_curve(summary, console)
        return
    for row in summary["rows"]:
        value = row["accuracy"] if metric == ACCURACY else row["value"]
        low, high = show(row["low"], metric), show(row["high"], metric)
        console.say(
            f"  {row['features']:12s} {row['pool']:9s} {show(value, metric):>6s}  "
            f"(95% interval {low} to {high}{_unusual(row)})"
        )
        for column in row.get("columns", []) if len(row.get("columns", [])) > 1 or task == REGRESSION else []:
            console.say(f"      {column['name']}: {_column(column)}")
    console.say(f"  {summary['verdict']}")


def _unusual(row: Mapping[str, Any]) -> str:
    said = "" if row.get("converged", True) else NOT_CONVERGED
    if "layer" in row:
        said += f"; layer {row['layer']['number']} of {row['layer']['last']}"
    if "votes" in row:
        said += "; under one mask" if row["votes"] == 1 else f"; majority over {row['votes']} masks"
    return said


def _column(column: Mapping[str, Any]) -> str:
    if "positives" in column:
        value = column["average_precision"]
        return f"{'not defined' if value is None else f'{value:.3f}'} ({column['positives']} positive test images)"
    value = "not defined" if column["r2"] is None else f"{column['r2']:.3f}"
    return f"R2 {value}, mean absolute error {column['mean_absolute_error']:.4g}"


def _say_curve(summary: Mapping[str, Any], console: Console) -> None:
    console.say(f"  {'labels per class':22s} " + " ".join(f"{number:>13d}" for number in summary["shots"]))
    for row in summary["rows"]:
        cells = [f"{p['mean']:.1%} ±{100 * (p['high'] - p['low']) / 2:.1f}" for p in row["points"]]
        console.say(f"  {row['features']:12s} {row['pool']:9s} " + " ".join(f"{cell:>13s}" for cell in cells))
    console.say(f"  mean of {summary['draws']} draws of the labels ± half of its 95% interval over them")
    console.say(f"  {summary['verdict']}")
