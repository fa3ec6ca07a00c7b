"""What a kind of probe offers. One file of `evals/probes/` is one kind; its name is the value of --kind.

The file defines `PROBE`, an instance of one of three classes:

- `PooledProbe` is fitted to pooled features, the class token or the mean over patches (knn, linear);
- `TokenProbe` is fitted to all tokens (attentive);
- `LabelFreeMeasure` is a number of the features alone (rankme).

Everything else follows from it: the options, the feature sets and controls, intervals, the result, the report.

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

if TYPE_CHECKING:
    import numpy as np

    from unmask.evals.frozen_features import Tokens
    from unmask.results import FeatureScore


@dataclass(frozen=True, kw_only=True)
class TrainingTargets:
    """What a probe is fitted to: `y` classes (n,) int64, or (n, T) float64 of 0 and 1 or of quantities.

    task: CLASSES, MULTILABEL or REGRESSION of `results.py`. seed: of every random choice. device: for probes in torch.
    """

    y: np.ndarray
    task: str
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A fitted probe: `predict` maps test features to classes (m,) int64, or to scores or quantities (m, T) float64.

    chosen: hyperparameters that the fit chose, by name. converged: False where the solver stopped at its limit.
    """

    predict: Callable[..., np.ndarray]
    chosen: dict[str, float | None] = field(default_factory=dict)
    converged: bool = True


@dataclass(frozen=True, kw_only=True)
class PooledProbe:
    """A probe of pooled features.

    title: for headings ("Linear probe"). phrase: for sentences ("a linear probe"). protocol: task -> what is fitted, in
    words. fit: features (n, D) float32 and targets -> a fitted probe, whose `predict` takes features (m, D).
    """

    title: str
    phrase: str
    protocol: Callable[[str], str]
    fit: Callable[[np.ndarray, TrainingTargets], Fitted]


@dataclass(frozen=True, kw_only=True)
class TokenProbe:
    """A probe of all tokens. As `PooledProbe`, but fit: `Tokens` and the positions (n,) of the training images in them.

    `predict` takes the `Tokens` of test images.
    """

    title: str
    phrase: str
    protocol: Callable[[str], str]
    fit: Callable[[Tokens, np.ndarray, TrainingTargets], Fitted]


@dataclass(frozen=True, kw_only=True)
class LabelFreeMeasure:
    """A number of the features of any images, labelled or not; it is always computed of the controls too.

    metric: what the number is called. protocol: how it is computed, in words. measure: features (n, D) -> the number.
    verdict: the scores of all feature sets, and the smaller of n and D of the run's own -> what they mean, in words.
    """

    title: str
    metric: str
    protocol: str
    measure: Callable[[np.ndarray], float]
    verdict: Callable[[Sequence[FeatureScore], int], str]


ProbeKind = PooledProbe | TokenProbe | LabelFreeMeasure


def kind_names() -> list[str]:
    """Return the values of --kind: the files of `evals/probes/`. Imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules(unmask.evals.probes.__path__))


def require_kind(name: str, also: Sequence[str] = ()) -> None:
    """Raise UserError for a kind that does not exist. also: kinds that are implemented elsewhere."""
    if name not in (known := [*kind_names(), *also]):
        raise UserError(f"got probe kind {name!r}; expected {', '.join(known[:-1])} or {known[-1]}")


def find_kind(name: str) -> ProbeKind:
    """Return `PROBE` of `evals/probes/<name>.py`. Raises UserError for a kind that does not exist."""
    require_kind(name)
    module = importlib.import_module(f"unmask.evals.probes.{name}")
    return module.PROBE
