"""The predictions by k nearest neighbours equal those of a simple loop, and ties are resolved as documented."""

import numpy as np
import pytest

from unmask.evals.probes import knn as module
from unmask.evals.probes.knn import TEMPERATURE, knn, knn_mean


def by_hand(train_x, train_y, test_x, k):
    """Predict the class of one test image at a time, in float64."""

    def unit(x):
        length = np.linalg.norm(x, axis=1, keepdims=True)
        return x / np.where(length > 0, length, 1)

    out = []
    for row in unit(test_x.astype(np.float64)):
        similarity = unit(train_x.astype(np.float64)) @ row
        near = sorted(range(len(train_x)), key=lambda i: (-similarity[i], i))[:k]
        votes = {}
        for i in near:
            votes[train_y[i]] = votes.get(train_y[i], 0.0) + np.exp(similarity[i] / TEMPERATURE)
        out.append(max(sorted(votes), key=lambda label: votes[label]))
    return np.array(out)


@pytest.mark.parametrize("k", [1, 3, 20, 1000])
def test_predictions_equal_those_of_a_simple_loop(k):
    rng = np.random.default_rng(k)
    train_x, test_x = rng.normal(size=(150, 8)).astype(np.float32), rng.normal(size=(60, 8)).astype(np.float32)
    train_y = rng.integers(0, 7, 150)
    found = knn(train_x, train_y, test_x, k=k)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, by_hand(train_x, train_y, test_x, k))


def test_predictions_are_the_same_if_similarities_are_computed_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    train_x, test_x = rng.normal(size=(90, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32)
    train_y = rng.integers(0, 5, 90)
    whole = knn(train_x, train_y, test_x)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 90 * 7)
    np.testing.assert_array_equal(knn(train_x, train_y, test_x), whole)


def test_votes_depend_on_cosine_similarity_not_on_length():
    train_x = np.array([[10, 0], [0, 0.1], [0, 5]], np.float32)
    test_x = np.array([[0.01, 0.001], [100, 90]], np.float32)
    np.testing.assert_array_equal(knn(train_x, np.array([0, 1, 1]), test_x, k=3), [0, 0])


def test_the_lowest_rows_are_chosen_among_equally_near_neighbours():
    train_x = np.tile(np.array([[1, 0]], np.float32), (30, 1))
    train_y = np.array([0] * 3 + [2] * 4 + [1] * 23)  # with k=7, the first seven rows vote
    assert knn(train_x, train_y, train_x[:1], k=7).tolist() == [2]
    assert knn(train_x, train_y, train_x[:1], k=3).tolist() == [0]
    assert knn(train_x, train_y, train_x[:1], k=30).tolist() == [1]
    # The nearest neighbour is always used; row numbers break the tie among the others, which are equally near.
    train_x[20] = train_x[21] = [2, 2]
    assert knn(train_x, np.where(np.arange(30) == 20, 3, train_y), np.array([[1, 1]], np.float32), k=1).tolist() == [3]


def test_equal_votes_go_to_the_most_similar_neighbour_and_then_to_the_smaller_class(monkeypatch):
    same = np.array([[1, 0], [1, 0]], np.float32)
    assert knn(same, np.array([5, 3]), same[:1], k=2).tolist() == [3]
    monkeypatch.setattr(module, "TEMPERATURE", np.inf)  # every neighbour has the same weight
    train_x = np.array([[1, 1], [1, 2], [2, 1], [1, 0]], np.float32)
    assert knn(train_x, np.array([1, 0, 0, 1]), np.array([[1, 1]], np.float32), k=4).tolist() == [1]
    assert knn(train_x, np.array([0, 1, 1, 1]), np.array([[1, 1]], np.float32), k=4).tolist() == [1]
    axes = np.eye(4, dtype=np.float32)
    assert knn(axes, np.array([2, 1, 1, 2]), np.ones((1, 4), np.float32), k=4).tolist() == [1]


def test_a_zero_vector_has_similarity_zero():
    train_x = np.array([[0, 0], [-1, 0], [1, 0]], np.float32)
    test_x = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    np.testing.assert_array_equal(knn(train_x, np.array([0, 1, 2]), test_x, k=1), [0, 2, 1])
    assert not np.isnan(knn(np.zeros((4, 3), np.float32), np.array([1, 1, 0, 0]), np.zeros((2, 3), np.float32))).any()


def test_arrays_whose_shapes_do_not_match_are_rejected():
    x, y = np.ones((3, 2), np.float32), np.arange(3)
    with pytest.raises(ValueError, match="k=0 neighbours"):
        knn(x, y, x, k=0)
    for arguments in ((x, y[:2], x), (x, y, np.ones((3, 5), np.float32)), (x[:0], y[:0], x)):
        with pytest.raises(ValueError, match="expected one label for each training row"):
            knn(*arguments)
    assert knn(x, y, x[:0]).shape == (0,)


def test_inputs_are_not_modified():
    x, y = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32), np.arange(40) % 3
    before = x.copy()
    knn(x, y, x)
    np.testing.assert_array_equal(x, before)


def test_the_weighted_mean_equals_that_of_a_simple_loop_and_the_share_of_votes(monkeypatch):
    rng = np.random.default_rng(0)
    train_x, test_x = (rng.normal(size=(n, 8)).astype(np.float32) for n in (60, 30))
    y = np.stack([rng.normal(size=60) * 100, rng.integers(0, 2, 60)], 1)
    want = []
    for row in test_x.astype(np.float64):
        similarity = train_x @ row / np.linalg.norm(train_x, axis=1) / np.linalg.norm(row)
        near = np.argsort(-similarity)[:5]
        want.append(np.average(y[near], axis=0, weights=np.exp(similarity[near] / TEMPERATURE)))
    found = knn_mean(train_x, y, test_x, k=5)
    np.testing.assert_allclose(found, want, rtol=1e-4)
    assert ((found[:, 1] >= 0) & (found[:, 1] <= 1)).all()
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 60 * 7)
    np.testing.assert_allclose(knn_mean(train_x, y, test_x, k=5), found, rtol=1e-4)
    assert knn_mean(train_x, y, test_x[:0]).shape == (0, 2)
