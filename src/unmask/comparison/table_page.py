"""A table's numbers beside the paper's: `table.json` and `table.html`, made from the folder of `unmask ablate` alone.

Our accuracies are probes of small models on small images, the paper's are ViT-L on ImageNet, so what compares is the
order of the cells and the shape of the curve, not the height. Every number stands with a 95 % interval: a t-interval
over seeds where there are two or more, else the Wilson interval of the test images, which says nothing of what another
seed would change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from unmask.comparison.agreement import IN_WORDS
from unmask.comparison.table_results import KINDS, gather
from unmask.report.charts import GUESSES, LOSS, to_svg
from unmask.report.page import page
from unmask.system.atomic_files import replace_file

TABLE_JSON, TABLE_HTML = "table.json", "table.html"


def write_table(folder: Path, state: str) -> dict[str, Any]:
    """Write both files and return what the JSON holds. A table with a cell that could not be made is "failed"."""
    summary = gather(folder, state)
    replace_file(folder / TABLE_JSON, json.dumps(summary, indent=2).encode("ascii") + b"\n")
    html = page("table.html.jinja", table=summary, groups=_groups(summary), picture=picture(summary))
    replace_file(folder / TABLE_HTML, html)
    return summary


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

    return to_svg(draw, size=(12.4, 4.2))


def _tick(row: dict[str, Any], *, own: bool) -> str:
    text = row["label"] if own or not row["theirs"] else row["theirs"]
    return text.removesuffix(" %").removesuffix(" epochs").split(" (")[0].split(":")[0]
