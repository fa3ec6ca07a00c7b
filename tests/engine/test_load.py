"""Loading a run: incomplete or damaged runs and pickles raise a clear error."""

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import SMALL_RUN, pretrain, write_images

from unmask.engine.checkpoint import CheckpointError
from unmask.engine.load import load, load_encoder, read_config, read_plan, untrained_encoder
from unmask.run import Run, RunError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    images = write_images(folder / "images", 16)
    settings = [*SMALL_RUN, "train.steps=4", "train.checkpoint_every=2", "optim.base_lr=0.01", "train.picture_every=9"]
    return pretrain(images, recipe="mae_nano", out=folder / "run", settings=settings).path


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def without_digest(manifest):
    """Return a manifest without a digest of its own, as earlier versions wrote it."""
    return {key: value for key, value in manifest.items() if key not in ("run_id", "sha256")}


def rewrite(run: Path, change) -> None:
    """Change the newest checkpoint's weights and update its manifest, so that the digests match."""
    folder = max((run / "checkpoints").glob("step-*"))
    weights = change(safetensors.torch.load_file(folder / "model.safetensors"))
    content = weights if isinstance(weights, bytes) else safetensors.torch.save(weights)
    (folder / "model.safetensors").write_bytes(content)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"]["model.safetensors"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "MANIFEST.json").write_text(json.dumps(without_digest(manifest)))


def same(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_newest_or_given_checkpoint_is_loaded(trained):
    newest, older = load(trained), load(str(trained), step=2)
    assert (newest.step, older.step) == (4, 2)
    assert not same(newest.method, older.method)
    assert same(newest.method, load(trained, step=4).method)
    assert not any(module.training for module in newest.method.modules())
    assert newest.plan.images.size == (16, 16)
    assert newest.config.train.batch_size == 8
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; it has 2, 4"):
        load(trained, step=3)


def test_encoder_features_are_deterministic_and_unmasked(trained):
    encoder = load_encoder(trained)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        first, second = encoder(images), load_encoder(trained)(images)
        assert torch.equal(first.cls, second.cls)
        assert torch.equal(first.patches, second.patches)
        assert first.patches.shape == (3, 16, 32), "every patch has its token"
        changed = images.clone()
        for row in range(4):
            for column in range(4):  # each patch affects the class token
                changed.copy_(images)
                changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] ^= 255
                assert not torch.equal(encoder(changed).cls, first.cls)


def test_untrained_encoder_has_the_initial_weights_of_the_run(tmp_path):
    images = write_images(tmp_path / "images", 8)
    still = ["train.steps=1", "optim.base_lr=1e-30", "train.seed=5"]
    run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=[*SMALL_RUN, *still])
    loaded = load(run.path)
    start = untrained_encoder(loaded)
    trained = loaded.method.encoder.state_dict()
    assert all((value - trained[name]).abs().max() < 1e-20 for name, value in start.state_dict().items())
    assert not start.training
    assert same(start, untrained_encoder(loaded)), "the weights are the same each time"
    other = loaded.config.model_copy(update={"train": loaded.config.train.model_copy(update={"seed": 6})})
    assert not same(start, untrained_encoder(replace(loaded, config=other)))


def test_folder_that_is_not_a_run_raises_a_clear_error(tmp_path, run):
    with pytest.raises(RunError, match="is not a folder"):
        load(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"has no config.json; did you mean .*run"):
        load(tmp_path)
    (run / "plan.json").unlink()
    with pytest.raises(RunError, match=r"plan.json is missing"):
        load(run)


@pytest.mark.parametrize("name", ["config.json", "plan.json"])
def test_damaged_settings_raise_a_one_line_error(run, name):
    value = Run(run).read(name)
    first = next(iter(value))
    Run(run).write(name, value | {first: ["no"], "unheard_of": 1})  # like a file of a later version
    with pytest.raises(
        RunError, match=rf"{name} is invalid in this version of unmask: .*{first}.*restore the file"
    ) as fault:
        (read_config if name == "config.json" else read_plan)(Run(run))
    assert "unheard_of" in str(fault.value)
    assert "\n" not in str(fault.value)
    (run / name).write_text("{")
    with pytest.raises(RunError, match=f"{name} cannot be read"):
        load(run)


def test_run_without_a_checkpoint_raises_a_clear_error(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint yet; train it first: unmask resume"):
        load(run)


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("manifest", ["as it was", "made to agree"])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_pickle_in_place_of_the_weights_is_not_opened(run, tmp_path, kind, manifest):
    marker = tmp_path / "it ran"
    if kind == "pickle":
        content = pickle.dumps(Payload(marker))
    else:
        torch.save({"x": Payload(marker)}, tmp_path / "weights.pt")
        content = (tmp_path / "weights.pt").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    if manifest == "made to agree":
        rewrite(run, lambda _: content)
    else:
        (run / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(content)
    for reader in (load, load_encoder):
        with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used") as fault:
            reader(run)
        if manifest == "as it was":
            assert "is a pickle, not safetensors; it was not opened" in str(fault.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the pickle would have created the file if it had been opened"


def test_damaged_newest_checkpoint_falls_back_to_the_previous_one(run):
    path = run / "checkpoints" / "step-00000004" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert load(run).step == 2
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        load(run, step=4)
    assert path.exists(), "reading renames nothing"


def test_checkpoint_with_only_an_encoder_is_rejected(run):
    rewrite(run, lambda weights: {name: w for name, w in weights.items() if name.startswith("encoder.")})
    with pytest.raises(
        CheckpointError, match=r"step 4 of .* holds only the encoder: .*decoder.* use the run or the file"
    ) as fault:
        load(run)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w | {"encoder.extra": torch.ones(2)}, "encoder.extra is not known"),
        (lambda w: {n: v for n, v in w.items() if n != "encoder.cls_token"}, "encoder.cls_token is missing"),
        (lambda w: {f"model.{n}": v for n, v in w.items()}, "more; restore config.json"),
        (
            lambda w: {n: v[..., :1].contiguous() if n == "encoder.cls_token" else v for n, v in w.items()},
            "expected (",
        ),
    ],
    ids=["extra", "missing", "renamed", "shape"],
)
def test_weights_of_another_model_are_rejected(run, change, says):
    rewrite(run, change)
    with pytest.raises(CheckpointError, match=r"does not fit the method in its config.json") as fault:
        load(run)
    assert says in str(fault.value)
    assert len(str(fault.value)) < 800


def test_changed_config_is_detected(run):
    config = Run(run).read("config.json")
    config["method"]["encoder"]["width"] = 16
    Run(run).write("config.json", config)
    with pytest.raises(CheckpointError, match=r"is \(.*32.*\), expected \(.*16.*\).*restore config.json"):
        load(run)
