"""The choice of a layer on training images, and the majority vote over patch masks."""

import numpy as np
import pytest
import torch
from feature_tables import measure, over

from unmask.batch import Batch, ImageSpec
from unmask.errors import UserError
from unmask.evals import choose_layer as module
from unmask.evals.choose_layer import choose_layer
from unmask.evals.encoder_views import View, best_layer, majority, wanted_layer
from unmask.evals.feature_sets import VOTE
from unmask.evals.frozen_features import FeatureTable, collect_each, collect_layers
from unmask.evals.labelled_images import Labelling
from unmask.nn.gpt import GPT, GPTConfig
from unmask.nn.image_encoder import ImageEncoder
from unmask.nn.vit import ViT, ViTConfig

SPEC = ImageSpec(3, (8, 8), "uint8", (120.0,) * 3, (60.0,) * 3)


def batches(count: int = 6) -> list[Batch]:
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 2
    whole = Batch(images, torch.arange(count), torch.zeros(count, dtype=torch.int64), labels)
    parts = [slice(start, start + 4) for start in range(0, count, 4)]
    return [Batch(whole.images[p], whole.index[p], whole.epoch[p], labels[p]) for p in parts]


def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(width=16, depth=3, heads=2, patch=4), SPEC)


def gpt(*, causal: bool, feature_layer: int | None = None) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(width=16, depth=3, heads=2, patch=2, colours=8, feature_layer=feature_layer)
    network = GPT(config, SPEC, causal=causal)
    network.palette.copy_(torch.rand(8, 3) * 255)
    return network


@pytest.mark.parametrize("encoder", [vit(), gpt(causal=True)], ids=["vit", "gpt"])
def test_all_layers_in_one_pass_equal_each_layer_alone(encoder):
    tables = collect_layers(View(encoder), over(batches()), device="cpu", precision="fp32")
    assert len(tables) == 4
    for number, table in enumerate(tables):
        alone = collect_each({"x": View(encoder, number)}, over(batches()), device="cpu", precision="fp32")["x"]
        assert np.array_equal(alone.mean, table.mean)
        assert table.labels.tolist() == [0, 1] * 3
    forward = collect_each({"x": encoder}, over(batches()), device="cpu", precision="fp32")["x"]
    usual = 1 if isinstance(encoder, GPT) else 3
    assert np.allclose(forward.mean, tables[usual].mean, atol=1e-6)
    assert not np.allclose(tables[1].mean, tables[2].mean, atol=1e-3)


def test_a_mask_depends_only_on_the_image_row_and_its_number():
    encoder = gpt(causal=False)

    def hide(rng):
        return rng.uniform(16) < 0.5

    def seen(mask, data=None):
        view = View(encoder, 2, hide, mask)
        return collect_each({"x": view}, over(data or batches()), device="cpu", precision="fp32")["x"].mean

    assert np.array_equal(seen(0), seen(0))
    assert not np.allclose(seen(0), seen(1), atol=1e-3)
    turned = [Batch(b.images.flip(0), b.index.flip(0), b.epoch, b.labels) for b in batches()]
    assert np.allclose(seen(0)[:4], seen(0, turned)[:4][::-1], atol=1e-6)
    assert not np.allclose(seen(0), collect_each({"x": View(encoder, 2)}, over(batches()), device="cpu",
                                                 precision="fp32")["x"].mean, atol=1e-3)  # fmt: skip


def test_the_majority_wins_and_ties_are_broken_uniformly_and_reproducibly():
    votes = np.array([[0, 1, 2, 2], [0, 1, 1, 0], [1, 1, 2, 1]])
    assert majority(votes, np.arange(4), 0)[:3].tolist() == [0, 1, 2]
    tied = np.repeat([[0], [1], [3]], 3000, 1)
    found = majority(tied, np.arange(3000), 0)
    assert np.array_equal(found, majority(tied, np.arange(3000), 0))
    assert np.bincount(found, minlength=4) / 3000 == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.04)
    assert not np.array_equal(found, majority(tied, np.arange(3000), 1))


def table(x: np.ndarray, labels: np.ndarray) -> FeatureTable:
    index = np.arange(len(x))
    return FeatureTable(index, labels, None, x.astype(np.float32), index.astype(np.uint64) + int(1e6 * x[0, 0] ** 2))


def layers_of(labels: np.ndarray, informative: int, seed: int = 0) -> list[FeatureTable]:
    generator = np.random.default_rng(seed)
    noise = [generator.normal(size=(len(labels), 8)) for _ in range(5)]
    noise[informative][:, 0] += 4 * labels
    return [table(x, labels) for x in noise]


def test_the_informative_layer_is_chosen_and_the_choice_is_explained():
    labels = np.arange(200) % 2
    chosen = choose_layer(layers_of(labels, 3), labels, task="classes", seed=0)
    assert (chosen.number, chosen.last) == (3, 4)
    assert "on 40 training images held out, 5 times" in chosen.why
    many = np.arange(2500) % 2
    assert choose_layer(layers_of(many, 3), many, task="classes", seed=0).why.count("times") == 0


def test_the_layer_is_chosen_more_reliably_with_several_held_out_fifths_than_with_one(monkeypatch):
    """Several held-out fifths find a slightly better layer more often than a single one."""
    labels = np.arange(100) % 2

    def layers(seed):
        generator = np.random.default_rng(seed)
        noise = [generator.normal(size=(100, 3)) for _ in range(4)]
        for number, x in enumerate(noise):
            x[:, 0] += labels * (1.8 if number == 3 else 0.9)
        return [table(x, labels) for x in noise]

    found = [choose_layer(layers(seed), labels, task="classes", seed=0).number for seed in range(40)]
    monkeypatch.setattr(module, "ENOUGH_PREDICTIONS", 1)
    once = [choose_layer(layers(seed), labels, task="classes", seed=0).number for seed in range(40)]
    assert found.count(3) > once.count(3) + 4


def test_the_middle_layer_is_chosen_among_equals():
    assert best_layer([0.5, 0.9, 0.9, 0.9, 0.9]) == 2
    assert best_layer([0.5, 0.6, 0.5]) == 1


def test_too_few_images_to_choose_a_layer_are_rejected():
    with pytest.raises(UserError, match="too few to choose a layer"):
        choose_layer(layers_of(np.arange(2), 0), np.arange(2), task="classes", seed=0)


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_the_majority_over_masks_gives_one_prediction(kind):
    """The prediction under a single mask is often wrong, but the majority over several masks is right."""
    labels = np.arange(300) % 2
    train = layers_of(labels, 0)[0]
    generator = np.random.default_rng(5)
    views = []
    for _ in range(5):
        wrong = generator.random(300) < 0.25
        x = generator.normal(size=(300, 8))
        x[:, 0] += 4 * np.where(wrong, 1 - labels, labels)
        views.append(table(x, labels))
    names = ["pre-trained", *(f"pre-trained{VOTE}{number}" for number in range(1, 5))]
    labelling = Labelling("classes", ("a", "b"))
    voted = measure(train, dict(zip(names, views, strict=True)), kind=kind, labelling=labelling)
    single = measure(train, views[0], kind=kind, labelling=labelling)
    assert len(voted.rows) == 1
    assert voted.rows[0].total == 300
    assert voted.rows[0].value > single.rows[0].value + 0.08


def test_the_encoder_determines_the_default_layer():
    assert wanted_layer(gpt(causal=True), None) == "best"
    assert wanted_layer(gpt(causal=True, feature_layer=3), None) == "3", "a layer set by the user is not overridden"
    assert wanted_layer(vit(), None) is None
    assert wanted_layer(vit(), "last") == "last"
    assert wanted_layer(ImageEncoder(), "last") is None


def test_layers_that_do_not_exist_are_rejected():
    with pytest.raises(UserError, match="got layer 'middle'; expected best, last or a number"):
        wanted_layer(vit(), "middle")
    with pytest.raises(UserError, match="got layer 4 for an encoder of 3 blocks; expected 0 to 3"):
        wanted_layer(vit(), "4")
    with pytest.raises(UserError, match="no layers to choose from"):
        wanted_layer(ImageEncoder(), "best")
