"""Moving average of weights: values, swapping in and out, skipped steps, and storing."""

import pytest
import torch

from unmask.nn.ema import MovingAverage, moved, warmed_up
from unmask.optim import OptimConfig, make_optimizer, update


def module():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def test_decay_is_smaller_in_the_first_steps():
    assert [warmed_up(0.9, step) for step in (0, 1, 89)] == [1 / 10, 2 / 11, 0.9]


def test_the_average_follows_the_weights_and_is_swapped_in_and_out():
    of = module()
    average, want = MovingAverage(of, 0.9), None
    for step in range(30):
        with torch.no_grad():
            of.weight.add_(torch.randn(3, 4))
        average.update(step)
        stays = min(0.9, (1 + step) / (10 + step))
        now = of.weight.detach().clone()
        want = now if want is None else stays * want + (1 - stays) * now
    torch.testing.assert_close(average.values["weight"], want)
    before = of.weight.detach().clone()
    assert not torch.allclose(before, want), "the average differs from the weights"

    def evaluate():
        with average.applied():
            torch.testing.assert_close(of.weight.detach(), want)
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert torch.equal(of.weight, before), "weights are restored after an exception"


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_skipped_step_does_not_move_the_average(name):
    of = module()
    optimizer = make_optimizer(of, OptimConfig(name=name))
    average = MovingAverage(of, 0.9)

    def take_step(step, gradient):
        for parameter in of.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        norm = update(optimizer, 0.1, torch.zeros(()), None)
        average.update(step, norm.isfinite())

    for step in range(3):
        take_step(step, 1.0)
    before = {key: value.clone() for key, value in average.values.items()}
    assert not torch.equal(before["weight"], of.weight)
    for step in range(3, 6):
        take_step(step, float("nan"))
    assert all(torch.equal(value, before[key]) for key, value in average.values.items())
    take_step(6, 1.0)
    assert not torch.equal(average.values["weight"], before["weight"])


def test_frozen_parameters_are_not_averaged():
    of = module()
    of.bias.requires_grad_(False)
    average = MovingAverage(of, 0.9)
    average.update(0)
    assert set(average.values) == {"weight"}


def test_stored_values_continue_bit_for_bit():
    of = module()
    whole, parts = MovingAverage(of, 0.99), MovingAverage(of, 0.99)
    for step in range(6):
        with torch.no_grad():
            of.weight.mul_(1.1)
        if step == 3:
            again = MovingAverage(of, 0.99)
            again.load({key: value.clone() for key, value in parts.values.items()})
            parts = again
        whole.update(step)
        parts.update(step)
    assert all(torch.equal(parts.values[key], value) for key, value in whole.values.items())
    parts.load({})
    assert parts.values == {}


def test_a_teacher_network_is_updated_like_the_averages():
    old, new = torch.zeros(2), torch.ones(2)
    torch.testing.assert_close(moved(old, new, 0.75), torch.full((2,), 0.25))
    assert torch.equal(moved(old, new, 0.75, torch.tensor(False)), old)
