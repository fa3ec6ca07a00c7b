"""An intact checkpoint remains after a kill or damage; negative controls show that each protection is needed."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from unmask.engine import checkpoint, checkpoint_manifest, fixed_tensors, training_state
from unmask.engine.checkpoint import (
    CheckpointError,
    CheckpointFull,
    CheckpointRefused,
    Damaged,
    load_latest,
    load_model,
    save,
)
from unmask.engine.checkpoint_formats import SAFETENSORS_TYPES, safetensors_pieces
from unmask.engine.copy_weights import graft
from unmask.engine.optimizer_state import optimizer_to_tensors, tensors_to_optimizer
from unmask.engine.prune_run import _old_checkpoints
from unmask.run import Run

FILES = ["model.safetensors", "optim.safetensors", "state.json", "MANIFEST.json"]


@pytest.fixture
def run(tmp_path):
    made = Run.create(tmp_path / "run")
    made.write("config.json", {})
    return made


def write(run, step, value=None, keep=2):
    model = {"w": torch.full((3, 5), float(value if value is not None else step)), "b": torch.arange(4.0)}
    return save(run, step, model, {"w/exp_avg": torch.ones(3, 5)}, {"position": {"step": step}}, keep=keep)


def write_unsigned(folder, manifest):
    """Write a manifest without a digest of its own, as earlier versions did."""
    unsigned = {key: value for key, value in manifest.items() if key not in ("run_id", "sha256")}
    (folder / "MANIFEST.json").write_text(json.dumps(unsigned))


def test_round_trip_is_exact_in_every_dtype(run):
    model = {"a": torch.randn(4, 3), "half": torch.randn(5).bfloat16(), "n": torch.tensor(3), "t": torch.randn(3, 4).T}
    save(run, 7, model, {}, {"x": 0.1})
    found = load_latest(run)
    assert found.step == 7
    assert found.state == {"x": 0.1}
    assert all(
        torch.equal(found.model[name], value) and found.model[name].dtype == value.dtype
        for name, value in model.items()
    )
    assert (run.checkpoints / "LATEST").read_text() == "step-00000007\n"


def test_pieces_of_a_file_have_the_bytes_of_safetensors_and_the_memory_of_the_tensors():
    shapes = {"b": (3, 5), "a": (), "z": (0, 4), "A.b": (7,), 'quoted "\\ é': (2, 3)}
    tensors = {
        f"{name}/{number}": (100 * torch.rand(shape)).to(dtype)
        for number, dtype in enumerate(SAFETENSORS_TYPES)
        for name, shape in shapes.items()
    }
    for given in (tensors, {}, {"w": torch.rand(3, 4).T}, {"rare": torch.zeros(3, dtype=torch.complex64)}):
        pieces = safetensors_pieces(given)
        whole = {name: value.contiguous() for name, value in given.items()}
        assert b"".join(bytes(piece) for piece in pieces) == safetensors.torch.save(whole)
    _, view = safetensors_pieces({"w": (weight := torch.zeros(4))})
    weight.fill_(1)
    assert bytes(view) == weight.numpy().tobytes(), "a copy would need the memory of a checkpoint once more"


def test_loading_a_run_without_checkpoints_returns_none(run):
    assert load_latest(run) is None
    with pytest.raises(CheckpointError, match=r"no checkpoint yet.*unmask resume"):
        load_model(run)


def test_pruning_keeps_the_newest_intact_checkpoints(run):
    for step in (1, 2, 3, 4):
        write(run, step)
    assert sorted(p.name for p in run.checkpoints.glob("step-*")) == ["step-00000003", "step-00000004"]


def test_damaged_newer_folders_do_not_count_in_pruning(run):
    write(run, 1)
    for step in (2, 3):
        (run.checkpoints / f"step-{step:08d}").mkdir()
        (run.checkpoints / f"step-{step:08d}" / "model.safetensors").write_bytes(b"half")
    write(run, 4)
    assert (run.checkpoints / "step-00000001").is_dir()


def test_pruning_reads_no_file_twice_that_has_not_changed(run, monkeypatch):
    verified, real = [], checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda path: (verified.append(path.name), real(path))[1])
    for step in (1, 2, 3):
        write(run, step)
    assert verified == []
    path = run.checkpoints / "step-00000003" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    write(run, 4)
    write(run, 5)
    assert verified == ["step-00000003"], "it was removed with the next save, as older than two intact ones"
    monkeypatch.setattr(checkpoint, "_KNOWN", {})
    write(run, 6)
    assert verified == ["step-00000003", "step-00000005"], "another process verifies what it has not written"


def test_a_changed_checkpoint_does_not_count_in_pruning(run):
    write(run, 1)
    write(run, 2)
    path = run.checkpoints / "step-00000002" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    write(run, 3)
    assert (run.checkpoints / "step-00000001").is_dir()


def test_keeping_only_one_checkpoint_is_rejected(run):
    with pytest.raises(AssertionError):
        write(run, 1, keep=1)


def test_non_finite_weights_are_not_saved(run):
    write(run, 1)
    with pytest.raises(CheckpointRefused, match="non-finite numbers, first w"):
        write(run, 2, value=float("nan"))
    assert load_latest(run).step == 1


def boundaries(run, step, at=None):
    """Save a checkpoint in a forked child that dies (as with kill -9) before the file operation with number `at`.

    Return how many file operations were done.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        passed = 0

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal passed
                if passed == at:
                    os.write(writer, bytes([passed]))
                    os._exit(9)
                passed += 1
                return function(*args, **kwargs)

            return wrapper

        for name in ("fsync", "rename", "replace"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint._write = counted(checkpoint._write)
        shutil.rmtree = counted(shutil.rmtree)
        write(run, step)
        os.write(writer, bytes([passed]))
        os._exit(0)
    os.close(writer)
    passed = os.read(reader, 1)[0]
    os.close(reader)
    os.waitpid(child, 0)
    return passed


def test_run_can_resume_after_a_kill_at_any_point_of_a_save(run):
    write(run, 1)
    write(run, 2)
    total = boundaries(run, 3)
    assert total > 12
    for at in range(total):
        shutil.rmtree(run.checkpoints)
        run.checkpoints.mkdir()
        write(run, 1)
        write(run, 2)
        assert boundaries(run, 3, at) == at
        found = load_latest(run, log=pytest.fail)  # files may be missing, but none is damaged
        assert found.step in (2, 3), f"boundary {at}"
        assert torch.equal(found.model["w"], torch.full((3, 5), float(found.step)))
        write(run, 4)
        assert not list(run.checkpoints.glob(".tmp-*")), "the next save removes leftover files"
        assert load_latest(run).step == 4


def test_kill_while_the_only_checkpoint_is_rewritten_leaves_one_copy(run):
    """After a rollback the same step is saved again.

    Between the two renames, no folder has the name of the checkpoint.
    """
    write(run, 1)
    total = boundaries(run, 1)
    for at in range(total):
        shutil.rmtree(run.checkpoints)
        run.checkpoints.mkdir()
        write(run, 1)
        assert boundaries(run, 1, at) == at
        assert load_latest(run, log=pytest.fail).step == 1, f"boundary {at}"
        write(run, 2)
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["LATEST", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_anywhere_is_detected(run, name):
    write(run, 1)
    path = write(run, 2) / name
    sound = path.read_bytes()
    for offset in np.linspace(0, len(sound) - 1, 25).astype(int):
        for bit in (0, 6):
            damaged = bytearray(sound)
            damaged[offset] ^= 1 << bit
            path.write_bytes(damaged)
            said = []
            found = load_latest(run, log=said.append)
            assert found.step == 1, f"byte {offset}, bit {bit}"
            assert name in said[0]
            assert "step-00000002" in said[0]
            corrupt = next(run.checkpoints.glob("*.corrupt*"))
            corrupt.rename(run.checkpoints / "step-00000002")
    path.write_bytes(sound)
    assert load_latest(run, log=pytest.fail).step == 2


def test_flipped_bit_would_be_loaded_without_the_digest(run, monkeypatch):
    """Negative control: the file format itself does not detect a flipped bit."""
    path = write(run, 1) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    real = hashlib.sha256

    class Blind:
        def __init__(self, data):
            self.data = data

        def hexdigest(self):
            manifest = json.loads((path.parent / "MANIFEST.json").read_bytes())["files"]
            return next(
                (e["sha256"] for e in manifest.values() if e["size"] == len(self.data)), real(self.data).hexdigest()
            )

    monkeypatch.setattr(hashlib, "sha256", Blind)
    found = load_latest(run, log=pytest.fail).model
    assert not (torch.equal(found["w"], torch.full((3, 5), 1.0)) and torch.equal(found["b"], torch.arange(4.0)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncate", "empty", "missing", "swap", "folder"])
def test_damaged_checkpoint_falls_back_to_the_previous_one(run, name, damage):
    older, newer = write(run, 1), write(run, 2)
    path = newer / name
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "swap":
        shutil.copy(older / name, path)
        if (older / name).read_bytes() == path.read_bytes() and name == "optim.safetensors":
            path.write_bytes(safetensors.torch.save({"w/exp_avg": torch.zeros(3, 5)}))
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    said = []
    assert load_latest(run, log=said.append).step == 1
    assert len(said) == 1
    assert (run.checkpoints / "step-00000002.corrupt").is_dir()


def test_renaming_a_damaged_checkpoint_overwrites_no_earlier_damaged_one(run):
    for _ in range(2):
        write(run, 1)
        path = write(run, 2)
        (path / "state.json").unlink()
        load_latest(run, log=lambda _: None)
    assert {p.name for p in run.checkpoints.glob("*.corrupt*")} == {"step-00000002.corrupt", "step-00000002.corrupt-2"}


def test_run_with_only_damaged_checkpoints_raises_an_error(run):
    for step in (1, 2):
        (write(run, step) / "model.safetensors").write_bytes(b"")
    for _ in range(2):  # at the second attempt, all damaged checkpoints have already been renamed
        with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used: all are damaged"):
            load_latest(run, log=lambda _: None)


def test_content_of_the_file_latest_is_ignored(run):
    write(run, 1)
    write(run, 2)
    (run.checkpoints / "LATEST").write_text("step-00000001\n")
    assert load_latest(run).step == 2
    (run.checkpoints / "LATEST").write_text("nonsense")
    assert load_latest(run).step == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", range(6))
def test_full_disk_keeps_older_checkpoints(run, monkeypatch, number, call):
    write(run, 1)
    real, calls = os.fsync, []

    def failing(handle):
        calls.append(handle)
        if len(calls) == call + 1:
            raise OSError(number, os.strerror(number))
        return real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    said = ""
    try:
        write(run, 2)
    except CheckpointFull as error:  # errors of flushing the folder are ignored, errors of flushing a file are not
        said = str(error)
    monkeypatch.undo()
    assert said or call > 3
    if said:
        assert "older checkpoints are unchanged" in said
        assert ("disk is full" in said) == (number == errno.ENOSPC)
    assert not list(run.checkpoints.glob(".tmp-*"))
    assert load_latest(run, log=pytest.fail).step in (1, 2)
    write(run, 3)
    assert load_latest(run).step == 3


def test_write_to_dev_full_is_reported(run):
    """/dev/full rejects every byte, like a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left"):
        checkpoint._write(Path("/dev/full"), b"x" * 100)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("with_manifest", [False, True])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_pickle_is_rejected_and_never_opened(run, tmp_path, form, with_manifest):
    marker = tmp_path / "marker"
    path = write(run, 1) / "model.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"model": Payload(marker)}, path)
    if with_manifest:  # a pickle is rejected even if the manifest matches
        manifest = json.loads((path.parent / "MANIFEST.json").read_bytes())
        content = path.read_bytes()
        manifest["files"]["model.safetensors"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_unsigned(path.parent, manifest)
    with pytest.raises(CheckpointError) as caught:
        load_model(run)
    if not with_manifest:
        assert "pickle, not safetensors" in str(caught.value)
    assert not marker.exists()
    assert (path.parent).is_dir(), "reading for evaluation renames nothing"


def test_checkpoint_of_a_given_step_is_loaded(run):
    write(run, 1)
    write(run, 2)
    assert load_model(run, 1)[0] == 1
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; it has 1, 2"):
        load_model(run, 5)


def test_verify_rejects_a_folder_with_the_wrong_step(run):
    path = write(run, 1)
    path.rename(run.checkpoints / "step-00000009")
    with pytest.raises(Damaged, match="belongs to another checkpoint"):
        checkpoint.verify(run.checkpoints / "step-00000009")


def make_training(seed):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.95), fused=True)
    return module, optimizer, {p: n for n, p in module.named_parameters()}


def advance(module, optimizer, steps):
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        module(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("forget", ["nothing", "moments", "step count"])
def test_restored_optimizer_state_is_bit_identical(run, forget):
    """Negative controls: without moments or the step count, the result must differ."""
    module, optimizer, names = make_training(0)
    advance(module, optimizer, 5)
    tensors, numbers = optimizer_to_tensors(optimizer, names)
    save(run, 5, module.state_dict(), tensors, {"optimizer": numbers})
    advance(module, optimizer, 5)

    other, other_optimizer, other_names = make_training(99)
    found = load_latest(run)
    other.load_state_dict(found.model)
    kept = {
        k: v
        for k, v in found.optim.items()
        if forget == "nothing" or not k.endswith("/exp_avg" if forget == "moments" else "/step")
    }
    if forget != "nothing":
        kept |= {k: torch.zeros_like(v) for k, v in found.optim.items() if k not in kept}
    tensors_to_optimizer(other_optimizer, other_names, kept, found.state["optimizer"])
    advance(other, other_optimizer, 5)
    same = all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert same == (forget == "nothing")


def test_optimizer_state_of_another_model_is_rejected():
    _, optimizer, names = make_training(0)
    with pytest.raises(CheckpointError, match=r"'other.weight', which this model does not train"):
        tensors_to_optimizer(optimizer, names, {"other.weight/exp_avg": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"has shape \(3,\); expected \(8, 4\)"):
        tensors_to_optimizer(optimizer, names, {"0.weight/exp_avg": torch.zeros(3)}, {})


def test_graft_rejects_missing_unexpected_and_mis_shaped_tensors():
    module = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 3), "head": torch.nn.Linear(3, 1)})
    source = {"tokenizer.weight": torch.ones(3, 2), "tokenizer.bias": torch.ones(3), "rest": torch.ones(1)}
    graft(module, [("tokenizer.", "encoder.", source)])
    assert module["encoder"].weight.eq(1).all()
    before = module["encoder"].weight.clone()
    for broken, message in [
        ({"tokenizer.weight": torch.zeros(3, 2)}, "missing encoder.bias"),
        (source | {"tokenizer.scale": torch.ones(1)}, "unexpected encoder.scale"),
        (source | {"tokenizer.weight": torch.zeros(2, 2)}, r"encoder.weight is \(2, 2\), expected \(3, 2\)"),
        ({"other": torch.ones(1)}, "the source has no tensors under 'tokenizer.'"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            graft(module, [("tokenizer.", "encoder.", broken)])
        assert torch.equal(module["encoder"].weight, before), "nothing is copied if any tensor does not fit"


def test_too_little_disk_space_is_reported_before_training(run):
    with pytest.raises(CheckpointFull, match="free space"):
        checkpoint.check_space(run, 1 << 60)
    checkpoint.check_space(run, 1)


def test_too_little_main_memory_for_a_whole_checkpoint_is_reported(run, monkeypatch):
    needed = sum(file.stat().st_size for file in write(run, 3).iterdir() if file.name != "MANIFEST.json")
    monkeypatch.setattr(training_state, "free_memory", lambda _: needed - 1)
    with pytest.raises(CheckpointError, match=r"got a checkpoint of .* \(step 3\), but rank 0 has .* free; "):
        training_state.require_memory(run)
    monkeypatch.setattr(training_state, "free_memory", lambda _: needed)
    training_state.require_memory(run)


def test_fixed_tensors_are_stored_once_and_loaded_with_every_step(run):
    tokenizer = {"tokenizer.weight": torch.randn(3, 4)}
    fixed_tensors.save_fixed(run, {"tokenizer.weight": torch.zeros(3, 4)})  # as an interrupted start leaves it
    fixed_tensors.save_fixed(run, tokenizer)
    for step in (1, 2):
        checkpoint.save(run, step, {"encoder.weight": torch.full((2,), float(step))}, {}, {"step": step})
    assert len(list(run.checkpoints.glob("fixed-*"))) == 1
    for model in (checkpoint.load_latest(run).model, checkpoint.load_model(run, 1)[1]):
        assert torch.equal(model["tokenizer.weight"], tokenizer["tokenizer.weight"])
        assert "encoder.weight" in model
    (file,) = run.checkpoints.glob("fixed-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        checkpoint.load_latest(run)
    assert len(checkpoint.steps_on_disk(run)) == 2, "intact checkpoints are not renamed because of the damaged one"


def test_loading_skips_a_damaged_checkpoint_with_a_message_and_renames_nothing(run, capsys):
    for step in (1, 2):
        checkpoint.save(run, step, {"weight": torch.full((2,), float(step))}, {}, {"step": step})
    assert checkpoint.load_model(run)[0] == 2
    assert capsys.readouterr().err == ""
    file = run.checkpoints / "step-00000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found, weights = checkpoint.load_model(run)
    assert (found, float(weights["weight"][0])) == (1, 1.0)
    assert "using the checkpoint of step 1, because newer ones cannot be used" in (err := capsys.readouterr().err)
    assert "model.safetensors has changed" in err
    assert len(checkpoint.steps_on_disk(run)) == 2


@pytest.mark.parametrize("step", ['"2"', "2.5", "null", "[]"])
def test_manifest_without_an_integer_step_counts_as_damaged(run, step):
    write(run, 2)
    folder = run.checkpoints / "step-00000002"
    write_unsigned(folder, json.loads((folder / "MANIFEST.json").read_text()) | {"step": json.loads(step)})
    with pytest.raises(checkpoint.Damaged, match=r"MANIFEST\.json cannot be read"):
        checkpoint.verify(folder)


def test_every_bit_of_the_manifest_counts_and_is_named(run):
    fixed_tensors.save_fixed(run, {"a": torch.ones(2)})
    folder = write(run, 2)
    path = folder / "MANIFEST.json"
    sound = path.read_bytes()
    assert b'"fixed"' in sound
    for place in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"MANIFEST\.json "):
            checkpoint_manifest.read_manifest(folder)
    path.write_bytes(sound)
    assert load_latest(run, log=pytest.fail).step == 2


def test_checkpoints_of_earlier_versions_have_no_digest_of_the_manifest(run):
    folder = write(run, 2)
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    write_unsigned(folder, manifest)
    assert load_latest(run, log=pytest.fail).step == 2
    del manifest["sha256"]
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"MANIFEST\.json has changed since it was written: sha256 is missing"):
        checkpoint.verify(folder)


def test_unreadable_fixed_tensors_raise_a_clear_error(run):
    fixed_tensors.save_fixed(run, {"a": torch.ones(2)})
    file = next(run.checkpoints.glob("fixed-*"))
    file.unlink()
    file.mkdir()
    with pytest.raises(checkpoint.CheckpointError, match=r"fixed-.* cannot be read .*restore it from a backup"):
        fixed_tensors.load_fixed(run.checkpoints)


def test_prune_keeps_a_renamed_checkpoint_of_another_run(run, tmp_path):
    other = Run.create(tmp_path / "other")
    foreign, damaged = write(other, 2), write(run, 3)
    write(run, 1)
    shutil.copytree(foreign, run.checkpoints / foreign.name)
    (damaged / "state.json").unlink()
    assert load_latest(run, log=lambda _: None).step == 1
    removable = [Path(found.path).name for found in _old_checkpoints(run, 1)]
    assert removable == ["step-00000003.corrupt"]
    assert (run.checkpoints / "step-00000002.corrupt").is_dir()
