"""Test that a test set warns if testing takes longer than training."""

import numpy as np
import pytest

from unmask.console import Console
from unmask.finetuning import test_set as module


class Clock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


@pytest.mark.parametrize(("training", "testing", "warned"), [(20, 50, True), (60, 40, False), (1, 2, False)])
def test_slow_tests_cause_one_warning(monkeypatch, capsys, training, testing, warned):
    clock = Clock()
    monkeypatch.setattr(module, "now", clock)

    def measured(self, method):
        clock.time += testing
        return {"accuracy": 0.5}

    monkeypatch.setattr(module.TestSet, "headlines", measured)
    tests = module.TestSet(None, np.arange(7), None, Console(), opened=0.0)  # type: ignore[arg-type]
    for _ in range(3):
        clock.time += training
        assert tests(None) == {"accuracy": 0.5}  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert said.count("train.test_every=N") == warned
    assert ("tests on 7 images took 50 s, and the training between them 40 s" in " ".join(said.split())) == warned
