"""The section of a page with the result of one probe: title, scores and chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from unmask.report.charts import curve_chart
from unmask.results import R2, UNLABELLED, CurveResult, FeatureMeasurement, FeatureScore, ProbeResult, show_score


@dataclass(frozen=True)
class Bar:
    """A score and the ends of its interval, as shares of the width of a full bar."""

    length: float
    low: float
    high: float


@dataclass(frozen=True)
class ScoreRow:
    """A score as text and bar. best: whether it is the highest score of its table."""

    score: FeatureScore
    text: str
    interval: str
    bar: Bar
    best: bool


@dataclass(frozen=True)
class ProbeSection:
    """Contents of the section of one probe.

    rows: rows of the table of scores, or () for a label-budget curve, whose rows are in `record`. reference: sentence
    about the score of a baseline that uses no image, or "" if there is no such baseline. reference_at: position of the
    baseline's line on the bars, or None. notes: sentences below the table.
    """

    title: str
    record: ProbeResult | CurveResult
    rows: tuple[ScoreRow, ...] = ()
    chart: Markup | None = None
    reference: str = ""
    reference_at: float | None = None
    notes: tuple[str, ...] = ()


def probe_section(record: ProbeResult | CurveResult) -> ProbeSection:
    """Return the section of a probe result."""
    title = probe_title(record)
    if isinstance(record, CurveResult):
        return ProbeSection(title, record, chart=curve_chart(record))
    values = {row.value for row in record.rows}
    highest = max(values) if len(values) > 1 else None  # if all scores are equal, no score is marked as best
    reference = "" if record.chance is None else f"chance, {show_score(record.chance, record.metric)}"
    if record.metric == R2:
        reference = "a constant prediction, 0.000"
    width = full_width(record)
    return ProbeSection(
        title,
        record,
        rows=tuple(_score_row(row, record.metric, width, best=row.value == highest) for row in record.rows),
        reference=reference,
        reference_at=(0.0 if record.metric == R2 else record.chance) if reference else None,
        notes=tuple(_notes(record)),
    )


def full_width(record: ProbeResult) -> float:
    """Return the score that a bar of full width stands for: 1, or the highest score of the table if that is larger."""
    highest = max((value for row in record.rows for value in (row.value, row.high or 0.0)), default=1.0)
    return max(1.0, highest)


def _score_row(row: FeatureScore, metric: str, width: float, *, best: bool) -> ScoreRow:
    low, high = row.value if row.low is None else row.low, row.value if row.high is None else row.high
    length, left, right = (min(1.0, max(0.0, value / width)) for value in (row.value, low, high))
    interval = "" if row.low is None or row.high is None else f"{show_score(low, metric)} to {show_score(high, metric)}"
    return ScoreRow(
        score=row, text=show_score(row.value, metric), interval=interval, bar=Bar(length, left, right), best=best
    )


def how_measured(row: FeatureScore) -> str:
    """Describe layer and masks of features if unusual, such as 'layer 6 of 12, under one mask', or return ""."""
    words = [] if row.layer is None else [f"layer {row.layer.number} of {row.layer.last}"]
    if row.votes is not None:
        words.append("under one mask" if row.votes == 1 else f"majority over {row.votes} masks")
    return ", ".join(words)


def _notes(record: ProbeResult) -> list[str]:
    notes = []
    if record.task != UNLABELLED and len({row.pool for row in record.rows}) > 2:
        notes.append("The verdict uses the better pooling of each feature set on these test images.")
    layers = {row.features: row.layer for row in record.rows if row.layer is not None and row.layer.why != "asked for"}
    notes += [f"Layer of {features}: {layer.why}." for features, layer in layers.items()]
    if not all(row.converged for row in record.rows):
        notes.append("* The fit reached its maximum number of iterations.")
    return notes


@dataclass(frozen=True)
class ImageNames:
    """Names of the labelled images, of the test images and of the table of targets, as used in a title."""

    data: str
    test: str
    targets: str = ""


def probe_title(record: FeatureMeasurement) -> str:
    """Return the title of a probe: its kind, its images, and the options that differ from the defaults."""
    data = str(record.data)
    targets = record.targets.path if record.targets is not None else ""
    return title_with(record, ImageNames(data, record.test.describe(data), targets))


def title_with(record: FeatureMeasurement, names: ImageNames) -> str:
    """Return the title of a probe with the given names of its images."""
    words = [f"{record.title or record.kind} on {names.data}"]
    if record.task != UNLABELLED:
        words.append(f"tested on {names.test}")
    if (budget := budget_words(record.budgets)) is not None:
        draws = f", {record.draws} random draws each" if isinstance(record, CurveResult) else ""
        words.append(budget + draws)
    if record.targets is not None:
        columns = f"{', '.join(record.targets.columns)} in " if record.targets.columns else ""
        words.append(f"{record.task} of {columns}{names.targets}")
    if record.seed:
        words.append(f"seed {record.seed}")
    if record.layer is not None:
        words.append(f"layer {record.layer}")
    if record.mask_votes is not None:
        words.append(f"{record.mask_votes} mask{'s' * (record.mask_votes != 1)}")
    return ", ".join(words)


def budget_words(budgets: Sequence[int] | None) -> str | None:
    """Return '10 labels per class', or None if all labels were used."""
    if budgets is None:
        return None
    return f"{', '.join(map(str, budgets))} label{'s' * (tuple(budgets) != (1,))} per class"
