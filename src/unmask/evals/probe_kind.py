"""The interface of a kind of probe, which is defined by a file in `evals/probes/`.

The name of the file is the value of --kind. The first line of its docstring, "Title: description.", describes the kind
in the help of --kind. The file defines `PROBE`, an instance of one of three classes:

- `PooledProbe` is fitted to pooled features: the class token or the mean over patches (knn, linear);
- `TokenProbe` is fitted to all tokens (attentive);
- `LabelFreeMeasure` computes a number from the features without labels (rankme).

A new kind needs no other code: options, feature sets, controls, intervals, results and report work for every kind.

Letters: n training images, m test images, D width of a feature, T target columns.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import unmask.evals.probes
from unmask.errors import UserError
from unmask.results import CLASSES, MULTILABEL, POOLS, REGRESSION
from unmask.system.docstrings import first_line

if TYPE_CHECKING:
    import numpy as np

    from unmask.evals.frozen_features import Tokens
    from unmask.results import FeatureScore

ALL_TASKS = frozenset({CLASSES, MULTILABEL, REGRESSION})


@dataclass(frozen=True, kw_only=True)
class TrainingTargets:
    """The training targets of a probe. y: classes (n,) int64, or (n, T) float64 with 0 and 1, or with quantities.

    task: CLASSES, MULTILABEL or REGRESSION in `results.py`. seed: seed of all random choices. device: torch device on
    which probes are fitted.
    """

    y: np.ndarray
    task: str
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A fitted probe. predict: maps test features to classes (m,) int64, or scores or quantities (m, T) float64.

    chosen: hyperparameters chosen by the fit, by name. converged: False if the solver reached its iteration limit.
    """

    predict: Callable[..., np.ndarray]
    chosen: dict[str, float | None] = field(default_factory=dict)
    converged: bool = True


@dataclass(frozen=True, kw_only=True)
class PooledProbe:
    """A probe of pooled features.

    title: name of the probe in headings ("Linear probe"). phrase: its name in sentences ("a linear probe"). protocol:
    function that describes in words what is fitted for a task. fit: fits features (n, D) float32 to targets and returns
    a probe that predicts features (m, D). tasks: the types of targets that the probe accepts.
    """

    title: str
    phrase: str
    protocol: Callable[[str], str]
    fit: Callable[[np.ndarray, TrainingTargets], Fitted]
    tasks: frozenset[str] = ALL_TASKS


@dataclass(frozen=True, kw_only=True)
class TokenProbe:
    """A probe of all tokens. Fields that are not listed here are described in `PooledProbe`.

    pool: name of its pooling in records and tables ("attentive"). pool_title: the same in words ("attention over
    tokens"). fit: fits `Tokens`, at the positions (n,) of the training images, to targets and returns a probe that
    predicts the `Tokens` of test images.
    """

    title: str
    phrase: str
    pool: str
    pool_title: str
    protocol: Callable[[str], str]
    fit: Callable[[Tokens, np.ndarray, TrainingTargets], Fitted]
    tasks: frozenset[str] = ALL_TASKS


@dataclass(frozen=True, kw_only=True)
class LabelFreeMeasure:
    """A number that is computed from features without labels, always for the controls too.

    metric: name of the number. protocol: how the number is computed, in words. measure: function that maps features (n,
    D) to the number. verdict: function that describes the numbers of all feature sets in words; its second argument is
    min(n, D) of the run's own features.
    """

    title: str
    metric: str
    protocol: str
    measure: Callable[[np.ndarray], float]
    verdict: Callable[[Sequence[FeatureScore], int], str]


ProbeKind = PooledProbe | TokenProbe | LabelFreeMeasure


def kind_names() -> list[str]:
    """Return the values of --kind: the names of the files in `evals/probes/`, which are not imported."""
    return sorted(module.name for module in pkgutil.iter_modules(unmask.evals.probes.__path__))


def kind_descriptions() -> dict[str, str]:
    """Return the values of --kind with their descriptions: the first lines of the files' docstrings, after the title.

    The files are not imported.
    """
    lines = {name: first_line(f"unmask.evals.probes.{name}").removesuffix(".") for name in kind_names()}
    return {name: line.partition(": ")[2] or line for name, line in lines.items()}


def require_kind(name: str) -> None:
    """Raise UserError for an unknown kind of probe."""
    if name not in (known := kind_names()):
        raise UserError(f"got probe kind {name!r}; expected {', '.join(known[:-1])} or {known[-1]}")


def find_kind(name: str) -> ProbeKind:
    """Return `PROBE` of `evals/probes/<name>.py`. Raises UserError for an unknown kind."""
    require_kind(name)
    module = importlib.import_module(f"unmask.evals.probes.{name}")
    return module.PROBE


def require_task(name: str, probe: PooledProbe | TokenProbe, task: str) -> None:
    """Raise UserError if a kind of probe does not accept this type of targets."""
    if task not in probe.tasks:
        raise UserError(
            f"got targets of type {task}, but --kind {name} accepts only {' and '.join(sorted(probe.tasks))}; choose "
            "another --kind"
        )


def pool_title(kind: str, pool: str) -> str:
    """Describe a pooling in words. kind: the kind of probe; a probe of all tokens declares its own pooling."""
    if pool in POOLS or kind not in kind_names():
        return POOLS.get(pool, pool)
    probe = find_kind(kind)
    return probe.pool_title if isinstance(probe, TokenProbe) and probe.pool == pool else pool
