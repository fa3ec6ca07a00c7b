"""Read the results of a table from its folder: one row per cell, with intervals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from unmask.comparison.agreement import (
    MEASURES,
    Agreement,
    CellScore,
    ComparedCell,
    RunAccuracy,
    agreement,
    cell_score,
    no_agreement,
)
from unmask.comparison.table_plan import PlannedCell, TablePlan, load_plan
from unmask.data.annotations.splits import HELD_OUT
from unmask.report.probe_section import how_measured
from unmask.report.training_log import last_loss, trained_rows, training_seconds
from unmask.results import (
    CLASSES,
    PRETRAINED,
    RANDOM_INIT,
    RAW_PIXELS,
    FeatureScore,
    FinetuneResult,
    ImageSet,
    ProbeResult,
    TestIdentity,
    read_results,
    read_score,
)
from unmask.run import Run

POOL = "mean"  # every encoder has the mean over patches, so the pooling is not chosen on the test images
KINDS = {"linear": "linear probe", "knn": "kNN"}
FAILURES = "failures.json"
PLAN_KEYS = (
    "asked", "title", "axis", "note", "log", "base", "missing", "steps", "reason", "shots", "pool", "measure", "device",
    "versions", "command",
)  # fmt: skip
"""Keys of ablation.json that table.json also contains, with the same values."""
WORST_FIRST = ("failed", "running", "interrupted", "stopped", "trained", "waiting")


@dataclass(frozen=True, kw_only=True)
class Control:
    """The accuracy of a control with one kind of probe.

    cell: label of the cell to which an untrained encoder belongs, or "" for raw pixels.
    """

    features: str
    cell: str
    kind: str
    score: RunAccuracy


@dataclass(frozen=True, kw_only=True)
class ControlRow:
    """A row of the table of controls: the accuracy of one feature set with every kind of probe."""

    features: str
    cell: str
    linear: RunAccuracy | None = None
    knn: RunAccuracy | None = None


@dataclass(frozen=True, kw_only=True)
class CellRun:
    """One run of a cell.

    folder: name of the run's folder. state: state that `unmask ls` shows, or "trained" if the run is not measured yet.
    size: image size (H, W). probes: accuracy by kind of probe and pooling. how: how the features were computed, as
    text, or "" for the default way.
    """

    seed: int
    folder: str
    state: str = "waiting"
    error: str | None = None
    loss: float | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    size: tuple[int, ...] | None = None
    probes: Mapping[str, Mapping[str, RunAccuracy]] = field(default_factory=dict)
    fine_tuned: RunAccuracy | None = None
    controls: tuple[Control, ...] = ()
    how: str = ""

    def probe(self, kind: str, pool: str = POOL) -> RunAccuracy | None:
        """Return the accuracy with one kind of probe and pooling, or None if it has not been measured."""
        return self.probes.get(kind, {}).get(pool)


@dataclass(frozen=True, kw_only=True)
class CellRow:
    """The results of a cell over its runs.

    flops_ratio, time_ratio: training FLOPs and training time per image, relative to the base row.
    """

    cell: PlannedCell
    runs: tuple[CellRun, ...]
    state: str
    loss: float | None
    images_per_second: float | None
    seconds: float
    linear: CellScore | None
    knn: CellScore | None
    fine_tuned: CellScore | None
    linear_cls: CellScore | None
    how: str
    sentence: str = ""
    flops_ratio: float = 1.0
    time_ratio: float | None = None

    def score(self, measure: str) -> CellScore | None:
        """Return the score by which cells are compared. measure: "linear" or "fine_tuned"."""
        return self.linear if measure == "linear" else self.fine_tuned

    def paper(self, measure: str) -> float | None:
        """Return the published accuracy of this cell in percent. measure: "linear" or "fine_tuned"."""
        return self.cell.paper.linear if measure == "linear" else self.cell.paper.fine_tuned

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the cell and of the row in one JSON object."""
        row = _ROW.dump_python(self, mode="json")
        return {**row.pop("cell"), **row}


_ROW = TypeAdapter(CellRow)


@dataclass(frozen=True, kw_only=True)
class TableResults:
    """The content of the page of a table. helped: a sentence about how many cells are above the controls."""

    plan: TablePlan
    state: str
    rows: tuple[CellRow, ...]
    controls: tuple[ControlRow, ...]
    helped: str
    not_comparable: tuple[str, ...]
    agreement: Agreement
    written: str

    def to_json(self) -> dict[str, Any]:
        """Return the content of table.json."""
        found = _TABLE.dump_python(self, mode="json")
        plan = found.pop("plan")
        rows = [row.to_json() for row in self.rows]
        return {"table": self.plan.asked.table, **{key: plan[key] for key in PLAN_KEYS}, **found, "rows": rows}


_TABLE = TypeAdapter(TableResults)


def read_table(folder: Path, state: str) -> TableResults:
    """Read the results of a table.

    state: "running", "stopped" or "finished"; the state in the results is "failed" instead of "finished" if a cell
    failed.
    """
    plan = load_plan(folder)
    failures = Run(folder).read_if_present(FAILURES)
    rows = with_ratios([read_cell(folder, plan, cell, failures) for cell in plan.cells])
    if state == "finished" and any(row.state == "failed" for row in rows):
        state = "failed"
    controls = control_rows(rows)
    compared = [ComparedCell(row.cell.label, row.score(plan.measure), row.paper(plan.measure)) for row in rows]
    return TableResults(
        plan=plan,
        state=state,
        rows=tuple(rows),
        controls=tuple(controls),
        helped=above_controls(rows, controls),
        not_comparable=tuple(different_sizes(rows)),
        agreement=no_agreement() if plan.asked.table == "family" else agreement(compared, plan.measure),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def with_ratios(rows: Sequence[CellRow]) -> list[CellRow]:
    """Set FLOPs and time of every row relative to the base row."""
    base = next(row for row in rows if row.cell.base)
    return [
        replace(
            row,
            flops_ratio=row.cell.training_flops / base.cell.training_flops,
            time_ratio=base.images_per_second / row.images_per_second
            if base.images_per_second and row.images_per_second
            else None,
        )
        for row in rows
    ]


# Cells and runs


def read_cell(folder: Path, plan: TablePlan, cell: PlannedCell, failures: Mapping[str, str]) -> CellRow:
    """Read the results of a cell. failures: error messages of failed runs, by folder name."""
    runs = tuple(read_run(folder, plan, cell=cell, seed=seed, failures=failures) for seed in plan.runs_of(cell))
    row = CellRow(
        cell=cell,
        runs=runs,
        state=next((state for state in WORST_FIRST if state in {run.state for run in runs}), "finished"),
        loss=_median(run.loss for run in runs),
        images_per_second=_median(run.images_per_second for run in runs),
        seconds=sum(run.seconds or 0.0 for run in runs),
        linear=cell_score([run.probe("linear") for run in runs]),
        knn=cell_score([run.probe("knn") for run in runs]),
        fine_tuned=cell_score([run.fine_tuned for run in runs]),
        linear_cls=cell_score([run.probe("linear", "cls") for run in runs]),
        how="; ".join(dict.fromkeys(run.how for run in runs if run.how)),
    )
    return replace(row, sentence=describe_row(row, "fine_tuned" if cell.fine_tunes else "linear"))


def read_run(folder: Path, plan: TablePlan, cell: PlannedCell, seed: int, failures: Mapping[str, str]) -> CellRun:
    """Read the results of one run of a cell."""
    name = cell.run_name(seed)
    run, error = Run(folder / name), failures.get(name)
    result = CellRun(seed=seed, folder=name, error=error, state="waiting" if error is None else "failed")
    if not (run.path / "plan.json").exists():
        return result
    trained = trained_rows(run.metrics())
    if trained:
        result = replace(
            result,
            loss=last_loss(trained),
            images_per_second=_median(row["images_per_second"] for row in trained),
            seconds=training_seconds(trained),
        )
    result = replace(result, size=tuple(run.read("plan.json")["images"]["size"]))
    if cell.fine_tunes:
        score = read_score(run)
        result = replace(result, fine_tuned=None if score is None else finetune_accuracy(score))
        measured = score is not None
    else:
        probes = {kind: probe for kind in KINDS if (probe := find_probe(run, kind, plan, controls=False)) is not None}
        result = with_probes(result, cell, probes)
        measured = len(probes) == len(KINDS)
    if error is not None:
        return result
    state = run.status().shown_state or "waiting"
    return replace(result, state="trained" if state == "finished" and not cell.shared and not measured else state)


def with_probes(run: CellRun, cell: PlannedCell, probes: Mapping[str, ProbeResult]) -> CellRun:
    """Return the run with the scores of its probes and controls. probes: results by kind of probe."""
    scores: dict[str, dict[str, RunAccuracy]] = {}
    controls, how = [], ""
    for kind, probe in probes.items():
        for row in probe.rows:
            if row.features == PRETRAINED:
                scores.setdefault(kind, {})[row.pool] = probe_accuracy(row)
                how = how_measured(row)
            elif row.pool in (POOL, "pixels"):
                owner = "" if row.features == RAW_PIXELS else cell.label
                controls.append(Control(features=row.features, cell=owner, kind=kind, score=probe_accuracy(row)))
    return replace(run, probes=scores, controls=tuple(controls), how=how)


def find_probe(run: Run, kind: str, plan: TablePlan, *, controls: bool) -> ProbeResult | None:
    """Return the result of a probe of a run's final weights on this table's images and labels, or None.

    controls: whether the probe must include controls. A damaged result file counts as missing.
    """
    request, steps = plan.asked, run.read("plan.json")["steps"]
    test = TestIdentity(held_out=HELD_OUT, seed=0)
    if request.test is not None:
        test = TestIdentity(images=ImageSet(name=request.test))
    for probe in read_results(run).probes:
        if (
            (probe.kind, probe.shots, probe.seed, probe.step) == (kind, plan.shots, 0, steps)
            and (probe.layer, probe.mask_votes, probe.targets, probe.task) == (None, None, None, CLASSES)
            and probe.data.matches(ImageSet(name=request.data))
            and probe.test.matches(test)
            and (not controls or probe.row(RANDOM_INIT) is not None)
        ):
            return probe
    return None


def probe_accuracy(row: FeatureScore) -> RunAccuracy:
    """Convert the score of a feature set to the accuracy of a run."""
    assert row.low is not None, "the accuracy of a probe on class labels has an interval"
    assert row.high is not None, "the accuracy of a probe on class labels has an interval"
    return RunAccuracy(accuracy=row.value, low=row.low, high=row.high, correct=row.correct, total=row.total)


def finetune_accuracy(result: FinetuneResult) -> RunAccuracy:
    """Convert the result of a fine-tuned classifier to the accuracy of a run."""
    low, high = (result.value if limit is None else limit for limit in (result.low, result.high))
    return RunAccuracy(
        accuracy=result.value, low=low, high=high, correct=result.correct, total=result.test_images
    )  # fmt: skip


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# Controls and sentences


def control_rows(rows: Sequence[CellRow]) -> list[ControlRow]:
    """Return the rows of the table of controls: raw pixels, which all cells share, and the untrained encoders."""
    by_control: dict[tuple[str, str], ControlRow] = {}
    for control in (control for row in rows for run in row.runs for control in run.controls):
        key = control.features, control.cell
        known = by_control.setdefault(key, ControlRow(features=control.features, cell=control.cell))
        by_control[key] = replace(known, **{control.kind: control.score})
    return list(by_control.values())


def describe_row(row: CellRow, measure: str) -> str:
    """Return a row of the table as a sentence for the console."""
    text = f"{row.cell.label}{', as many FLOPs' if row.cell.equal == 'compute' else ''}: "
    score, paper = row.score(measure), row.cell.paper
    if score is None:
        errors = "; ".join(run.error for run in row.runs if run.error)
        return text + (f"failed: {errors}" if errors else row.state)
    text += f"{MEASURES[measure]} {score}"
    if row.knn is not None:
        text += f", kNN {row.knn}"
    if measure == "fine_tuned":
        return text + f"; paper {paper.fine_tuned}"
    if paper.linear is not None:
        text += f"; paper {paper.linear} linear"
        text += f", {paper.fine_tuned} fine-tuned" if paper.fine_tuned is not None else ""
    return text


def different_sizes(rows: Sequence[CellRow]) -> list[str]:
    """Return a warning if cells were trained on images of different sizes, which no table varies."""
    sizes: dict[tuple[int, ...], list[str]] = {}
    for row in rows:
        for run in row.runs:
            if run.size is not None and not row.cell.shared:
                sizes.setdefault(run.size, []).append(run.folder)
    if len(sizes) < 2:
        return []
    text = "; ".join(f"{' x '.join(map(str, size))}: {', '.join(names)}" for size, names in sizes.items())
    return [f"The cells were trained on images of different sizes, so they cannot be compared: {text}."]


def above_controls(rows: Sequence[CellRow], controls: Sequence[ControlRow]) -> str:
    """State how many cells exceed the best control in the linear probe; "" if cells or controls are not measured."""
    measured = [row.linear.mean for row in rows if row.linear is not None]
    known = {control.features: control.linear.accuracy for control in controls if control.linear is not None}
    if not measured or not known:
        return ""
    best = max(known, key=lambda name: known[name])
    above = sum(value > known[best] for value in measured)
    text = f"{above} of {len(measured)} cells are above {best} ({known[best]:.1%}, linear probe)."
    return (
        text if above else text + " So pre-training did not help in any cell, and the order of the cells means little."
    )
