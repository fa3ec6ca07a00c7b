"""Fixtures of all tests: one compute thread, small folders of images, a small run."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # set before torch is imported; subprocesses inherit the value
os.environ["UNMASK_CACHE"] = "off"  # tests neither read nor write cached scans

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)

SMALL_RUN = (
    "data.size=[16,16]", "data.workers=0", "train.batch_size=8", "train.log_every=1", "train.device=cpu",
    "method.encoder.width=32", "method.encoder.depth=1", "method.encoder.heads=2",
    "method.decoder.width=16", "method.decoder.depth=1", "method.decoder.heads=2",
)  # fmt: skip


def write_images(
    folder: Path, count: int, *, classes: int = 0, size: tuple[int, int] = (20, 24), seed: int = 0
) -> Path:
    """Write `count` smooth random PNGs, optionally in `classes` sub-folders that differ in mean brightness."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % classes if classes else 0
        place = folder / f"class{label}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 120, (3, 3, 3)) + (label * 60 if classes else 60)
        image = Image.fromarray(coarse.astype(np.uint8)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        image.save(place / f"{number:04d}.png")
    return folder


def stored(path: Path) -> dict:
    """Return the contents of a JSON file of a run without its digest and the id of the run."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key not in ("run_id", "sha256")}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 30 unlabelled images of 20 x 24 pixels."""
    return write_images(tmp_path / "images", 30)


def pretrain(data, *, out=None, budget=None, resume_auto=False, console=None, **options):
    """Pre-train with the fields of `PretrainOptions` as keywords."""
    from unmask.engine import pretraining as module

    options = module.PretrainOptions(**options)
    return module.pretrain(data, options, out=out, budget=budget, resume_auto=resume_auto, console=console)


def small(*settings: str) -> list[str]:
    """Return command-line options for a small run."""
    return [flag for setting in [*SMALL_RUN, *settings] for flag in ("--set", setting)]


@pytest.fixture
def unmask(monkeypatch, capfd, tmp_path):
    """Return a function that runs a command in this process in `tmp_path`: (exit code, stdout, stderr)."""
    from unmask import commands

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        try:
            commands.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return code, out, err

    return run


@pytest.fixture
def run_folder(unmask, images, tmp_path):
    """The folder `run` of a finished run of four steps on `images`."""
    code, _, err = unmask("pretrain", images, "--recipe", "mae_nano", "--out", "run", *small("train.steps=4"))
    assert code == 0, err
    return tmp_path / "run"
