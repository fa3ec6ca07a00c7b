"""Reconstruct, embed and probe real files with a trained run, including unreadable files."""

import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL_RUN, pretrain, stored, write_images
from PIL import Image

from unmask.console import Console
from unmask.data.sources.open_source import open_source
from unmask.engine.load import load
from unmask.errors import UserError
from unmask.evals import feature_sets
from unmask.evals import images as images_module
from unmask.evals import reconstruct_images as reconstruct_module
from unmask.evals import run_probe as run_probe_module
from unmask.evals.embed_images import embed_images
from unmask.evals.probe_options import ProbeOptions
from unmask.evals.probes import attentive
from unmask.evals.reconstruct_images import MAX_DRAWN, reconstruct_images
from unmask.evals.run_probe import run_probe
from unmask.results import PRETRAINED, RANDOM_INIT, RAW_PIXELS, EmbedResult, LayerChoice, TestIdentity, from_json


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an .npz file and close it."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


class RecordingConsole(Console):
    """A console that records its messages."""

    def __init__(self):
        super().__init__(quiet=True)
        self.messages, self.warnings = [], []

    def print(self, text=""):
        self.messages.append(text)

    def warn(self, text):
        self.warnings.append(text)


def train(images, out, *settings):
    small = [*SMALL_RUN, "train.steps=2", "train.picture_every=9", *settings]
    return pretrain(images, recipe="mae_nano", out=out, settings=small).path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on RGB images."""
    folder = tmp_path_factory.mktemp("use")
    return train(write_images(folder / "images", 16), folder / "run")


@pytest.fixture
def run(trained, tmp_path):
    """A writable copy of the run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def labelled(tmp_path):
    """36 images in three class folders that differ in brightness."""
    return write_images(tmp_path / "labelled", 36, classes=3)


def embed(run, data, out, **more):
    console = more.pop("console", None) or RecordingConsole()
    return embed_images(run, str(data), Path(out), step=None, device="cpu", console=console, **more)


def probe(run, data, *, console=None, **more):
    kind = more.pop("kind", "knn")
    return run_probe(run, kind, ProbeOptions(data=str(data), device="cpu", **more), console or RecordingConsole())


def reconstruct(run, images, out, *, console=None, seed=0):
    names = [str(image) for image in images]
    return reconstruct_images(
        run, names, Path(out), step=None, seed=seed, device="cpu", console=console or RecordingConsole()
    )


def break_file(path):
    path.write_bytes(path.read_bytes()[:40])


# Embed


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_embedding_twice_gives_identical_bytes(trained, labelled, tmp_path, monkeypatch, suffix):
    embed(trained, labelled, tmp_path / f"a{suffix}")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.struct_time((2033, 5, 18, 3, 33, 20, 2, 138, 0)))
    torch.manual_seed(123)
    embed(trained, labelled, tmp_path / f"b{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_rows_contain_the_encoders_features_with_names_and_classes(trained, labelled, tmp_path):
    summary = embed(trained, labelled, tmp_path / "a.npz")
    embed(trained, labelled, tmp_path / "a.parquet")
    assert summary == EmbedResult(
        out=str(tmp_path / "a.npz"),
        images=36,
        left_out=0,
        columns=("name", "label", "cls", "mean"),
        width=32,
        step=2,
    )
    npz = arrays_of(tmp_path / "a.npz")
    table = pq.read_table(tmp_path / "a.parquet").to_pydict()
    assert set(npz) == set(table) == {"name", "label", "cls", "mean"}
    assert npz["name"].tolist() == table["name"] == sorted(table["name"])
    assert table["label"] == npz["label"].tolist() == [name.split("/")[0] for name in table["name"]]
    encoder = load(trained).method.encoder
    for row in (0, 17, 35):
        with Image.open(labelled / table["name"][row]) as image:  # 20 x 24 pixels
            square = image.crop((2, 0, 22, 20)).resize((16, 16), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())[None]
        with torch.no_grad():
            features = encoder(pixels)
        # Some pixels differ by one level from those resized by Pillow; with a wrong crop, all pixels would differ.
        np.testing.assert_allclose(npz["cls"][row], features.cls[0], atol=3e-3)
        np.testing.assert_allclose(npz["mean"][row], features.patches[0].mean(0), atol=3e-3)
    for name in ("cls", "mean"):
        assert npz[name].dtype == np.float32
        np.testing.assert_array_equal(np.array(table[name], np.float32), npz[name])


def test_embedded_features_do_not_depend_on_batch_size_and_workers(trained, images, tmp_path, monkeypatch):
    embed(trained, images, tmp_path / "a.npz")
    want = arrays_of(tmp_path / "a.npz")
    for size in (1, 7, 256):
        monkeypatch.setattr(images_module, "EVAL_BATCH", size)
        embed(trained, images, tmp_path / f"{size}.npz")
        for name in ("cls", "mean"):
            np.testing.assert_allclose(arrays_of(tmp_path / f"{size}.npz")[name], want[name], atol=2e-6)
    monkeypatch.undo()
    monkeypatch.setattr(images_module, "MANY_IMAGES", 1)
    asked = []
    monkeypatch.setattr(images_module, "choose_workers", lambda device, cached: asked.append(cached) or (2, "two"))
    embed(trained, images, tmp_path / "workers.npz")
    assert asked == [False]
    assert (tmp_path / "workers.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()


def test_embed_computes_features_in_fp32_and_probe_in_the_precision_of_training(tmp_path, labelled, monkeypatch):
    run = train(labelled, tmp_path / "run", "train.precision=bf16")
    asked = []
    real = images_module.collect_each
    monkeypatch.setattr(
        images_module, "collect_each", lambda *a, **more: asked.append(more["precision"]) or real(*a, **more)
    )
    embed(run, labelled, tmp_path / "a.npz")
    assert probe(run, labelled).precision == "bf16"
    assert asked == ["fp32", "bf16", "bf16"]


def test_few_images_start_no_workers(trained, images, tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "choose_workers", lambda *_, **__: pytest.fail("asked for workers"))
    embed(trained, images, tmp_path / "a.npz")


def test_unlabelled_images_have_no_label_column(trained, images, tmp_path):
    assert embed(trained, images, tmp_path / "a.parquet").columns == ("name", "cls", "mean")
    assert pq.read_schema(tmp_path / "a.parquet").names == ["name", "cls", "mean"]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_reported_and_do_not_change_other_rows(trained, images, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(images_module, "EVAL_BATCH", 4)
    embed(trained, images, tmp_path / "whole.npz")
    whole = arrays_of(tmp_path / "whole.npz")
    for number in (4, 5, 6, 7, 9, 21, 29):  # all images of one batch, and some images of others
        break_file(images / f"{number:04d}.png")
    if workers:
        monkeypatch.setattr(images_module, "MANY_IMAGES", 1)
        monkeypatch.setattr(images_module, "choose_workers", lambda *_, **__: (workers, ""))
    console = RecordingConsole()
    summary = embed(trained, images, tmp_path / "a.npz", console=console)
    assert (summary.images, summary.left_out) == (23, 7)
    found = arrays_of(tmp_path / "a.npz")
    kept = np.isin(whole["name"], found["name"])
    assert kept.sum() == 23
    np.testing.assert_allclose(found["mean"], whole["mean"][kept], atol=2e-6)
    (warning,) = console.warnings
    assert "7 of 30 cannot be used" in warning
    assert "7 of 30 cannot be used and are left out: 0004.png (TRUNCATED" in warning or "0004.png (CORRUPT" in warning
    assert "0009.png" in warning
    assert "and 2 more: `unmask check` lists all" in warning
    assert warning.count("0004.png") == 1


def test_every_file_is_decoded_once(trained, images, tmp_path, monkeypatch):
    from unmask.data.decode import decode

    calls = []
    real = decode.decode
    monkeypatch.setattr(decode, "decode", lambda *parts, **more: calls.append(1) or real(*parts, **more))
    embed(trained, images, tmp_path / "a.npz")
    assert len(calls) == 30


def test_images_with_other_channels_than_the_run_are_left_out(trained, images, tmp_path):
    np.save(images / "five.npy", np.zeros((16, 16, 5), np.uint8))
    Image.fromarray(np.full((20, 20), 99, np.uint8)).save(images / "gray.png")  # repeated to RGB
    console = RecordingConsole()
    assert embed(trained, images, tmp_path / "a.npz", console=console).images == 31
    assert "five.npy (MISMATCHED_CHANNELS: got 5 channels; expected 3, as in the data set)" in console.warnings[0]


def test_nothing_is_written_when_no_file_can_be_read(trained, tmp_path):
    folder = write_images(tmp_path / "images", 3)
    for path in folder.iterdir():
        break_file(path)
    with pytest.raises(ValueError, match=r"none of the 3 files of .* can be used: 0000.png"):
        embed(trained, folder, tmp_path / "a.npz")
    assert not list(tmp_path.glob("*a.npz*"))


def test_a_failed_write_leaves_no_files(trained, images, tmp_path, monkeypatch):
    embed(trained, images, tmp_path / "a.npz")
    before = (tmp_path / "a.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space"):
        embed(trained, images, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_bad_outputs_are_rejected_before_the_run_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"ends in .parquet or .npz"):
        embed(tmp_path / "no run", tmp_path, tmp_path / "a.csv")
    with pytest.raises(ValueError, match="does not exist; create it first"):
        embed(tmp_path / "no run", tmp_path, tmp_path / "no" / "a.npz")


# Reconstruct


def pictured(monkeypatch):
    """Record the arguments that `draw` gets: (picture, dtype, title, names)."""
    seen = []
    real = reconstruct_module.draw

    def keep(picture, dtype, path, title, names):
        seen.append((picture, dtype, title, names))
        real(picture, dtype, path, title, names)

    monkeypatch.setattr(reconstruct_module, "draw", keep)
    return seen


def test_single_files_are_drawn_in_the_order_given_with_their_names(trained, images, tmp_path, monkeypatch):
    seen = pictured(monkeypatch)
    console = RecordingConsole()
    files = [images / "0007.png", images / "0002.png"]
    numbers = reconstruct(trained, files, tmp_path / "a.png", console=console).losses
    picture, dtype, title, names = seen[0]
    assert names == ["0007.png", "0002.png"]
    assert (dtype, title) == ("uint8", "run, step 2")
    assert set(numbers) == {"loss", "true_patch_mean", "visible_mean", "nearest_visible"}
    assert all(np.isfinite(value) for value in numbers.values())
    with Image.open(files[0]) as image:
        square = np.asarray(image.crop((2, 0, 22, 20)).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(picture.panels["original"][0].permute(1, 2, 0), square, atol=1.01)
    assert "TRUE mean and standard deviation" in picture.note, "the note states which patch statistics the picture uses"
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.size[0] > 600
    assert "loss" in console.messages[-1]
    assert "nearest visible" in console.messages[-1]


def test_the_same_seed_gives_the_same_picture_and_another_seed_hides_other_patches(trained, images, tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        reconstruct(trained, [images / "0003.png"], tmp_path / f"{name}.png", seed=seed)
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_images_of_a_folder_are_drawn_at_even_spacing(trained, images, tmp_path, monkeypatch):
    seen, console = pictured(monkeypatch), RecordingConsole()
    reconstruct(trained, [images], tmp_path / "a.png", console=console)
    names = seen[0][3]
    assert len(names) == MAX_DRAWN
    assert (names[0], names[-1]) == ("0000.png", "0029.png")
    assert console.messages[0] == "drawing 16 of 30 images, evenly spread"


def test_archives_are_opened_and_files_with_unknown_extensions_are_images(trained, images, tmp_path, monkeypatch):
    seen = pictured(monkeypatch)
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for number in range(3):
            archive.write(images / f"{number:04d}.png", f"in/{number}.png")
    reconstruct(trained, [tmp_path / "some.zip"], tmp_path / "a.png")
    assert seen[0][3] == ["in/0.png", "in/1.png", "in/2.png"]
    shutil.copy(images / "0000.png", tmp_path / "photograph")
    reconstruct(trained, [tmp_path / "photograph"], tmp_path / "a.png")
    assert seen[1][3] == ["photograph"]


def test_gray_and_large_images_are_converted_for_an_rgb_model(trained, tmp_path, monkeypatch):
    seen = pictured(monkeypatch)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (300, 200), np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray(rng.integers(0, 256, (640, 480, 3), np.uint8)).save(tmp_path / "large.jpg")
    Image.fromarray(rng.integers(0, 256, (5, 9, 3), np.uint8)).save(tmp_path / "tiny.png")
    reconstruct(trained, [tmp_path / name for name in ("gray.png", "large.jpg", "tiny.png")], tmp_path / "a.png")
    original = seen[0][0].panels["original"]
    assert original.shape == (3, 3, 16, 16)
    np.testing.assert_allclose(original[0, 0], original[0, 2], atol=1e-2)


def test_a_gray_run_draws_rgb_files_gray(tmp_path, monkeypatch):
    folder = tmp_path / "gray"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (20, 20), np.uint8)).save(folder / f"{number}.png")
    run = train(folder, tmp_path / "run")
    seen = pictured(monkeypatch)
    rgb = write_images(tmp_path / "rgb", 2)
    reconstruct(run, [rgb], tmp_path / "a.png")
    assert seen[0][0].panels["original"].shape == (2, 1, 16, 16)


def test_an_unreadable_image_is_reported_and_not_replaced(trained, images, tmp_path, monkeypatch):
    seen, console = pictured(monkeypatch), RecordingConsole()
    break_file(images / "0002.png")
    reconstruct(trained, [images / f"000{i}.png" for i in (1, 2, 3)], tmp_path / "a.png", console=console)
    assert seen[0][3] == ["0001.png", "0003.png"]
    assert len(seen[0][0].panels["original"]) == 2
    assert "1 of 3 cannot be used" in console.warnings[0]
    assert "0002.png (" in console.warnings[0]
    with pytest.raises(ValueError, match=r"none of the 1 files of .*0002.png can be used: 0002.png"):
        reconstruct(trained, [images / "0002.png"], tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_wrong_arguments_are_rejected_early(trained, images, tmp_path):
    with pytest.raises(ValueError, match=r"ends in .png"):
        reconstruct(tmp_path / "no run", [images], tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="is not a file; expected image files"):
        reconstruct(trained, [images / "0000.png", images], tmp_path / "a.png")
    with pytest.raises(ValueError, match="does not exist"):
        reconstruct(trained, [images / "no.png"], tmp_path / "a.png")
    shutil.copytree(trained, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(ValueError, match="has no checkpoint yet; train it first"):
        reconstruct(tmp_path / "bare", [images], tmp_path / "a.png")


# Probe


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_folder_is_split_by_class_and_the_result_is_written_and_printed(run, labelled, kind):
    console = RecordingConsole()
    found = probe(run, labelled, kind=kind, console=console)
    assert from_json(stored(run / f"evals/probe-{kind}-labelled.json")) == found
    assert (found.train_images, found.test_images, found.shared) == (30, 6, 0)
    assert found.names == ("class0", "class1", "class2")
    assert found.test == TestIdentity(held_out=0.2, seed=0)
    assert (found.data.name, found.data.digest) == (str(labelled), open_source(labelled).fingerprint())
    assert found.step == 2
    assert [(row.features, row.pool) for row in found.rows] == [(PRETRAINED, "cls"), (PRETRAINED, "mean")]
    assert all(row.low <= row.value <= row.high for row in found.rows)
    assert any("95% interval" in line and "cls" in line for line in console.messages)
    assert found.verdict in console.messages[-1]
    again = probe(run, labelled, kind=kind)
    assert again == found


def test_probe_with_controls_and_shots_on_separate_test_images(run, labelled, tmp_path):
    test = write_images(tmp_path / "test", 30, classes=3, seed=1)
    found = probe(run, labelled, test=str(test), kind="linear", shots=3, controls=True)
    assert (found.train_images, found.test_images) == (9, 30)
    assert found.shots == 3
    assert found.test.images.name == found.test.images.path == str(test)
    assert [row.features for row in found.rows] == [RAW_PIXELS, *[RANDOM_INIT] * 2, *[PRETRAINED] * 2]
    assert (run / "evals/probe-linear-labelled-3-shots-on-test.json").is_file()
    assert found.rows[0].value > 0.5, "classes differ in brightness"


def rows_read(monkeypatch):
    """Record the rows whose features are computed, one list per call."""
    seen = []
    real = feature_sets.features

    def record(loaded, encoders, source, rows, *more):
        found = real(loaded, encoders, source, rows, *more)
        seen.append(next(iter(found.values())).index.tolist())
        return found

    monkeypatch.setattr(feature_sets, "features", record)
    return seen


def test_only_the_selected_training_images_are_read(run, labelled, tmp_path, monkeypatch):
    test = write_images(tmp_path / "test", 6, classes=3, seed=1)
    seen = rows_read(monkeypatch)
    probe(run, labelled, test=str(test), shots=2)
    probe(run, labelled, test=str(test), shots=4)
    probe(run, labelled, test=str(test), shots=4, seed=1)
    few, _, more, _, other, _ = seen
    assert len(few) == 6
    assert set(few) < set(more)
    assert set(other) != set(more)


def test_an_unreadable_training_image_is_replaced_by_another_image_of_its_class(run, labelled, monkeypatch):
    seen = rows_read(monkeypatch)
    probe(run, labelled, shots=3)
    names = sorted(path.relative_to(labelled) for path in labelled.rglob("*.png"))
    break_file(labelled / names[seen[0][0]])
    console = RecordingConsole()
    found = probe(run, labelled, shots=3, console=console)
    assert found.train_images == 9
    assert len(set(seen[0]) - set(seen[-2])) == 1
    assert str(names[seen[0][0]]) in console.warnings[0]
    assert seen[-1] == seen[1], "the test images are the same"


def test_an_unreadable_file_does_not_change_the_split_of_other_images(run, labelled, monkeypatch):
    seen = rows_read(monkeypatch)
    probe(run, labelled)
    names = sorted(path.relative_to(labelled) for path in labelled.rglob("*.png"))
    break_file(labelled / names[0])
    found = probe(run, labelled)
    assert found.train_images + found.test_images == 35
    assert set(seen[2]) <= set(seen[0])
    assert set(seen[3]) <= set(seen[1])


def test_the_split_depends_only_on_the_seed(run, labelled, monkeypatch):
    seen = rows_read(monkeypatch)
    probe(run, labelled)
    probe(run, labelled, kind="linear", controls=True)
    probe(run, labelled, shots=2)
    probe(run, labelled, seed=1)
    assert seen[1] == seen[3] == seen[5] != seen[7]
    assert not set(seen[0]) & set(seen[1])


def test_a_test_folder_may_lack_a_class_and_labels_are_matched_by_name(run, labelled, tmp_path):
    test = tmp_path / "test"
    for name in ("class1", "class2"):
        shutil.copytree(labelled / name, test / name)
    found = probe(run, labelled, test=str(test))
    assert found.test_images == 24
    assert found.shared == 24
    assert "24 of the 24 test images are also training images" in found.caveats[0]
    assert found.names == ("class0", "class1", "class2")
    one = probe(run, labelled, test=str(test), kind="linear")
    assert one.rows[0].value > 0.6, "test classes have the numbers of the training classes"


def test_a_test_class_without_training_images_is_rejected_by_name(run, labelled, tmp_path):
    test = write_images(tmp_path / "test", 8, classes=2)
    (test / "class1").rename(test / "klass1")
    with pytest.raises(
        ValueError, match=r"has classes that .*labelled does not have \(klass1\); expected class0, class1, class2"
    ):
        probe(run, labelled, test=str(test))


def test_the_only_image_of_a_class_is_used_for_training_and_not_for_the_test(run, labelled, monkeypatch):
    for path in sorted((labelled / "class2").iterdir())[1:]:
        path.unlink()
    found = probe(run, labelled)
    assert found.train_images == 10 + 10 + 1
    assert found.caveats == ()
    for folder in labelled.iterdir():
        for path in sorted(folder.iterdir())[1:]:
            path.unlink()
    with pytest.raises(
        ValueError, match=r"got one image per class in .*, so none .* give separate test images with --test"
    ):
        probe(run, labelled)


def test_test_images_of_only_one_class_are_accepted_with_a_warning(run, labelled, tmp_path):
    test = tmp_path / "test"
    one = sorted(labelled.iterdir())[0]
    shutil.copytree(one, test / one.name)
    console = RecordingConsole()
    found = probe(run, labelled, test=str(test), console=console)
    assert found.test_images == len(list(one.iterdir()))
    others = [folder.name for folder in sorted(labelled.iterdir())[1:]]
    assert any(all(name in line for name in others) and "not tested" in line for line in console.warnings)


def test_the_error_for_images_without_labels_states_why_they_have_none(run, labelled, tmp_path):
    first = sorted(labelled.iterdir())[0]
    shutil.copy(sorted(first.iterdir())[0], labelled / "stray.png")
    with pytest.raises(ValueError, match=r"1 of its images lie beside the sub-folders \(stray.png\)"):
        probe(run, labelled)
    shutil.copytree(first, tmp_path / "alone" / "cat")
    with pytest.raises(ValueError, match="all its images lie in one sub-folder, cat"):
        probe(run, tmp_path / "alone")


def test_data_that_cannot_be_probed_is_rejected(run, images, labelled):
    with pytest.raises(ValueError, match="has no class labels"):
        probe(run, images)
    with pytest.raises(ValueError, match="has no class labels"):
        probe(run, labelled, test=str(images))
    with pytest.raises(ValueError, match="expected attentive, knn, linear or rankme"):
        probe(run / "nothing", labelled, kind="forest")
    with pytest.raises(ValueError, match="has only 10 training images; use --shots 10 or fewer"):
        probe(run, labelled, shots=11)
    assert not list((run / "evals").glob("probe-*"))


def test_results_for_other_steps_and_shots_have_separate_files(run, labelled):
    probe(run, labelled)
    probe(run, labelled, step=2)
    probe(run, labelled, shots=1)
    names = {path.name for path in (run / "evals").glob("probe-*")}
    assert names == {"probe-knn-labelled.json", "probe-knn-labelled-step-2.json", "probe-knn-labelled-1-shots.json"}


# Layers and masks


@pytest.fixture(scope="module")
def igpts(tmp_path_factory):
    """One iGPT run with three blocks for each objective."""
    folder = tmp_path_factory.mktemp("igpt")
    images = write_images(folder / "images", 16)
    small = [setting for setting in SMALL_RUN if "decoder" not in setting and "depth" not in setting]
    small += ["method.encoder.depth=3", "train.steps=2", "train.picture_every=9", "train.precision=fp32"]
    return {
        objective: pretrain(images, recipe=recipe, out=folder / objective, settings=small).path
        for objective, recipe in {"ar": "igpt_nano", "bert": "igpt_bert_nano"}.items()
    }


@pytest.fixture
def igpt(igpts, tmp_path):
    """Writable copies of the runs."""
    return {objective: Path(shutil.copytree(run, tmp_path / objective)) for objective, run in igpts.items()}


def measured(run, data, monkeypatch, **more):
    """Probe a run; return the training and test features by name of the feature set, and the result."""
    seen = []
    real = run_probe_module.predict_pooled
    monkeypatch.setattr(
        run_probe_module,
        "predict_pooled",
        lambda probe, train, test, targets: seen.append((train, test)) or real(probe, train, test, targets),
    )
    found = probe(run, data, **more)
    monkeypatch.undo()
    return *seen[0], found


def test_layers_are_counted_from_the_input_and_forward_returns_the_middle_layer(igpt, labelled, monkeypatch):
    tables = {}
    for layer in ("0", "1", "last"):
        _, test, found = measured(igpt["ar"], labelled, monkeypatch, layer=layer)
        tables[layer] = test[PRETRAINED]
        assert found.rows[0].layer == LayerChoice(3 if layer == "last" else int(layer), 3, "asked for")
    encoder = load(igpt["ar"]).method.encoder
    embed(igpt["ar"], labelled, igpt["ar"].parent / "a.npz")
    middle = arrays_of(igpt["ar"].parent / "a.npz")["mean"][tables["1"].index]
    np.testing.assert_allclose(tables["1"].mean, middle, atol=1e-5)
    assert encoder.layer == 1
    assert np.abs(tables["last"].mean - middle).max() > 1e-2
    assert {file.name for file in (igpt["ar"] / "evals").glob("probe-*")} == {
        f"probe-knn-labelled-layer-{layer}.json" for layer in ("0", "1", "last")
    }, "one measurement does not overwrite another"


def test_the_best_layer_is_chosen_without_the_test_images(igpt, labelled, tmp_path):
    test = write_images(tmp_path / "test", 12, classes=3, seed=5)
    console = RecordingConsole()
    first = probe(igpt["ar"], labelled, test=str(test), controls=True, console=console)
    rows = {row.features: row for row in first.rows}
    assert rows[RAW_PIXELS].layer is None
    assert "best linear probe of layers 0 to 3" in rows[PRETRAINED].layer.why
    assert rows[RANDOM_INIT].layer.last == 3, "the control chooses from the same layers"
    assert any(f"layer {rows[PRETRAINED].layer.number} of 3" in line for line in console.messages)
    (test / "class0").rename(tmp_path / "aside")  # change the labels and the number of the test images
    (test / "class1").rename(test / "class0")
    (tmp_path / "aside").rename(test / "class1")
    (test / "class2" / "0002.png").unlink()
    second = probe(igpt["ar"], labelled, test=str(test), controls=True)
    assert [row.layer for row in second.rows] == [row.layer for row in first.rows]
    assert [row.value for row in second.rows] != [row.value for row in first.rows]


def test_igpt_bert_is_measured_under_masks_that_differ_between_votes(igpt, labelled, monkeypatch):
    train, test, once = measured(igpt["bert"], labelled, monkeypatch, layer="1")
    whole = measured(igpt["bert"], labelled, monkeypatch, layer="1", mask_votes=0)[1]
    _, five, found = measured(igpt["bert"], labelled, monkeypatch, layer="1", mask_votes=5)
    again = measured(igpt["bert"], labelled, monkeypatch, layer="1", mask_votes=5)[1]
    assert (once.rows[0].votes, found.rows[0].votes, once.mask_votes, found.mask_votes) == (1, 5, None, 5)
    assert set(train) == set(test) == {PRETRAINED}
    assert len(five) == 5
    assert np.array_equal(five[PRETRAINED].mean, test[PRETRAINED].mean)
    seen = [whole[PRETRAINED], *five.values()]
    assert all(np.abs(a.mean - b.mean).max() > 1e-3 for i, a in enumerate(seen) for b in seen[:i]), (
        "no mask is used twice"
    )
    assert all(np.array_equal(five[name].mean, again[name].mean) for name in five)


def test_mask_votes_are_rejected_for_encoders_measured_on_whole_images(igpt, run, labelled):
    for whole in (igpt["ar"], run):
        with pytest.raises(UserError, match=r"got --mask-votes 5, but this run's encoder is measured on whole images"):
            probe(whole, labelled, mask_votes=5)
    with pytest.raises(UserError, match=r"got --mask-votes -1; expected 0 or more"):
        probe(igpt["bert"], labelled, mask_votes=-1)


def test_layers_of_a_vit_can_be_chosen_too(run, labelled):
    usual = probe(run, labelled)
    assert usual.rows[0].layer is None
    last = probe(run, labelled, layer="last")
    assert [row.value for row in last.rows] == [row.value for row in usual.rows]
    assert probe(run, labelled, layer="best").rows[0].layer.last == 1


def test_an_attentive_probe_of_igpt_bert_also_uses_masks(igpt, labelled, monkeypatch):
    monkeypatch.setattr(attentive, "MIN_STEPS", 5)
    monkeypatch.setattr(attentive, "EPOCHS", 1)
    found = probe(igpt["bert"], labelled, kind="attentive", layer="1", mask_votes=3, controls=True)
    assert [row.features for row in found.rows] == [RAW_PIXELS, RANDOM_INIT, PRETRAINED]
    assert [row.votes for row in found.rows] == [None, 3, 3]
    assert found.rows[2].layer.number == 1
    assert "layer 1 of 3" in found.protocol
