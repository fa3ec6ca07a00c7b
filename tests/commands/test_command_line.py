"""Test the command line: one-line errors, exit codes, and JSON on stdout."""

import errno
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import small, write_images

from unmask import commands
from unmask.commands import explain
from unmask.errors import name_in_errors

VERBS = [
    "demo", "check", "pretrain", "import", "export", "palette", "resume", "finetune", "predict", "reconstruct", "probe",
    "embed", "ablate", "compare", "report", "plan", "recipes", "doctor", "pack",
    "ls", "prune", "set", "launch",
]  # fmt: skip


def test_help_lists_every_verb_with_a_help_text(unmask):
    code, out, _ = unmask("--help")
    assert code == 0
    listed = re.findall(r"^│ ([a-z]+) ", out, re.MULTILINE)
    assert sorted(listed) == sorted(VERBS)
    for verb in VERBS:
        code, text, _ = unmask(verb, "--help")
        assert code == 0
        assert "Usage" in text
        assert not re.search(r"│ --[a-z-]+ +[A-Z]+ +│", text), f"an option of {verb} without a help text"
    assert unmask("--version")[1].strip() == f"unmask {metadata.version('unmask')}"


def test_python_m_unmask_runs_the_command():
    done = subprocess.run([sys.executable, "-m", "unmask", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["unmask", metadata.version("unmask")]


def test_help_of_masks_and_layers_is_unambiguous(unmask):
    pretrain, probe = (" ".join(unmask(verb, "--help")[1].replace("│", " ").split()) for verb in ("pretrain", "probe"))
    assert "patch mask file" in pretrain
    assert "random patch masks" in probe
    assert "0 uses no mask" in probe
    assert "0 is the input of the first block" in probe


@pytest.mark.parametrize(
    ("arguments", "old", "new"),
    [
        (["probe", "run", "data", "--masks", "5"], "--masks", "--mask-votes"),
        (["probe", "run", "data", "--draws=3"], "--draws", "--label-draws"),
        (["probe", "run", "data", "--task", "regression"], "--task", "--target-type"),
        (["predict", "run", "data", "--out", "a.json", "--least", "0.3"], "--least", "--min-score"),
    ],
)
def test_error_for_a_renamed_option_names_the_new_one(unmask, arguments, old, new):
    code, out, err = unmask(*arguments)
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1] == f"got {old}; expected {new}, its new name"


def bad_inputs(tmp_path):
    """Return a list of (arguments, pattern of the error message), one for each kind of invalid input."""
    for folder in ("empty", "texts", "broken", "taken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    for number in range(4):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"no image")
    (tmp_path / "taken" / "file").write_text("something of somebody")
    (tmp_path / "file.xyz").write_text("?")
    write_images(tmp_path / "good", 12)
    for number in range(12):
        (tmp_path / "half").mkdir(exist_ok=True)
        (tmp_path / "half" / f"bad{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    write_images(tmp_path / "half", 12)
    train = ["--recipe", "mae_nano", *small("train.steps=1")]
    return [
        (["pretrain", "empty", *train], "contains no images, it is empty; expected files ending in .jpg"),
        (["pretrain", "texts", *train], r"contains no images \(but 1 \.txt\)"),
        (["pretrain", "broken", *train], "none of the 4 files .* can be read"),
        (["pretrain", "half", *train], "12 of 24 files checked cannot be read"),
        (["pretrain", "goood", *train], "does not exist; .* did you mean good"),
        (["pretrain", "file.xyz", *train], "a file of an unknown kind"),
        (["pretrain", "none*.jpg", *train], "does not match any file"),
        (["pretrain", "good", "--out", "taken", *train], "a folder that is not empty; .* choose another --out"),
        (["pretrain", "good", "--recipe", "mae_nan"], "recipe 'mae_nan' is not known; did you mean mae_nano"),
        (
            ["pretrain", "good", *train, "--set", "train.stepz=5"],
            "'train.stepz' is not a setting; did you mean train.steps",
        ),
        (["pretrain", "good", *train, "--set", "train.steps=many"], r"train\.steps='many' does not fit"),
        (["pretrain", "good", *train, "--set", "train.steps=-3"], r"train\.steps=-3 does not fit"),
        (["pretrain", "good", *train, "--set", "train.steps"], "expected KEY=VALUE"),
        (
            ["pretrain", "good", *train, "--budget", "soon"],
            "of 'soon'; expected a number with s, m, h or d",
        ),
        (["pretrain", "good", *train, "--budget", "-5m"], "got a time budget of '-5m'; expected a positive time"),
        (["pretrain", "good", *train, "--set", "data.size=[30,30]"], "not a multiple of patch size 4; use 28 or 32"),
        (["pretrain", "good", *train, "--set", "method.encoder.heads=5"], "5 heads do not divide"),
        (["pretrain", "good", *train, "--set", "method.mask_ratio=0.99"], "leaves nothing visible"),
        (["pretrain", "good", *train, "--set", "train.device=cuda:7"], "got device 'cuda:7'; expected one of"),
        (["pretrain", "good", *train, "--set", "data.mean=[1]"], "1 means and 3 standard deviations"),
        (["pretrain", "good", *train, "--set", "data.channels=5"], "can be read|channels"),
        (["resume", "good"], "is not a run: it has no config.json"),
        (["resume", "nowhere"], "is not a folder"),
        (["report", "good"], "is not a run"),
        (["reconstruct", "good", "good/0000.png"], "is not a run"),
        (["check", "empty"], "contains no images"),
        (["check", "nowhere"], "does not exist"),
    ]


def test_invalid_input_gives_a_one_line_error_and_exit_code_2(unmask, tmp_path):
    for arguments, expected in bad_inputs(tmp_path):
        code, out, err = unmask(*arguments)
        last = err.strip().splitlines()[-1]
        assert code == 2, (arguments, code, err)
        assert re.search(expected, last), (arguments, last)
        assert out == ""
    assert (tmp_path / "taken" / "file").read_text() == "something of somebody"
    assert not (tmp_path / "runs").exists(), "a rejected command must leave no folder behind"


def test_invalid_use_of_a_run_gives_a_one_line_error(unmask, run_folder, images, tmp_path):
    unlabelled, labelled = images, write_images(tmp_path / "labelled", 12, classes=3)
    write_images(tmp_path / "two", 12, classes=2)
    weights = next(run_folder.glob("checkpoints/step-*/model.safetensors"))
    cases = [
        (["reconstruct", "run", "nowhere.png"], "does not exist|is not a file"),
        (["reconstruct", "run", unlabelled, "--out", "picture.txt"], "ends in .png"),
        (["reconstruct", "run", unlabelled, "--step", "99"], "has no checkpoint of step 99; it has "),
        (["embed", "run", unlabelled, "--out", "f.csv"], "ends in .parquet or .npz"),
        (["embed", "run", unlabelled, "--out", "nofolder/f.npz"], "does not exist; create it first"),
        (["probe", "run", unlabelled], "has no class labels; put the images of each class into a sub-folder"),
        (
            ["probe", "run", labelled, "--kind", "forest"],
            "got --kind forest; expected attentive, knn, linear, rankme or paper-linear",
        ),
        (["probe", "run", labelled, "--shots", "500"], "has only"),
        (["probe", "run", "two", "--test", labelled], "class2"),
        (["pretrain", unlabelled, "--out", "run", *small()], "continue the run: unmask resume"),
    ]
    for arguments, expected in cases:
        code, _, err = unmask(*arguments)
        last = err.strip().splitlines()[-1]
        assert code == 2, (arguments, code, err)
        assert re.search(expected, last), (arguments, last)
    weights.write_bytes(b"\x80\x04\x95" + b"cposix\nsystem\n")
    for checkpoint in run_folder.glob("checkpoints/step-*"):
        if checkpoint != weights.parent:
            (checkpoint / "model.safetensors").write_bytes(b"")
    code, _, err = unmask("embed", "run", unlabelled, "--out", "f.npz")
    assert code == 2
    assert "is a pickle, not safetensors; it was not opened" in err


def test_undecodable_file_names_and_cyclic_links_are_accepted(unmask, images):
    raw = os.path.join(os.fsencode(images), b"na\xefve.png")
    os.rename(images / "0003.png", raw)
    (images / "loop").symlink_to(images, target_is_directory=True)
    code, _, err = unmask("pretrain", images, "--recipe", "mae_nano", "--out", "run", *small("train.steps=2"))
    assert code == 0, err
    assert "30 images found" in err
    code, out, err = unmask("embed", "run", images, "--out", "f.npz", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 30


def test_closed_pipe_ends_the_command_without_a_message(tmp_path):
    """The case is `unmask ls --json | head -c 100` with more output than the 64 KiB buffer of a pipe."""
    for number in range(500):
        (tmp_path / f"run{number}" / "checkpoints").mkdir(parents=True)
        (tmp_path / f"run{number}" / "config.json").write_text("{}")
    command = [sys.executable, "-m", "unmask", "ls", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(100).startswith('[{"path": ')
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, ""), "lost output gives exit code 1, but no message"
    whole = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(whole) > 64 * 1024
    assert len(json.loads(whole)) == 500


def test_interrupted_command_exits_with_130(unmask, monkeypatch, images, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.data.pack_images.pack_image", interrupted)
    code, out, err = unmask("pack", images, tmp_path / "copy.tar", "--workers", 0)
    assert (code, out) == (130, "")
    assert err.endswith("\nInterrupted.\n")


def test_unexpected_exception_prints_a_traceback_and_exits_with_1(unmask, monkeypatch, capfd, tmp_path):
    def broken(*_, **__):
        raise KeyError("something we forgot")

    monkeypatch.setattr("unmask.engine.check_data.check_data", broken)
    monkeypatch.setattr(sys, "argv", ["unmask", "check", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 1
    assert "this is a fault in unmask: KeyError" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--lr", "optim.base_lr"), ("--epochs", "train.epochs"), ("--batch-size", "train.batch_size"),
        ("--num_workers", "data.workers"), ("--img-size", "data.size"), ("--mask-ratio", "method.mask_ratio"),
    ],
)  # fmt: skip
def test_error_for_a_setting_given_as_option_suggests_set(unmask, option, key):
    code, out, err = unmask("pretrain", "shapes", option, "1")
    assert (code, out) == (2, "")
    assert f"--set {key}=VALUE" in err


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("probe run data --shot 5", "--shots"), ("pretrain data --budgett 2m", "--budget"),
        ("pretrain data --output run", "--out"), ("probe run data --linear", "--kind linear"),
        ("pretrain data --Recipe mae_nano", "--recipe"),
    ],
)  # fmt: skip
def test_error_for_a_misspelt_option_suggests_the_nearest(unmask, command, hint):
    code, out, err = unmask(*command.split())
    assert (code, out) == (2, "")
    assert f"Did you mean {hint}?" in err
    assert "--set" not in err


def test_error_for_an_output_without_permission_names_the_output(capfd):
    with pytest.raises(PermissionError) as denied, name_in_errors(Path("/folder/out.npz")):
        raise PermissionError(errno.EACCES, "Permission denied", "/folder/.out.npz.partial")
    assert explain(denied.value) == 2
    assert capfd.readouterr().err == (
        "error: /folder/out.npz: Permission denied; choose another path, or change its permissions\n"
    )


def test_hint_for_lr_explains_the_scaling_with_the_batch_size(unmask):
    assert "VALUE x batch size / 256" in unmask("pretrain", "shapes", "--lr", "1")[2]
    assert "/ 256" not in unmask("pretrain", "shapes", "--epochs", "1")[2]


def test_unknown_option_of_a_verb_without_settings_gets_no_hint(unmask):
    code, _, err = unmask("report", "run", "--lr", "1")
    assert code == 2
    assert "--set" not in err


def test_error_for_a_common_name_suggests_the_setting(unmask):
    code, _, err = unmask("pretrain", "shapes", "--set", "lr=1e-3")
    assert code == 2
    assert "did you mean optim.base_lr" in err
    assert "data.crop.ratio" not in err  # not all seventy
