"""The results of evaluations as typed records: the contents of RUN/evals/*.json.

    {"record": "probe", "kind": "linear", "data": {...}, "test": {...}, "rows": [...], ...}

The key `record` names the class in this module that a file belongs to. File names have no meaning. To get results, call
`read_results` and iterate over the records. Files of earlier versions lack the key `record` and are converted when they
are read.

The results of commands that write a file of their own (`EmbedResult`, `PredictResult`, ...) are not in RUN/evals.

This module imports neither torch nor numpy, so that reports and lists of runs load quickly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from unmask.errors import UserError
from unmask.system.earlier_results import METRIC_WORDS, from_earlier_version

SCORE = "evals/fine-tuned.json"
RECORD = "record"

PRETRAINED, RANDOM_INIT, RAW_PIXELS = "pre-trained", "random init", "raw pixels"
"""Names of feature sets: the run's encoder, the same encoder untrained, and no encoder."""
CONTROLS = (RAW_PIXELS, RANDOM_INIT)
ACCURACY, MEAN_AP, R2 = "accuracy", "mean average precision", "R2"
CLASSES, MULTILABEL, REGRESSION, UNLABELLED = "classes", "multilabel", "regression", "unlabelled"
METRICS = {CLASSES: ACCURACY, MULTILABEL: MEAN_AP, REGRESSION: R2}
POOLS = {"cls": "class token", "mean": "mean over patches", "pixels": "pixels"}
"""Poolings in words. Probes of all tokens declare their own, see `evals/probe_kind.py`."""


def show_score(value: float, metric: str) -> str:
    """Format a score: '61.0%' for an accuracy, '0.412' for average precision and R2, '31.2' for other metrics."""
    if metric == ACCURACY:
        return f"{value:.1%}"
    return f"{value:.3f}" if metric in (MEAN_AP, R2) else f"{value:.3g}"


class RunFolder(Protocol):
    """The members of `Run` that this module uses."""

    @property
    def evals(self) -> Path: ...

    def read(self, name: str) -> dict[str, Any]: ...


# Images and test sets


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A set of images.

    name: the name that the user gave. path: absolute path, or None for generated and built-in sets. digest: SHA-256
    over the names and sizes of its files (`Source.fingerprint`), or None in results of earlier versions. excluded: the
    patterns of `--exclude`.
    """

    name: str
    path: str | None = None
    digest: str | None = None
    excluded: tuple[str, ...] = ()

    def matches(self, other: ImageSet) -> bool:
        """Return whether both sets contain the same images. Digests are compared if both are known, else names."""
        if self.digest is not None and other.digest is not None:
            return self.digest == other.digest
        return (self.name, self.excluded) == (other.name, other.excluded)

    def __str__(self) -> str:
        return self.name + (f" without {' '.join(self.excluded)}" if self.excluded else "")


@dataclass(frozen=True, kw_only=True)
class TestIdentity:
    """The test images, which are either held out of the labelled data or a separate set.

    held_out: held-out share of the labelled data. seed: the seed that selected the held-out images, or None if it was
    not recorded. images: the separate set.
    """

    __test__: ClassVar[bool] = False  # pytest would otherwise collect this class as a test

    held_out: float | None = None
    seed: int | None = None
    images: ImageSet | None = None

    def matches(self, other: TestIdentity) -> bool:
        """Return whether both describe the same test images, provided that the labelled data are the same."""
        if self.images is None or other.images is None:
            return self.images is other.images and (self.held_out, self.seed or 0) == (other.held_out, other.seed or 0)
        return self.images.matches(other.images)

    def describe(self, data: str) -> str:
        """Return a name for messages, such as 'a held-out fifth of birds', or the name of the separate set."""
        if self.images is not None:
            return str(self.images)
        share = "fifth" if self.held_out == 0.2 else f"{self.held_out:.0%}"
        return f"a held-out {share} of {data}"


@dataclass(frozen=True, kw_only=True)
class TargetTable:
    """A table of targets. reason: why its columns were interpreted as labels or as quantities."""

    path: str
    test_path: str | None = None
    columns: tuple[str, ...] | None = None
    reason: str = ""
    images_without_row: int = 0


@dataclass(frozen=True, kw_only=True)
class OtherRun:
    """Another run whose encoder was measured on the same images. name: name of the run in `FeatureScore.features`."""

    name: str
    run: str
    step: int | None = None


# Scores


@dataclass(frozen=True)
class LayerChoice:
    """The layer whose features were used. number: 0 to `last`. why: why this layer was chosen, in words."""

    number: int
    last: int
    why: str


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """The score of one target column.

    value: average precision of a label, or R2 of a quantity, or None if the score is undefined on these test images.
    positives: number of test images with the label.
    """

    name: str
    value: float | None
    positives: int | None = None
    mean_absolute_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureScore:
    """The score of one feature set under one pooling, with its 95 % interval.

    features: PRETRAINED, RANDOM_INIT, RAW_PIXELS, or the name of another run. pool: "cls", "mean", "pixels", or the
    pooling of a probe of all tokens ("attentive"). value: the score in the record's `metric`. total: number of test
    images.
    correct: number of correctly classified test images, if the metric is accuracy. fit: hyperparameters that the probe
    selected (`c`, `rate`). votes: number of random patch masks per image, whose majority class is scored.
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
    """The mean score with `shots` training labels per class.

    values, correct, fits: one entry for each random choice of labels.
    """

    shots: int
    mean: float
    low: float
    high: float
    values: tuple[float, ...]
    correct: tuple[int, ...] = ()
    fits: tuple[dict[str, float | None], ...] = ()


@dataclass(frozen=True, kw_only=True)
class CurveRow:
    """The label-budget curve of one feature set under one pooling, with one point for each number of labels."""

    features: str
    pool: str
    points: tuple[CurvePoint, ...]
    layer: LayerChoice | None = None
    votes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The score of the run's features minus the score of another feature set, on the same test images.

    low, high: 95 % interval. own_pool: pooling of the run's features. pool: pooling of the other features. shots:
    number of labels per class, in label-budget curves only.
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
    """A test during training, after optimiser step `step`."""

    __test__: ClassVar[bool] = False

    step: int
    value: float


# Records


@dataclass(frozen=True, kw_only=True)
class FeatureMeasurement(ABC):
    """Base of the results of all frozen-feature probes.

    kind: value of --kind. title: the kind as a heading, such as "Linear probe". step: step of the checkpoint. seed:
    seed of the split and of all random draws. layer, mask_votes: values of the options (None: the default protocol of
    the encoder).
    task: CLASSES, MULTILABEL, REGRESSION or UNLABELLED. names: names of the classes or the target columns. chance: the
    score of predictions that do not depend on the image, or None if it is undefined. interval: how the 95 % intervals
    were computed. shared: number of test images that are identical to a training image, pixel for pixel. differences:
    differences of the score to the scores of other feature sets. protocol, verdict: descriptions in words. caveats:
    sentences on the limitations of the numbers. command: the shell command that measured the numbers, or None for a
    call from Python.
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
    @abstractmethod
    def budgets(self) -> tuple[int, ...] | None:
        """Numbers of labels per class, ascending, or None if all labels were used."""

    def same_measurement(self, other: FeatureMeasurement) -> bool:
        """Return whether both results used the same protocol and images, so that their scores are comparable."""
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
    """The result of `unmask probe`, with a score for every feature set.

    shots: number of training labels per class (None: all). run, best: for --kind paper-linear, which trains a
    classifier, the run of that training inside the probed run, and its best test during training.
    """

    rows: tuple[FeatureScore, ...]
    shots: int | None = None
    run: str | None = None
    best: TestOnTheWay | None = None

    @property
    def budgets(self) -> tuple[int, ...] | None:
        return None if self.shots is None else (self.shots,)

    def row(self, features: str = PRETRAINED, pool: str | None = None) -> FeatureScore | None:
        """Return the score of a feature set under `pool` (None: its best pooling), or None if it was not measured."""
        rows = [row for row in self.rows if row.features == features and pool in (None, row.pool)]
        return max(rows, key=lambda row: row.value, default=None)


@dataclass(frozen=True, kw_only=True)
class CurveResult(FeatureMeasurement):
    """A label-budget curve.

    shots: numbers of training labels per class. draws: number of random choices of labels for each number.
    """

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

    task: name of the method ("classify", "segment", "detect", "linear_probe"). metric: key of the score in `numbers`.
    words: {key: name in texts} of the reported metrics, beginning with the score; empty in results of earlier versions.
    low, high: 95 % interval of the score. by_class: IoU or AP50 of every class, or None for a class without a defined
    score. best: the best test during training, selected on the test images. averaged: the score with the moving average
    of the weights.
    initial_run: the run that the initial weights are from.
    """

    task: str
    metric: str
    numbers: dict[str, float]
    data: ImageSet
    test: TestIdentity
    step: int | None = None
    low: float | None = None
    high: float | None = None
    words: dict[str, str] = field(default_factory=dict)
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
        """The score: `numbers[metric]`."""
        return self.numbers[self.metric]

    @property
    def metric_words(self) -> dict[str, str]:
        """Names of the reported metrics in texts, by key, the score first."""
        known = self.words or {name: words for name, words in METRIC_WORDS.items() if name in self.numbers}
        return {self.metric: known.get(self.metric, self.metric), **known}


@dataclass(frozen=True, kw_only=True)
class BaselineLosses:
    """Losses of a pre-training run on fixed images, and losses of trivial predictions on the same images.

    guesses: loss of each trivial prediction, by name. losses, held_out_losses: (step, loss) pairs, in order of steps.
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


# Results of written files


@dataclass(frozen=True, kw_only=True)
class EmbedResult:
    """The result of `unmask embed`.

    out: path of the table. images: number of its rows. left_out: number of unreadable images. columns: names of the
    columns, in order. width: length of a feature vector. step: step of the checkpoint.
    """

    out: str
    images: int
    left_out: int
    columns: tuple[str, ...]
    width: int
    step: int

    def to_json(self) -> dict[str, Any]:
        """Return the object that --json prints."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ReconstructResult:
    """The result of `unmask reconstruct`.

    picture: path of the picture. losses: loss of the method on the drawn images ("loss"), and losses of trivial
    predictions, by name.
    """

    picture: str
    losses: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return the object that --json prints, in which the losses are keys beside "picture"."""
        return {"picture": self.picture, **self.losses}


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """The result of `unmask predict`.

    out: path of the file or folder. images: number of images with predictions. left_out: number of unreadable images.
    classes: number of predicted images, pixels or boxes of each class.
    """

    out: str
    images: int
    left_out: int
    classes: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the object that --json prints."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The result of `unmask export`.

    run, step: the exported checkpoint. to: the target. out: path of the file or folder. card: path of the model card.
    what: the model in the terms of the other library. load: Python code that loads it. notes: sentences about omitted
    parts. difference: largest absolute difference between the outputs of the other library and of the run, or None if
    that library cannot be used here. tested: a sentence about this comparison.
    """

    run: str
    to: str
    out: str
    card: str
    what: str
    step: int
    load: str
    notes: tuple[str, ...]
    difference: float | None
    tested: str

    def to_json(self) -> dict[str, Any]:
        """Return the object that --json prints."""
        return asdict(self)


# Reading and writing


@cache
def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    return TypeAdapter(kind)


def to_json(record: Record) -> dict[str, Any]:
    """Convert a record to the JSON object that --json prints and that is stored in a file."""
    name = next(name for name, kind in RECORDS.items() if type(record) is kind)
    return {RECORD: name, **_adapter(type(record)).dump_python(record, mode="json")}


def from_json(found: Mapping[str, Any]) -> Record:
    """Convert a JSON object of this version or of an earlier version to a record. Raises UserError."""
    found = found if RECORD in found else from_earlier_version(found)
    name = found[RECORD]
    if name not in RECORDS:
        raise UserError(
            f"got a result of record {name!r}; expected {', '.join(RECORDS)}; update unmask if a newer version wrote "
            "it, or measure again"
        )
    try:
        return _adapter(RECORDS[name]).validate_python(dict(found))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"got a {name} result with an invalid {where}: {first['msg']}; measure again") from None


T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class Results:
    """The results of a run.

    records: records by file name, without .json. damaged: one message for each file that is damaged or does not contain
    a result.
    """

    records: Mapping[str, Record]
    damaged: tuple[str, ...] = ()

    @property
    def probes(self) -> tuple[ProbeResult, ...]:
        """Probe results, grouped by data set, with linear probes first, then in order of steps."""
        return tuple(sorted(self._of(ProbeResult), key=_order))

    @property
    def curves(self) -> tuple[CurveResult, ...]:
        return tuple(sorted(self._of(CurveResult), key=_order))

    @property
    def finetuned(self) -> FinetuneResult | None:
        """The score of a fine-tuned run, or None for other runs and for runs that have not been tested."""
        return next(self._of(FinetuneResult), None)

    @property
    def baselines(self) -> BaselineLosses | None:
        return next(self._of(BaselineLosses), None)

    def _of(self, kind: type[T]) -> Iterator[T]:
        return (record for record in self.records.values() if isinstance(record, kind))


def _order(record: FeatureMeasurement) -> tuple[Any, ...]:
    """Return the key for sorting: class labels before tables, then by data set, linear before kNN, few labels first."""
    kinds = ("linear", "knn", "attentive")
    place = kinds.index(record.kind) if record.kind in kinds else len(kinds)
    budgets = record.budgets or (1 << 40,)
    return record.targets is not None, str(record.data), place, record.kind, budgets, record.step or 0


def read_results(run: RunFolder) -> Results:
    """Read all results of a run. Damaged files raise no error; they are reported in `Results.damaged`."""
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
    """Return the score of a fine-tuned run's last weights, or None if they have not been tested yet."""
    found = read_results(run).finetuned
    return found if found is not None and found.step == run.read("plan.json")["steps"] else None
