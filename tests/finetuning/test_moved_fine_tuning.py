"""Test that a fine-tuned run resumes with moved images, masks and test images, and names changed files."""

import shutil

import numpy as np
import pytest
from conftest import pretrain
from faults import signal_after
from PIL import Image
from test_finetune_run import SMALL

from unmask.engine.changed_data import DataLocations
from unmask.engine.load import read_config
from unmask.engine.training_data import DataError
from unmask.finetuning import finetune_run
from unmask.run import Run

SETTINGS = ["train.steps=4", "train.batch_size=8", "data.workers=0", "train.test_every=4"]


def street(root, count=12, seed=0):
    """Images of two colours and their masks as BMP; all files have the same size in bytes."""
    random = np.random.default_rng(seed)
    for number in range(count):
        mask = (random.random((20, 24)) > 0.5).astype(np.uint8)
        image = mask[:, :, None] * np.array([200, 60, 40], np.uint8) + 20
        for kind, pixels in (("images", image), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / kind / f"{number}.bmp")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moved")
    return pretrain(street(folder / "data") / "images", recipe="mae_nano", out=folder / "pre", settings=SMALL)


def tuned(pretrained, tmp_path):
    """A segmentation run with separate test images, stopped after two steps."""
    data, test = (str(street(tmp_path / "old" / name, seed=seed)) for name, seed in (("train", 1), ("test", 2)))
    options = finetune_run.FinetuneOptions(task="segment", test=test, settings=SETTINGS)
    with signal_after(2):
        run = finetune_run.finetune(pretrained.path, data, options, out=tmp_path / "run")
    assert run.read("status.json")["state"] == "stopped"
    return run


def test_resume_finds_moved_images_masks_and_test_images(pretrained, tmp_path):
    run = tuned(pretrained, tmp_path)
    shutil.copytree(tmp_path / "old", tmp_path / "new", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "old")
    finetune_run.resume(
        run.path, places=DataLocations((str(tmp_path / "new" / "train"),), test=str(tmp_path / "new" / "test"))
    )
    assert Run(run.path).read("status.json")["state"] == "finished"
    data = read_config(run).data
    assert data.source == str(tmp_path / "new" / "train" / "images")
    assert (data.annotations, data.test) == (
        str(tmp_path / "new" / "train" / "masks"),
        str(tmp_path / "new" / "test"),
    )


@pytest.mark.parametrize("what", ["train/masks", "test/images", "test/masks"])
def test_changed_masks_and_test_images_of_the_same_size_are_detected(pretrained, tmp_path, what):
    run = tuned(pretrained, tmp_path)
    other = street(tmp_path / "other", seed=9) / what.partition("/")[2]
    shutil.copyfile(other / "3.bmp", tmp_path / "old" / what / "3.bmp")
    role = {"train/masks": "masks", "test/images": "test", "test/masks": "test masks"}[what]
    with pytest.raises(DataError, match=rf"the {role} files of .* have changed .*1 changed: 3.bmp \(content\)"):
        finetune_run.resume(run.path)


def test_resume_rejects_changed_labels_of_a_list(pretrained, tmp_path):
    images = street(tmp_path / "d", count=20) / "images"
    lines = [f"{images}/{number}.bmp,{'ab'[number % 2]}" for number in range(20)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    with signal_after(2):
        options = finetune_run.FinetuneOptions(settings=SETTINGS)
        run = finetune_run.finetune(pretrained.path, str(tmp_path / "list.csv"), options, out=tmp_path / "run")
    swapped = [line[:-1] + {"a": "b", "b": "a"}[line[-1]] for line in lines]
    (tmp_path / "list.csv").write_text("\n".join(swapped))
    with pytest.raises(DataError, match=r"the labels, masks or boxes of .* have changed"):
        finetune_run.resume(run.path)
