"""`unmask finetune --resume auto`: the same command continues its run; other labels or settings are refused."""

import pytest
from conftest import pretrain, write_images
from faults import signal_after
from test_finetune_run import SMALL
from test_moved_fine_tuning import street

from unmask.config import ConfigError
from unmask.console import Console
from unmask.data.annotations.segmentation_masks import MaskOptions
from unmask.finetuning import finetune_run

QUIET = Console(quiet=True)
SETTINGS = ["train.steps=4", "train.batch_size=8", "data.workers=0", "train.test_every=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with labelled images, images with masks, and a pre-trained run."""
    folder = tmp_path_factory.mktemp("tuning")
    data = write_images(folder / "labelled", 30, classes=2)
    pretrain(data, recipe="mae_nano", out=folder / "pre", settings=SMALL)
    street(folder / "street")
    return folder


def tune(place, out, data="labelled", settings=(), **options):
    options = finetune_run.FinetuneOptions(settings=[*SETTINGS, *settings], **options)
    return finetune_run.finetune(place / "pre", str(place / data), options, out=out, resume_auto=True, console=QUIET)


def test_the_same_command_continues_without_reading_annotations_to_compare(place, tmp_path, monkeypatch):
    with signal_after(2):
        run = tune(place, tmp_path / "run")
    assert run.status().state == "stopped"
    monkeypatch.setattr(finetune_run, "open_examples", None)
    assert tune(place, tmp_path / "run").finished
    assert tune(place, tmp_path / "run", settings=["train.log_every=10"]).finished  # resolved and compared
    assert tune(place, tmp_path / "run", task="classify").finished


def test_other_labels_and_settings_are_refused(place, tmp_path):
    run = tune(place, tmp_path / "run", shots=6).path
    for options, message in (
        ({"shots": 5}, r"got --shots 5; the run in .* has --shots 6; use the same value, or another --out$"),
        ({}, r"got --shots none; the run in .* has --shots 6"),
        ({"shots": 6, "exclude": ["0001*"]}, r'got --exclude \["0001\*"\]; the run in .* has --exclude none'),
        ({"shots": 6, "settings": ["train.steps=5"]}, r"got train.steps=5; .* or unmask set .*run train.steps=5$"),
        ({"shots": 6, "last_blocks": 0}, r"got method.last_blocks=0.0; the run in .* has method.last_blocks=none"),
        ({"shots": 6, "from_scratch": True}, r"got .*graft=\[\]; the run in .* has .*graft="),
        ({"shots": 6, "task": "segment"}, r"got .*method.name=segment; the run in .* has .*method.name=classify"),
        ({"shots": 6, "data": "street"}, r"got data=.*street; the run in .* has data=.*labelled"),
    ):
        with pytest.raises(ConfigError, match=message):
            tune(place, run, **options)
    with pytest.raises(ConfigError, match=r"got unmask pretrain .* was begun by unmask finetune; choose another --out"):
        pretrain(place / "labelled", recipe="mae_nano", out=run, settings=SMALL, resume_auto=True)


def test_masks_and_how_they_are_read_are_compared(place, tmp_path):
    run = tune(place, tmp_path / "run", "street", task="segment", mask_options=MaskOptions(values=(0, 1))).path
    assert tune(place, run, "street", task="segment", mask_options=MaskOptions(values=(0, 1))).finished
    free = ["train.checkpoint_every=7"]
    assert tune(place, run, "street", free, task="segment", mask_options=MaskOptions(values=(0, 1))).finished
    with pytest.raises(ConfigError, match=r"--mask-values"):
        tune(place, run, "street", task="segment")
    with pytest.raises(ConfigError, match=r"got --ignore \[7\]; the run in .* has --ignore none"):
        tune(place, run, "street", task="segment", mask_options=MaskOptions(values=(0, 1)), ignored=[7])
