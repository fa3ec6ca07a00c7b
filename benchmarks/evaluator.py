"""Measure time and memory of the kNN probe and the linear probe, next to scikit-learn on the same features.

    python benchmarks/evaluator.py [--features TRAIN.npz TEST.npz] [--json] [--keep]

--features reads files that `unmask embed RUN DATA --out FILE.npz` wrote. Without --features, the features are random
vectors of ten classes, correlated and with decreasing variance like real features.

kNN: the 20 nearest neighbours by cosine similarity s vote, weighted with exp(s / 0.07). The rival is scikit-learn's
KNeighborsClassifier with the same vote weights. Linear: the regularisation C is chosen from eight powers of ten on a
fifth of the rows. The rival is scikit-learn's LogisticRegression, which fits all eight values from scratch. unmask
starts each fit from the previous one and ends the search early.

`agree` is the share of test rows for which unmask and the rival predict the same class. Every measurement runs in its
own process. The reported memory is the peak minus the memory at the start. --tiny uses very small data, for the test of
this script.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from measure import command_line, conclude, origin, spread
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from unmask.data.annotations.splits import HOLD_OUT_FOR_C, hold_out
from unmask.evals.probes.knn import TEMPERATURE, knn
from unmask.evals.probes.linear import C_GRID, MAX_ITERATIONS, Standardise, fit_classes

CLASSES = 10
SIZES = {"knn": [(10_000, 2_000, 192), (50_000, 10_000, 768)], "linear": [(10_000, 2_000, 192), (50_000, 10_000, 192)]}
TINY = {"knn": [(200, 40, 8)], "linear": [(200, 40, 8)]}
MOST_OF_RIVAL = 20_000  # maximum rows for scikit-learn's linear probe, which takes many minutes with more

Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def random_features(train: int, test: int, width: int) -> Rows:
    """Return random (training rows, their classes, test rows, their classes). The classes overlap."""
    rng = np.random.default_rng(0)
    scale = np.arange(1, width + 1) ** -0.5
    turned = np.linalg.qr(rng.normal(size=(width, width)))[0]
    middles = rng.normal(size=(CLASSES, width)) * scale * 0.15
    y = rng.integers(0, CLASSES, train + test)
    x = ((middles[y] + rng.normal(size=(train + test, width)) * scale) @ turned).astype(np.float32)
    return x[:train], y[:train], x[train:], y[train:]


def stored_features(train: Path, test: Path) -> Rows:
    """Read (training rows, their classes, test rows, their classes) from two files of `unmask embed`.

    The rows are the means over patches.
    """
    found: list[np.ndarray] = []
    for file in (train, test):
        with np.load(file) as stored:
            found += [stored["mean"], np.unique(stored["label"], return_inverse=True)[1]]
    return found[0], found[1], found[2], found[3]


def our_knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    return knn(train_x, train_y, test_x)


def their_knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    def votes(distance: np.ndarray) -> np.ndarray:
        return np.exp(-distance / TEMPERATURE)

    model = KNeighborsClassifier(20, weights=votes, metric="cosine", algorithm="brute")
    return model.fit(train_x, train_y).predict(test_x)


def our_linear(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    return fit_classes(train_x, train_y).predict(test_x)


def their_linear(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> np.ndarray:
    standardise = Standardise(train_x)
    train_x, test_x = standardise(train_x), standardise(test_x)
    fit, held = hold_out(train_y, np.arange(len(train_y)), 0, HOLD_OUT_FOR_C)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = [
            LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
            .fit(train_x[fit], train_y[fit])
            .score(train_x[held], train_y[held])
            for c in C_GRID
        ]
        best = C_GRID[int(np.argmax(scores))]
        return LogisticRegression(C=best, max_iter=MAX_ITERATIONS).fit(train_x, train_y).predict(test_x)


PROBES = {("knn", "ours"): our_knn, ("knn", "theirs"): their_knn, ("linear", "ours"): our_linear,
          ("linear", "theirs"): their_linear}  # fmt: skip


def in_own_process(probe: str, whose: str, rows: Rows) -> tuple[float, float, np.ndarray]:
    """Run one call in its own process; return (seconds, increase of peak memory in MiB, predictions)."""
    here, there = multiprocessing.get_context("fork").Pipe()
    worker = multiprocessing.get_context("fork").Process(target=_call, args=(there, probe, whose, rows))
    worker.start()
    found = here.recv()
    worker.join()
    return found


def _call(pipe: Any, probe: str, whose: str, rows: Rows) -> None:
    before = peak_mib()
    start = time.perf_counter()
    answers = PROBES[probe, whose](*rows[:3])
    seconds = time.perf_counter() - start
    pipe.send((seconds, peak_mib() - before, answers))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux reports KiB


def measured(probe: str, rows: Rows, rounds: int) -> dict[str, Any]:
    train, width = rows[0].shape
    rivals = ["ours", "theirs"] if probe == "knn" or train <= MOST_OF_RIVAL else ["ours"]
    found = {whose: [] for whose in rivals}
    for _ in range(rounds):
        for whose in rivals:
            found[whose].append(in_own_process(probe, whose, rows))
    row: dict[str, Any] = {"probe": probe, "train": train, "test": len(rows[2]), "width": width}
    for whose, several in found.items():
        row |= {f"{whose}_{name}_s": value for name, value in spread([one[0] for one in several]).items()}
        row[f"{whose}_peak_mib"] = max(one[1] for one in several)
        row[f"{whose}_accuracy"] = float((several[0][2] == rows[3]).mean())
    if len(rivals) == 2:
        row["ratio"] = row["theirs_median_s"] / row["ours_median_s"]
        row["agree"] = float((found["ours"][0][2] == found["theirs"][0][2]).mean())
    return row


def main() -> None:
    parser = command_line(__doc__, rounds=3, result="evaluator")
    parser.add_argument("--probes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--features", type=Path, nargs=2, metavar="FILE.npz")
    options = parser.parse_args()
    rows = []
    for probe in options.probes:
        if options.features:
            rows.append(measured(probe, stored_features(*options.features), options.rounds))
            continue
        for size in (TINY if options.tiny else SIZES)[probe]:
            rows.append(measured(probe, random_features(*size), 1 if options.tiny else options.rounds))
    about = {**origin(("torch", "numpy", "scikit-learn", "scipy")), "omp_threads": os.environ.get("OMP_NUM_THREADS")}
    name = "evaluator-features" if options.features else "evaluator"
    conclude(name, rows, about, as_json=options.json, keep=options.keep)


if __name__ == "__main__":
    main()
