"""Describe the result of a probe in words: verdict, protocol, and the table on the screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from unmask.console import Console
from unmask.evals.probe_kind import pool_title
from unmask.results import (
    ACCURACY,
    CLASSES,
    CONTROLS,
    MEAN_AP,
    PRETRAINED,
    RANDOM_INIT,
    RAW_PIXELS,
    REGRESSION,
    CurveResult,
    Difference,
    FeatureMeasurement,
    FeatureScore,
    ProbeResult,
    TargetScore,
    show_score,
)

PHRASES = {RAW_PIXELS: "raw pixels", RANDOM_INIT: "the same encoder untrained"}
UNKNOWN_HELP = "Probe again with --controls to find out whether pre-training helped."


# Protocol


def protocol(result: FeatureMeasurement, fitted: str) -> str:
    """Describe the measurement in one sentence: features, probe, images, and what the intervals cover.

    fitted: description of what this kind of probe fits; see `protocol` in `probe_kind.py`.
    """
    assert isinstance(result, ProbeResult | CurveResult)
    rows = result.rows
    pools = " and ".join(dict.fromkeys(pool_title(result.kind, row.pool) for row in rows if row.features != RAW_PIXELS))
    layers = {row.features: f"layer {row.layer.number} of {row.layer.last}" for row in rows if row.layer is not None}
    where = layers.get(PRETRAINED, "the encoder's output")
    if len(set(layers.values())) > 1:
        where = ", ".join(f"{name}: {layer}" for name, layer in layers.items())
    features = f"Frozen features ({pools}; {where}), {fitted}"
    if not result.train_images:
        return f"{features}; {result.test_images} images of {result.data}."
    labels = "" if result.budgets is None else f", {', '.join(str(n) for n in result.budgets)} labels per class"
    if isinstance(result, CurveResult):
        labels += f", {result.draws} draws of each"
    train = f"{result.train_images} training images of {result.data}{labels}"
    test = f"{result.test_images} test images: {result.test.describe(str(result.data))}"
    table = "" if result.targets is None else f", targets of {result.targets.path}"
    return f"{features}; {train}; {test}{table}; seed {result.seed}; 95 % intervals: {result.interval}."


# Verdict


def verdict(result: ProbeResult, phrase: str) -> str:
    """State whether pre-training helps: by how much scores differ from the controls, and which differences are noise.

    phrase: name of the probe in sentences ("a linear probe"). For each feature set, the score of its better pooling is
    reported.
    """
    assert result.chance is not None, "a verdict needs scores of labelled images"
    own = result.row(PRETRAINED)
    if own is None:
        raise ValueError("got no score of the pre-trained features; expected one, because the verdict describes it")
    controls = [row for name in CONTROLS if (row := result.row(name)) is not None]
    pool = pool_title(result.kind, own.pool)
    score = f"{phrase} on the pre-trained features ({pool}) {_reached(own, result.metric, result.chance)}"
    if not controls:
        unclear = "" if _is_above(own, result.chance) else ", which is indistinguishable from chance"
        sentences = [f"{_capitalised(score)}{unclear}. {UNKNOWN_HELP}"]
    elif not any(_is_above(row, result.chance) for row in (own, *controls)):
        others = " and ".join(f"{PHRASES[row.features]} {show_score(row.value, result.metric)}" for row in controls)
        sentences = [
            f"No verdict: all scores are near chance level. {_capitalised(score)}, {others}. Either the labels are not "
            "visible in such images, or there are too few of them."
        ]
    else:
        found = {each.features: each for each in result.differences}
        compared = [found[row.features] for row in controls]
        clauses = [_clause(row, each, result.metric) for row, each in zip(controls, compared, strict=True)]
        sentences = [f"{_lead(compared)} {_capitalised(score)}: {'; '.join(clauses)}."]
    return " ".join([*sentences, *_against(result)])


def _is_above(row: FeatureScore, chance: float) -> bool:
    return row.low is not None and row.low > chance


def _reached(row: FeatureScore, metric: str, chance: float) -> str:
    assert row.low is not None, "scores of labelled images have intervals"
    assert row.high is not None, "scores of labelled images have intervals"
    if metric == ACCURACY:
        return (
            f"gets {row.value:.1%} of {row.total} test images right (95% interval {100 * row.low:.1f} to "
            f"{row.high:.1%}; chance {chance:.1%})"
        )
    article, nothing = ("a", "chance") if metric == MEAN_AP else ("an", "a constant prediction")
    return (
        f"reaches {article} {metric} of {row.value:.3f} on {row.total} test images (95% interval {row.low:.3f} to "
        f"{row.high:.3f}; {nothing} {chance:.3f})"
    )


def _lead(differences: Sequence[Difference]) -> str:
    if all(each.low > 0 for each in differences):
        if len(differences) < 2:
            return f"Better than {PHRASES[differences[0].features]}."
        return "Pre-training helps."
    if any(each.high < 0 for each in differences):
        return "Pre-training does not help here."
    if any(each.low > 0 for each in differences):
        return "Pre-training is not shown to help: it beats one control, not both."
    return "Pre-training is not shown to help: the differences are within the noise."


def _clause(other: FeatureScore, difference: Difference, metric: str) -> str:
    name = f"{PHRASES.get(other.features, other.features)} ({show_score(other.value, metric)})"
    scale, digits, unit = (100, 1, " points") if metric == ACCURACY else (1, 3, "")
    points, low, high = (scale * value for value in (difference.value, difference.low, difference.high))
    span = f"95% interval {low:+.{digits}f} to {high:+.{digits}f}"
    if difference.low > 0:
        return f"{points:.{digits}f}{unit} more than {name}, {span}"
    if difference.high < 0:
        return f"{-points:.{digits}f}{unit} {'fewer' if unit else 'less'} than {name}, {span}"
    return f"no clear difference from {name}: {points:+.{digits}f}{unit}, {span}"


def _against(result: ProbeResult) -> Iterator[str]:
    """For each other run, yield a sentence that compares its score with this run's on the same test images."""
    for difference in result.differences:
        if difference.features in CONTROLS:
            continue
        own = result.row(PRETRAINED, difference.own_pool)
        other = result.row(difference.features, difference.pool)
        assert own is not None, "it was compared"
        assert other is not None, "it was compared"
        pool = pool_title(result.kind, other.pool)
        yield (
            f"Compared with {other.features} ({pool} of both), {show_score(own.value, result.metric)}: "
            f"{_clause(other, difference, result.metric)}."
        )


def curve_verdict(result: CurveResult) -> str:
    """State the accuracy of the pre-trained features, and their lead over controls and other runs, for every budget."""
    own = next(row for row in result.rows if row.features == PRETRAINED and row.pool != "cls")
    curve = ", ".join(f"{point.mean:.1%} with {point.shots}" for point in own.points)
    sentences = [f"The pre-trained features ({pool_title(result.kind, own.pool)}) reach {curve} labels per class."]
    by_name: dict[str, list[Difference]] = {}
    for difference in result.differences:
        by_name.setdefault(difference.features, []).append(difference)
    controls = [name for name in by_name if name in CONTROLS]
    if controls:
        ahead = [n for i, n in enumerate(result.shots) if all(by_name[name][i].low > 0 for name in controls)]
        phrases = " and ".join(PHRASES[name] for name in controls)
        if ahead:
            sentences.insert(
                0, f"Pre-training helps with {_listed(ahead)} labels per class, where it is better than {phrases}."
            )
        else:
            sentences.insert(
                0, f"Pre-training is not shown to help at any of these budgets: not clearly above {phrases}."
            )
    else:
        sentences.append(UNKNOWN_HELP)
    for name, steps in by_name.items():
        points = [
            f"{100 * each.value:+.1f} ({100 * each.low:+.1f} to {100 * each.high:+.1f}) with {each.shots}"
            for each in steps
        ]
        sentences.append(f"Points above {PHRASES.get(name, name)}: {', '.join(points)}.")
    return " ".join(sentences)


def _listed(numbers: Sequence[int]) -> str:
    *first, last = (str(number) for number in numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:] if not text.startswith("kNN") else text


# Console output


def print_result(result: ProbeResult | CurveResult, console: Console) -> None:
    """Print the scores, the verdict and the caveats."""
    console.print(_headline(result))
    if isinstance(result, CurveResult):
        _print_curve(result, console)
    else:
        for row in result.rows:
            interval = ""
            if row.low is not None and row.high is not None:
                interval = f"95% interval {show_score(row.low, result.metric)} to {show_score(row.high, result.metric)}"
            notes = "; ".join(filter(None, [interval, *_notes(row)]))
            value = f"  {row.features:12s} {row.pool:9s} {show_score(row.value, result.metric):>6s}"
            console.print(value + (f"  ({notes})" if notes else ""))
            if len(row.targets) > 1 or result.task == REGRESSION:
                for target in row.targets:
                    console.print(f"      {target.name}: {_target(target)}")
    console.print(f"  {' '.join([result.verdict, *result.caveats])}")


def _headline(result: ProbeResult | CurveResult) -> str:
    if not result.train_images:
        return f"{result.title} of {result.test_images} images of {result.data}"
    shots = f" ({result.shots} per class)" if isinstance(result.shots, int) else ""
    up_to = "up to " if isinstance(result, CurveResult) else ""
    named = f"{len(result.names)} classes" if result.task == CLASSES else f"{result.task} of "
    if result.task != CLASSES:
        named += ", ".join(result.names[:6])
    chance = (
        f", chance {show_score(result.chance or 0.0, result.metric)}" if result.metric in (ACCURACY, MEAN_AP) else ""
    )
    return (
        f"{result.title} on {result.data}: {up_to}{result.train_images} training images{shots}, {result.test_images} "
        f"test images, {named}{chance}"
    )


def _notes(row: FeatureScore) -> Iterator[str]:
    if not row.converged:
        yield (
            "the fit stopped at its iteration limit, so the score may be too low: compare it with --kind knn, or "
            "give more labels"
        )
    if row.layer is not None:
        yield f"layer {row.layer.number} of {row.layer.last}"
    if row.votes is not None:
        yield "under one mask" if row.votes == 1 else f"majority over {row.votes} masks"


def _target(target: TargetScore) -> str:
    value = "not defined" if target.value is None else f"{target.value:.3f}"
    if target.mean_absolute_error is None:
        return f"{value} ({target.positives} positive test images)"
    return f"R2 {value}, mean absolute error {target.mean_absolute_error:.4g}"


def _print_curve(result: CurveResult, console: Console) -> None:
    console.print(f"  {'labels per class':22s} " + " ".join(f"{number:>13d}" for number in result.shots))
    for row in result.rows:
        cells = [f"{point.mean:.1%} ±{100 * (point.high - point.low) / 2:.1f}" for point in row.points]
        console.print(f"  {row.features:12s} {row.pool:9s} " + " ".join(f"{cell:>13s}" for cell in cells))
    console.print(f"  mean of {result.draws} draws of the labels ± half of its 95% interval over them")
