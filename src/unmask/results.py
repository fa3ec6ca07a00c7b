"""The results of evaluations, as typed records: what RUN/evals/*.json holds, whichever command measured it.

    {"record": "probe", "kind": "linear", "data": {...}, "test": {...}, "rows": [...], ...}

The key `record` says which class of this module a file belongs to. Names of files mean nothing: whoever wants results
calls `read_results` and iterates over records. Files of earlier versions, which lack that key, are converted when they
are read.

Loads neither torch nor numpy, so that a report or a list of runs is read quickly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from unmask.errors import UserError
from unmask.system.earlier_results import from_earlier_version

SCORE = "evals/fine-tuned.json"
RECORD = "record"

PRETRAINED, RANDOM_INIT, RAW_PIXELS = "pre-trained", "random init", "raw pixels"
"""Names of feature sets: the run's encoder, the same encoder untrained, and no encoder."""
CONTROLS = (RAW_PIXELS, RANDOM_INIT)
ACCURACY, MEAN_AP, R2 = "accuracy", "mean average precision", "R2"
CLASSES, MULTILABEL, REGRESSION, UNLABELLED = "classes", "multilabel", "regression", "unlabelled"
METRICS = {CLASSES: ACCURACY, MULTILABEL: MEAN_AP, REGRESSION: R2}
POOLS = {"cls": "class token", "mean": "mean over patches", "pixels": "pixels", "attentive": "attention over tokens"}
"""Poolings in words."""


class RunFolder(Protocol):
    """What is read of a `Run`."""

    @property
    def evals(self) -> Path: ...

    def read(self, name: str) -> dict[str, Any]: ...


# ------------------------------------------------------------------------------------------------- images and test sets


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A set of images: its name as it was given, where it lies, and a digest of its content.

    path: absolute; None for sets that are drawn or built in. digest: SHA-256 over the names and sizes of its files
    (`Source.fingerprint`); None in results of earlier versions. excluded: the patterns of `--exclude`.
    """

    name: str
    path: str | None = None
    digest: str | None = None
    excluded: tuple[str, ...] = ()

    def matches(self, other: ImageSet) -> bool:
        """Whether both are the same images: by content where both digests are known, else by name."""
        if self.digest is not None and other.digest is not None:
            return self.digest == other.digest
        return (self.name, self.excluded) == (other.name, other.excluded)

    def __str__(self) -> str:
        return self.name + (f" without {' '.join(self.excluded)}" if self.excluded else "")


@dataclass(frozen=True, kw_only=True)
class TestIdentity:
    """The images that something was measured on: a share held out of the labelled data, or a set of their own.

    held_out, seed: the share, and the seed that chose it (None where it was not recorded). images: the other set.
    """

    __test__: ClassVar[bool] = False  # not a test class, whatever pytest infers from its name

    held_out: float | None = None
    seed: int | None = None
    images: ImageSet | None = None

    def matches(self, other: TestIdentity) -> bool:
        """Whether both are the same images, given the same labelled data."""
        if self.images is None or other.images is None:
            return self.images is other.images and (self.held_out, self.seed or 0) == (other.held_out, other.seed or 0)
        return self.images.matches(other.images)

    def describe(self, data: str) -> str:
        """Name the test images in a sentence: 'a held-out fifth of birds', or the name of the other set."""
        if self.images is not None:
            return str(self.images)
        share = "fifth" if self.held_out == 0.2 else f"{self.held_out:.0%}"
        return f"a held-out {share} of {data}"


@dataclass(frozen=True, kw_only=True)
class TargetTable:
    """The table that labels or quantities came from. `reason`: why its columns were read as this task."""

    path: str
    test_path: str | None = None
    columns: tuple[str, ...] | None = None
    reason: str = ""
    images_without_row: int = 0


@dataclass(frozen=True, kw_only=True)
class OtherRun:
    """Another run whose encoder was measured on the same images; `name` is that of its rows."""

    name: str
    run: str
    step: int | None = None


# ------------------------------------------------------------------------------------------------------------ scores


@dataclass(frozen=True)
class LayerChoice:
    """Which layer was measured, 0 to `last`, and how it was chosen, in words."""

    number: int
    last: int
    why: str


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """The score of one target column; `value` is None where it is not defined on these test images.

    value: average precision of a label, R2 of a quantity. positives: test images that have the label.
    """

    name: str
    value: float | None
    positives: int | None = None
    mean_absolute_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureScore:
    """The score of one feature set under one pooling, with its 95 % interval.

    features: PRETRAINED, RANDOM_INIT, RAW_PIXELS, or the name of another run. pool: "cls", "mean", "pixels" or
    "attentive". value: in the record's `metric`. total: test images; correct: of them, where the metric is accuracy.
    fit: what the kind of probe chose while fitting, by name (`c`, `rate`). votes: masks that the majority was over.
    """

    features: str
    pool: str
    value: float
    low: float | None = None
    high: float | None = None
    total: int = 0
    correct: int | None = None
    targets: tuple[TargetScore, ...] = ()
    fit: dict[str, float | None] = field(default_factory=dict)
    converged: bool = True
    layer: LayerChoice | None = None
    votes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """The mean score over several draws of `shots` training labels per class; `values` and `correct` of each draw."""

    shots: int
    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    correct: tuple[int, ...] = ()
    fits: tuple[dict[str, float | None], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """The label-budget curve of one feature set under one pooling: a point for every number of labels."""

    features: str
    pool: str
    points: tuple[CurvePoint, ...]
    layer: LayerChoice | None = None
    votes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much higher the run's own features score than another set on the same test images, with its 95 % interval.

    pool, own_pool: which pooling of each is compared. shots: labels per class, in a label-budget curve.
    """

    features: str
    pool: str
    own_pool: str
    value: float
    low: float
    high: float
    shots: int | None = None


@dataclass(frozen=True, kw_only=True)
class TestOnTheWay:
    """A test during training, at `step`."""

    __test__: ClassVar[bool] = False

    step: int
    value: float


# ----------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True, kw_only=True)
class FeatureMeasurement:
    """What the results of all frozen-feature probes have in common.

    kind: the name for --kind; title: the same for a heading, "Linear probe". step: of the checkpoint. seed: of the
    split and of every random choice. layer, mask_votes: as asked for; None is the protocol that suits the encoder.
    task: CLASSES, MULTILABEL, REGRESSION or UNLABELLED. names: of the classes, or of the target columns. chance: the
    score without looking at the images; None where there is none. interval: how the 95 % intervals were made. shared:
    test images that are also training images, pixel for pixel. differences: to the other feature sets. protocol,
    verdict: in words. caveats: sentences that limit what the numbers mean.
    """

    kind: str
    title: str = ""
    data: ImageSet
    test: TestIdentity
    step: int | None = None
    seed: int = 0
    layer: str | None = None
    mask_votes: int | None = None
    task: str = CLASSES
    metric: str = ACCURACY
    names: tuple[str, ...] = ()
    train_images: int = 0
    test_images: int = 0
    chance: float | None = None
    interval: str = ""
    shared: int = 0
    differences: tuple[Difference, ...] = ()
    verdict: str = ""
    protocol: str = ""
    caveats: tuple[str, ...] = ()
    targets: TargetTable | None = None
    against: tuple[OtherRun, ...] = ()
    precision: str | None = None
    command: str | None = None

    @property
    def budgets(self) -> tuple[int, ...] | None:
        """Labels per class of every fit, ascending; None where all labels were used."""
        raise NotImplementedError

    def same_measurement(self, other: FeatureMeasurement) -> bool:
        """Whether both measure the same thing, of whatever encoder, so that their scores can be compared."""
        return (
            type(self) is type(other)
            and self._protocol == other._protocol
            and self.data.matches(other.data)
            and self.test.matches(other.test)
            and (self.train_images, self.test_images, self.names)
            == (other.train_images, other.test_images, other.names)
        )

    @property
    def _protocol(self) -> tuple[Any, ...]:
        return (self.kind, self.budgets, self.seed, self.layer, self.mask_votes, self.task, self.metric, self.targets)


@dataclass(frozen=True, kw_only=True)
class ProbeResult(FeatureMeasurement):
    """The result of `unmask probe`: a score for every feature set. shots: training labels per class; None for all.

    For --kind paper-linear, which is a training: `run` is its folder inside the run, `best` its best test on the way.
    """

    rows: tuple[FeatureScore, ...]
    shots: int | None = None
    run: str | None = None
    best: TestOnTheWay | None = None

    @property
    def budgets(self) -> tuple[int, ...] | None:
        return None if self.shots is None else (self.shots,)

    def row(self, features: str = PRETRAINED, pool: str | None = None) -> FeatureScore | None:
        """Return the score of a feature set under one pooling, or its best one; None where it was not measured."""
        rows = [row for row in self.rows if row.features == features and pool in (None, row.pool)]
        return max(rows, key=lambda row: row.value, default=None)


@dataclass(frozen=True, kw_only=True)
class CurveResult(FeatureMeasurement):
    """A label-budget curve: `draws` choices of training labels for each number of labels per class in `shots`."""

    rows: tuple[CurveRow, ...]
    shots: tuple[int, ...]
    draws: int

    @property
    def budgets(self) -> tuple[int, ...] | None:
        return self.shots

    @property
    def _protocol(self) -> tuple[Any, ...]:
        return (*super()._protocol, self.draws)


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """The score of a fine-tuned run on its test images, with the weights of the last step.

    task: the method ("classify", "segment", "detect", "linear_probe"). metric: which of `numbers` is the headline; the
    interval low..high (95 %) belongs to it. by_class: IoU or AP50 of every class, None where it is not defined.
    best: the best test on the way, which was chosen on the test images. averaged: the headline with the moving average
    of the weights. initial_run: the run that the weights started from.
    """

    task: str
    metric: str
    numbers: dict[str, float]
    data: ImageSet
    test: TestIdentity
    step: int | None = None
    low: float | None = None
    high: float | None = None
    correct: int | None = None
    by_class: dict[str, float | None] = field(default_factory=dict)
    confusion: tuple[tuple[int, ...], ...] = ()
    classes: tuple[str, ...] = ()
    train_images: int = 0
    test_images: int = 0
    best: TestOnTheWay | None = None
    averaged: float | None = None
    recipe: str = ""
    last_blocks: float | None = None
    initial_run: str | None = None

    @property
    def value(self) -> float:
        """The headline number."""
        return self.numbers[self.metric]


@dataclass(frozen=True, kw_only=True)
class BaselineLosses:
    """Losses of a pre-training on fixed images, and what trivial predictions score on the same images.

    guesses: loss by the name of the trivial prediction. losses, held_out_losses: (step, loss) pairs, by step.
    """

    images: int
    guesses: dict[str, float]
    losses: tuple[tuple[int, float], ...]
    held_out_images: int = 0
    held_out_losses: tuple[tuple[int, float], ...] = ()


Record = ProbeResult | CurveResult | FinetuneResult | BaselineLosses
RECORDS: dict[str, type[Record]] = {
    "probe": ProbeResult, "curve": CurveResult, "finetune": FinetuneResult, "baselines": BaselineLosses,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reading, writing


@cache
def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    return TypeAdapter(kind)


def to_json(record: Record) -> dict[str, Any]:
    """Return the JSON object of a record: what its file holds, and what --json prints."""
    name = next(name for name, kind in RECORDS.items() if type(record) is kind)
    return {RECORD: name, **_adapter(type(record)).dump_python(record, mode="json")}


def from_json(found: Mapping[str, Any]) -> Record:
    """Return the record of a JSON object, of this version or an earlier one. Raises UserError."""
    found = found if RECORD in found else from_earlier_version(found)
    name = found[RECORD]
    if name not in RECORDS:
        raise UserError(
            f"got a result of record {name!r}; expected {', '.join(RECORDS)}: a newer version of unmask wrote it, or "
            "none did; update unmask, or measure again"
        )
    try:
        return _adapter(RECORDS[name]).validate_python(dict(found))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"got a {name} result whose {where} is wrong: {first['msg']}; measure again") from None


T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class Results:
    """The results of a run: records by the names of their files (without .json), and why other files are unreadable.

    damaged: a sentence for each file that is damaged or not a result, which names it.
    """

    records: Mapping[str, Record]
    damaged: tuple[str, ...] = ()

    @property
    def probes(self) -> tuple[ProbeResult, ...]:
        """Probes; of one data set the linear probe first, the newest step last."""
        return tuple(sorted(self._of(ProbeResult), key=_order))

    @property
    def curves(self) -> tuple[CurveResult, ...]:
        return tuple(sorted(self._of(CurveResult), key=_order))

    @property
    def finetuned(self) -> FinetuneResult | None:
        """The score of a fine-tuned run; None for other runs, and before it is tested."""
        return next(self._of(FinetuneResult), None)

    @property
    def baselines(self) -> BaselineLosses | None:
        return next(self._of(BaselineLosses), None)

    def _of(self, kind: type[T]) -> Iterator[T]:
        return (record for record in self.records.values() if isinstance(record, kind))


def _order(record: FeatureMeasurement) -> tuple[Any, ...]:
    """Order of results on a page: labels by class before tables of targets, linear before kNN, few labels first."""
    kinds = ("linear", "knn", "attentive")
    place = kinds.index(record.kind) if record.kind in kinds else len(kinds)
    budgets = record.budgets or (1 << 40,)
    return record.targets is not None, str(record.data), place, record.kind, budgets, record.step or 0


def read_results(run: RunFolder) -> Results:
    """Read every result of a run. Raises nothing for files that are damaged: they are named in `Results.damaged`."""
    records: dict[str, Record] = {}
    damaged: list[str] = []
    for file in sorted(run.evals.glob("*.json")):
        try:
            found = run.read(f"evals/{file.name}")
        except UserError as error:
            damaged.append(str(error))
            continue
        try:
            records[file.stem] = from_json(found)
        except UserError as error:
            damaged.append(f"{file}: {error}")
    return Results(records, tuple(damaged))


def read_score(run: RunFolder) -> FinetuneResult | None:
    """Return the score of a fine-tuned run's last weights; None where it is still to be measured."""
    found = read_results(run).finetuned
    return found if found is not None and found.step == run.read("plan.json")["steps"] else None
