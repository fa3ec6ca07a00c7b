"""Charts of a run as SVG: loss, tests on the way, accuracy over labels."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from markupsafe import Markup

INK = "#010203"  # becomes the page's own text colour
LOSS, GUESSES = "#2f7ebc", ("#c0392b", "#d68910", "#7d3c98", "#1e8449")
HELD_OUT = "#0b7a75"
MORE = ("#7f8c8d", "#8d5524", "#d6336c")  # colours where the guesses' do not suffice
IN_WORDS = {
    "true_patch_mean": "the true mean colour of each hidden patch, which the model is not told",
    "visible_mean": "guess the mean of all visible patches",
    "nearest_visible": "copy the nearest visible patch",
    "data_mean_colour": "guess the mean colour of all images",
    "corrupted_input": "return the corrupted image as it came",
}


def budget_chart(probe: dict[str, Any]) -> Markup:
    """Accuracy over labels per class, one loss_chart for each feature set and pool, with the limits as bars."""
    from matplotlib.ticker import NullLocator, PercentFormatter

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        names = list(dict.fromkeys(row["features"] for row in reversed(probe["rows"])))  # the run's own first
        names.sort(key=lambda name: name != "pre-trained")
        colours = dict(zip(names, [LOSS, *GUESSES, *MORE] * len(names), strict=False))
        for row in probe["rows"]:
            means, colour = [point["mean"] for point in row["points"]], colours[row["features"]]
            reach = [
                [max(0.0, point["mean"] - point["low"]) for point in row["points"]],
                [max(0.0, point["high"] - point["mean"]) for point in row["points"]],
            ]
            axes.errorbar(
                probe["shots"], means, reach, color=colour, capsize=3, marker="o", markersize=4, linewidth=1.6,
                linestyle=":" if row["pool"] == "cls" else "-", label=f"{row['features']}, {row['pool']}",
            )  # fmt: skip
        axes.axhline(probe["chance"], color=INK, linestyle="--", linewidth=1, alpha=0.5)
        lowest = min(probe["chance"], *(point["low"] for row in probe["rows"] for point in row["points"]))
        axes.set_ylim(bottom=max(0.0, lowest - 0.02))
        axes.set_xscale("log")
        axes.set_xticks(probe["shots"], [str(number) for number in probe["shots"]])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("labels per class")
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.15)
        axes.legend(frameon=False, fontsize=9)

    return to_svg(draw, size=(8.2, 3.6))


def loss_chart(trained: list[dict[str, Any]], baselines: dict[str, Any]) -> Markup:
    """The loss loss_chart with the trivial guesses as lines across it, as SVG."""
    from matplotlib.ticker import FuncFormatter

    steps, losses = [row["step"] for row in trained], [row["loss"] for row in trained]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(steps, losses, color=LOSS, alpha=0.3, linewidth=0.8)
        axes.plot(*smooth(steps, losses), color=LOSS, linewidth=2)
        top = max(losses[len(losses) // 50 :])
        looked = [(step, loss) for step, loss in baselines.get("losses", []) if step > 0]
        axes.plot([step for step, _ in looked], [loss for _, loss in looked], "o", color=LOSS, markersize=4)
        held_out = [(step, loss) for step, loss in baselines.get("held_out_losses", []) if step > 0]
        axes.plot(*zip(*held_out, strict=True), "s-", color=HELD_OUT, markersize=4, linewidth=1) if held_out else None
        guesses = baselines.get("guesses", {})
        for (name, value), colour in zip(guesses.items(), GUESSES, strict=False):
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.2)
            axes.annotate(
                f"{IN_WORDS.get(name, name.replace('_', ' '))}: {value:.3f}", (1, value), (-4, 3),
                xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=colour, fontsize=9,
            )  # fmt: skip
            top = max(top, value)
        low = min([*losses, *guesses.values()])
        axes.set_ylim(max(0.0, low - 0.08 * (top - low)), top + 0.1 * (top - low))
        axes.set_xlim(0, steps[-1])
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(alpha=0.15)

    return to_svg(draw, size=(8.2, 3.6))


def tests_chart(tested: list[dict[str, Any]], metric: str) -> Markup | None:
    """The tests on the way, as SVG; None where there is only one."""
    if len(tested) < 2:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for key, label, colour in (
            (f"test_{metric}", "weights as they are", LOSS),
            (f"test_averaged_{metric}", "running average", GUESSES[1]),
        ):
            points = [(row["step"], 100 * row[key]) for row in tested if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
        axes.set_xlim(0)
        axes.set_xlabel("step")
        axes.set_ylabel("test images, %")
        axes.grid(alpha=0.15)
        if any(f"test_averaged_{metric}" in row for row in tested):
            axes.legend(frameon=False, fontsize=9)

    return to_svg(draw, size=(8.2, 3.0))


def to_svg(draw: Callable[[Any], None], *, size: tuple[float, float]) -> Markup:
    """What `draw` puts on a matplotlib Figure of `size` in inches, as SVG in the page's own text colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.edgecolor": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "svg.hashsalt": "unmask",
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return Markup(svg[svg.index("<svg") :].replace(INK, "currentColor"))


def smooth(steps: list[int], losses: list[float]) -> tuple[list[float], list[float]]:
    """Means over up to 60 pieces of equal length: (mean steps, mean losses)."""
    pieces = min(60, len(steps))
    edges = [round(i * len(steps) / pieces) for i in range(pieces + 1)]
    spans = [slice(a, b) for a, b in pairwise(edges)]
    return [statistics.mean(steps[s]) for s in spans], [statistics.mean(losses[s]) for s in spans]
