"""The attentive probe, on images whose class is stored in one token at a random position."""

import numpy as np
import pytest
import torch
from feature_tables import over
from sklearn.datasets import load_digits

from unmask.batch import Batch
from unmask.errors import UserError
from unmask.evals import frozen_features as collect_module
from unmask.evals.frozen_features import Tokens, collect_each
from unmask.evals.probe_kind import TrainingTargets
from unmask.evals.probes import attentive as module
from unmask.evals.probes.attentive import RATES, AttentiveHead
from unmask.evals.probes.linear import fit_classes
from unmask.nn.features import Features


def needles(count, *, tokens=16, width=16, classes=4, seed=0):
    """Return tokens (n, T, D) of noise with a class signal in one token, which cancels in the mean over tokens."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count)
    x = rng.normal(size=(count, tokens, width))
    mark = 7.0 * np.eye(classes, width)[y]
    x -= mark[:, None] / (tokens - 1)
    x[np.arange(count), rng.integers(0, tokens, count)] += mark * (1 + 1 / (tokens - 1))
    return x.astype(np.float32), y


def kept(x):
    return Tokens(torch.from_numpy(x).half(), torch.zeros(x.shape[2]), torch.ones(x.shape[2]))


def fit_attentive(tokens, positions, y, *, task, seed=0):
    return module.fit_attentive(tokens, positions, TrainingTargets(y=y, task=task, seed=seed))


def head_of(tokens, positions, y, *, task="classes", seed=0, rate=module.RATE_WITHOUT_CHOICE):
    """Fit an attentive head with a single learning rate."""
    return module._train(tokens, positions, module._goal(y, task)[0], task, rate, seed, "cpu")


@pytest.fixture(scope="module")
def found():
    (x, y), (test_x, test_y) = needles(400), needles(400, seed=1)
    return x, y, test_x, test_y, fit_attentive(kept(x), np.arange(400), y, task="classes")


def test_classes_that_cancel_in_the_mean_over_tokens_are_predicted(found):
    x, y, test_x, test_y, fit = found
    assert (fit.predict(kept(test_x)) == test_y).mean() > 0.9
    assert (fit_classes(x.mean(1), y).predict(test_x.mean(1)) == test_y).mean() < 0.35, "chance is 0.25"
    assert fit.chosen["rate"] in RATES


def test_fits_with_the_same_seed_are_equal_and_class_numbers_may_have_gaps(found, monkeypatch):
    x, y, test_x, _, fit = found
    monkeypatch.setattr(module, "RATES", (fit.chosen["rate"],))
    torch.manual_seed(5)
    again = fit_attentive(kept(x), np.arange(400), 10 * y + 3, task="classes")
    np.testing.assert_array_equal(again.predict(kept(test_x)), 10 * fit.predict(kept(test_x)) + 3)
    monkeypatch.setattr(module, "MIN_STEPS", 2)
    monkeypatch.setattr(module, "EPOCHS", 1)
    first, other = (head_of(kept(x), np.arange(400), y, seed=seed) for seed in (0, 1))
    assert not torch.equal(other.weight, first.weight)


def test_only_the_images_at_the_given_positions_are_fitted(monkeypatch):
    monkeypatch.setattr(module, "MIN_STEPS", 30)
    x, y = needles(60)
    places = np.arange(0, 60, 2)
    plain = head_of(kept(x[places]), np.arange(30), y[places])
    x[1::2] = 1e4
    part = head_of(kept(x), places, y[places])
    torch.testing.assert_close(part.weight, plain.weight)
    shifted = Tokens(kept((x - 3) / 2).values, torch.full((16,), 3.0), torch.full((16,), 2.0))
    same = head_of(shifted, places, y[places])
    torch.testing.assert_close(same.weight, plain.weight, atol=5e-3, rtol=0.05)


def test_with_one_token_the_head_is_as_accurate_as_logistic_regression(monkeypatch):
    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)[:, None]
    places = np.arange(600)
    fit = fit_attentive(kept(x), places, y[:600], task="classes")
    monkeypatch.setattr(module, "MIN_STEPS", 1)
    assert not hasattr(head_of(kept(x), places[:8], y[:8]), "query")
    mine = (fit.predict(kept(x[600:])) == y[600:]).mean()
    assert mine > (fit_classes(x[:600, 0], y[:600]).predict(x[600:, 0]) == y[600:]).mean() - 0.02


def test_the_head_equals_multi_head_cross_attention():
    torch.manual_seed(0)
    middle, spread = torch.randn(24), torch.rand(24) + 0.5
    head = AttentiveHead(middle, spread, 5, 3, torch.Generator().manual_seed(0))
    assert head.heads == 12
    with torch.no_grad():
        head.query.normal_()
        head.value_bias.normal_()
    x = torch.randn(4, 5, 24)
    wide = torch.nn.MultiheadAttention(24, 12, batch_first=True)
    with torch.no_grad():
        wide.in_proj_weight.copy_(torch.cat([torch.eye(24), head.key.flatten(0, 1), head.value.flatten(0, 1)]))
        wide.in_proj_bias.copy_(torch.cat([torch.zeros(48), head.value_bias]))
        wide.out_proj.weight.copy_(torch.eye(24))
        wide.out_proj.bias.zero_()
    tokens = (x - middle) / spread
    gathered, _ = wide(head.query.flatten().expand(4, 1, 24), tokens, tokens)
    torch.testing.assert_close(head(x), gathered[:, 0] @ head.weight.T + head.bias)


def test_multilabel_targets_and_quantities_in_a_single_token_are_predicted(monkeypatch):
    monkeypatch.setattr(module, "RATES", (1e-2,))
    (x, y), (test_x, test_y) = needles(400), needles(300, seed=1)
    truth, test_truth = np.eye(4)[y], np.eye(4)[test_y]
    many = fit_attentive(kept(x), np.arange(400), truth, task="multilabel").predict(kept(test_x))
    precision = module.by_column(module.average_precision, test_truth, many)
    assert precision.mean() > 0.85
    value = np.stack([100 + 5 * (y % 2), -3.0 * (y > 1)], 1)
    guess = fit_attentive(kept(x), np.arange(400), value, task="regression").predict(kept(test_x))
    errors = np.abs(guess - np.stack([100 + 5 * (test_y % 2), -3.0 * (test_y > 1)], 1)).mean(0)
    assert (errors < [1.5, 0.9]).all(), "a constant prediction has errors of 2.5 and 1.5"


def test_with_one_image_per_class_the_learning_rate_is_the_default(monkeypatch):
    monkeypatch.setattr(module, "MIN_STEPS", 5)
    x, _ = needles(3)
    fit = fit_attentive(kept(x), np.arange(3), np.arange(3), task="classes")
    assert fit.chosen == {"rate": module.RATE_WITHOUT_CHOICE}


class Encoder(torch.nn.Module):
    """Encoder whose patch tokens are pixels and whose class token is their mean, all far from zero."""

    def forward(self, images):
        patches = 1e5 + images.float().flatten(2).transpose(1, 2)
        return Features(patches.mean(1), patches, images.shape[2:])


def batches(count):
    pixels = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    index = torch.arange(count)
    return [Batch(pixels[i : i + 8], index[i : i + 8], torch.zeros(8, dtype=torch.int64)) for i in range(0, count, 8)]


def test_tokens_are_the_class_token_and_the_patches_standardised_in_half_precision():
    table = collect_each({"a": Encoder()}, over(batches(24)), device="cpu", precision="fp32", tokens=24)["a"]
    values = table.tokens.values.float() * table.tokens.scale + table.tokens.middle
    assert table.tokens.values.dtype == torch.float16
    pixels = torch.cat([batch.images for batch in batches(24)]).flatten(2).transpose(1, 2)
    torch.testing.assert_close(values[:, 1:], 1e5 + pixels, atol=0.02, rtol=0)
    np.testing.assert_allclose(values[:, 0], table.cls, atol=0.02)
    part = table.at(np.array([5, 2]))
    assert part.index.tolist() == [5, 2]
    assert torch.equal(part.tokens.values, table.tokens.values[[5, 2]])


def test_tokens_that_do_not_fit_in_memory_are_rejected_after_one_batch(monkeypatch):
    monkeypatch.setattr(collect_module, "free_memory", lambda device: 2 * 100 * 17 * 3 * 2 - 1)
    seen = []

    def watched():
        for batch in batches(24):
            seen.append(batch)
            yield batch

    with pytest.raises(UserError, match=r"tokens of 100 .* \(17 x 3 numbers .*: train on fewer images with --shots N"):
        collect_each({"a": Encoder()}, over(watched()), device="cpu", precision="fp32", tokens=100)
    assert len(seen) == 1
    assert collect_each({"a": Encoder()}, over(batches(24)), device="cpu", precision="fp32", tokens=99)
