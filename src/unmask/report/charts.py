"""Draw charts of a run as SVG: training loss, tests during training, accuracy over the number of labels."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from unmask.report.training_log import smooth
from unmask.results import PRETRAINED, BaselineLosses, CurveResult

INK = "#010203"  # placeholder that is replaced by the text colour of the page
LOSS_COLOUR, HELD_OUT_COLOUR = "#2f7ebc", "#0b7a75"
COLOURS = ("#c0392b", "#d68910", "#7d3c98", "#1e8449")
MORE_COLOURS = ("#7f8c8d", "#8d5524", "#d6336c")
BASELINES = {
    "true_patch_mean": "the true mean colour of each hidden patch, which the model does not know",
    "visible_mean": "the mean of all visible patches",
    "nearest_visible": "a copy of the nearest visible patch",
    "data_mean_colour": "the mean colour of all images",
    "corrupted_input": "the corrupted image itself",
}
"""Description of each baseline, by its name in the records."""


def loss_chart(trained: Sequence[Mapping[str, Any]], baselines: BaselineLosses | None) -> Markup:
    """Draw the training loss, with the baselines as horizontal lines. trained: rows of metrics.jsonl with a loss."""
    from matplotlib.ticker import FuncFormatter

    steps, losses = [row["step"] for row in trained], [row["loss"] for row in trained]
    guesses = baselines.guesses if baselines else {}
    fixed = [point for point in baselines.losses if point[0] > 0] if baselines else []
    held_out = [point for point in baselines.held_out_losses if point[0] > 0] if baselines else []

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.plot(steps, losses, color=LOSS_COLOUR, alpha=0.3, linewidth=0.8)
        axes.plot(*smooth(steps, losses), color=LOSS_COLOUR, linewidth=2)
        if fixed:
            axes.plot(*zip(*fixed, strict=True), "o", color=LOSS_COLOUR, markersize=4)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "s-", color=HELD_OUT_COLOUR, markersize=4, linewidth=1)
        for (name, value), colour in zip(guesses.items(), COLOURS, strict=False):
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.2)
            axes.annotate(
                f"{BASELINES.get(name, name.replace('_', ' '))}: {value:.3f}", (1, value), (-4, 3),
                xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=colour, fontsize=9,
            )  # fmt: skip
        top = max([*losses[len(losses) // 50 :], *guesses.values()])
        low = min([*losses, *guesses.values()])
        axes.set_ylim(max(0.0, low - 0.08 * (top - low)), top + 0.1 * (top - low))
        axes.set_xlim(0, steps[-1])
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(alpha=0.15)

    return to_svg(draw, size=(8.2, 3.6))


def tests_chart(tested: Sequence[Mapping[str, Any]], metric: str) -> Markup | None:
    """Draw the scores of the tests during training; return None if there are fewer than two.

    tested: rows of metrics.jsonl with `test_` keys.
    """
    if len(tested) < 2:
        return None
    plain, averaged = f"test_{metric}", f"test_averaged_{metric}"

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for key, label, colour in ((plain, "weights", LOSS_COLOUR), (averaged, "moving average", COLOURS[1])):
            points = [(row["step"], 100 * row[key]) for row in tested if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
        axes.set_xlim(0)
        axes.set_xlabel("step")
        axes.set_ylabel("test images, %")
        axes.grid(alpha=0.15)
        if any(averaged in row for row in tested):
            axes.legend(frameon=False, fontsize=9)

    return to_svg(draw, size=(8.2, 3.0))


def curve_chart(curve: CurveResult) -> Markup:
    """Draw accuracy over the number of labels per class, with 95% intervals as bars.

    There is one line for each feature set and pooling.
    """
    from matplotlib.ticker import NullLocator, PercentFormatter

    names = sorted({row.features for row in curve.rows}, key=lambda name: (name != PRETRAINED, name))
    colours = dict(zip(names, [LOSS_COLOUR, *COLOURS, *MORE_COLOURS] * len(names), strict=False))
    lowest = [point.low for row in curve.rows for point in row.points]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for row in curve.rows:
            below = [max(0.0, point.mean - point.low) for point in row.points]
            above = [max(0.0, point.high - point.mean) for point in row.points]
            axes.errorbar(
                [point.shots for point in row.points], [point.mean for point in row.points], [below, above],
                color=colours[row.features], capsize=3, marker="o", markersize=4, linewidth=1.6,
                linestyle=":" if row.pool == "cls" else "-", label=f"{row.features}, {row.pool}",
            )  # fmt: skip
        if curve.chance is not None:
            axes.axhline(curve.chance, color=INK, linestyle="--", linewidth=1, alpha=0.5)
            lowest.append(curve.chance)
        axes.set_ylim(bottom=max(0.0, min(lowest) - 0.02))
        axes.set_xscale("log")
        axes.set_xticks(curve.shots, [str(number) for number in curve.shots])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("labels per class")
        axes.set_ylabel(curve.metric)
        axes.grid(alpha=0.15)
        axes.legend(frameon=False, fontsize=9)

    return to_svg(draw, size=(8.2, 3.6))


def to_svg(draw: Callable[[Any], None], *, size: tuple[float, float]) -> Markup:
    """Render a matplotlib figure as SVG in the text colour of the page.

    draw: function that draws on the figure. size: width and height in inches.
    """
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
