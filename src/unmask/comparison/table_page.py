"""`table.html` and `table.json`: the results of a table beside the paper's, read from the folder of the table.

The results are usually from small models on small images, those of the paper from ViT-L on ImageNet. So compare the
order of the cells and the shape of the curve, not the accuracies. Every accuracy has a 95% interval. With two or more
seeds it is a t-interval over the seeds. With one seed it is the Wilson interval over the test images, which does not
cover the choice of the seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from unmask.comparison.agreement import MEASURES
from unmask.comparison.table_results import KINDS, CellRow, TableResults, read_table
from unmask.report.charts import COLOURS, LOSS_COLOUR, to_svg
from unmask.report.page import render
from unmask.system.atomic_files import replace_file

TABLE_JSON, TABLE_HTML = "table.json", "table.html"


@dataclass(frozen=True)
class RowGroup:
    """The rows of the page under one heading. title: the heading, or "" if there is only one group."""

    title: str
    rows: Sequence[CellRow]


def write_table(folder: Path, state: str) -> TableResults:
    """Write table.json and table.html, and return the results. state: state of the table; see `read_table`."""
    table = read_table(folder, state)
    replace_file(folder / TABLE_JSON, json.dumps(table.to_json(), indent=2).encode("ascii") + b"\n")
    replace_file(folder / TABLE_HTML, render("table.html.jinja", table=table, groups=groups(table), chart=chart(table)))
    return table


def groups(table: TableResults) -> list[RowGroup]:
    """Group the rows for the page: the family has a group with equal steps and one with equal FLOPs, both with MAE."""
    compute = [row for row in table.rows if row.cell.equal == "compute"]
    if not compute:
        return [RowGroup("", table.rows)]
    base = [row for row in table.rows if row.cell.base]
    return [
        RowGroup("As many steps as MAE", [row for row in table.rows if row.cell.equal == "steps"]),
        RowGroup("As many training FLOPs as MAE", [*compute, *base]),
    ]


def chart(table: TableResults) -> Markup | None:
    """Draw the measured accuracies on the left and the paper's on the right; return None before two are measured."""
    plan = table.plan
    measure = plan.measure
    rows = [row for row in table.rows if row.paper(measure) is not None]
    if sum(row.score(measure) is not None for row in rows) < 2 or plan.asked.table == "family":
        return None
    numeric = all(row.cell.at is not None for row in rows)
    places = {row.cell.name: row.cell.at if numeric else float(place) for place, row in enumerate(rows)}

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        if measure == "fine_tuned":
            _draw_here(left, rows, places, {measure: MEASURES[measure]}, line=numeric)
            _draw_paper(right, rows, places, (measure,), line=numeric)
        else:
            _draw_here(left, rows, places, KINDS, line=numeric)
            _draw_paper(right, rows, places, ("linear", "fine_tuned"), line=numeric)
        titles = (
            "here: fine-tuned" if measure == "fine_tuned" else "here: frozen features",
            "paper: ViT-L, ImageNet-1K",
        )
        for axes, title in zip((left, right), titles, strict=True):
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_ylabel("top-1, %")
            axes.grid(alpha=0.15)
            # The legend is above the axes, right of the title, where it covers no data.
            axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
            if plan.log:
                axes.set_xscale("log", base=2)
            labels = [_tick(row, own=axes is left) for row in rows]
            axes.set_xticks(list(places.values()), labels, rotation=0 if numeric else 12, fontsize=8)
            axes.minorticks_off()
            axes.set_xlabel(plan.axis)

    return to_svg(draw, size=(12.4, 4.2))


def _draw_here(
    axes: Any, rows: Sequence[CellRow], places: Mapping[str, float | None], kinds: Mapping[str, str], *, line: bool
) -> None:
    """Draw the measured accuracies with their intervals. kinds: fields of `CellRow`, with labels for the legend."""
    for (kind, label), colour in zip(kinds.items(), (LOSS_COLOUR, COLOURS[1]), strict=False):
        scores = [(places[row.cell.name], score) for row in rows if (score := getattr(row, kind)) is not None]
        below = [100 * (score.mean - score.low) for _, score in scores]
        above = [100 * (score.high - score.mean) for _, score in scores]
        axes.errorbar(
            [place for place, _ in scores], [100 * score.mean for _, score in scores], [below, above],
            fmt="o-" if line else "o", color=colour, markersize=4, capsize=3, label=label,
        )  # fmt: skip


def _draw_paper(
    axes: Any, rows: Sequence[CellRow], places: Mapping[str, float | None], measures: Sequence[str], *, line: bool
) -> None:
    for measure, colour in zip(measures, (LOSS_COLOUR, COLOURS[2]), strict=False):
        axes.plot(
            [places[row.cell.name] for row in rows], [row.paper(measure) for row in rows], "o-" if line else "o",
            color=colour, markersize=4, label=MEASURES[measure],
        )  # fmt: skip


def _tick(row: CellRow, *, own: bool) -> str:
    text = row.cell.label if own or not row.cell.theirs else row.cell.theirs
    return text.removesuffix(" %").removesuffix(" epochs").split(" (")[0].split(":")[0]
