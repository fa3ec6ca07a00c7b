"""The training loop with non-finite numbers, unreadable files, full disks and accumulation, from files to a run."""

import errno
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, pretrain, write_images
from faults import faults

from unmask.console import Console
from unmask.engine import checkpoint
from unmask.engine.continue_run import resume
from unmask.engine.load import load, load_encoder
from unmask.engine.pacing import due
from unmask.engine.train import TrainingFailed, epoch_text
from unmask.engine.training_data import DataError
from unmask.methods.mae import MAE
from unmask.results import BaselineLosses, from_json
from unmask.run import Run


def start(data, out, *settings, **more):
    return pretrain(data, recipe="mae_nano", out=out, settings=[*SMALL_RUN, *settings], **more)


def losses(run):
    return [row["loss"] for row in run.metrics()]


def float_images(folder, count, bad=()):
    """Write float32 .npy images; those in `bad` contain values whose square overflows."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        image = rng.normal(size=(16, 16, 3)).astype(np.float32)
        np.save(folder / f"{number:03d}.npy", image * (1e30 if number in bad else 1))
    return folder


FLOATS = ("data.mean=[0,0,0]", "data.std=[1,1,1]", "method.target=pixels", "data.crop.kind=center")


def test_run_trains_and_its_folder_is_complete(images, tmp_path):
    run = start(images, tmp_path / "run", "train.steps=60", "optim.base_lr=0.05", "train.picture_every=30")
    found = losses(run)
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])
    assert run.read("status.json")["state"] == "finished"
    assert {path.name for path in run.pictures.iterdir()} == {
        "step-00000000.png",
        "step-00000001.png",
        "step-00000030.png",
        "step-00000060.png",
    }
    baselines = run.read("evals/baselines.json")
    assert isinstance(from_json(baselines), BaselineLosses)
    assert set(baselines["guesses"]) == {"true_patch_mean", "visible_mean", "nearest_visible"}
    assert [step for step, _ in baselines["losses"]] == [0, 1, 30, 60]
    row = run.metrics()[-1]
    assert {"step", "loss", "lr", "images_per_second", "data_wait", "grad_norm", "images"} <= set(row)
    assert 0 <= row["data_wait"] <= 1
    plan = run.read("plan.json")
    assert plan["images"]["mean"]
    assert "the setting train." in " ".join(plan["reasons"])
    assert run.read("provenance.json")["versions"]["torch"]
    features = load_encoder(run.path)(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert features.cls.shape == (2, 32)
    assert features.grid == (4, 4)
    assert load(run.path).step == 60


def test_same_seed_gives_the_same_run_for_any_number_of_workers(images, tmp_path):
    plain = start(images, tmp_path / "a", "train.steps=6")
    for name, settings in {"b": ["data.workers=2"], "c": ["data.workers=1", "data.cache=false"]}.items():
        assert losses(start(images, tmp_path / name, "train.steps=6", *settings)) == losses(plain)
    assert losses(start(images, tmp_path / "d", "train.steps=6", "train.seed=1")) != losses(plain)


def test_accumulation_changes_results_only_by_rounding(images, tmp_path):
    settings = ("train.steps=5", "optim.base_lr=0.01", "train.precision=fp32")
    whole = start(images, tmp_path / "a", *settings)
    parts = start(images, tmp_path / "b", *settings, "train.micro_batch=2")
    assert parts.read("plan.json")["accumulation"] == 4
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    with pytest.raises(ValueError, match=r"micro_batch=3 does not divide train.batch_size=8"):
        start(images, tmp_path / "c", "train.micro_batch=3")


def test_gradient_clipping_changes_the_update(images, tmp_path):
    # AdamW normalises gradients, so without a large eps clipping would have almost no effect
    settings = ("train.steps=4", "optim.base_lr=0.05", "optim.eps=0.1")
    free = start(images, tmp_path / "a", *settings)
    clipped = start(images, tmp_path / "b", *settings, "optim.clip=0.001")
    assert losses(free)[:1] == losses(clipped)[:1]
    assert all(one != other for one, other in zip(losses(free)[2:], losses(clipped)[2:], strict=True))
    assert clipped.metrics()[0]["grad_norm"] == free.metrics()[0]["grad_norm"] > 0.001, (
        "the norm is logged before clipping"
    )
    loose = start(images, tmp_path / "c", *settings, "optim.clip=1000")
    assert losses(loose) == losses(free), "gradients below the limit are not clipped"


def test_non_finite_step_is_skipped_and_its_images_are_listed(tmp_path):
    data = float_images(tmp_path / "images", 40, bad=[7])
    run = start(data, tmp_path / "run", *FLOATS, "train.steps=10", "train.picture_every=100")
    skipped = [row for row in run.metrics() if "skipped" in row]
    assert len(skipped) == 2  # image 7 is used once in each of two epochs
    assert all("007.npy" in row["skipped"] and row["loss"] is None for row in skipped)
    assert [row["step"] for row in run.metrics()] == list(range(1, 11))
    assert all(value.isfinite().all() for value in checkpoint.load_model(run)[1].values())


def test_three_bad_steps_roll_back_and_repeated_rollbacks_stop(tmp_path):
    data = float_images(tmp_path / "images", 16, bad=range(16))
    said = []
    console = Console(quiet=True)
    console.warn = said.append
    with pytest.raises(TrainingFailed, match=r"after 2 rollbacks.*optim.clip"):
        start(data, tmp_path / "run", *FLOATS, "train.steps=50", "train.picture_every=100", console=console)
    assert sum("back from step" in line for line in said) == 2
    assert Run(tmp_path / "run").read("status.json")["state"] == "failed"


def test_rollback_returns_to_the_checkpoint_and_skips_data(tmp_path):
    data = float_images(tmp_path / "images", 40)
    poison = {6, 7, 8}

    def sometimes_bad(job, step):
        if step.number in poison:
            poison.discard(step.number)
            return replace(step, loss=torch.tensor(float("nan")))
        return step

    settings = ("train.steps=12", "train.checkpoint_every=4", "train.picture_every=100")
    with faults(after_step=sometimes_bad):
        run = start(data, tmp_path / "run", *FLOATS, *settings)
    assert [row["step"] for row in run.metrics()] == list(range(1, 13)), (
        "each step is logged once, and rolled-back steps are removed"
    )
    assert run.metrics()[-1]["images"] == 12 * 8 + 50 * 8 + 4 * 8  # 4 steps were repeated with later data
    assert run.read("status.json")["state"] == "finished"


def poisoned(numbers, stop_after=None):
    """Context manager in which the steps `numbers` have a NaN gradient when they are first done.

    SIGTERM is sent after step `stop_after`.
    """
    left = set(numbers)

    def sometimes_bad(job, step):
        if step.number == stop_after:
            os.kill(os.getpid(), 15)
        if step.number in left:
            left.discard(step.number)
            return replace(step, norm=torch.tensor(float("nan")))
        return step

    return faults(after_step=sometimes_bad)


@pytest.mark.parametrize("settings", [("train.log_every=5",), ("train.log_every=100", "train.checkpoint_every=3")])
def test_result_does_not_depend_on_when_the_host_reads(tmp_path, settings):
    data = float_images(tmp_path / "images", 40)
    weights = []
    for name, more in {"a": ("train.checkpoint_every=3",), "b": (*settings, "train.checkpoint_every=3")}.items():
        with poisoned({4, 7, 8, 9}):
            run = start(data, tmp_path / name, *FLOATS, "train.steps=14", "train.picture_every=100", *more)
        weights.append((checkpoint.load_latest(run).state["position"], checkpoint.load_model(run)[1]))
    assert weights[0][0] == weights[1][0]
    assert weights[0][0]["rollbacks"] == 1
    assert all(torch.equal(weights[0][1][name], weights[1][1][name]) for name in weights[0][1])


def test_bad_steps_are_counted_across_a_stop(tmp_path):
    data = float_images(tmp_path / "images", 40)
    settings = (*FLOATS, "train.steps=14", "train.picture_every=100", "train.checkpoint_every=5")
    with poisoned({7, 8, 9}):
        whole = start(data, tmp_path / "a", *settings)
    with poisoned({7, 8}, stop_after=8):
        parts = start(data, tmp_path / "b", *settings)
    assert checkpoint.load_latest(parts).state["position"]["bad_steps"] == 2
    with poisoned({9}):
        resume(parts.path)
    assert [row["step"] for row in parts.metrics()] == [row["step"] for row in whole.metrics()] == list(range(1, 15))
    assert checkpoint.load_latest(parts).state["position"]["rollbacks"] == 1


def test_non_finite_weights_are_not_saved_and_reported(images, tmp_path):
    said, left = [], [4]

    def spoiling(job, step):
        if step.number in left:
            left.clear()
            with torch.no_grad():
                job.method.decoder.pred.bias[0] = float("nan")
        return step

    console = Console(quiet=True)
    console.warn = said.append
    settings = ("train.steps=9", "train.checkpoint_every=2", "train.picture_every=100")
    with faults(after_step=spoiling):
        run = start(images, tmp_path / "run", *settings, console=console)
    assert sum("not written" in line and "decoder.pred.bias" in line for line in said) == 2, (
        "the checkpoints of steps 4 and 6 are not written"
    )
    assert sum("back from step 7 to 2" in line for line in said) == 1
    assert run.read("status.json")["state"] == "finished"


def test_failed_writes_of_metrics_and_pictures_are_reported_once(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Run, "log", full)
    monkeypatch.setattr("unmask.engine.samples.draw", full)
    said = []
    console = Console(quiet=True)
    console.warn = said.append
    run = start(images, tmp_path / "run", "train.steps=6", "train.picture_every=2", console=console)
    assert run.read("status.json")["state"] == "finished"
    said = [text for text in said if "an untrained baseline" not in text]  # ignore the warning about too few steps
    assert len(said) == 2


def test_file_that_becomes_unreadable_is_replaced_deterministically(images, tmp_path):
    def train_with_a_broken_file(out, workers):
        settings = ("train.steps=8", "data.cache=false", f"data.workers={workers}", "data.max_bad_fraction=0.1")
        with faults(before_training=lambda run: (images / "0004.png").write_bytes(b"")):  # after the scan
            run = start(images, out, *settings)
        write_images(images, 30)
        return run

    a, b = train_with_a_broken_file(tmp_path / "a", 0), train_with_a_broken_file(tmp_path / "b", 2)
    assert losses(a) == losses(b)
    assert [(row["name"], row["code"]) for row in a.quarantine()] == [("0004.png", "CHANGED")]


def test_few_unreadable_files_are_quarantined_and_many_stop_the_run(tmp_path, capsys):
    images = write_images(tmp_path / "images", 99)
    (images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    run = start(images, tmp_path / "run", "train.steps=2")
    assert [row["name"] for row in run.quarantine()] == ["broken.png"]
    assert "1 of 100 files cannot be read and are left out;" in " ".join(capsys.readouterr().err.split())
    assert run.read("plan.json")["num_images"] == 99
    for number in range(99):
        (images / f"bad{number}.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"100 of 199 files checked cannot be read.*max_bad_fraction=0.55"):
        start(images, tmp_path / "run2", "train.steps=2")
    assert not (tmp_path / "run2").exists(), "a rejected run leaves no folder"


def test_training_survives_a_full_disk_at_a_checkpoint(images, tmp_path):
    attempts = []

    def full_at_first(path):
        attempts.append(path)
        if len(attempts) <= 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    said = []
    console = Console(quiet=True)
    console.warn = said.append
    with faults(before_write=full_at_first):
        run = start(images, tmp_path / "run", "train.steps=6", "train.checkpoint_every=2", console=console)
    assert sum("disk is full" in line for line in said) == 2
    assert run.read("status.json")["state"] == "finished"
    assert checkpoint.load_model(run)[0] == 6


def test_disk_that_stays_full_fails_at_the_end(images, tmp_path):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    failed = pytest.raises(TrainingFailed, match=r"could not be written.*unmask resume")
    with faults(before_write=full), failed:
        start(images, tmp_path / "run", "train.steps=3")


def test_batch_may_be_larger_than_the_data_set(tmp_path):
    images = write_images(tmp_path / "images", 3)
    run = start(images, tmp_path / "run", "train.steps=2", "train.batch_size=8")  # every batch has repeated images
    assert len(losses(run)) == 2


@pytest.mark.parametrize(
    ("channels", "dtype"), [(1, "uint8"), (2, "uint8"), (1, "uint16"), (5, "uint16"), (3, "float32")]
)
def test_any_channels_and_dtype_train_on_a_wide_grid(tmp_path, channels, dtype):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        image = rng.random((20, 40, channels)) * {"uint8": 255, "uint16": 60000, "float32": 3}[dtype]
        np.save(folder / f"{number}.npy", image.astype(dtype))
    run = start(folder, tmp_path / "run", "train.steps=3", "data.size=[16,32]")
    spec = run.read("plan.json")["images"]
    assert (spec["channels"], spec["dtype"]) == (channels, dtype)
    assert spec["mean"][0] == pytest.approx({"uint8": 127, "uint16": 30000, "float32": 1.5}[dtype], rel=0.05)
    features = load_encoder(run.path)(torch.zeros(1, channels, 16, 32))
    assert features.grid == (4, 8)
    assert (run.pictures / "step-00000003.png").stat().st_size > 500
    assert all(np.isfinite(losses(run)))


def test_budget_determines_the_number_of_steps(images, tmp_path, monkeypatch):
    monkeypatch.setattr("unmask.engine.time_budget.clock", lambda: 0.0)
    monkeypatch.setattr("unmask.engine.make_plan.time_steps", lambda *_, **__: [0.1])
    run = start(images, tmp_path / "run", budget=6.0)
    plan = run.read("plan.json")
    assert 5 <= plan["steps"] <= 20_000
    assert "in a budget of 6 s" in " ".join(plan["reasons"])
    with pytest.raises(ValueError, match="leave one of them out"):
        start(images, tmp_path / "run2", "train.steps=5", budget=6.0)


def test_every_stop_can_be_resumed_in_the_same_process(images, tmp_path):
    whole = start(images, tmp_path / "a", "train.steps=9")

    def stop_at_four(job, at):
        if at.step == 4:
            os.kill(os.getpid(), 15)

    with faults(before_step=stop_at_four):
        run = start(images, tmp_path / "b", "train.steps=9")
    assert run.read("status.json")["state"] == "stopped"
    assert losses(resume(run.path)) == losses(whole)


def test_periodic_actions_are_due_at_the_first_and_last_step_and_multiples():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [1, 4, 8, 10]


def test_logs_of_a_method_are_averaged_over_micro_batches(images, tmp_path, monkeypatch):
    real = MAE.loss

    def chatty(self, batch, clock):
        return replace(real(self, batch, clock), logs={"first_half": torch.tensor(float(clock.micro < 2))})

    monkeypatch.setattr(MAE, "loss", chatty)
    run = start(images, tmp_path / "run", "train.steps=3", "train.micro_batch=2")
    assert [row["first_half"] for row in run.metrics()] == [0.5, 0.5, 0.5]


def test_training_in_another_thread_keeps_the_callers_random_state(images, tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    found = []
    thread = threading.Thread(target=lambda: found.append(start(images, tmp_path / "run", "train.steps=2")))
    thread.start()
    thread.join()
    assert found[0].read("status.json")["state"] == "finished"
    assert losses(start(images, tmp_path / "again", "train.steps=2")) == losses(found[0])
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("done", "total", "expected"),
    [
        (0, 20, "epoch 0.0/20.0"),
        (1.54, 3, "epoch 1.5/3.0"),
        (0.002, 0.006, "epoch 0.0020/0.0060"),
        (0, 0.5, "epoch 0.00/0.50"),
    ],
)
def test_epochs_of_a_short_run_have_enough_decimals(done, total, expected):
    assert epoch_text(done, total) == expected
