"""Run every `unmask` command and every Python example of the documents, with small images and models.

The placeholders of the documents (PHOTOS, LABELLED, RUN, ...) are files and folders in a workspace. Commands that train
get additional settings for small models, and are otherwise unchanged.
"""

import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from conftest import SMALL_RUN, write_images
from PIL import Image

import unmask
from unmask.commands import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {"LOG.md": "a lab notebook with commands that take hours", "index.md": "repeats commands of other pages"}
ELSEWHERE = {
    "demo": "tests/commands/test_demo.py runs it",
    "launch": "tests/distributed/test_launch.py runs it",
    "ablate": "tests/comparison/test_run_table.py runs every table",
}
MODEL = [*SMALL_RUN, "method.encoder.patch=[4,4]"]
TRAINING = ["train.steps=2", "train.batch_size=8", "train.device=cpu", "data.workers=0"]
SMALL_RECIPES = {
    "dvae_nano": [
        "data.size=[16,16]", "method.encoder.codes=8", "method.encoder.width=8", "method.encoder.depth=1",
        "method.encoder.patch=[4,4]",
    ],
    "beit_nano": [
        "data.size=[16,16]", "method.encoder.width=32", "method.encoder.depth=1", "method.encoder.heads=2",
        "method.encoder.patch=[4,4]",
    ],
    "igpt_nano": [
        "data.size=[16,16]", "method.encoder.width=32", "method.encoder.depth=1", "method.encoder.heads=2",
        "method.encoder.patch=[4,4]", "method.encoder.colours=16",
    ],
    "demo_digits": [],
}  # fmt: skip
SMALLER = {"1,5,10,100": "1,2", "10": "2", "128": "16", "train.steps=20000": "train.steps=4"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    """Return the words of every `unmask` command in the shell blocks of a document."""
    lines = "\n".join(blocks(document.read_text("utf-8"), "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("unmask ")]


def small(words: list[str]) -> list[str]:
    """Return the command with the numbers of SMALLER, without a time budget, and with settings for a small model."""
    verb, *rest = words
    kept: list[str] = []
    for before, word in zip(["", *rest], rest, strict=False):
        if "--budget" in (before, word):
            continue
        kept.append(SMALLER.get(word, word))
    return [verb, *kept, *(flag for each in smaller_settings(verb, rest) for flag in ("--set", each))]


def smaller_settings(verb: str, rest: list[str]) -> list[str]:
    """Return settings that make a command small if it trains or measures training."""
    if verb == "pretrain":
        recipe = rest[rest.index("--recipe") + 1] if "--recipe" in rest else "auto"
        network = SMALL_RECIPES.get(recipe, MODEL) if "--from" not in rest or recipe != "auto" else []
        return [*(each for each in network if "--palette" not in rest or "colours" not in each), *TRAINING]
    if verb == "finetune":
        length = [] if "--steps-of" in rest else TRAINING[:2]
        return [*length, *TRAINING[2:], "data.size=[16,16]"]
    if verb == "probe" and "paper-linear" in rest:
        return TRAINING
    return ["data.workers=0"] if verb == "check" or (verb == "doctor" and rest) else []


def run(*words: str) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["unmask", *words])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def write_masks(folder: Path, count: int, seed: int) -> None:
    """Write `count` images to images/<folder name>, and their masks of two classes to labels/<folder name>."""
    write_images(folder, count, size=(20, 24), seed=seed)
    labels = folder.parents[1] / "labels" / folder.name
    labels.mkdir(parents=True)
    for path in sorted(folder.glob("*.png")):
        mask = np.zeros((20, 24), np.uint8)
        mask[10:] = 1
        Image.fromarray(mask).save(labels / path.name)


def write_boxes(folder: Path, count: int) -> None:
    """Write a folder in the layout of Pascal VOC, with one box per image and two splits."""
    write_images(folder / "JPEGImages", count)
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    names = sorted(path.stem for path in (folder / "JPEGImages").iterdir())
    for name in names:
        box = "<bndbox><xmin>2</xmin><ymin>3</ymin><xmax>12</xmax><ymax>14</ymax></bndbox>"
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename><size><width>24</width><height>20</height>"
            f"<depth>3</depth></size><object><name>cell</name>{box}</object></annotation>"
        )
    for split, part in (("train", names[::2]), ("test", names[1::2])):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(part) + "\n")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with all files and runs that the documents name."""
    folder = tmp_path_factory.mktemp("documents")
    for name in ("PHOTOS", "MORE_PHOTOS"):
        write_images(folder / name, 24, seed=len(name))
    for name in ("LABELLED", "LABELLED_TEST"):
        write_images(folder / name, 48, classes=2, seed=len(name))
    for name in ("photo1", "photo2", "PHOTOS/cat"):
        Image.open(folder / "PHOTOS" / "0000.png").convert("RGB").save(folder / f"{name}.jpg")
    rows = [f"{path.relative_to(folder / 'PHOTOS')},{number % 2}\n" for number, path in enumerate(
        sorted((folder / "PHOTOS").glob("*.png")))]  # fmt: skip
    (folder / "scores.csv").write_text("path,good\n" + "".join(rows))
    (folder / "pattern.txt").write_text("#.##\n####\n.###\n##.."[:19] + "\n")
    write_masks(folder / "STREETS" / "images" / "train", 12, seed=1)
    write_masks(folder / "STREETS" / "images" / "test", 4, seed=2)
    write_boxes(folder / "CELLS", 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = [flag for each in [*MODEL, *TRAINING] for flag in ("--set", each)]
        assert run("pretrain", "PHOTOS", "--recipe", "mae_nano", "--out", "RUN", *settings) == 0
        assert run("pretrain", "PHOTOS", "--recipe", "mae_nano", "--out", "runs/other", *settings) == 0
        for name in ("runs/a", "runs/b", "runs/beit", "runs/PHOTOS-mae_nano", "runs/continued", "runs/official"):
            shutil.copytree("RUN", name)
        assert run("export", "RUN", "--to", "official", "--out", "mae_pretrain_vit_base.pth") == 0
        tune = [flag for each in [*TRAINING, "data.size=[16,16]"] for flag in ("--set", each)]
        assert run("finetune", "RUN", "LABELLED", "--test", "LABELLED_TEST", "--out", "runs/classifier", *tune) == 0
        street = ["STREETS/images/train", "--task", "segment", "--test", "STREETS/images/test"]
        assert run("finetune", "RUN", *street, "--out", "runs/segmenter", *tune) == 0
        cells = ["CELLS", "--task", "detect", "--split", "train", "--test", "CELLS", "--test-split", "test"]
        assert run("finetune", "RUN", *cells, "--out", "runs/detector", *tune) == 0
    return folder


@pytest.fixture
def workspace(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of the prepared folder, as working directory."""
    folder = tmp_path / "workspace"
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def free(words: list[str], made: set[str]) -> None:
    """Remove the prepared output of this command, so that the command writes it."""
    for option, name in pairwise(words):
        if option == "--out" and name not in made and Path(name).is_dir():
            shutil.rmtree(name)
            made.add(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "document", [each for each in DOCUMENTS if each.name not in NOT_RUN], ids=lambda path: path.name
)
def test_commands_of_a_page_run_in_order(document, workspace, capfd):
    made: set[str] = set()
    for words in commands(document):
        if words[0] in ELSEWHERE:
            continue
        free(words, made)
        code = run(*small(words))
        _, err = capfd.readouterr()
        assert code == 0, f"unmask {shlex.join(words)}\n{err}"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_of_a_page_run(document, prepared, monkeypatch, request):
    request.addfinalizer(lambda: jaxtyping.config.update("jaxtyping_disable", False))
    examples = [each for each in blocks(document.read_text("utf-8"), "python") if "import" in each and "unmask" in each]
    monkeypatch.chdir(prepared)
    for example in examples:
        if example.startswith("# src/"):
            continue  # this page imports a file of the package, which test_docs.py tests
        settings = ", ".join(repr(each) for each in [*MODEL, *TRAINING])
        if "torch.export" in example:
            jaxtyping.config.update("jaxtyping_disable", True)  # sizes in an exported graph are symbols
        example = example.replace('budget="30m"', f'recipe="mae_nano", settings=[{settings}]')
        scope = {"images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}
        exec(compile(example, document.name, "exec"), scope)
        names = set(re.findall(r"\bunmask\.(\w+)\(", example))
        assert names <= set(unmask.__all__)
