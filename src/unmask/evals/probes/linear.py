"""Linear probe: a linear classifier or linear regression, fitted to pooled features.

Classes are predicted by multinomial logistic regression (scikit-learn, L-BFGS) on standardised features, multi-label
targets by one logistic regression per label, and quantities by ridge regression.

This probe is cheaper than that of the MAE paper (SGD with augmentation on the class token after BatchNorm, He et al.
2021, A.1), which is available as `--kind paper-linear`. The scores of the two are close, but not equal. The strength of
the regularisation is chosen on a held-out fifth of the training images, never on test images.

Letters: n training images, m test images, D width, T target columns.
"""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from unmask.data.annotations.splits import HOLD_OUT_FOR_C, hold_out
from unmask.errors import UserError
from unmask.evals.measures import average_precision, by_column
from unmask.evals.probe_kind import Fitted, PooledProbe, TrainingTargets
from unmask.results import CLASSES, MULTILABEL

C_GRID = tuple(10.0**power for power in range(-5, 3))
C_WITHOUT_CHOICE = 0.01
PENALTIES = tuple(10.0**power for power in range(-2, 7))
PENALTY_WITHOUT_CHOICE = 100.0
MAX_ITERATIONS, FINAL_ITERATIONS = 500, 5_000
"""Iteration limits of the fits that choose C, and of the final fit, which should converge."""


class Standardise:
    """Standardise features by the mean and standard deviation of the training features (n, D).

    Features that are constant in the training images become 0, even if they vary by float32 rounding. scikit-learn's
    StandardScaler would scale such rounding errors up to noise of variance 1, because it treats a feature as constant
    only if it varies by no more than float64 rounding.
    """

    def __init__(self, x: np.ndarray) -> None:
        mean, std = x.mean(0, dtype=np.float64), x.std(0, dtype=np.float64)
        std[std <= 1e-6 * np.abs(mean)] = 1.0
        self.mean, self.std = mean.astype(np.float32), std.astype(np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (x - self.mean) / self.std


def fit_linear(x: np.ndarray, targets: TrainingTargets, *, c: float | None = None) -> Fitted:
    """Fit the linear probe for the task of the targets to features (n, D).

    c: inverse regularisation strength for classes, or None to choose it. Raises UserError for fewer than
    two classes.
    """
    if targets.task == CLASSES:
        return fit_classes(x, targets.y, seed=targets.seed, c=c)
    fit = fit_labels if targets.task == MULTILABEL else fit_quantities
    return fit(x, targets.y, seed=targets.seed)


def fit_classes(x: np.ndarray, y: np.ndarray, *, seed: int = 0, c: float | None = None) -> Fitted:
    """Fit logistic regression to features (n, D) with labels `y` (n,). The result predicts classes (m,) int64.

    C, the inverse regularisation strength, is the power of ten from 1e-5 to 1e2 with the best accuracy on a held-out
    fifth of every class; ties are broken by the log-loss. `seed` determines the held-out images. The search goes from
    strong to weak regularisation, starts each fit from the previous one, and ends after two values in a row without
    improvement. Then the model is fitted to all training images with this C. With one image per class, none can be held
    out, so C is 0.01. c: value of C, or None to choose it. Raises UserError for fewer than two classes.
    """
    y = np.asarray(y, np.int64)
    if len(np.unique(y)) < 2:
        raise UserError("got labels of fewer than two classes; expected at least two; give images of another class too")
    standardise = Standardise(x)
    x = standardise(x)
    fit, held = hold_out(y, np.arange(len(y)), seed, HOLD_OUT_FOR_C)
    if c is None:
        c = choose_c(x[fit], y[fit], x[held], y[held]) if len(held) else C_WITHOUT_CHOICE
    model, converged = _fit(LogisticRegression(max_iter=FINAL_ITERATIONS, C=c), x, y)
    return Fitted(
        predict=lambda test_x: np.asarray(model.predict(standardise(test_x)), np.int64),
        chosen={"c": c},
        converged=converged,
    )


def fit_labels(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> Fitted:
    """Fit one logistic regression per label (column) of `y` (n, T), 0 or 1. The result predicts scores (m, T) float64.

    All labels share one C: the power of ten with the best mean average precision on a held-out fifth of the training
    images. A label that all training images have, or none has, gets score 0 for every test image.
    """
    standardise = Standardise(x)
    x = standardise(x)
    fit, held = hold_out(np.zeros(len(y), np.int64), np.arange(len(y)), seed, HOLD_OUT_FOR_C)
    c, worse, best = C_WITHOUT_CHOICE, 0, -np.inf
    models = [LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True) for _ in y.T]
    for tried in C_GRID if len(held) else ():
        _fit_each(models, tried, x[fit], y[fit])
        precision = by_column(average_precision, y[held], _scores(models, y[fit], x[held]))
        score = -1.0 if np.isnan(precision).all() else float(np.nanmean(precision))
        best, c, worse = (score, tried, 0) if score > best else (best, c, worse + 1)
        if worse == 2:
            break
    models = [LogisticRegression(max_iter=FINAL_ITERATIONS) for _ in y.T]
    converged = _fit_each(models, c, x, y)
    return Fitted(predict=lambda test_x: _scores(models, y, standardise(test_x)), chosen={"c": c}, converged=converged)


def _fit_each(models: list[LogisticRegression], c: float, x: np.ndarray, y: np.ndarray) -> bool:
    """Fit the models of all labels that vary among the training images; return whether all models converged."""
    varying = [(model, column) for model, column in zip(models, y.T, strict=True) if np.ptp(column)]
    converged = [_fit(model.set_params(C=c), x, column)[1] for model, column in varying]
    return all(converged)


def _scores(models: list[LogisticRegression], y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    """Return the scores (m, T) float64 of test features `test_x` under the models of all labels."""
    scores = np.zeros((len(test_x), y.shape[1]))
    for place, model in enumerate(models):
        if np.ptp(y[:, place]):
            scores[:, place] = model.decision_function(test_x)
    return scores


def fit_quantities(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> Fitted:
    """Fit ridge regression to `y` (n, T) float64. The result predicts quantities (m, T).

    The columns of `y` are standardised and share one penalty: the power of ten from 1e-2 to 1e6 with the smallest mean
    squared error on a held-out fifth of the training images. The chosen `c` is 1 / penalty.
    """
    standardise = Standardise(x)
    x = standardise(x)
    middle, scale = y.mean(0), y.std(0)
    scale[scale == 0] = 1.0
    y = (y - middle) / scale
    fit, held = hold_out(np.zeros(len(y), np.int64), np.arange(len(y)), seed, HOLD_OUT_FOR_C)
    penalty = PENALTY_WITHOUT_CHOICE
    with threadpool_limits(1):
        if len(held) > 1:
            errors = [
                float(np.square(_predict(_ridge(alpha, x[fit], y[fit]), x[held]) - y[held]).mean())
                for alpha in PENALTIES
            ]
            penalty = PENALTIES[int(np.argmin(errors))]
        model = _ridge(penalty, x, y)

    def predict(test_x: np.ndarray) -> np.ndarray:
        with threadpool_limits(1):
            return _predict(model, standardise(test_x)) * scale + middle

    return Fitted(predict=predict, chosen={"c": 1 / penalty})


def _ridge(alpha: float, x: np.ndarray, y: np.ndarray) -> Ridge:
    return Ridge(alpha=alpha).fit(x.astype(np.float64), y)


def _predict(model: Ridge, x: np.ndarray) -> np.ndarray:
    return np.asarray(model.predict(x.astype(np.float64))).reshape(len(x), -1)


def choose_c(fit_x: np.ndarray, fit_y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> float:
    """Return the C of `C_GRID` with the best accuracy on held-out images; the lowest log-loss breaks ties."""
    # LogisticRegressionCV is as fast, but chooses the smallest C among equal accuracies instead of the lowest log-loss,
    # which would change published results.
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    best, best_c, worse = (-1.0, -np.inf), C_GRID[0], 0
    for c in C_GRID:
        model, _ = _fit(model.set_params(C=c), fit_x, fit_y)
        chances = model.predict_proba(held_x)
        place = np.searchsorted(model.classes_, held_y)  # every held-out class also has fitted images
        right = float((chances.argmax(1) == place).mean())
        score = right, float(np.log(chances[np.arange(len(place)), place] + 1e-12).mean())
        best, best_c, worse = (score, c, 0) if score > best else (best, best_c, worse + 1)
        if worse == 2:
            break
    return best_c


def _fit(model: LogisticRegression, x: np.ndarray, y: np.ndarray) -> tuple[LogisticRegression, bool]:
    """Fit a logistic regression in place; return it and whether L-BFGS converged."""
    # L-BFGS computes many small products. With several threads on busy cores it was 40 times slower than with one.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `Fitted.converged` reports it instead
        model.fit(x, y)
    return model, int(np.max(model.n_iter_)) < model.max_iter


def _protocol(task: str) -> str:
    chosen = "chosen on a fifth of the training images"
    if task == CLASSES:
        return f"logistic regression (L-BFGS) on standardised features, C {chosen}"
    if task == MULTILABEL:
        return f"a logistic regression for each label on standardised features, one C {chosen}"
    return f"ridge regression on standardised features, its penalty {chosen}"


PROBE = PooledProbe(title="Linear probe", phrase="a linear probe", protocol=_protocol, fit=fit_linear)
