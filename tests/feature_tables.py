"""Measure made-up tables of features, as `unmask probe` measures those of images."""

from dataclasses import replace

from unmask.evals.predictions import images_in_both, predict_pooled
from unmask.evals.probe_kind import TrainingTargets, find_kind
from unmask.evals.probe_text import verdict
from unmask.evals.scores import caveats_of, chance_of, differences, require_defined, score
from unmask.results import METRICS, PRETRAINED, ImageSet, ProbeResult, TestIdentity


def predictions_of(train, test, train_y, *, kind, labelling, seed=0):
    """Predictions for the test tables by a probe of pooled features. train, test: tables by feature set."""
    targets = TrainingTargets(y=train_y, task=labelling.task, seed=seed)
    return predict_pooled(find_kind(kind), train, test, targets)


def result_of(scored, *, kind="knn", chance=0.1, metric="accuracy", runs=(), **more):
    """A result of these scores, with its verdict."""
    result = ProbeResult(
        kind=kind, data=ImageSet(name="data"), test=TestIdentity(held_out=0.2), metric=metric, chance=chance,
        rows=tuple(each.score for each in scored), differences=differences(scored, runs), **more,
    )  # fmt: skip
    return replace(result, verdict=verdict(result, find_kind(kind).phrase))


def measure(train, test, *, kind="knn", labelling, seed=0, targets=None, runs=()):
    """The result of a probe. targets: (training, test) ones that are not the tables' labels."""
    train, test = (each if isinstance(each, dict) else {PRETRAINED: each} for each in (train, test))
    train_y, test_y = targets or (train[PRETRAINED].labels, test[PRETRAINED].labels)
    require_defined(test_y, labelling)
    predictions = predictions_of(train, test, train_y, kind=kind, labelling=labelling, seed=seed)
    scored = [score(each, test_y, labelling) for each in predictions]
    shared = images_in_both(train[PRETRAINED], test[PRETRAINED])
    return result_of(
        scored, kind=kind, runs=runs, chance=chance_of(train_y, test_y, labelling), metric=METRICS[labelling.task],
        task=labelling.task, names=labelling.names, train_images=len(train_y), test_images=len(test_y), shared=shared,
        caveats=caveats_of(train_y, test_y, labelling, shared),
    )  # fmt: skip


def over(batches):
    """Return the function that `collect_each` calls, for batches that one process reads."""
    return lambda compute: map(compute, batches)
