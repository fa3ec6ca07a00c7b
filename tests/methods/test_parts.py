"""A micro-batch in equal parts has the loss, the gradient, the logs and the statistics of the whole micro-batch.

Each part is computed in a thread of its own, with its own copy of the method; a barrier takes the place of the
processes that add up their counts.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_golden_curves import RECIPES, SIDE, drawn, shrunk

from unmask.batch import IGNORED, NO_BOX, Batch, ImageSpec
from unmask.config import override
from unmask.data.order import places
from unmask.method import Clock, Method
from unmask.nn.batch_sums import part_of_batch
from unmask.optim import OptimConfig, make_optimizer, update
from unmask.rng import Draws

COUNT, MICRO, PATIENCE = 8, 3, 60
AUGMENTED = "method.rand_augment=9 method.erasing=0.5 method.drop_path=0.3"
TOLERANCES = {"loss": 1e-6, "gradient": 3e-6, "log": 1e-5, "buffer": 1e-6}
"""Relative; float32 sums are added in another order, and the KL divergence of a dVAE is a small difference."""
CASES = [
    *RECIPES,
    "mae_nano method.target=pixels",
    "mae_nano method.target=pca",
    "mae_nano method.loss_on=all",
    "mpp_nano method.target=pixels",
    "mpp_nano method.target=colours_4x4",
    "dae_nano method.corruption=gaussian",
    "ae_nano method.encoder.loss=bce",
    "dvae_nano method.encoder.loss=logit_laplace",
    "segment_nano method.drop_path=0.3",
    "detect_nano method.drop_path=0.3",
    f"finetune_nano {AUGMENTED} method.mixup=0 method.cutmix=0",
    f"finetune_nano {AUGMENTED} method.mixup=0.8 method.cutmix=0",
    f"finetune_nano {AUGMENTED} method.mixup=0 method.cutmix=1",
]
CLASSIFIERS = ("finetune_nano", "scratch_nano")  # without counts: every image is one value


def make(case: str) -> Method:
    """Create a small method and train it for three steps, because an output layer of zeros hides the others."""
    recipe, *settings = case.split()
    torch.manual_seed(0)
    config = override(shrunk(recipe), settings)
    method: Method = config.build(ImageSpec(3, (SIDE, SIDE), "uint8", (127.5,) * 3, (63.75,) * 3))
    batch = drawn()
    if method.num_prepare:
        method.prepare(batch.images)
    optimizer = make_optimizer(method, OptimConfig())
    for step in range(3):
        loss = method(batch, Clock(step, 100, Draws(0, batch.epoch, batch.index))).value
        loss.backward()
        update(optimizer, 1e-3, loss.detach(), None)
    method.zero_grad()
    return method


def uneven(repeats: int = 1, *, whole: bool = False) -> Batch:
    """Return eight images whose parts have different numbers of absent pixels, ignored pixels and boxes.

    Of two parts, the second has no boxes; of four parts the first has no valid pixels, the second no annotated pixels.
    whole: no pixel is absent.
    """
    batch, image = drawn(), torch.arange(COUNT)
    maps, labels, valid = batch.maps.clone(), batch.box_labels.clone(), torch.ones(COUNT, SIDE, SIDE, dtype=torch.bool)
    maps[2, :5] = IGNORED
    maps[[1, 6]] = IGNORED
    labels[2:6] = NO_BOX
    valid[[0, 7]] = False
    valid[3, :, 5:] = False
    valid[6, 10:] = False
    return replace(
        batch, index=image // repeats, epoch=image % repeats, maps=maps, box_labels=labels,
        valid=None if whole else valid,
    )  # fmt: skip


def part_of(batch: Batch, own: np.ndarray) -> Batch:
    return replace(
        batch, **{name: value[own] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    )


def measured(method: Method, batch: Batch, place: np.ndarray | None = None, step: int = 5) -> dict[str, torch.Tensor]:
    """Return the loss, the gradients, the logs and, after the loss, the buffers of a method."""
    loss = method(batch, Clock(step, 100, Draws(0, batch.epoch, batch.index), micro=MICRO, place=place))
    loss.value.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    buffers = {f"buffer {name}": buffer.clone() for name, buffer in method.named_buffers()}
    return {"loss": loss.value.detach()} | {f"log {n}": x for n, x in loss.logs.items()} | gradients | buffers


class Parts:
    """Adds up tensors of threads. calls: shapes of the tensors, by thread."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=PATIENCE)
        self.given: list[torch.Tensor | None] = [None] * count
        self.calls: list[list[torch.Size]] = [[] for _ in range(count)]

    def total(self, number: int, x: torch.Tensor) -> torch.Tensor:
        self.calls[number].append(x.shape)
        self.given[number] = x
        self.barrier.wait()
        result = torch.stack(self.given).sum(0)
        self.barrier.wait()
        return result


def in_parts(
    method: Method, batch: Batch, count: int, *, step: int = 5, repeats: int = 1, sums: bool = True, placed: bool = True
) -> tuple[dict[str, torch.Tensor], Parts]:
    """Return what `measured` returns, as the mean over `count` parts, and the sums over the parts.

    sums, placed: False to leave out the sums over the parts, or the places in the global batch, which must be noticed.
    """
    parts = Parts(count)

    def one(number: int) -> dict[str, torch.Tensor]:
        own, copied = places(COUNT, number, count, repeats), copy.deepcopy(method)
        place = MICRO * COUNT + own if placed else None
        if not sums:
            return measured(copied, part_of(batch, own), place, step)
        with part_of_batch(count, lambda x: parts.total(number, x)):
            return measured(copied, part_of(batch, own), place, step)

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(one, range(count)))
    assert all(calls == parts.calls[0] for calls in parts.calls), "all parts make the same calls in the same order"
    for name in found[0]:
        if name.startswith("buffer ") and sums:
            assert all(torch.equal(other[name], found[0][name]) for other in found), f"{name} is equal in all parts"
    return {name: torch.stack([one[name].double() for one in found]).mean(0) for name in found[0]}, parts


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest relative difference of the loss, of the logs, of the gradient and of the buffers."""
    assert found.keys() == expected.keys()
    largest: dict[str, float] = {}
    scale = max(float(x.norm()) for name, x in expected.items() if name.startswith("gradient"))
    for name, value in expected.items():
        kind = name.split()[0]
        unit = scale if kind == "gradient" else max(float(value.double().norm()), 1e-6)
        away = float((found[name] - value.double()).norm()) / unit
        largest[kind] = max(largest.get(kind, 0.0), away)
    return largest


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    away = difference(found, expected)
    assert all(away[kind] <= TOLERANCES[kind] for kind in away), away


def mixes(method: Method) -> bool:
    config = getattr(method, "config", None)
    return bool(getattr(config, "mixup", 0) or getattr(config, "cutmix", 0))


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_micro_batch_have_the_mean_of_the_whole(case):
    method = make(case)
    for repeats, count in ((1, 2), (1, 4), (2, 2), (2, 4)):
        batch = uneven(repeats)
        found, parts = in_parts(method, batch, count, repeats=repeats)
        expected = measured(copy.deepcopy(method), batch)
        assert bool(parts.calls[0]) == (case.split()[0] not in CLASSIFIERS)
        if mixes(method) and (repeats, count) == (2, 4):  # one image for each part: there are no mirrored pairs
            assert difference(found, expected)["gradient"] > 1e-2
        else:
            require_equal(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_part_without_absent_pixels_may_have_a_mask_or_none(case):
    method, batch = make(case), uneven(whole=True)
    assert batch.valid is None
    expected = measured(copy.deepcopy(method), batch)
    require_equal(in_parts(method, batch, 4)[0], expected)
    require_equal(in_parts(method, batch.with_valid(), 4)[0], expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.split()[0] not in CLASSIFIERS])
def test_counts_of_each_part_alone_are_noticed(case):
    method, batch = make(case), uneven()
    expected = measured(copy.deepcopy(method), batch)
    assert difference(in_parts(method, batch, 4, sums=False)[0], expected)["gradient"] > 1e-2


@pytest.mark.parametrize("case", [case for case in CASES if AUGMENTED in case])
def test_augmentations_drawn_by_the_place_in_a_part_are_noticed(case):
    method, batch = make(case), uneven()
    expected = measured(copy.deepcopy(method), batch)
    assert difference(in_parts(method, batch, 2, placed=False)[0], expected)["gradient"] > 1e-2


def test_running_statistics_of_batchnorm_are_those_of_the_whole_micro_batch():
    method, batch = make("linear_paper"), uneven()
    found, parts = in_parts(method, batch, 4)
    expected = measured(copy.deepcopy(method), batch)
    assert parts.calls[0] == [torch.Size([32])] * 2
    for name in ("buffer norm.running_mean", "buffer norm.running_var"):
        torch.testing.assert_close(found[name].float(), expected[name])
        assert not torch.equal(expected[name], method.get_buffer(name.removeprefix("buffer ")))
    assert found["buffer norm.num_batches_tracked"] == expected["buffer norm.num_batches_tracked"] == 4


def test_a_non_finite_image_in_one_part_leaves_the_running_statistics_of_all_parts_unchanged():
    method, batch = make("linear_paper"), uneven()
    images = batch.images.float()
    images[4] = float("nan")
    found, _ = in_parts(method, replace(batch, images=images), 4)
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(found[f"buffer {name}"], method.get_buffer(name).double())
