"""k nearest neighbours: how well do images of one class lie together, with nothing trained at all?

The protocol is the usual one (Wu et al. 2018, "Unsupervised feature learning via non-parametric instance
discrimination", section 3.4; Caron et al. 2021, DINO): cosine similarity s, the k most similar training images vote for
their class with weight exp(s / 0.07). It measures the features as they are: not scaled, not centred.

Where the targets are no classes the same neighbours give a weighted mean: of 0 and 1 that is the share of their votes.

Letters: n training images, m test images, D width, K classes, T target columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

TEMPERATURE = 0.07
CHUNK_BYTES = 32 << 20


def knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, k: int = 20) -> np.ndarray:
    """Predicted classes (m,) int64 of `test_x` (m, D), from `train_x` (n, D) with labels `train_y` (n,) >= 0.

    With fewer than k training images all of them vote. A feature of length zero is similar to nothing (s = 0).
    Ties: among training images equally similar, those with the lower row are neighbours; among classes with equal
    votes, the one with the most similar single neighbour wins, and after that the one with the smaller number. The
    similarity matrix is computed in pieces of at most 32 MiB. Raises ValueError for k < 1 or tables that do not fit.
    """
    labels = np.asarray(train_y, np.int64)
    pieces = _nearest(train_x, train_y, test_x, k)
    guesses = [_vote(near, rows, labels, int(labels.max()) + 1) for near, rows in pieces]
    return np.concatenate(guesses) if guesses else np.zeros(0, np.int64)


def knn_mean(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, k: int = 20) -> np.ndarray:
    """(m, T) float64: the mean of `train_y` (n, T) over the neighbours of each test image, weighted like their votes.

    Neighbours, weights and errors as in `knn`.
    """
    guesses = []
    for near, rows in _nearest(train_x, train_y, test_x, k):
        weights = np.exp((near.astype(np.float64) - 1) / TEMPERATURE)  # (m, k)
        guesses.append((weights[:, :, None] * train_y[rows]).sum(1) / weights.sum(1, keepdims=True))
    return np.concatenate(guesses) if guesses else np.zeros((0, train_y.shape[1]))


def _nearest(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Similarities and rows (piece, k) of the neighbours, for one piece of the test images after another."""
    if k < 1:
        raise ValueError(f"k={k} neighbours came; at least 1 was expected, 20 is usual")
    if not len(train_x) or len(train_x) != len(train_y) or train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(
            f"training features {train_x.shape} with {len(train_y)} labels and test features {test_x.shape} do not fit "
            "together; rows and labels must be equally many, and the width the same"
        )
    train = _unit(train_x)
    chunk = max(1, CHUNK_BYTES // (4 * len(train)))
    for i in range(0, len(test_x), chunk):
        yield _neighbours(_unit(test_x[i : i + chunk]) @ train.T, min(k, len(train)))


def _unit(x: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(x, np.float32)), dim=1)


def _neighbours(similarity: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and rows (m, k) of the nearest; equally near ones are taken from the lowest row on."""
    near, rows = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    last = near[:, k - 1 : k]
    # topk promises no order among equals, which matters where the first one left outside equals the last one inside.
    doubtful = (near[:, k:] == last).nonzero()[:, 0].tolist()
    near, rows = near[:, :k].clone(), rows[:, :k].clone()  # (m, k)
    for test in doubtful:
        nearer = (similarity[test] > last[test]).nonzero()[:, 0]
        equal = (similarity[test] == last[test]).nonzero()[:, 0]
        rows[test] = torch.cat([nearer, equal])[:k]
        near[test] = similarity[test, rows[test]]
    return near.numpy(), rows.numpy()


def _vote(near: np.ndarray, rows: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    m = len(near)
    order = np.lexsort((rows, -near), axis=1)  # equal votes must be summed in an equal order to be equal
    near, rows = np.take_along_axis(near, order, 1), np.take_along_axis(rows, order, 1)
    near = near.astype(np.float64)
    place = (np.arange(m)[:, None], labels[rows])  # (m, k): whose vote each neighbour is
    votes = np.zeros((m, classes))
    np.add.at(votes, place, np.exp((near - 1) / TEMPERATURE))  # (m, K)
    best = np.full((m, classes), -np.inf)
    np.maximum.at(best, place, near)  # (m, K)
    leads = votes == votes.max(1, keepdims=True)
    return np.where(leads, best, -np.inf).argmax(1).astype(np.int64)
