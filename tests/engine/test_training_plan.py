"""The plan that is derived from a configuration, and the recipe that `auto` chooses."""

import json

import pytest
import torch
from torch import nn

from unmask.batch import ImageSpec
from unmask.config import ConfigError, keys, override
from unmask.engine import measure
from unmask.engine import time_budget as budgets
from unmask.engine.build import build_method
from unmask.engine.device import autocast, choose_device, choose_precision
from unmask.engine.flops import typical_images
from unmask.engine.make_plan import (
    BUDGET_SHARE,
    MEMORY_SHARE,
    DatasetFacts,
    LoadingPlan,
    choose_micro_batch,
    choose_steps,
    few_steps,
    make_plan,
)
from unmask.engine.measure import Timing, bytes_per_image, example_batch, measure_step_seconds
from unmask.engine.time_budget import Budget
from unmask.engine.training_plan import Plan
from unmask.method import Loss
from unmask.recipes.catalogue import AUTO as AUTO_RECIPES
from unmask.recipes.catalogue import choose, find

SPEC = ImageSpec(3, (16, 16), "uint8", (120.0,) * 3, (60.0,) * 3)
SMALL = (
    "data.size=[16,16]", "method.encoder.width=32", "method.encoder.depth=1", "method.encoder.heads=2",
    "method.decoder.width=16", "method.decoder.depth=1", "method.decoder.heads=2", "train.batch_size=12",
)  # fmt: skip


def small(*settings):
    return override(find("mae_nano"), [*SMALL, *settings])


IN_MEMORY = LoadingPlan(workers=0, cached=True)


def planned(*settings, excluded=(), loading=IN_MEMORY, **more):
    return make_plan(small(*settings), DatasetFacts(SPEC, 1000, "f", excluded), loading, "cpu", **more)


@pytest.mark.parametrize(
    ("settings", "images", "steps"),
    [
        (["train.epochs=10"], 1000, 834),  # 10 * 1000 / 12, rounded up
        (["train.epochs=1"], 5, 1),
        (["train.epochs=0.5"], 1200, 50),
        (["train.epochs=none"], 120, 1000),  # 100 epochs
        (["train.steps=7"], 1000, 7),
        (["train.steps=7", "train.epochs=10"], 1000, 7),
    ],
)
def test_settings_determine_the_steps_without_a_budget(settings, images, steps):
    found, every, why = choose_steps(small(*settings), images, budget=None, step_seconds=pytest.fail)
    assert every == -(-found // 10)
    assert found == steps
    assert str(steps) in why


def exactly(seconds):
    return lambda: Timing(seconds, seconds, seconds)


@pytest.fixture
def still(monkeypatch):
    """The clock of budgets always shows 0."""
    monkeypatch.setattr(budgets, "clock", lambda: 0.0)


@pytest.mark.parametrize(
    ("budget", "used", "each", "steps"), [(600.0, 0, 0.5, 1080), (600.0, 100.0, 0.5, 880), (60.0, 0, 0.001, 54_000)]
)
@pytest.mark.usefixtures("still")
def test_budget_determines_the_steps_and_leaves_a_reserve(budget, used, each, steps):
    left = Budget(budget, -used)
    found, _, why = choose_steps(small("train.steps=3"), 1000, budget=left, step_seconds=exactly(each))
    assert found == steps
    assert "measurements), in a budget of" in why


@pytest.mark.parametrize(("budget", "used"), [(1.0, 0.0), (60.0, 40.0)])
@pytest.mark.usefixtures("still")
def test_too_small_budget_is_rejected_with_the_needed_time(budget, used):
    with pytest.raises(ConfigError, match=r"got a budget of .* which has time for \d steps.*give a budget of \d+ min"):
        choose_steps(small(), 1000, budget=Budget(budget, -used), step_seconds=exactly(5.0))


def test_budget_for_few_steps_warns_with_the_needed_time():
    found = planned("train.steps=50").model_copy(update={"budget": 110.0, "startup": 10.0})
    assert few_steps(found) == (
        "a budget of 1 min 50 s has time for about 50 steps, too few to learn much; 100 steps would take about "
        "3 min 39 s"
    )
    assert few_steps(found.model_copy(update={"steps": 100})) is None
    assert few_steps(found.model_copy(update={"budget": None})) is None


def test_timing_has_median_and_range():
    timing = Timing.of([1.0, 1.0, 1.0, 9.0, 2.0, 1.0])
    assert timing == (1.0, 1.0, 5.0)
    assert timing.busy
    assert timing.words() == "1 s (1 to 5 s in 3 measurements)"
    assert Timing.of([2.0]) == (2.0, 2.0, 2.0)
    assert not Timing.of([2.0, 3.0]).busy
    assert timing.with_loading(Timing(2.0, 1.5, 3.0), 2) == (2.0, 1.5, 5.0)
    assert timing.with_loading(Timing(2.0, 1.5, 3.0), 0) == (3.0, 2.5, 8.0)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("average", ["none", "0.99"])
@pytest.mark.parametrize(("num_test", "wanted"), [(10, None), (400, None), (2000, None), (100, 7)])
def test_evaluations_count_in_a_budget_and_become_rarer_if_slow(num_test, wanted, average):
    config = small(f"optim.average={average}", *([] if wanted is None else [f"train.test_every={wanted}"]))
    budget, each = 120.0, 0.2
    steps, every, why = choose_steps(
        config, 1000, budget=Budget(budget, 0.0), step_seconds=exactly(each), num_test=num_test
    )
    test = 0.5 * each / 12 * num_test * (1 if average == "none" else 2)
    tests = -(-steps // every) + 1
    assert steps * each + tests * test <= BUDGET_SHARE * budget + test
    if wanted is not None:
        assert every == wanted
    else:
        assert tests <= 11
        assert tests * test <= 0.15 * budget or tests == 2
        assert num_test > 10 or tests == 11
    assert f"tests on {num_test} images take about" in why


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize(("workers", "seconds"), [(0, 0.5), (2, 0.3)])
def test_loading_time_counts_in_a_budget_with_and_without_workers(monkeypatch, workers, seconds):
    monkeypatch.setattr("unmask.engine.make_plan.time_steps", lambda *_, **__: [0.2])
    found = planned(loading=LoadingPlan(workers, True, exactly(0.3)), budget=Budget(100.0, 0.0))
    assert found.steps == int(BUDGET_SHARE * 100 / seconds)


def test_step_is_measured_on_a_copy_of_the_method():
    before = torch.random.get_rng_state()
    seconds = measure_step_seconds(small(), SPEC, 6, "fp32", "cpu", seconds=0)
    assert 0 < seconds < 20
    torch.random.set_rng_state(before)


@pytest.mark.parametrize(
    ("capabilities", "wanted", "found"),
    [
        ({"amx_bf16": True}, "auto", "bf16"),
        ({"avx512_bf16": True}, "auto", "bf16"),
        ({"architecture": "aarch64", "bf16": True}, "auto", "bf16"),
        ({"architecture": "x86_64", "avx512_f": True}, "auto", "fp32"),
        ({}, "auto", "fp32"),
        ({}, "bf16", "bf16"),
        ({"amx_bf16": True}, "fp32", "fp32"),
    ],
)
def test_precision_on_a_processor(monkeypatch, capabilities, wanted, found):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    precision, why = choose_precision(wanted, "cpu")
    assert precision == found
    assert why.startswith(found)
    assert ("the setting" in why) == (wanted != "auto")


@pytest.mark.parametrize("native", [True, False])
def test_precision_on_a_gpu(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert choose_precision("auto", "cuda:1")[0] == ("bf16" if native else "fp32")
    assert choose_precision("auto", "mps")[0] == "fp32"


def test_autocast_is_off_in_fp32():
    a = torch.ones(2, 2)
    with autocast("fp32", "cpu"):
        assert (a @ a).dtype == torch.float32
    with autocast("bf16", "cpu"):
        assert (a @ a).dtype == torch.bfloat16


def test_unavailable_device_is_rejected():
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match=r"got device 'tpu'; expected one of this machine: cpu"):
        choose_device("tpu")


@pytest.mark.parametrize(
    ("images_that_fit", "micro"), [(100, 12), (12, 12), (11, 6), (5, 4), (4, 4), (3, 3), (1, 1), (0.2, 1)]
)
def test_micro_batch_is_the_largest_divisor_that_fits_in_memory(monkeypatch, images_that_fit, micro):
    monkeypatch.setattr("unmask.engine.make_plan.free_memory", lambda _: int(images_that_fit * 1000 / MEMORY_SHARE) + 1)
    found, why = choose_micro_batch(small(), 1000, "cpu")
    assert found == micro
    assert str(micro) in why


@pytest.mark.parametrize(("wanted", "message"), [(5, "use 4"), (7, "use 6"), (24, "use 12")])
def test_micro_batch_that_does_not_divide_the_batch_is_rejected(wanted, message):
    with pytest.raises(ConfigError, match=rf"micro_batch={wanted} does not divide train\.batch_size=12; {message}"):
        choose_micro_batch(small(f"train.micro_batch={wanted}"), 1, "cpu")
    assert choose_micro_batch(small("train.micro_batch=4"), 1, "cpu")[0] == 4


def test_bytes_per_image_exclude_one_off_allocations():
    """Under autocast the bfloat16 copies of the weights are kept too, but do not count per image."""
    torch.manual_seed(0)
    method = small("method.encoder.width=256", "method.encoder.depth=2").build(SPEC)
    weights = sum(p.numel() for p in method.parameters()) * 2
    in_bf16 = bytes_per_image(method, SPEC, "bf16", "cpu")
    assert 0 < in_bf16 < bytes_per_image(method, SPEC, "fp32", "cpu")
    assert in_bf16 < weights / 4, "bf16 copies of the weights, if included, would add half of their size per image"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_example_batch_has_the_right_shape_and_dtype(dtype):
    batch = example_batch(ImageSpec(2, (8, 4), dtype, (5.0, 9.0), (1.0, 1.0)), 3, "cpu")
    assert (batch.images.shape, batch.images.dtype) == ((3, 2, 8, 4), getattr(torch, dtype))
    assert batch.images[0, :, 0, 0].tolist() == [5, 9]


def test_peak_learning_rate_uses_the_global_batch_for_any_accumulation():
    whole, parts = planned("optim.base_lr=1e-3"), planned("optim.base_lr=1e-3", "train.micro_batch=3")
    assert (parts.micro_batch, parts.accumulation, parts.batch_size) == (3, 4, 12)
    assert whole.peak_lr == parts.peak_lr == pytest.approx(1e-3 * 12 / 256)
    assert planned("optim.base_lr=1e-3", "train.batch_size=24").peak_lr == pytest.approx(1e-3 * 24 / 256)


def test_schedule_is_linear_warm_up_then_half_a_cosine():
    found = planned("train.steps=100", "optim.warmup=0.1", "optim.base_lr=0.256", "train.batch_size=256")
    assert (found.warmup_steps, found.peak_lr, found.final_lr) == (10, pytest.approx(0.256), 0)
    golden = {0: 0.0, 1: 0.0256, 5: 0.128, 10: 0.256, 11: 0.2559220, 40: 0.192, 55: 0.128, 99: 0.0000780}
    for step, rate in golden.items():
        assert found.lr(step) == pytest.approx(rate, abs=1e-6), step
    last = planned("train.steps=100", "optim.final_lr=0.1", "train.batch_size=256")
    assert last.lr(100) == pytest.approx(0.1 * last.peak_lr)


def test_digest_of_annotations_has_its_earlier_name_in_the_file():
    later = planned("train.steps=40").model_copy(update={"annotations_digest": "cafe"})
    plan = later.model_copy(update={"annotations_digest": "abcd", "earlier": later})
    tree = plan.model_dump(mode="json")
    assert (tree["taught"], tree["earlier"]["taught"]) == ("abcd", "cafe")
    assert "annotations_digest" not in tree
    assert Plan.model_validate(tree) == plan


def test_plan_has_reasons_and_round_trips_through_json():
    found = planned("train.steps=40", excluded=(3, 5), reasons=("because",))
    assert Plan.model_validate(json.loads(found.model_dump_json())) == found
    text = " ".join(found.reasons)
    for word in (
        "because",
        "40 steps: the setting train.steps",
        "the whole batch of 12",
        "peak learning rate",
        "only 0.48 epochs",
    ):
        assert word in text
    assert found.epochs == pytest.approx(0.48)
    assert found.picture_every == 10
    assert found.parameters > found.encoder_parameters > 0
    assert planned("train.picture_every=7").picture_every == 7


AUTO = {
    "ten small images": (10, (20, 24), "cpu", "mae_nano", (20, 20), (2, 2), ["patch 2", "3000 steps", "batch 16"]),
    "CIFAR": (50_000, (32, 32), "cpu", "mae_nano", (32, 32), (4, 4), ["small images"]),
    "CIFAR on a GPU": (50_000, (32, 32), "cuda", "mae_nano", (32, 32), (4, 4), ["small images"]),
    "250 photographs": (
        250,
        (470, 400),
        "cpu",
        "mae_nano",
        (64, 64),
        (8, 8),
        ["without a GPU", "batch 16", "3000 steps"],
    ),
    "250 on a GPU": (250, (470, 400), "cuda", "mae_tiny", (96, 96), (8, 8), ["fewer than 20,000"]),
    "2 M on a GPU": (2_000_000, (400, 500), "cuda", "mae_base", (224, 288), (16, 16), ["300,000 images or more"]),
    "100,000 on a GPU": (100_000, (500, 500), "cuda", "mae_small", (224, 224), (16, 16), ["between 20,000"]),
    "digits": (1797, (8, 8), "cpu", "mae_nano", (16, 16), (2, 2), ["small images", "patch 2: 16 visible patches"]),
    "20 pixels": (5000, (20, 20), "cpu", "mae_nano", (20, 20), (2, 2), ["small images"]),
    "21 pixels": (5000, (21, 21), "cpu", "mae_nano", (20, 20), (2, 2), ["small images"]),
    "24 pixels": (5000, (24, 24), "cpu", "mae_nano", (24, 24), (3, 3), ["patch 3"]),
    "MNIST": (60_000, (28, 28), "cpu", "mae_nano", (28, 28), (2, 2), ["patch 2"]),
    "28 x 56": (5000, (28, 56), "cpu", "mae_nano", (28, 56), (4, 4), ["28 x 56: the images are not square"]),
    "36 pixels": (5000, (36, 36), "cpu", "mae_nano", (36, 36), (4, 4), ["small images"]),
    "47 pixels": (5000, (47, 47), "cpu", "mae_nano", (48, 48), (4, 4), ["small images"]),
    "48 pixels on a GPU": (5000, (48, 48), "cuda", "mae_tiny", (48, 48), (6, 6), ["mae_tiny: small", "patch 6"]),
    "very wide": (5000, (100, 4000), "cpu", "mae_nano", (64, 160), (8, 8), ["64 x 160: the images are not square"]),
    "very tall": (5000, (4000, 100), "cuda", "mae_tiny", (240, 96), (8, 8), ["240 x 96"]),
    "one pixel": (5000, (1, 1), "cpu", "mae_nano", (16, 16), (2, 2), []),
}


@pytest.mark.parametrize("case", AUTO)
def test_auto_chooses_a_consistent_recipe_with_reasons(case):
    images, median, device, recipe, size, patch, words = AUTO[case]
    name, overrides, reasons = choose(images, median, device)
    config = override(find(name), overrides)
    assert (name, config.data.size, config.method.encoder.patch) == (recipe, size, patch)
    assert reasons[0] == f"{images} images of {median[0]} x {median[1]} pixels (median) on {device}"
    for word in words:
        assert word in " ".join(reasons), word
    with torch.device("meta"):
        method = config.build(ImageSpec(1, size, "uint8", (1.0,), (1.0,)))  # raises an error if sizes do not fit
    assert method.encoder.grid == (size[0] // patch[0], size[1] // patch[1])
    assert method.encoder.grid[0] * method.encoder.grid[1] // 4 >= 16, (
        "at least 16 patches stay visible if three quarters are hidden"
    )
    assert config.train.batch_size <= max(16, images)


@pytest.mark.parametrize("key", ["data.size", "method.encoder.patch", "train.batch_size", "train.steps"])
def test_auto_proposes_nothing_for_keys_that_are_set(key):
    everything, without = choose(250, (100, 300), "cpu"), choose(250, (100, 300), "cpu", fixed={key})
    gone = set(everything[1]) - set(without[1])
    assert [item.split("=")[0] for item in gone] == [key]
    assert len(without[2]) == len(everything[2]) - (key != "method.encoder.patch")


@pytest.mark.parametrize(
    ("side", "size", "patch"),
    [
        (24, (32, 32), "[4,4]"),
        (24, (16, 16), "[2,2]"),
        (24, (30, 30), "[3,3]"),
        (32, (97, 97), "[4,4]"),
        (9, (8, 8), "[2,2]"),
    ],
)
def test_auto_chooses_the_patch_for_a_given_size(side, size, patch):
    _, overrides, _ = choose(5000, (side, side), "cpu", fixed={"data.size"}, size=size)
    assert f"method.encoder.patch={patch}" in overrides
    assert not [item for item in overrides if item.startswith("data.size")]


def test_estimated_number_of_images_is_described_as_estimate():
    assert choose(5000, (32, 32), "cpu", about=True)[2][0].startswith("about 5000 images of 32 x 32")


def test_auto_cannot_be_looked_up_like_a_recipe():
    with pytest.raises(ConfigError, match=r"'auto' is chosen from the data and has no settings of its own; .*check"):
        find("auto")
    assert set(AUTO_RECIPES) >= {case[3] for case in AUTO.values()}


@pytest.mark.parametrize("device", ["cuda:77", "cuda:x", "cpu:3", "cpu:"])
def test_unavailable_device_number_is_rejected(device):
    with pytest.raises(ConfigError, match=f"got device '{device}'; expected one of this machine: cpu"):
        choose_device(device)
    assert choose_device("cpu:0") == "cpu:0"


@pytest.mark.parametrize(("micro", "seconds"), [(12, 0.0), (6, 0.0), (4, 1.5), (3, 2.0), (1, 6.0)])
def test_step_with_accumulation_is_measured_after_waiting_for_the_device(monkeypatch, micro, seconds):
    """On the simulated device, launching takes no time, and waiting for two micro-batches takes a second."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "update", lambda *_: None)

    def wait(loss):
        now[0] += loss is not None  # only passes take time, updates do not

    monkeypatch.setattr(measure, "wait_for", wait)
    assert measure_step_seconds(small(), SPEC, micro, "fp32", "cpu", seconds=0) == pytest.approx(seconds)


class Slow(nn.Module):
    """A method that takes a second per image."""

    def __init__(self, now: list[float], seen: set[int]) -> None:
        super().__init__()
        self.now, self.seen, self.weight = now, seen, nn.Parameter(torch.ones(()))

    def forward(self, batch, _):
        self.now[0] += len(batch)
        self.seen.add(len(batch))
        return Loss(self.weight * 1.0)


@pytest.mark.parametrize(
    ("micro", "longest", "sizes"), [(6, 0, {6}), (12, 0, {8}), (12, 11, {8, 11}), (12, 99, {8, 12})]
)
def test_time_of_a_measured_pass_on_a_cpu_is_limited(monkeypatch, micro, longest, sizes):
    now, seen = [0.0], set()
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "build_method", lambda *_: Slow(now, seen))
    monkeypatch.setattr(measure, "LONGEST_PASS", longest)
    assert measure_step_seconds(small(), SPEC, micro, "fp32", "cpu", seconds=0) == pytest.approx(12)
    assert seen == sizes


def test_every_proposal_of_auto_is_a_valid_setting():
    for images, median, device, *_ in AUTO.values():
        name, overrides, _ = choose(images, median, device)
        assert {item.split("=")[0] for item in overrides} <= set(keys(find(name)))


def test_frozen_encoder_needs_memory_too():
    config = override(find("finetune_nano"), ["method.last_blocks=0"])
    images = typical_images(config)
    found = bytes_per_image(build_method(config, images), images, "fp32", "cpu")
    hidden = 64 * 4 * 192 * 4  # activations of one MLP, in float32
    assert hidden < found < 20 * hidden
