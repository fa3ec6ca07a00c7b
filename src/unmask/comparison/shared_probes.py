"""Rank runs by the probes that all of them have, and list the probes that only some of them have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unmask.comparison.agreement import difference, single_run
from unmask.evals.probe_kind import pool_title
from unmask.report.probe_section import full_width, probe_title
from unmask.results import ACCURACY, PRETRAINED, FeatureScore, ImageSet, ProbeResult, Results, TestIdentity, show_score

NO_SHARED_PROBE = (
    "No probe is shared by all of these runs, so it is unknown which features are better; measure one with: unmask "
    "compare RUN... --data DATA --test DATA"
)


@dataclass(frozen=True)
class RankedRun:
    """One run in the ranking by a probe.

    score: the score that is ranked. pools: the score of every pooling, by name.
    """

    name: str
    step: int | None
    score: FeatureScore
    pools: Mapping[str, FeatureScore]


@dataclass(frozen=True)
class SharedProbe:
    """A probe that every compared run has.

    rows: the runs, the best first. width: the score that fills a bar on the page. sentence: the ranking in words.
    """

    title: str
    kind: str
    data: ImageSet
    test: TestIdentity
    shots: int | None
    seed: int
    layer: str | None
    mask_votes: int | None
    metric: str
    train_images: int
    test_images: int
    chance: float | None
    width: float
    rows: tuple[RankedRun, ...]
    sentence: str


def latest_probes(results: Results) -> list[ProbeResult]:
    """Return the probes of a run; of those that differ only in the step of the checkpoint, return only the last."""
    latest: list[ProbeResult] = []
    for probe in results.probes:
        same = next((i for i, other in enumerate(latest) if probe.same_measurement(other)), None)
        if same is None:
            latest.append(probe)
        elif (probe.step or 0) >= (latest[same].step or 0):
            latest[same] = probe
    return latest


def shared_probes(probes: Mapping[str, Sequence[ProbeResult]], caveat: str = "") -> list[SharedProbe]:
    """Return the probes that every run has. probes: results by run name. caveat: text to append to every ranking.

    All runs are ranked by the same pooling, the mean over patches if available: using the better pooling on the test
    images would favour encoders with a class token.
    """
    first, *others = probes.values()
    shared = []
    for probe in first:
        if not all(any(probe.same_measurement(other) for other in each) for each in others):
            continue
        matching = {
            name: next(other for other in each if probe.same_measurement(other)) for name, each in probes.items()
        }
        rows = tuple(
            sorted((_ranked(name, match) for name, match in matching.items()), key=lambda row: -row.score.value)
        )
        shared.append(
            SharedProbe(
                title=probe_title(probe),
                kind=probe.kind,
                data=probe.data,
                test=probe.test,
                shots=probe.shots,
                seed=probe.seed,
                layer=probe.layer,
                mask_votes=probe.mask_votes,
                metric=probe.metric,
                train_images=probe.train_images,
                test_images=probe.test_images,
                chance=probe.chance,
                width=max(full_width(match) for match in matching.values()),
                rows=rows,
                sentence=ranking(rows, probe.metric, probe.kind) + caveat,
            )
        )
    return shared


def _ranked(name: str, probe: ProbeResult) -> RankedRun:
    pools = {row.pool: row for row in probe.rows if row.features == PRETRAINED}
    return RankedRun(name, probe.step, pools.get("mean") or next(iter(pools.values())), pools)


def ranking(rows: Sequence[RankedRun], metric: str = ACCURACY, kind: str = "") -> str:
    """Name the run with the highest score, and the runs whose difference from it is within the noise.

    kind: the kind of probe.
    """
    first, *others = rows
    pool = pool_title(kind, first.score.pool)
    shared = ", the pooling that every encoder has" if first.score.pool == "mean" else ""
    text = f"{first.name} scores highest with {show_score(first.score.value, metric)} ({pool}{shared})"
    if first.score.low is None or first.score.high is None:
        return text
    best = single_run(first.score)
    close = [row.name for row in others if difference(best, single_run(row.score)).low <= 0]
    if not close:
        return (
            text + "; the margin is larger than the noise of the test images, but another training seed may change it"
        )
    return text + f", but the difference to {', '.join(close)} is within the noise of the test images"


def not_shared(probes: Mapping[str, Sequence[ProbeResult]]) -> list[str]:
    """Return one sentence for every probe that only some of the runs have."""
    groups: list[tuple[ProbeResult, list[str]]] = []
    for name, each in probes.items():
        for probe in each:
            group = next((names for other, names in groups if probe.same_measurement(other)), None)
            if group is None:
                groups.append((probe, [name]))
            else:
                group.append(name)
    lines = [
        f"{probe_title(probe)} ({probe.test_images} test images) was measured for {', '.join(names)} only."
        for probe, names in groups
        if len(names) < len(probes)
    ]
    return lines if any(len(names) == len(probes) for _, names in groups) else [*lines, NO_SHARED_PROBE]
