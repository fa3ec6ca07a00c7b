"""The linear probe agrees with scikit-learn, and its hyperparameters do not depend on test images."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from unmask.data.annotations.splits import HOLD_OUT_FOR_C, hold_out
from unmask.evals.probes import linear as module
from unmask.evals.probes.linear import (
    C_GRID,
    C_WITHOUT_CHOICE,
    PENALTIES,
    fit_classes,
    fit_labels,
    fit_quantities,
)


class Fit:
    """Fit a linear probe and predict the classes of test features."""

    def __init__(self, fitted, test_x):
        self.predictions, self.c, self.converged = fitted.predict(test_x), fitted.chosen["c"], fitted.converged


def linear(train_x, train_y, test_x, **more):
    return Fit(fit_classes(train_x, train_y, **more), test_x)


def linear_labels(train_x, train_y, test_x):
    return Fit(fit_labels(train_x, train_y), test_x)


def ridge(train_x, train_y, test_x):
    return Fit(fit_quantities(train_x, train_y), test_x)


def blobs(count, *, classes=3, width=6, spread=1.0, seed=0):
    """Return overlapping clusters around fixed centres; every feature has its own offset and scale."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    y = np.arange(count) % classes
    x = centres[y] + spread * rng.normal(size=(count, width))
    return (x * np.logspace(-1, 2, width) + 7).astype(np.float32), y


def direct(train_x, train_y, test_x, c):
    scaler = StandardScaler().fit(train_x.astype(np.float64))
    model = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(scaler.transform(train_x), train_y)
    return model.predict(scaler.transform(test_x))


def test_predictions_agree_with_scikit_learn_at_the_chosen_c():
    (train_x, train_y), (test_x, test_y) = blobs(300), blobs(200, seed=1)
    fit = linear(train_x, train_y, test_x)
    assert fit.converged
    assert fit.c in C_GRID
    assert fit.predictions.dtype == np.int64
    assert (fit.predictions == direct(train_x, train_y, test_x, fit.c)).mean() >= 0.995
    assert (fit.predictions == test_y).mean() > 0.7


def test_digits_are_classified_as_well_as_by_scikit_learn():
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    fit = linear(x[:1000], y[:1000], x[1000:])
    assert (fit.predictions == y[1000:]).mean() > 0.88
    assert (fit.predictions == direct(x[:1000], y[:1000], x[1000:], fit.c)).mean() > 0.99


def test_the_chosen_c_has_the_best_score_on_held_out_images():
    train_x, train_y = blobs(240, spread=2.5)
    fit_rows, held = hold_out(train_y, np.arange(240), 0, HOLD_OUT_FOR_C)
    mean, std = train_x.mean(0), train_x.std(0)
    x = (train_x - mean) / std
    scores = []
    for c in C_GRID:
        model = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x[fit_rows], train_y[fit_rows])
        chances = model.predict_proba(x[held])
        scores.append(((chances.argmax(1) == train_y[held]).mean(), np.log(chances[range(48), train_y[held]]).mean()))
    best, c, worse = scores[0], C_GRID[0], 0
    for score, value in list(zip(scores, C_GRID, strict=True))[1:]:
        best, c, worse = (score, value, 0) if score > best else (best, c, worse + 1)
        if worse == 2:
            break
    assert linear(train_x, train_y, train_x).c == c


def test_the_search_for_c_ends_after_two_values_without_improvement(monkeypatch):
    shares, tried = (
        [0.5, 0.4, 0.6, 0.6, 0.5, 0.9, 0.9, 0.9],
        [],
    )  # accuracy on held-out images for each C

    class Scripted:
        classes_ = np.array([0, 1])

        def predict_proba(self, held_x):
            right = np.arange(len(held_x)) < shares[len(tried) - 1] * len(held_x)
            return np.stack([right, ~right], 1) * 0.98 + 0.01

    monkeypatch.setattr(module, "_fit", lambda model, x, y: (tried.append(model.C) or Scripted(), True))
    monkeypatch.setattr(Scripted, "set_params", lambda self, C: LogisticRegression(C=C), raising=False)
    held = np.zeros((10, 2), np.float32), np.zeros(10, int)
    assert module.choose_c(*held, *held) == C_GRID[2]
    assert tried == list(C_GRID[:5])


def test_test_images_never_influence_the_fit():
    train_x, train_y = blobs(200, spread=2)
    test_x, _ = blobs(60, seed=1)
    alone = [linear(train_x, train_y, test_x[i : i + 1]).predictions[0] for i in range(3)]
    shifted = np.concatenate([test_x[:3], 1e4 * test_x])  # statistics of these features would change the predictions
    fit = linear(train_x, train_y, shifted)
    assert fit.predictions[:3].tolist() == alone
    assert fit.c == linear(train_x, train_y, test_x).c


def test_held_out_images_are_stratified_and_depend_only_on_the_seed():
    labels = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    fit, held = hold_out(labels, np.arange(63), 0, 2)
    assert sorted([*fit, *held]) == list(range(63))
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 2, 1, 0]
    np.testing.assert_array_equal(held, hold_out(labels, np.arange(63), 0, 2)[1])
    assert held.tolist() != hold_out(labels, np.arange(63), 1, 2)[1].tolist()
    assert held.tolist() != hold_out(labels, np.arange(63), 0, 0)[1].tolist(), "each purpose has its own random split"


def test_another_seed_holds_out_other_images(monkeypatch):
    seen = []
    real = module.choose_c
    monkeypatch.setattr(module, "choose_c", lambda *parts: seen.append(parts[2].tobytes()) or real(*parts))
    train_x, train_y = blobs(60)
    for seed in (0, 0, 1):
        linear(train_x, train_y, train_x, seed=seed)
    assert seen[0] == seen[1] != seen[2]


def test_with_one_image_per_class_c_is_the_default():
    train_x, train_y = blobs(3, spread=0)
    fit = linear(train_x, train_y, train_x)
    assert fit.c == C_WITHOUT_CHOICE
    assert fit.predictions.tolist() == [0, 1, 2]


def test_the_only_image_of_a_class_is_used_for_the_fit_and_not_held_out():
    train_x, train_y = blobs(41, classes=2, spread=0.1)
    train_y[-1] = 7  # class numbers with a gap
    train_x[-1] += 500
    fit = linear(train_x, train_y, train_x)
    assert fit.c in C_GRID
    assert fit.predictions[-1] == 7


def test_constant_features_do_not_change_predictions():
    (train_x, train_y), (test_x, _) = blobs(120), blobs(50, seed=1)
    plain = linear(train_x, train_y, test_x)
    for value in (
        0.0,
        0.1,
        1e6,
    ):  # 0.1 is not exact in float32, so its float64 mean differs slightly from it
        train = np.column_stack([train_x, np.full(120, value, np.float32)])
        test = np.column_stack([test_x, np.full(50, value, np.float32)])
        fit = linear(train, train_y, test)
        np.testing.assert_array_equal(fit.predictions, plain.predictions)
    noise = np.random.default_rng(0).integers(-1, 2, 120) * np.spacing(
        np.float32(7)
    )  # values that differ by rounding errors only
    train = np.column_stack([train_x, np.float32(7) + noise.astype(np.float32)])
    test = np.column_stack([test_x, np.full(50, 7.001, np.float32)])
    np.testing.assert_array_equal(linear(train, train_y, test).predictions, plain.predictions)
    assert np.isfinite(linear(np.ones((6, 2), np.float32), np.arange(6) % 2, np.ones((1, 2), np.float32)).c)


def test_fewer_than_two_classes_are_rejected():
    with pytest.raises(ValueError, match="expected at least two"):
        linear(np.ones((4, 2), np.float32), np.zeros(4, int), np.ones((1, 2), np.float32))


def test_a_fit_that_reached_its_limit_of_iterations_is_not_converged(monkeypatch):
    monkeypatch.setattr(module, "FINAL_ITERATIONS", 2)
    train_x, train_y = blobs(200, spread=3)
    assert not linear(train_x, train_y, train_x).converged


def test_labels_of_any_dtype_are_accepted_and_inputs_not_modified():
    train_x, train_y = blobs(60)
    before = train_x.copy()
    one, other = linear(train_x, train_y.astype(np.int32), train_x), linear(train_x, train_y.tolist(), train_x)
    np.testing.assert_array_equal(one.predictions, other.predictions)
    np.testing.assert_array_equal(train_x, before)


def test_a_c_given_by_the_caller_is_used():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    x = (rng.normal(size=(60, 4)) + labels[:, None]).astype(np.float32)
    given = linear(x, labels, x, c=0.003)
    assert given.c == 0.003
    assert linear(x, labels, x).c in C_GRID, "without c, C is chosen from the grid, which has no 0.003"


def marked(count, seed=0):
    """Return features and three multi-label targets, each along its own direction."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((count, 3)) < [0.5, 0.3, 0.1]).astype(float)
    x = truth @ np.eye(3, 8) * 1.5 + rng.normal(size=(count, 8))
    return (x * np.logspace(-1, 2, 8) + 7).astype(np.float32), truth


def test_every_label_has_its_own_logistic_regression():
    (x, truth), (test_x, test_truth) = marked(400), marked(300, seed=1)
    fit = linear_labels(x, truth, test_x)
    assert fit.converged
    scaler = StandardScaler().fit(x.astype(np.float64))
    for label in range(3):
        model = LogisticRegression(C=fit.c, max_iter=5000, tol=1e-8).fit(scaler.transform(x), truth[:, label])
        want = model.decision_function(scaler.transform(test_x))
        np.testing.assert_allclose(fit.predictions[:, label], want, atol=0.02)
        precision = average_precision_score(test_truth[:, label], fit.predictions[:, label])
        assert precision > average_precision_score(test_truth[:, label], np.zeros(300)) + 0.2
    truth[:, 1] = 0
    without = linear_labels(x, truth, test_x)
    assert np.ptp(without.predictions[:, 1]) == 0, "a label without positive images gets equal scores"
    assert np.ptp(without.predictions[:, 0]) > 0


def test_ridge_regression_equals_scikit_learn_with_the_best_held_out_penalty():
    rng = np.random.default_rng(0)
    x, _ = marked(120)
    x = np.concatenate(
        [x, rng.normal(size=(120, 80)).astype(np.float32)], 1
    )  # more features than images, so the penalty matters
    y = np.stack([x[:, 0] + rng.normal(size=120), 1000 * x[:, 9] + 5e4], 1)
    test_x, test_y = x[80:], y[80:]
    x, y = x[:80], y[:80].astype(np.float64)
    fit = ridge(x, y, test_x)
    scaler, scaled = StandardScaler().fit(x.astype(np.float64)), StandardScaler().fit(y)
    inner, held = hold_out(np.zeros(80, np.int64), np.arange(80), 0, HOLD_OUT_FOR_C)
    errors = []
    for alpha in PENALTIES:
        model = Ridge(alpha).fit(scaler.transform(x)[inner], scaled.transform(y)[inner])
        errors.append(np.square(model.predict(scaler.transform(x)[held]) - scaled.transform(y)[held]).mean())
    assert 1 / fit.c == pytest.approx(PENALTIES[int(np.argmin(errors))])
    want = Ridge(1 / fit.c).fit(scaler.transform(x), scaled.transform(y)).predict(scaler.transform(test_x))
    np.testing.assert_allclose(fit.predictions, scaled.inverse_transform(want), rtol=1e-3, atol=1e-2)
    assert np.corrcoef(fit.predictions[:, 1], test_y[:, 1])[0, 1] > 0.5
