"""Time budgets: the number of steps is adapted during training, and a resumed run repeats its steps exactly."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
from conftest import SMALL_RUN, pretrain
from faults import faults

from unmask.batch import ImageSpec
from unmask.console import Console
from unmask.engine import checkpoint
from unmask.engine import time_budget as budgets
from unmask.engine.continue_run import resume
from unmask.engine.time_budget import Budget, Pacer, Replan, as_budget, place, require_order
from unmask.engine.training_plan import Plan
from unmask.errors import UserError
from unmask.optim import learning_rate
from unmask.run import Run, RunError

STEP = 0.2


class FakeClock:
    """A clock that only advances when a test advances it."""

    def __init__(self, monkeypatch):
        self.time = 1000.0
        monkeypatch.setattr(budgets, "clock", lambda: self.time)

    def wait(self, seconds):
        self.time += seconds


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch)


def plan(**more):
    about = {
        "steps": 100, "warmup_steps": 10, "batch_size": 8, "micro_batch": 8, "accumulation": 1, "peak_lr": 1.0,
        "final_lr": 0.0, "epochs": 1.0, "num_images": 800,
        "images": ImageSpec(3, (8, 8), "uint8", (0.0,) * 3, (1.0,) * 3),
        "fingerprint": "f", "precision": "fp32", "device": "cpu", "workers": 0, "cached": True, "picture_every": 25,
        "parameters": 1, "encoder_parameters": 1,
    }  # fmt: skip
    return Plan(**{**about, **more})


# The schedule


def test_schedule_without_replans_is_bit_identical_to_the_plain_one():
    found = plan()
    for step in range(101):
        assert found.lr(step) == learning_rate(step, steps=100, warmup_steps=10, peak=1.0)
        assert found.clock(step, None).progress == step / 100
        assert found.passed(step, 7) == (step % 7 == 0)


@pytest.mark.parametrize("step", [10, 60])
def test_clock_knows_the_places_of_the_images_before_and_after_a_change_of_length(step):
    found = plan(earlier=plan(), since=50)
    assert found.clock(step, None, micro=2).places(4).tolist() == [8, 9, 10, 11]
    assert found.clock(step, None, micro=2, place=np.array([8, 15])).places(2).tolist() == [8, 15]
    with pytest.raises(AssertionError, match="2 places for 4 images"):
        found.clock(step, None, place=np.array([8, 15])).places(4)


@pytest.mark.parametrize("changes", [((40, 60),), ((40, 400),), ((3, 50), (20, 300), (280, 281)), ((99, 150),)])
def test_replan_keeps_the_position_and_spreads_the_rest_of_the_schedule(changes):
    found = plan()
    for step, steps in changes:
        before, found = found, found.replanned(step, steps)
        for earlier in range(step + 1):
            assert found.lr(earlier) == pytest.approx(before.lr(earlier), abs=1e-12), (
                "the learning rate of finished steps does not change"
            )
    last = changes[-1][1]
    assert (found.steps, found.first_steps) == (last, 100)
    places = [found.place(step) for step in range(last + 1)]
    assert places[0] == 0
    assert places[-1] == pytest.approx(100)
    assert all(one < other for one, other in pairwise(places))
    assert found.lr(last) == pytest.approx(0.0, abs=1e-9)
    assert sum(found.passed(step, 25) for step in range(1, last + 1)) == 4, "the number of pictures is as planned"
    assert Plan.model_validate(json.loads(found.model_dump_json())) == found


@pytest.mark.parametrize(
    ("replans", "steps"),
    [
        ([(40, 100, 60)], 61),  # The last replan does not set the final number of steps.
        ([(40, 100, 40)], 40),  # The replan is at the last step.
        ([(40, 100, 60), (40, 60, 80)], 80),  # Two replans at one step.
        ([(40, 100, 60), (50, 70, 80)], 80),  # The second replan does not start from the number of steps of the first.
        ([(100, 100, 120)], 120),  # The replan is after the last step.
    ],
)
def test_inconsistent_replans_are_rejected(replans, steps):
    entries = [Replan(step=step, before=before, steps=after) for step, before, after in replans]
    with pytest.raises(ValueError, match=r"does not continue|after replans that lead to"):
        require_order(entries, steps)
    with pytest.raises(ValueError):
        plan(steps=steps, replans=tuple(entries))


# Decisions of the pacer

PACES = {
    "as measured": lambda share, rng: STEP,
    "four times faster": lambda share, rng: STEP / 4,
    "five times slower": lambda share, rng: STEP * 5,
    "slow in the first half": lambda share, rng: STEP * (2 if share < 0.5 else 1),
    "slow in the second half": lambda share, rng: STEP * (2 if share > 0.5 else 1),
    "three times slower at the end": lambda share, rng: STEP * (3 if share > 0.9 else 1),
    "bursts": lambda share, rng: STEP * (5 if int(share * 20) % 2 else 1),
    "noise": lambda share, rng: STEP * rng.lognormvariate(0, 0.7),
    "ever slower": lambda share, rng: STEP * (1 + 4 * share),
}


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("seconds", [60.0, 600.0])
def test_budget_is_used_and_not_exceeded_at_varying_speed(clock, pace, seconds):
    budget = Budget(seconds)
    clock.wait(5.0)
    rng, step, total = random.Random(0), 0, int((0.9 * seconds - 5) / STEP)
    pacer, closing, changes = Pacer(seconds, budget.used()), 1.0, []
    while step < total:
        clock.wait(PACES[pace](budget.used() / seconds, rng))
        step += 1
        if step < total and (step % 10 == 0 or step == 1 or pacer.due()):
            steps = pacer.steps(step, total, closing)
            if steps != total:
                changes.append(Replan(step=step, before=total, steps=steps))
                total = steps
    clock.wait(closing)
    assert 0.9 * seconds <= budget.used() <= 1.05 * seconds
    assert len(changes) <= 100
    require_order(changes, total)
    if changes:
        assert place(total, changes) == pytest.approx(changes[0].before)


def test_interruptions_count_in_the_budget_but_not_in_the_speed(clock):
    pacer, step, total = Pacer(100.0, 0.0), 0, 95
    while step < total:
        clock.wait(1.0)
        step += 1
        if step == 10:
            with pacer.aside("test"):
                clock.wait(20.0)
        if step < total:
            total = pacer.steps(step, total, 0.0)
    assert pacer.cost("test") == 20.0
    assert 93 <= clock.time - 1000 <= 100
    assert 73 <= total <= 80


def test_most_of_a_budget_is_used_for_training(clock):
    pacer = Pacer(100.0, 10.0)
    assert pacer.affords("test", closing=5.0)
    pacer.expect("test", 14.0)
    assert not pacer.affords("test", closing=5.0), (
        "the test and the closing would take 14 + 5 s, more than a fifth of the remaining 90 s"
    )
    assert pacer.affords("test", closing=4.0)


# In the training loop


def timed_steps(clock, seconds, *, die_at=None):
    """Context manager in which every step advances the clock by `seconds(number of earlier steps)`.

    After `die_at` steps the training is aborted without saving.
    """

    def before_step(job, at):
        if at.step == die_at:
            raise SystemExit("killed")

    def after_step(job, step):
        clock.wait(seconds(step.number - 1))
        return step

    return faults(before_step=before_step, after_step=after_step)


def begin(images, out, monkeypatch, *, budget, console=None, settings=(), each=1.0):
    monkeypatch.setattr("unmask.engine.make_plan.time_steps", lambda *_, **__: [each])
    monkeypatch.setattr("unmask.engine.training_data.batch_seconds", lambda *_, **__: (0.0, 0.0, 0.0))
    rare = ("train.log_every=1", "train.checkpoint_every=20")
    return pretrain(
        images, recipe="mae_nano", out=out, budget=budget, settings=[*SMALL_RUN, *rare, *settings], console=console
    )


def rows(run):
    return {row["step"]: (row["loss"], row["lr"]) for row in run.metrics() if row.get("loss") is not None}


def test_number_of_steps_follows_the_speed_and_is_recorded(images, tmp_path, monkeypatch, clock):
    said = []
    console = Console(quiet=True)
    console.print = said.append
    with timed_steps(clock, lambda step: 0.5 if step < 30 else 2.0):  # the plan assumed 1 s per step
        run = begin(images, tmp_path / "run", monkeypatch, budget=100.0, console=console)
    found = run.read("plan.json")
    assert 90 <= clock.time - 1000 <= 100
    assert found["budget"] == 100.0
    assert len(found["replans"]) >= 2
    assert found["replans"][0]["before"] == 90
    assert found["steps"] == found["replans"][-1]["steps"] == run.read("status.json")["step"] != 90
    assert run.read("status.json")["state"] == "finished"
    assert checkpoint.newest_step(run) == found["steps"]
    assert len(run.metrics()) == found["steps"], "each step is logged once"
    assert run.metrics()[-1]["lr"] < 0.02 * found["peak_lr"], "the learning rate decays to the end of the schedule"
    assert len(list(run.pictures.iterdir())) == 6, (
        "one before training, one after the first step, and four at the planned steps"
    )
    assert any("steps in all now" in line for line in said)


@pytest.mark.parametrize("negative_control", [False, True])
def test_killed_run_repeats_its_steps_with_the_recorded_replans(images, tmp_path, monkeypatch, clock, negative_control):
    """The run is killed after replans that no checkpoint contains, and resumed on a machine that is ten times slower.

    The resumed run repeats the steps exactly. Negative control: without the recorded replans the repeated steps differ.
    """
    with timed_steps(clock, lambda step: 0.4, die_at=37), pytest.raises(SystemExit):
        begin(images, tmp_path / "run", monkeypatch, budget=60.0)
    run = Run(tmp_path / "run")
    before, planned = rows(run), run.read("plan.json")
    assert checkpoint.newest_step(run) == 20
    assert max(before) == 37
    assert planned["replans"][0]["step"] < 37
    if negative_control:
        run.write("plan.json", planned | {"replans": [], "steps": planned["replans"][0]["before"]})
    with timed_steps(clock, lambda step: 4.0):
        resume(run.path)
    after = rows(run)
    repeated = {step: after[step] for step in before if step in after}
    assert len(repeated) == 37 or negative_control
    assert (repeated == {step: before[step] for step in repeated}) is not negative_control
    if not negative_control:
        assert run.read("plan.json")["replans"][: len(planned["replans"])] == planned["replans"]
        assert run.read("plan.json")["steps"] < planned["steps"], "the remaining steps are fitted to the slower pace"


def test_resumed_run_has_the_rest_of_its_budget(images, tmp_path, monkeypatch, clock):
    def stop_at(step):
        if step == 30:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    said = []
    console = Console(quiet=True)
    console.print = said.append
    with timed_steps(clock, stop_at):
        run = begin(images, tmp_path / "run", monkeypatch, budget=100.0)
    assert run.read("status.json")["state"] == "stopped"
    first = run.read("status.json")["seconds"]
    assert 30 <= first <= 32
    clock.wait(10_000.0)
    began = clock.time
    with timed_steps(clock, lambda step: 1.0):
        resume(run.path, console=console)
    assert 93 <= first + clock.time - began <= 100
    status = run.read("status.json")
    assert status["seconds"] == pytest.approx(first + clock.time - began)
    assert any(line.startswith(f"finished {status['step']} steps in 1 min 3") for line in said), said


def test_number_of_steps_stays_if_the_plan_cannot_be_written(images, tmp_path, monkeypatch, clock):
    real, warned = Run.write, []

    def full(self, name, value):
        if name == "plan.json" and value["replans"]:
            raise OSError(28, "No space left on device")
        real(self, name, value)

    monkeypatch.setattr(Run, "write", full)
    console = Console(quiet=True)
    console.warn = warned.append
    with timed_steps(clock, lambda step: 2.0):
        run = begin(images, tmp_path / "run", monkeypatch, budget=30.0, console=console)
    assert run.read("status.json")["step"] == run.read("plan.json")["steps"] == 27
    assert sum("the number of steps stays 27" in line for line in warned) == 1


def test_run_without_a_budget_keeps_its_steps(images, tmp_path, clock):
    with timed_steps(clock, lambda step: 100.0):
        run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=[*SMALL_RUN, "train.steps=5"])
    found = run.read("plan.json")
    assert (found["steps"], found["replans"], found["budget"]) == (5, [], None)


def test_damaged_replans_are_rejected(images, tmp_path, monkeypatch, clock):
    with timed_steps(clock, lambda step: 0.5):
        run = begin(images, tmp_path / "run", monkeypatch, budget=20.0)
    found = run.read("plan.json")
    found["replans"][0]["steps"] += 1
    run.write("plan.json", found)
    with pytest.raises(RunError, match=r"plan\.json is invalid"):
        resume(run.path)


@pytest.mark.parametrize(("given", "seconds"), [("90s", 90.0), ("30m", 1800.0), ("1.5h", 5400.0), ("2D", 172800.0)])
def test_budget_may_be_text_such_as_30m(given, seconds):
    assert as_budget(given).seconds == seconds


@pytest.mark.parametrize("given", ["", "1", "10k", "m", "0s", "-5m", "infh", "nanm"])
def test_invalid_budget_is_rejected_before_images_are_opened(given):
    with pytest.raises(UserError, match="got a time budget of"):
        pretrain("no such folder", budget=given)
