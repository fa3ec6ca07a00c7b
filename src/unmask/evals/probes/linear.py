"""Linear probe: how much of the classes can one linear map read out of frozen features?

Multinomial logistic regression (scikit-learn, L-BFGS) on standardised features. This is the cheap cousin of the paper's
probe (SGD with augmentation on the class token under a BatchNorm, He et al. 2021, A.1), which is a Method here and runs
in the loop; numbers of the two are close, not equal. Differs from "maximum over epochs on the test set": nothing of a
fit is chosen on test images. Labels of which an image may have several, and quantities, have their own linear maps:
one logistic regression a label, and ridge regression.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from unmask.data.annotations.splits import HOLD_OUT_FOR_C, hold_out
from unmask.errors import UserError
from unmask.evals.measures import average_precision, by_column

C_GRID = tuple(10.0**power for power in range(-5, 3))
C_WITHOUT_CHOICE = 0.01
PENALTIES = tuple(10.0**power for power in range(-2, 7))
PENALTY_WITHOUT_CHOICE = 100.0
MAX_ITERATIONS = 500  # of the fits among which C is chosen
FINAL_ITERATIONS = 5_000  # of the fit that is measured: it should converge, whatever the choice may cost


@dataclass(frozen=True)
class LinearFit:
    """`predictions` (m,) int64 on the test images; `c` the inverse regularisation used; `chosen` False where too few
    labels were given to choose it; `converged` False where L-BFGS stopped at its limit of iterations."""

    predictions: np.ndarray
    c: float
    chosen: bool
    converged: bool


@dataclass(frozen=True)
class ScoresFit:
    """As `LinearFit`, where the answers are no classes: `predictions` (m, T) float64, a score or a number a column."""

    predictions: np.ndarray
    c: float
    chosen: bool
    converged: bool


def linear(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, seed: int = 0, c: float | None = None
) -> LinearFit:
    """Fit on `train_x` (n, D) with labels `train_y` (n,), predict `test_x` (m, D).

    Features are standardised with the training set's mean and standard deviation (a constant feature stays zero). C is
    the decade from 1e-5 to 1e2 with the best accuracy on a fifth of every class of the training set, picked by `seed`
    (equal accuracies: the best log-loss). The path goes from strong to weak regularisation, each fit starting from the
    one before, and ends early after two values in a row that are no better. Then all training images are fitted with
    that C. With one image per class there is nothing to hold out: C = 0.01. c: this C and no choice. Raises ValueError
    for fewer than two classes.
    """
    train_y = np.asarray(train_y, np.int64)
    if len(np.unique(train_y)) < 2:
        raise UserError("labels of fewer than two classes came; a linear probe needs at least two classes")
    train_x, test_x = standardised(train_x, test_x)

    fit, held = hold_out(train_y, np.arange(len(train_y)), seed, HOLD_OUT_FOR_C)
    chosen = c is None and len(held) > 0
    if chosen:
        c = _choose_c(train_x[fit], train_y[fit], train_x[held], train_y[held])
    c = C_WITHOUT_CHOICE if c is None else c
    model, converged = _fit(LogisticRegression(max_iter=FINAL_ITERATIONS, C=c), train_x, train_y)
    return LinearFit(np.asarray(model.predict(test_x), np.int64), c, chosen, converged)


def linear_labels(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, seed: int = 0) -> ScoresFit:
    """As `linear`, for labels of which an image may have any number: `train_y` (n, L) of 0 and 1, one against the rest.

    One C for all labels, the decade with the best mean average precision on a fifth of the training images. A label
    that no training image has, or every one, gets the same score for all images.
    """
    train_x, test_x = standardised(train_x, test_x)
    fit, held = hold_out(np.zeros(len(train_y), np.int64), np.arange(len(train_y)), seed, HOLD_OUT_FOR_C)
    chosen, c, worse = len(held) > 0, C_WITHOUT_CHOICE, 0
    if chosen:
        best = -np.inf
        models = [LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True) for _ in train_y.T]
        for tried in C_GRID:
            scores, _ = _each_label(models, tried, train_x[fit], train_y[fit], train_x[held])
            precision = by_column(average_precision, train_y[held], scores)
            score = -1.0 if np.isnan(precision).all() else float(np.nanmean(precision))
            best, c, worse = (score, tried, 0) if score > best else (best, c, worse + 1)
            if worse == 2:
                break
    models = [LogisticRegression(max_iter=FINAL_ITERATIONS) for _ in train_y.T]
    scores, converged = _each_label(models, c, train_x, train_y, test_x)
    return ScoresFit(scores, c, chosen, converged)


def _each_label(
    models: list[LogisticRegression], c: float, x: np.ndarray, y: np.ndarray, test_x: np.ndarray
) -> tuple[np.ndarray, bool]:
    scores, converged = np.zeros((len(test_x), y.shape[1])), True
    for place, model in enumerate(models):
        if np.ptp(y[:, place]):
            model, done = _fit(model.set_params(C=c), x, y[:, place])
            scores[:, place], converged = model.decision_function(test_x), converged and done
    return scores, converged


def ridge(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, seed: int = 0) -> ScoresFit:
    """Least squares with a penalty on standardised features: `train_y` (n, T) float64 -> predictions (m, T).

    One penalty for all columns (each in units of its own standard deviation), the decade from 1e-2 to 1e6 with the
    smallest square error on a fifth of the training images; `c` is 1 / penalty.
    """
    train_x, test_x = standardised(train_x, test_x)
    middle, scale = train_y.mean(0), train_y.std(0)
    scale[scale == 0] = 1.0
    y = (train_y - middle) / scale
    fit, held = hold_out(np.zeros(len(y), np.int64), np.arange(len(y)), seed, HOLD_OUT_FOR_C)
    chosen, penalty = len(held) > 1, PENALTY_WITHOUT_CHOICE
    with threadpool_limits(1):
        if chosen:
            errors = [
                float(np.square(_ridge(alpha, train_x[fit], y[fit], train_x[held]) - y[held]).mean())
                for alpha in PENALTIES
            ]
            penalty = PENALTIES[int(np.argmin(errors))]
        guess = _ridge(penalty, train_x, y, test_x)
    return ScoresFit(guess * scale + middle, 1 / penalty, chosen, True)


def _ridge(alpha: float, x: np.ndarray, y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    model = Ridge(alpha=alpha).fit(x.astype(np.float64), y)
    return np.asarray(model.predict(test_x.astype(np.float64))).reshape(len(test_x), -1)


def standardised(train_x: np.ndarray, test_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the training set's mean 0 and standard deviation 1; a constant feature stays zero."""
    mean, std = train_x.mean(0, dtype=np.float64), train_x.std(0, dtype=np.float64)
    std[std <= 1e-6 * np.abs(mean)] = 1.0  # what varies by float32 rounding alone is constant
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    return (train_x - mean) / std, (test_x - mean) / std


def _choose_c(fit_x: np.ndarray, fit_y: np.ndarray, held_x: np.ndarray, held_y: np.ndarray) -> float:
    model = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
    best, best_c, worse = (-1.0, -np.inf), C_GRID[0], 0
    for c in C_GRID:
        model, _ = _fit(model.set_params(C=c), fit_x, fit_y)
        chances = model.predict_proba(held_x)
        place = np.searchsorted(model.classes_, held_y)  # every class keeps an image to be fitted on
        right = float((chances.argmax(1) == place).mean())
        score = right, float(np.log(chances[np.arange(len(place)), place] + 1e-12).mean())
        best, best_c, worse = (score, c, 0) if score > best else (best, best_c, worse + 1)
        if worse == 2:
            break
    return best_c


def _fit(model: LogisticRegression, x: np.ndarray, y: np.ndarray) -> tuple[LogisticRegression, bool]:
    """Fitted, and whether L-BFGS reached its tolerance."""
    # One thread: L-BFGS is many short products, and threads that wait for a busy core made it forty times slower.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a field of the result, not a line on the screen
        model.fit(x, y)
    return model, int(np.max(model.n_iter_)) < model.max_iter
