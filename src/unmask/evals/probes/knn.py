"""k nearest neighbours: a vote of the most similar training images, without any training.

Follows the usual protocol (Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination",
section 3.4; Caron et al. 2021, DINO): the k training images with the largest cosine similarity s vote for their class
with weight exp(s / 0.07). Features are neither scaled nor centred.

Multi-label targets and quantities are predicted by the mean over the k nearest training images, with the same weights.

scikit-learn's KNeighborsClassifier is not used: which of several equally near neighbours it uses depends on the order
of its search, and with a function as `weights` it needs several times the memory of this file. Here rows break ties,
and the similarity matrix is computed in pieces.

Letters: n training images, m test images, D width, K classes, T target columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from unmask.evals.probe_kind import Fitted, PooledProbe, TrainingTargets
from unmask.results import CLASSES, MULTILABEL

K = 20
TEMPERATURE = 0.07
CHUNK_BYTES = 32 << 20


def knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, k: int = K) -> np.ndarray:
    """Predict the classes (m,) int64 of test features by a vote of the nearest training features.

    train_x: (n, D). train_y: (n,), class numbers >= 0. test_x: (m, D). k: number of neighbours; with fewer than k
    training images, all of them vote. A feature vector of length zero has similarity 0 to all others. Among equally
    similar training images, those with the lower rows are used. Among classes with equal votes, the class with the most
    similar neighbour wins, then the class with the lower number. The similarity matrix is computed in pieces of at most
    32 MiB. Raises ValueError if k is less than 1 or the shapes of the arrays do not match.
    """
    labels = np.asarray(train_y, np.int64)
    pieces = _nearest(train_x, train_y, test_x, k)
    predictions = [_vote(near, rows, labels, int(labels.max()) + 1) for near, rows in pieces]
    return np.concatenate(predictions) if predictions else np.zeros(0, np.int64)


def knn_mean(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, *, k: int = K) -> np.ndarray:
    """Predict targets (m, T) float64: the weighted mean of `train_y` (n, T) over the nearest training features.

    `knn` describes the choice of the neighbours, their weights, and the errors.
    """
    predictions = []
    for near, rows in _nearest(train_x, train_y, test_x, k):
        weights = np.exp((near.astype(np.float64) - 1) / TEMPERATURE)  # (m, k)
        predictions.append((weights[:, :, None] * train_y[rows]).sum(1) / weights.sum(1, keepdims=True))
    return np.concatenate(predictions) if predictions else np.zeros((0, train_y.shape[1]))


def _nearest(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For successive pieces of the test images, yield the similarities and rows (piece, k) of their neighbours."""
    if k < 1:
        raise ValueError(f"got k={k} neighbours; expected at least 1, {K} is usual")
    if not len(train_x) or len(train_x) != len(train_y) or train_x.shape[1:] != test_x.shape[1:]:
        raise ValueError(
            f"got training features {train_x.shape} with {len(train_y)} labels and test features {test_x.shape}; "
            "expected one label for each training row, and the same width"
        )
    train = _unit(train_x)
    chunk = max(1, CHUNK_BYTES // (4 * len(train)))
    for i in range(0, len(test_x), chunk):
        yield _neighbours(_unit(test_x[i : i + chunk]) @ train.T, min(k, len(train)))


def _unit(x: np.ndarray) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(x, np.float32)), dim=1)


def _neighbours(similarity: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarities and rows (m, k) of the nearest neighbours; lower rows are chosen among equals."""
    near, rows = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    last = near[:, k - 1 : k]
    # If the (k + 1)-th similarity equals the k-th, topk chooses either; here the one with the lower row must be chosen.
    tied = (near[:, k:] == last).nonzero()[:, 0].tolist()
    near, rows = near[:, :k].clone(), rows[:, :k].clone()  # (m, k)
    for test in tied:
        nearer = (similarity[test] > last[test]).nonzero()[:, 0]
        equal = (similarity[test] == last[test]).nonzero()[:, 0]
        rows[test] = torch.cat([nearer, equal])[:k]
        near[test] = similarity[test, rows[test]]
    return near.numpy(), rows.numpy()


def _vote(near: np.ndarray, rows: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    m = len(near)
    order = np.lexsort((rows, -near), axis=1)  # summing in a fixed order keeps equal votes exactly equal
    near, rows = np.take_along_axis(near, order, 1), np.take_along_axis(rows, order, 1)
    near = near.astype(np.float64)
    place = (np.arange(m)[:, None], labels[rows])  # (m, k): the class that each neighbour votes for
    votes = np.zeros((m, classes))
    np.add.at(votes, place, np.exp((near - 1) / TEMPERATURE))  # (m, K)
    best = np.full((m, classes), -np.inf)
    np.maximum.at(best, place, near)  # (m, K)
    leads = votes == votes.max(1, keepdims=True)
    return np.where(leads, best, -np.inf).argmax(1).astype(np.int64)


def _fit(x: np.ndarray, targets: TrainingTargets) -> Fitted:
    predict = knn if targets.task == CLASSES else knn_mean
    return Fitted(predict=lambda test_x: predict(x, targets.y, test_x))


def _protocol(task: str) -> str:
    neighbours, weight = f"the {K} nearest training images by cosine", f"weight exp(s / {TEMPERATURE})"
    if task == CLASSES:
        return f"{neighbours} vote with {weight}"
    return f"{'share of the votes' if task == MULTILABEL else 'mean'} of {neighbours}, {weight}"


PROBE = PooledProbe(title="k nearest neighbours", phrase="kNN", protocol=_protocol, fit=_fit)
