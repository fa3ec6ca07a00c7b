"""The command line as a person meets it: one clear line for every mistake, exit codes, JSON alone on stdout."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata

import numpy as np
import pytest
from conftest import SMALL_RUN, write_images
from PIL import Image

from unmask import commands
from unmask.commands import options
from unmask.commands.demo import demo
from unmask.config import DataConfig, TrainConfig, keys, override
from unmask.optim import OptimConfig
from unmask.recipes.catalogue import all_recipes, describe

VERBS = [
    "demo", "check", "pretrain", "import", "export", "palette", "resume", "finetune", "predict", "reconstruct", "probe",
    "embed", "ablate", "compare", "report", "plan", "recipes", "doctor", "pack",
    "ls", "prune", "set",
]  # fmt: skip


@pytest.fixture
def unmask(monkeypatch, capfd, tmp_path):
    """Run a command in this process: (exit code, stdout, stderr)."""
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


def small(*settings):
    return [flag for setting in [*SMALL_RUN, *settings] for flag in ("--set", setting)]


@pytest.fixture
def run_folder(unmask, images, tmp_path):
    code, _, err = unmask("pretrain", images, "--recipe", "mae_nano", "--out", "run", *small("train.steps=4"))
    assert code == 0, err
    return tmp_path / "run"


def test_help_of_every_verb_says_what_it_does(unmask):
    code, out, _ = unmask("--help")
    assert code == 0
    for verb in VERBS:
        assert verb in out
        code, text, _ = unmask(verb, "--help")
        assert code == 0
        assert "Usage" in text
        assert not re.search(r"│ --[a-z-]+ +[A-Z]+ +│", text), f"an option of {verb} without a help text"
    assert unmask("--version")[1].strip() == f"unmask {metadata.version('unmask')}"


def test_it_is_a_module_that_can_be_run():
    done = subprocess.run([sys.executable, "-m", "unmask", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["unmask", metadata.version("unmask")]


def test_pretrain_prints_json_alone_on_stdout(unmask, images, tmp_path):
    code, out, err = unmask("pretrain", images, "--recipe", "mae_nano", "--out", "a", "--json", *small("train.steps=3"))
    assert code == 0, err
    summary = json.loads(out)
    assert summary["state"] == "finished"
    assert summary["step"] == 3
    assert (tmp_path / "a" / "report.html").exists()
    assert "\r" not in err
    assert "\x1b" not in err, "no colours and no cursor movements outside a terminal"


def test_the_run_folder_is_named_after_data_and_recipe_when_none_is_given(unmask, images, tmp_path):
    for name in ("images-mae_nano", "images-mae_nano-2"):
        code, _, err = unmask("pretrain", images, "--recipe", "mae_nano", *small("train.steps=1"))
        assert code == 0, err
        assert (tmp_path / "runs" / name / "config.json").exists()


def test_everything_one_does_with_a_run(unmask, run_folder, images, tmp_path):
    picture = next(images.iterdir())
    code, out, err = unmask("reconstruct", "run", picture, "--out", "r.png", "--json")
    assert code == 0, err
    assert {"picture", "loss", "nearest_visible"} <= set(json.loads(out))
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.size[0] > 300

    code, out, err = unmask("embed", "run", images, "--out", "f.npz", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 30
    assert np.load(tmp_path / "f.npz")["mean"].shape == (30, 32)

    labelled = write_images(tmp_path / "labelled", 40, classes=2)
    for kind in ("knn", "linear"):
        code, out, err = unmask("probe", "run", labelled, "--kind", kind, "--controls", "--shots", "5", "--json")
        assert code == 0, err
        rows = json.loads(out)["rows"]
        assert {(row["features"], row["pool"]) for row in rows} == {
            ("raw pixels", "pixels"), ("random init", "cls"), ("random init", "mean"), ("pre-trained", "cls"),
            ("pre-trained", "mean"),
        }  # fmt: skip
        assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    code, out, err = unmask("report", "run", "--json")
    assert code == 0, err
    page = (run_folder / "report.html").read_text()
    assert f"Linear probe on {labelled}, tested on a held-out fifth of {labelled}, 5 labels per class" in page
    assert unmask("resume", "run")[0] == 0


def test_check_describes_the_data_and_forecasts(unmask, images):
    (images / "broken.png").write_bytes(b"")
    code, out, err = unmask("check", images, "--json")
    summary = json.loads(out)
    assert code == 0, err
    assert (summary["good"], summary["median_size"]) == (30, [20, 24])
    assert summary["bad"] == [{"name": "broken.png", "code": "EMPTY", "detail": "the file has no bytes"}]
    assert summary["recipe"] == "mae_nano"
    assert summary["forecast_seconds"] > 0
    assert "EMPTY" in err
    assert "forecast" in err


def test_recipes_and_one_of_them(unmask):
    code, out, _ = unmask("recipes")
    assert code == 0
    for name in ("mae_nano", "mae_tiny", "mae_small", "mae_base", "mae_large", "mae_huge", "auto"):
        assert f"\n{name} " in f"\n{out}"
    code, out, _ = unmask("recipes", "mae_base", "--json")
    assert json.loads(out)["train"]["batch_size"] == 4096
    code, _, err = unmask("recipes", "mae_bse")
    assert code == 2
    assert "did you mean mae_base" in err


def test_one_recipe_for_a_person_says_what_settings_mean_and_may_be(unmask):
    code, out, _ = unmask("recipes", "mae_nano")
    assert code == 0
    assert out.startswith("Images of 32 to 64 pixels on any processor")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "# MAE's settings; the defaults are the paper's, with its best target.",
        "method.encoder.patch = [4,4] # each above 0",
        "method.mask = random # random, block, grid or pattern",
        "method.mask_ratio = 0.75 # above 0 and below 1",
        "method.smallest_block = none # above 0, or none",
        "method.pca_whiten = false # true or false",
        "method.tokenizer = none",
        "train.seed = 0 # at least 0 and below 9223372036854775808",
    ):
        assert line in lines
    for section in ("method", "data", "optim", "train"):
        assert f"\n\n# {section}:\n" in out, "sections are apart"


def test_what_is_printed_of_every_recipe_is_what_set_takes():
    for name, recipe in all_recipes().items():
        printed = [
            line.split("  # ")[0] for line in describe(name).splitlines() if line.split(" ")[0] in keys(recipe())
        ]
        assert [line.split(" ")[0] for line in printed] == keys(recipe())
        other = recipe().model_copy(update={"optim": OptimConfig(), "train": TrainConfig(), "data": DataConfig()})
        assert override(other, printed) == recipe()


def test_the_two_kinds_of_masks_and_the_layers_are_told_apart_in_the_help(unmask):
    pretrain, probe = (" ".join(unmask(verb, "--help")[1].replace("│", " ").split()) for verb in ("pretrain", "probe"))
    assert "a FILE" in pretrain
    assert "a NUMBER of random masks" in probe
    assert "0 hides nothing" in probe
    assert "0 is what the first block is given" in probe


def bad_inputs(tmp_path):
    """(name, arguments, what the one line must say)."""
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
        (["pretrain", "empty", *train], "holds no image: it is empty; known are .jpg"),
        (["pretrain", "texts", *train], r"holds no image \(but 1 \.txt\)"),
        (["pretrain", "broken", *train], "none of the 4 files .* can be read"),
        (["pretrain", "half", *train], "12 of 24 files checked cannot be read"),
        (["pretrain", "goood", *train], "does not exist; .* did you mean good"),
        (["pretrain", "file.xyz", *train], "a file of no known kind"),
        (["pretrain", "none*.jpg", *train], "matches no file"),
        (["pretrain", "good", "--out", "taken", *train], "a folder that is not empty; .* choose another --out"),
        (["pretrain", "good", "--recipe", "mae_nan"], "recipe 'mae_nan' is not known; did you mean mae_nano"),
        (
            ["pretrain", "good", *train, "--set", "train.stepz=5"],
            "'train.stepz' is not a setting; did you mean train.steps",
        ),
        (["pretrain", "good", *train, "--set", "train.steps=many"], r"train\.steps='many' does not fit"),
        (["pretrain", "good", *train, "--set", "train.steps=-3"], r"train\.steps=-3 does not fit"),
        (["pretrain", "good", *train, "--set", "train.steps"], "KEY=VALUE was expected"),
        (
            ["pretrain", "good", *train, "--budget", "soon"],
            "of 'soon'; expected a number with s, m, h or d",
        ),
        (["pretrain", "good", *train, "--budget", "-5m"], "got a time budget of '-5m'; expected a positive time"),
        (["pretrain", "good", *train, "--set", "data.size=[30,30]"], "not a multiple of patch size 4; use 28 or 32"),
        (["pretrain", "good", *train, "--set", "method.encoder.heads=5"], "5 heads do not divide"),
        (["pretrain", "good", *train, "--set", "method.mask_ratio=0.99"], "leaves nothing visible"),
        (["pretrain", "good", *train, "--set", "train.device=cuda:7"], "is not available here|not available"),
        (["pretrain", "good", *train, "--set", "data.mean=[1]"], "1 means and 3 standard deviations"),
        (["pretrain", "good", *train, "--set", "data.channels=5"], "can be read|channels"),
        (["resume", "good"], "is not a run: it has no config.json"),
        (["resume", "nowhere"], "is not a folder"),
        (["report", "good"], "is not a run"),
        (["reconstruct", "good", "good/0000.png"], "is not a run"),
        (["check", "empty"], "holds no image"),
        (["check", "nowhere"], "does not exist"),
    ]


def test_every_mistake_gets_one_clear_line_and_exit_code_2(unmask, tmp_path):
    for arguments, expected in bad_inputs(tmp_path):
        code, out, err = unmask(*arguments)
        last = err.strip().splitlines()[-1]
        assert code == 2, (arguments, code, err)
        assert re.search(expected, last), (arguments, last)
        assert out == ""
    assert (tmp_path / "taken" / "file").read_text() == "something of somebody"
    assert not (tmp_path / "runs").exists(), "a refusal leaves no folder behind"


def test_mistakes_with_a_run(unmask, run_folder, images, tmp_path):
    unlabelled, labelled = images, write_images(tmp_path / "labelled", 12, classes=3)
    write_images(tmp_path / "two", 12, classes=2)
    weights = next(run_folder.glob("checkpoints/step-*/model.safetensors"))
    cases = [
        (["reconstruct", "run", "nowhere.png"], "does not exist|is not a file"),
        (["reconstruct", "run", unlabelled, "--out", "picture.txt"], "ends in .png"),
        (["reconstruct", "run", unlabelled, "--step", "99"], "has no checkpoint of step 99; it has "),
        (["embed", "run", unlabelled, "--out", "f.csv"], "ends in .parquet or .npz"),
        (["embed", "run", unlabelled, "--out", "nofolder/f.npz"], "does not exist; make it first"),
        (["probe", "run", unlabelled], "has no class labels; they come from sub-folder names"),
        (["probe", "run", labelled, "--kind", "forest"], "'forest' came; knn or linear"),
        (["probe", "run", labelled, "--shots", "500"], "has only"),
        (["probe", "run", "two", "--test", labelled], "class2"),
        (["pretrain", unlabelled, "--out", "run", *small()], "go on with it: unmask resume"),
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


def test_a_name_that_is_no_utf8_and_a_loop_of_links_train_and_print(unmask, images):
    raw = os.path.join(os.fsencode(images), b"na\xefve.png")
    os.rename(images / "0003.png", raw)
    (images / "loop").symlink_to(images, target_is_directory=True)
    code, _, err = unmask("pretrain", images, "--recipe", "mae_nano", "--out", "run", *small("train.steps=2"))
    assert code == 0, err
    assert "30 images found" in err
    code, out, err = unmask("embed", "run", images, "--out", "f.npz", "--json")
    assert code == 0, err
    assert json.loads(out)["images"] == 30


def test_a_closed_pipe_is_no_fault():
    command = f"{sys.executable} -m unmask.cli recipes mae_base | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_who_interrupts_a_command_is_told_what_became_of_it(unmask, monkeypatch, images, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.data.pack.pack_image", interrupted)
    code, out, err = unmask("pack", images, tmp_path / "copy.tar", "--workers", 0)
    assert (code, out) == (130, "")
    assert err.endswith("\nInterrupted.\n")


def test_a_fault_of_ours_says_so_and_fails(unmask, monkeypatch, capfd, tmp_path):
    def broken(*_, **__):
        raise KeyError("something we forgot")

    monkeypatch.setattr("unmask.engine.check.check_data", broken)
    monkeypatch.setattr(sys, "argv", ["unmask", "check", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 1
    assert "this is a fault in unmask: KeyError" in capfd.readouterr().err


@pytest.mark.slow
def test_the_demo_from_nothing_to_a_report_with_both_sets(unmask, tmp_path):
    """Shortened to some steps: that it learns in its four minutes stands in docs/LOG.md, not in a test with a clock."""
    code, out, err = unmask("demo", "--steps", "40", "--out", "demo", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert set(summary["probes"]) == {"shapes-linear", "shapes-knn", "digits-linear", "digits-knn"}
    for probed in summary["probes"].values():
        assert probed["rows"][0]["features"] == "raw pixels"
        assert probed["shared"] == 0
    html = (tmp_path / "demo" / "report.html").read_text()
    assert html.count("<section>") == 2
    assert html.count("95 % interval</th>") == 4
    assert "before training" in html


@pytest.mark.parametrize(("steps", "weak"), [(387, True), (3200, False)])
def test_a_demo_that_had_time_for_few_steps_blames_the_steps(monkeypatch, capsys, tmp_path, steps, weak):
    class Trained:
        path = tmp_path

        def status(self):
            return {"state": "finished", "step": steps}

    monkeypatch.setattr("unmask.engine.pretrain.pretrain", lambda *_, **__: Trained())
    monkeypatch.setattr("unmask.evals.run_probe.probe_run", lambda *_, **__: {})
    monkeypatch.setattr("unmask.report.run_page.write_report", lambda out: out / "report.html")
    demo(out=tmp_path)
    err = capsys.readouterr().err
    assert (f"only {steps} steps fitted" in err) == weak
    assert (f"unmask set {tmp_path} train.steps=" in err.replace("\n", " ")) == weak


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--lr", "optim.base_lr"), ("--epochs", "train.epochs"), ("--batch-size", "train.batch_size"),
        ("--num_workers", "data.workers"), ("--img-size", "data.size"), ("--mask-ratio", "method.mask_ratio"),
    ],
)  # fmt: skip
def test_an_option_that_is_a_setting_points_to_set(unmask, option, key):
    code, out, err = unmask("pretrain", "shapes", option, "1")
    assert (code, out) == (2, "")
    assert f"--set {key}=VALUE" in err


def test_the_hint_for_lr_names_the_scaling_with_the_batch(unmask):
    assert "VALUE x batch size / 256" in unmask("pretrain", "shapes", "--lr", "1")[2]
    assert "/ 256" not in unmask("pretrain", "shapes", "--epochs", "1")[2]


def test_an_unknown_option_of_a_verb_without_settings_gets_no_such_hint(unmask):
    code, _, err = unmask("report", "run", "--lr", "1")
    assert code == 2
    assert "--set" not in err


def test_names_of_other_programs_are_suggested_for_settings(unmask):
    code, _, err = unmask("pretrain", "shapes", "--set", "lr=1e-3")
    assert code == 2
    assert "did you mean optim.base_lr" in err
    assert "data.crop.ratio" not in err  # not all seventy


def test_settings_of_another_run_repeat_it(unmask, run_folder, images):
    code, _, err = unmask("pretrain", images, "--config", "run", "--out", "again")
    assert code == 0, err
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_folder, run_folder.with_name("again"))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1
    code, _, err = unmask("pretrain", images, "--config", "run/config.json", "--out", "more", "--set", "train.steps=2")
    assert code == 0, err
    assert "2 steps" in err


def test_settings_of_a_budgeted_run_repeat_its_steps(unmask, images, tmp_path, monkeypatch):
    monkeypatch.setattr("unmask.engine.time_budget.clock", lambda: options.started())  # stands still
    monkeypatch.setattr("unmask.engine.make_plan.time_steps", lambda *_, **__: [0.1])
    code, _, err = unmask("pretrain", images, "--recipe", "mae_nano", "--out", "a", "--budget", "1s", *small())
    assert code == 0, err
    code, _, err = unmask("pretrain", images, "--config", "a", "--out", "b")
    assert code == 0, err
    steps = [json.loads((tmp_path / name / "plan.json").read_text())["steps"] for name in "ab"]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("more", [["--recipe", "mae_nano"], ["--from", "run"]], ids=["recipe", "from"])
def test_two_sources_of_settings_are_refused(unmask, run_folder, images, more):
    code, _, err = unmask("pretrain", images, "--config", "run", *more)
    assert code == 2
    assert "leave one of them out" in err


def test_recipes_are_listed_in_groups(unmask):
    code, out, _ = unmask("recipes")
    assert code == 0
    lines = out.splitlines()
    names = [line.split()[0] for line in lines if line]
    assert set(all_recipes()) <= set(names)
    assert names.index("mae_huge") < names.index("crossmae_nano") < names.index("finetune_few")
    *blocks, footnote = out.strip().split("\n\n")[1:]
    assert all(len(block.splitlines()) > 1 for block in blocks)  # a title and its recipes
    assert footnote.startswith("* the image size follows your images")


def test_ls_shows_every_run_and_prune_frees_what_is_not_needed(unmask, run_folder):
    code, out, _ = unmask("ls")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("run  ") and "finished" in line)
    for part in ("mae_nano", "4/4", "16x16"):
        assert part in line
    (record,) = json.loads(unmask("ls", "--json")[1])
    assert (record["path"], record["state"], record["step"], record["size"]) == ("run", "finished", 4, [16, 16])

    (run_folder / "features").mkdir()
    (run_folder / "features" / "a.arrays").write_bytes(bytes(1000))
    before = sorted(path.name for path in (run_folder / "checkpoints").glob("step-*"))
    assert len(before) == 2
    code, out, _ = unmask("prune", "run", "--dry-run", "--json")
    assert code == 0
    assert len(json.loads(out)["folders"]) == 2
    assert (run_folder / "features").exists()
    code, _, err = unmask("prune", "run")
    assert code == 0, err
    assert sorted(path.name for path in (run_folder / "checkpoints").glob("step-*")) == before[-1:]
    assert not (run_folder / "features").exists()
    assert unmask("embed", "run", "shapes:8", "--out", "e.npz")[0] == 0


def test_ls_of_no_runs_and_of_no_folder(unmask, tmp_path):
    assert "no runs here" in unmask("ls")[1]
    assert unmask("ls", "nowhere")[0] == 2


def test_prune_keeps_a_run_without_a_sound_checkpoint_as_it_is(unmask, run_folder):
    for folder in (run_folder / "checkpoints").glob("step-*"):
        (folder / "model.safetensors").write_bytes(b"damaged")
    code, _, err = unmask("prune", "run")
    assert code == 2
    assert "no sound checkpoint" in err
    assert len(list((run_folder / "checkpoints").glob("step-*"))) == 2


def test_ls_shows_damaged_runs_too(unmask, run_folder):
    (run_folder / "plan.json").write_text("{")
    (run_folder / "status.json").write_text("[]")
    code, out, _ = unmask("ls")
    assert code == 0
    assert "run " in out


def test_excluded_images_are_left_out_of_probes_finetuning_pack_and_doctor(unmask, run_folder, tmp_path):
    write_images(tmp_path / "labelled", 40, classes=2)
    (tmp_path / "labelled" / "thumbs").mkdir()
    for number in range(8):
        Image.new("RGB", (20, 24), (number, 0, 0)).save(tmp_path / "labelled" / "thumbs" / f"{number}.png")
    code, out, err = unmask("probe", "run", "labelled", "--exclude", "thumbs", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["classes"] == ["class0", "class1"]
    assert found["data"] == "labelled without thumbs"
    assert len(json.loads(unmask("probe", "run", "labelled", "--json")[1])["classes"]) == 3
    assert len(list((run_folder / "evals").glob("probe-knn*"))) == 2, "they are results on other images"
    code, _, err = unmask(
        "finetune", "run", "labelled", "--exclude", "thumbs", "--out", "tuned", "--recipe", "finetune_few",
        "--set", "train.steps=2", "--set", "train.batch_size=8",
    )  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["data"]["exclude"] == ["thumbs"]
    assert len(config["method"]["classes"]) == 2
    code, out, err = unmask("pack", "labelled", "packed.tar", "--exclude", "thumbs", "--workers", "0", "--json")
    assert code == 0, err
    assert json.loads(unmask("check", "packed.tar", "--json")[1])["files"] == 40
    code, _, err = unmask("doctor", "--exclude", "thumbs")
    assert code == 2
    assert "name images too" in err


def test_prune_keeps_the_only_copy_of_a_checkpoint_that_was_being_written_again(unmask, run_folder):
    """A crash between the two renames of `checkpoint.save` leaves it under another name until the run is resumed."""
    newest = max((run_folder / "checkpoints").glob("step-*"))
    aside = newest.with_name(f"{newest.name}.old")
    newest.rename(aside)
    assert unmask("prune", "run")[0] == 0
    assert aside.is_dir()
    assert unmask("resume", "run")[0] == 0
    assert newest.is_dir()
