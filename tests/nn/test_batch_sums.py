"""Counts over the parts of a micro-batch: identities for a whole micro-batch, sums for a part."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from unmask.nn.batch_sums import batch_sum, batch_var_mean, mean_count, num_parts, part_of_batch


def test_a_whole_micro_batch_is_left_alone():
    count, rows = torch.tensor(3.0), torch.arange(12.0).view(4, 3)
    assert num_parts() == 1
    assert batch_sum(count) is count
    assert mean_count(count) is count
    assert float(mean_count(torch.tensor(0.0), least=1.0)) == 1
    assert all(map(torch.equal, batch_var_mean(rows), torch.var_mean(rows, 0)))
    with part_of_batch(1, lambda x: x + 1):
        assert batch_sum(count) is count


def test_the_average_of_sums_divided_by_the_mean_count_is_the_mean():
    values, weights = torch.tensor([5.0, 7, 9, 2]), torch.tensor([1.0, 1, 0, 1])
    shares = []
    for part in (slice(0, 2), slice(2, 4)):
        with part_of_batch(2, lambda _: torch.tensor(3.0)):
            shares.append((values[part] * weights[part]).sum() / mean_count(weights[part].sum(), least=1.0))
    assert float(sum(shares) / 2) == pytest.approx(float((values * weights).sum() / weights.sum()))


def test_the_least_count_applies_to_the_whole_micro_batch():
    with part_of_batch(4, lambda x: x + 2):
        assert float(mean_count(torch.tensor(0), least=1.0)) == 0.5
    with part_of_batch(4, lambda x: x):
        assert float(mean_count(torch.tensor(0), least=1.0)) == 0.25


def test_sums_with_gradients_are_rejected():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(AssertionError, match="no gradient"):
        batch_sum(x)
    with part_of_batch(2, lambda x: x), pytest.raises(AssertionError, match="no gradient"):
        mean_count(x.sum())


def test_a_part_ends_with_its_context_and_applies_to_one_thread():
    def fail():
        with part_of_batch(2, lambda x: x):
            assert num_parts() == 2
            assert pool.submit(num_parts).result() == 1
            raise ValueError("stop")

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="stop"):
        fail()
    assert num_parts() == 1
