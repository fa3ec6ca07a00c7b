"""`unmask plan RECIPE --nodes N --gpus N`: engine, micro-batch, memory, traffic and speed on many GPUs."""

import dataclasses
import json

import pytest

from unmask.config import ConfigError, override
from unmask.console import Console
from unmask.engine import cluster_plan, make_plan
from unmask.engine.choose_parallel import USABLE_SHARE
from unmask.engine.cluster_plan import Cluster
from unmask.engine.flops import build_unallocated, typical_images
from unmask.engine.parallel_costs import Model
from unmask.engine.recipe_costs import costs_and_plan, print_costs, recipe_costs
from unmask.recipes.catalogue import find

GIB = 2**30
NANO = ("train.batch_size=96",)


def planned(*settings, recipe="mae_nano", verify=False, **cluster):
    return costs_and_plan(recipe, settings=(*NANO, *settings), cluster=Cluster(**cluster), verify=verify)[1]


def model_of(recipe):
    config = find(recipe)
    return Model.of(build_unallocated(config, typical_images(config)))


def gib(plan, *, images):
    """Return the memory in GiB with which `images` images per GPU just fit."""
    return (plan.memory.total + images * plan.bytes_per_image) / USABLE_SHARE / GIB * (1 + 1e-9)


def test_memory_decides_about_the_micro_batch():
    plan = planned(nodes=2, gpus=4)
    assert (plan.engine, plan.images, plan.accumulation) == ("ddp", 12, 1)
    assert plan.peak == plan.memory.total + 12 * plan.bytes_per_image
    assert plan.fits
    for fit, images in ((12, 12), (11, 6), (7, 6), (5, 4), (3, 3), (1, 1)):
        less = planned("train.parallel=ddp", nodes=2, gpus=4, memory=gib(plan, images=fit))
        assert (less.images, less.images * less.accumulation, less.largest_images) == (images, 12, fit)
        assert less.fits
    none = planned("train.parallel=ddp", nodes=2, gpus=4, memory=gib(plan, images=0.5))
    assert (none.images, none.largest_images, none.fits) == (1, 0, False)


def test_gradients_are_divided_after_each_micro_batch_if_whole_ones_do_not_fit(capsys):
    plan = planned("train.parallel=fsdp", gpus=8)
    assert (plan.images, plan.memory.accumulated) == (12, 0)
    whole = 4 * sum(s.numel for b in model_of("mae_nano").blocks for s in b if s.trainable)
    room = whole / USABLE_SHARE / GIB
    set_to_6 = ("train.parallel=fsdp", "train.micro_batch=48")
    enough = planned(*set_to_6, gpus=8, memory=gib(plan, images=6) + room)
    assert (enough.memory.accumulated, enough.divide_gradients, enough.fits) == (whole, False, True)
    for settings, images in ((set_to_6, 6), (("train.parallel=fsdp",), 11)):
        less = planned(*settings, gpus=8, memory=gib(plan, images=images))
        assert (less.memory.accumulated, less.divide_gradients, less.fits) == (0, True, True)
        assert (less.images, less.accumulation) == (enough.images, enough.accumulation) == (6, 2)
        assert less.traffic.reduce_scatter == 2 * enough.traffic.reduce_scatter
        assert less.traffic.all_gather == enough.traffic.all_gather
    print_costs(recipe_costs("mae_nano", settings=NANO), Console(), less)
    assert "gradients are divided after each micro-batch" in capsys.readouterr().err


def test_settings_are_used():
    plan = planned("train.micro_batch=24", gpus=4)
    assert (plan.images, plan.accumulation) == (6, 4)
    with pytest.raises(ConfigError, match=r"got train.micro_batch=6 for 4 processes; expected a multiple of 4 that"):
        planned("train.micro_batch=6", gpus=4)
    assert planned("train.precision=fp32", gpus=4).memory.cast == 0
    assert planned("train.recompute=true", gpus=4).bytes_per_image < planned(gpus=4).bytes_per_image
    assert planned("optim.average=0.99", gpus=4).memory.average == planned(gpus=4).memory.gradients
    engine = planned("train.parallel=hsdp", nodes=2, gpus=4)
    assert (engine.engine, engine.reason) == ("hsdp", "hsdp: the setting train.parallel")
    assert engine.traffic.between_nodes == 4 * engine.traffic.all_reduce


def test_batch_must_be_divisible_among_all_gpus():
    with pytest.raises(
        ConfigError, match=r"train\.batch_size=96 for 10 processes; expected a multiple of 10; .*90 or 100"
    ):
        planned(nodes=2, gpus=5)


def test_speed_comes_from_the_given_rate_only():
    assert planned(gpus=2).throughput is None
    speed = planned(nodes=2, gpus=2, images_per_second=100).throughput
    assert (speed.images_per_second, speed.step_seconds) == (400, 96 / 400)
    costs, plan = costs_and_plan("mae_nano", settings=NANO, cluster=Cluster(gpus=2, tflops=0.5))
    assert plan.throughput.images_per_second == pytest.approx(2 * 0.5e12 / costs["flops"]["training"])
    slower = planned("train.recompute=true", gpus=2, tflops=0.5).throughput
    assert slower.images_per_second == pytest.approx(0.75 * plan.throughput.images_per_second, rel=0.01)
    both = planned(nodes=2, gpus=2, images_per_second=100)
    assert both.throughput.network == pytest.approx(both.traffic.between_nodes / 0.24)


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"nodes": 0}, "got 0 nodes; expected at least 1"),
        ({"memory": 0}, "got --memory 0; expected a number above 0"),
        ({"tflops": -1}, "got --tflops -1; expected a number above 0"),
        ({"tflops": 1, "images_per_second": 1}, "got both --images-per-second and --tflops; leave one of them out"),
    ],
)
def test_invalid_clusters_are_rejected(cluster, message):
    with pytest.raises(ConfigError, match=message):
        Cluster(**cluster)


def test_verification_is_reported_and_can_fail(monkeypatch, capsys):
    assert planned(gpus=2).exact is None
    real, settings = cluster_plan.sharded_bytes, ("train.batch_size=128", "train.parallel=fsdp")

    def checked():
        found, plan = costs_and_plan("mae_nano", settings=settings, cluster=Cluster(16, 8), verify=True)
        assert found["cluster"]["verified"] == plan.exact
        print_costs(found, Console(), plan)
        return plan.exact, capsys.readouterr().err

    exact, said = checked()
    assert exact
    assert "are equal to those of torch in a simulated group of 128 processes" in said
    monkeypatch.setattr(cluster_plan, "sharded_bytes", lambda *about: real(*about) | {"gradients": 1})
    exact, said = checked()
    assert not exact
    assert "ARE NOT equal to those of torch" in said


def test_json_has_all_numbers():
    cluster = Cluster(nodes=2, gpus=4, memory=40, images_per_second=10)
    found, plan = costs_and_plan("mae_nano", settings=NANO, cluster=cluster)
    assert (found["gpus"], found["images_per_gpu"]) == (8, 12)
    tree = json.loads(json.dumps(found["cluster"]))
    assert (tree["nodes"], tree["gpus_per_node"], tree["gpu_memory"]) == (2, 4, 40 * GIB)
    assert tree["memory"]["peak"] == plan.peak == sum(tree["memory"].values()) - plan.peak
    assert tree["traffic"]["total"] == sum(tree["traffic"][k] for k in ("all_gather", "reduce_scatter", "all_reduce"))
    assert tree["throughput"]["images_per_second"] == 80
    assert (tree["engine"], tree["fits"], tree["verified"]) == ("ddp", True, None)
    assert "cluster" not in costs_and_plan("mae_nano")[0]


def show(found, plan):
    print_costs(found, Console(), plan)


def test_text_states_engine_memory_traffic_and_that_the_speed_is_unknown(capsys):
    cluster = Cluster(nodes=2, gpus=4, memory=40)
    show(*costs_and_plan("mae_nano", settings=NANO, cluster=cluster))
    err = capsys.readouterr().err
    for words in (
        "2 nodes x 4 GPUs with 40 GiB each, 36.0 GiB of which training may use, in bf16:",
        "engine ddp: model, gradients and moments",
        "batch of each GPU: 12 images in 1 micro-batch of 12",
        "moments of the optimiser",
        "traffic: each GPU sends",
        "to other nodes",
        "images/s: unknown; give the speed of one GPU",
    ):
        assert words in err
    show(*costs_and_plan("mae_nano", settings=NANO, cluster=Cluster(gpus=4, memory=0.01)))
    assert "this does not fit; use " in capsys.readouterr().err


def test_several_gpus_are_planned_for_without_memory_for_the_model(monkeypatch):
    """A model that is divided may be too large for one GPU, and for the host that plans."""
    config, spec = find("mae_nano"), typical_images(find("mae_nano"))
    expected = planned(nodes=2, gpus=4)
    monkeypatch.setattr(make_plan, "build_method", lambda *_: pytest.fail("the model was allocated"))
    facts = make_plan.model_facts(config, spec, "bf16", "cuda:0", make_plan.Processes(8, 4))
    assert facts.bytes_per_image == expected.bytes_per_image
    assert facts.parameters == sum(shard.numel for shard in model_of("mae_nano").all)
    division = make_plan.Division(config, facts.groups, 1, "bf16", make_plan.Devices(1 << 40, 2, 4))
    assert division.memory() == expected.memory


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_too_little_main_memory_for_initial_weights_is_reported(monkeypatch, parallel):
    config = override(find("mae_nano"), [f"train.parallel={parallel}", "train.steps=1", "train.device=cpu"])
    needed = 4 * sum(shard.numel for shard in model_of("mae_nano").all)
    facts = make_plan.DatasetFacts(typical_images(config), 1000, "")
    monkeypatch.setattr(make_plan, "free_memory", lambda _: needed - 1)

    def plan():
        return make_plan.make_plan(
            config, facts, make_plan.LoadingPlan(0, False), "cpu", processes=make_plan.Processes(2, 2)
        )

    if parallel == "ddp":
        assert plan().parallel == "ddp"
    else:
        with pytest.raises(
            ConfigError, match=r"got a model of 11.2 MiB, but rank 0 has 11.2 MiB of main memory free; "
        ):
            plan()
        monkeypatch.setattr(make_plan, "free_memory", lambda _: needed)
        assert plan().parallel == "fsdp"


def test_training_takes_the_same_engine_and_micro_batch(monkeypatch):
    """The plan of a training on these GPUs agrees with `unmask plan`."""
    spec = typical_images(find("mae_nano"))
    for parallel, images in (("auto", 12.5), ("auto", 8.5), ("fsdp", 11.5), ("auto", 0.2)):
        settings = (*NANO, f"train.parallel={parallel}", "train.precision=bf16")
        memory = gib(planned("train.parallel=ddp", nodes=2, gpus=4), images=images)
        expected = planned(*settings, nodes=2, gpus=4, memory=memory)
        monkeypatch.setattr(make_plan, "free_memory", lambda _, memory=memory: memory * GIB)
        config = override(find("mae_nano"), settings)
        facts = make_plan.model_facts(config, spec, "bf16", "cpu")
        facts = dataclasses.replace(facts, bytes_per_image=expected.bytes_per_image)  # measured with fused attention
        processes = make_plan.Processes(8, 4)
        division = make_plan.divide(config, facts, "bf16", "cuda", processes)
        fit = division.images_that_fit
        micro, _ = make_plan.choose_micro_batch(config, facts.bytes_per_image, "cuda", processes, fit)
        assert (division.engine, micro // 8) == (expected.engine, expected.images)
        fields = make_plan.division_of_steps(division, 96, micro)
        assert fields["divide_gradients"] == expected.divide_gradients
