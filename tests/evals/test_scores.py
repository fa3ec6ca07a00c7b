"""Probes of synthetic features: poolings, controls, scores of every task, differences and caveats."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from feature_tables import measure, over, predictions_of
from sklearn.metrics import r2_score

from unmask.batch import Batch
from unmask.evals.feature_sets import with_controls
from unmask.evals.frozen_features import FeatureTable, collect_each
from unmask.evals.labelled_images import Labelling, few_shots, require_classes
from unmask.evals.probe_kind import kind_names, require_kind
from unmask.evals.probes import knn as knn_module
from unmask.evals.probes import linear as linear_module
from unmask.evals.scores import chance_level
from unmask.metrics.intervals import wilson
from unmask.nn.features import Features
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS

CLASSES = ("ant", "bee", "cow")


def table(labels, *, cls_noise=0.3, mean_noise=0.3, seed=0, cls=True, digest_from=0):
    """Return features that contain the class and noise."""
    labels = np.asarray(labels, np.int64)
    rng = np.random.default_rng(seed)
    axes = np.eye(3, 8)[labels]

    def noisy(amount):
        return (axes + amount * rng.normal(size=axes.shape)).astype(np.float32)

    return FeatureTable(
        index=np.arange(len(labels)),
        labels=labels,
        cls=noisy(cls_noise) if cls else None,
        mean=noisy(mean_noise),
        digest=np.arange(digest_from, digest_from + len(labels)).astype(np.uint64),
    )


def balanced(count):
    return np.arange(count) % 3


def run(train, test, *, labelling=None, **more):
    return measure(train, test, labelling=labelling or Labelling("classes", CLASSES), **more)


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_class_token_and_mean_are_both_measured_with_their_intervals(kind):
    found = run(
        table(balanced(90), cls_noise=0.7, mean_noise=0.05),
        table(balanced(60), cls_noise=0.7, seed=1, mean_noise=0.05, digest_from=500),
        kind=kind,
    )
    assert [(row.features, row.pool) for row in found.rows] == [(PRETRAINED, "cls"), (PRETRAINED, "mean")]
    for row in found.rows:
        assert row.value == row.correct / row.total
        assert (row.low, row.high) == wilson(row.correct, 60)
        assert row.fit.keys() == ({"c"} if kind == "linear" else set())
    assert found.rows[1].value == 1.0
    assert found.rows[1].value > found.rows[0].value > 0.6
    assert found.train_images == 90
    assert found.test_images == 60
    assert found.names == CLASSES
    assert found.shared == 0
    assert "mean over patches" in found.verdict, "the verdict describes the better pooling"


def test_an_encoder_without_class_token_has_one_row():
    found = run(table(balanced(30), cls=False), table(balanced(30), cls=False, seed=1, digest_from=500))
    assert [row.pool for row in found.rows] == ["mean"]


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_controls_are_measured_on_the_same_images_and_compared(kind):
    def tables(count, seed, first):
        labels = balanced(count)
        return {
            RAW_PIXELS: table(labels, cls=False, mean_noise=2.0, seed=seed, digest_from=first),
            RANDOM_INIT: table(labels, cls_noise=1.5, mean_noise=1.5, seed=seed + 10, digest_from=first),
            PRETRAINED: table(labels, cls_noise=0.2, mean_noise=0.2, seed=seed + 20, digest_from=first),
        }

    found = run(tables(300, 0, 0), tables(300, 1, 1000), kind=kind)
    assert [(row.features, row.pool) for row in found.rows] == [
        (RAW_PIXELS, "pixels"),
        (RANDOM_INIT, "cls"),
        (RANDOM_INIT, "mean"),
        (PRETRAINED, "cls"),
        (PRETRAINED, "mean"),
    ]
    assert found.verdict.startswith("Pre-training helps.")


class Encoder(torch.nn.Module):
    def forward(self, images):
        return Features(None, images.float().flatten(2).transpose(1, 2), images.shape[2:])


def test_raw_pixels_are_centred_and_features_of_encoders_are_not(monkeypatch):
    encoder, untrained = Encoder(), Encoder()
    assert with_controls(encoder, None) == {PRETRAINED: encoder}
    assert list(with_controls(encoder, untrained)) == [RAW_PIXELS, RANDOM_INIT, PRETRAINED]
    # Bright images have a large common mean; cosine similarity distinguishes the classes only after centring.
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(balanced(90))
    pixels = torch.full((90, 3, 4, 4), 200.0) + torch.from_numpy(rng.normal(size=(90, 3, 4, 4)))
    pixels[torch.arange(90), labels] += 2
    batch = Batch(pixels.float(), torch.arange(90), torch.zeros(90, dtype=torch.int64), labels)
    tables = collect_each(with_controls(encoder, untrained), over([batch]), device="cpu", precision="fp32")
    train = {
        name: FeatureTable(t.index[:60], t.labels[:60], None, t.mean[:60], t.digest[:60]) for name, t in tables.items()
    }
    test = {
        name: FeatureTable(t.index[60:], t.labels[60:], None, t.mean[60:], t.digest[60:]) for name, t in tables.items()
    }
    seen = []
    real = knn_module.knn
    monkeypatch.setattr(knn_module, "knn", lambda *parts: seen.append((parts[0], parts[2])) or real(*parts))
    raw = run(train, test).rows[0]
    assert raw.features == RAW_PIXELS
    assert raw.value > 0.9
    (train_x, test_x), (own_train, own_test) = seen[0], seen[1]
    mean = tables[RAW_PIXELS].mean[:60].mean(0)
    np.testing.assert_allclose(train_x + mean, tables[RAW_PIXELS].mean[:60], rtol=1e-5)
    np.testing.assert_allclose(test_x + mean, tables[RAW_PIXELS].mean[60:], rtol=1e-5)
    assert np.abs(train_x.mean(0)).max() < 1e-3
    np.testing.assert_array_equal(own_train, train[RANDOM_INIT].mean)  # features of encoders are not centred
    np.testing.assert_array_equal(own_test, test[RANDOM_INIT].mean)


def test_shots_are_drawn_per_class_and_larger_draws_contain_smaller_ones():
    index, labels = np.arange(1000, 1090), np.random.default_rng(0).integers(0, 3, 90)
    picks = [few_shots(index, labels, CLASSES, shots, 0) for shots in (1, 2, 5, 12)]
    for shots, pick in zip((1, 2, 5, 12), picks, strict=True):
        assert np.bincount(labels[pick - 1000]).tolist() == [shots] * 3
        assert (np.diff(pick) > 0).all()
    for fewer, more in pairwise(picks):
        assert set(fewer) < set(more)
    other = few_shots(index, labels, CLASSES, 5, 1)
    assert set(other) != set(picks[2])
    shuffled = np.random.default_rng(1).permutation(90)
    np.testing.assert_array_equal(few_shots(index[shuffled], labels[shuffled], CLASSES, 5, 0), picks[2])


def test_removing_an_image_replaces_only_that_image():
    index, labels = np.arange(90), balanced(90)
    pick = few_shots(index, labels, CLASSES, 5, 0)
    rest = np.setdiff1d(index, pick[:1])
    again = few_shots(rest, labels[rest], CLASSES, 5, 0)
    assert len(set(pick) - set(again)) == 1
    assert len(set(again) - set(pick)) == 1


def test_more_shots_than_a_class_has_are_rejected_with_the_largest_possible_number():
    labels = np.array([0] * 5 + [1] * 2 + [2] * 5)
    with pytest.raises(ValueError, match=r"class 'bee' has only 2 training images; use --shots 2 or fewer"):
        few_shots(np.arange(12), labels, CLASSES, 3, 0)
    with pytest.raises(ValueError, match="expected at least 1"):
        few_shots(np.arange(12), labels, CLASSES, 0, 0)
    with pytest.raises(ValueError, match="'dog' has only 0"):
        few_shots(np.arange(12), labels, (*CLASSES, "dog"), 1, 0)


def test_test_images_that_are_training_images_are_counted():
    found = run(table(balanced(30)), table(balanced(30), digest_from=26))
    assert found.shared == 4
    assert "Careful: 4 of the 30 test images are also training images" in found.caveats[0]
    assert run(table(balanced(30)), table(balanced(30), digest_from=30)).caveats == ()


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_classes_without_training_images_count_as_wrong_with_a_caveat(kind):
    found = run(
        table(balanced(30) % 2, mean_noise=0.01), table(balanced(30), digest_from=500, mean_noise=0.01), kind=kind
    )
    assert found.caveats == ("10 test images are of classes without any training image (cow) and count as wrong.",)
    assert found.rows[1].value == pytest.approx(2 / 3)


def test_chance_is_one_in_k_or_the_accuracy_of_predicting_the_most_frequent_training_class():
    assert chance_level(balanced(30), balanced(30), 3) == pytest.approx(1 / 3)
    assert chance_level(np.array([0, 0, 1]), np.array([0] * 9 + [1]), 3) == pytest.approx(0.9)
    assert chance_level(np.array([0, 0, 1]), np.array([1] * 9 + [0]), 3) == pytest.approx(1 / 3)


def test_data_that_cannot_be_probed_is_rejected():
    good = table(balanced(12))
    with pytest.raises(ValueError, match="got 6 training images, all of one class"):
        run(table([1] * 6), good)
    with pytest.raises(ValueError, match="got 1 classes"):
        require_classes(CLASSES[:1])
    with pytest.raises(ValueError, match="got probe kind 'Knn'; expected attentive, knn, linear or rankme"):
        require_kind("Knn")
    assert kind_names() == ["attentive", "knn", "linear", "rankme"]


def test_the_seed_of_a_probe_is_passed_to_the_linear_fit(monkeypatch):
    seeds = []
    real = linear_module.fit_classes
    monkeypatch.setattr(
        linear_module, "fit_classes", lambda *parts, seed, c: seeds.append(seed) or real(*parts, seed=seed, c=c)
    )
    run(table(balanced(30)), table(balanced(30), digest_from=500), kind="linear", seed=7)
    assert seeds == [7, 7]


def values(count, seed=0):
    """Return features that contain two quantities, the second of them with much noise."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(count, 2)) * [1, 50] + [0, 1000]
    x = np.concatenate([truth @ [[1, 0], [0, 0.002]], np.zeros((count, 4))], 1) + 0.2 * rng.normal(size=(count, 6))
    index = np.arange(count)
    return FeatureTable(index, None, None, x.astype(np.float32), index.astype(np.uint64) + 1000 * seed), truth


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_quantities_are_scored_by_r2_and_absolute_error(kind):
    (train, train_y), (test, test_y) = values(400), values(200, seed=1)
    labelling = Labelling("regression", ("size", "age"))
    found = run(train, test, kind=kind, labelling=labelling, targets=(train_y, test_y))
    (row,) = found.rows
    tables = {PRETRAINED: train}, {PRETRAINED: test}
    predicted = predictions_of(*tables, train_y, kind=kind, labelling=labelling)[0].values
    for place, target in enumerate(row.targets):
        assert target.name == labelling.names[place]
        assert target.value == pytest.approx(r2_score(test_y[:, place], predicted[:, place]))
        error = np.abs(test_y[:, place] - predicted[:, place]).mean()
        assert target.mean_absolute_error == pytest.approx(error)
    assert row.value == pytest.approx(np.mean([target.value for target in row.targets]))
    assert row.targets[0].value > 0.7 > row.targets[1].value
    assert row.low < row.value < row.high
    assert (found.metric, found.task, found.chance) == ("R2", "regression", 0.0)
    assert "R2 of" in found.verdict
    assert "a constant prediction 0.000" in found.verdict
    assert found.names == ("size", "age")


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_labels_without_positives_are_left_out_of_the_mean_average_precision(kind):
    train, test = table(balanced(300), cls=False), table(balanced(150), cls=False, seed=1, digest_from=500)
    truths = [np.stack([t.labels == 0, t.labels > 0, t.labels == 9], 1).astype(float) for t in (train, test)]
    found = run(train, test, kind=kind, labelling=Labelling("multilabel", ("ant", "other", "owl")), targets=truths)
    (row,) = found.rows
    assert [target.positives for target in row.targets] == [50, 100, 0]
    assert row.targets[2].value is None
    assert row.value == pytest.approx(np.mean([target.value for target in row.targets[:2]]))
    assert row.value > 0.9
    assert found.chance == pytest.approx(0.5), "chance is the mean share of positives"
    assert "no positive image among the test images are left out of the mean: owl." in found.caveats[0]
    truths[1][:] = 0
    with pytest.raises(ValueError, match="in which ant, other, owl do not vary"):
        run(train, test, kind=kind, labelling=Labelling("multilabel", ("ant", "other", "owl")), targets=truths)


def test_runs_are_compared_by_a_pooling_that_both_have():
    def tables(count, seed, first):
        labels = balanced(count)
        return {
            PRETRAINED: table(labels, cls_noise=0.1, mean_noise=0.9, seed=seed, digest_from=first),
            "b mask run": table(labels, cls=False, mean_noise=0.5, seed=seed + 9, digest_from=first),
        }

    found = run(tables(300, 0, 0), tables(300, 1, 1000), kind="linear", runs=["b mask run"])
    rows = {(row.features, row.pool): row.value for row in found.rows}
    own, other = rows[PRETRAINED, "mean"], rows["b mask run", "mean"]
    assert rows[PRETRAINED, "cls"] > other > own
    points = f"{100 * (other - own):.1f} points fewer than b "
    assert f"Compared with b mask run (mean over patches of both), {own:.1%}: {points}" in found.verdict
    assert f"b mask run ({other:.1%}), 95% interval -" in found.verdict


def test_draws_of_labels_differ_and_the_first_is_the_default():
    index, labels = np.arange(90), balanced(90)
    one = few_shots(index, labels, CLASSES, 5, 0)
    draws = [set(few_shots(index, labels, CLASSES, 5, 0, draw=draw)) for draw in range(4)]
    assert draws[0] == set(one)
    assert len({frozenset(draw) for draw in draws}) == 4
    assert set(few_shots(index, labels, CLASSES, 2, 0, draw=3)) < draws[3]
