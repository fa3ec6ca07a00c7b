"""Several processes check and predict images like one process, and read every file once."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import pretrain, write_images
from corpus import file_of, noisy, npy, smooth, tiff
from group import outputs, run_script, start, wait
from PIL import Image

from unmask.console import Console
from unmask.finetuning.finetune_run import FinetuneOptions, finetune

SCRIPT = Path(__file__).with_name("divided_group.py")


def write_data(folder: Path) -> None:
    """Write folders of files: images (37 files in five formats, six of them unreadable), bad, and pages."""
    images = write_images(folder / "images", 20, classes=2)
    for number in range(11):
        gray = smooth(16 + number, 20, 1)
        contents = {
            "a.jpg": file_of(noisy(16, 24 + number, seed=number), "JPEG"),
            "b.tif": tiff(gray),
            "c.npy": npy(smooth(20, 24 + number)),
            "d.png": file_of(smooth(18, 18, 4), "PNG"),
            "e.png": b"",
            "f.jpg": file_of(noisy(32, 32), "JPEG")[:300],
        }
        name = list(contents)[number % len(contents)]
        (images / f"class{number % 2}/{number:02d}{name}").write_bytes(contents[name])
    for number in range(6):
        (images / f"class1/broken{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    write_images(folder / "bad", 5)
    for number in range(7):
        (folder / f"bad/broken{number}.png").write_bytes(b"")
    (folder / "broken").mkdir()
    for number in range(5):
        (folder / f"broken/{number}.png").write_bytes(b"")
    (folder / "pages").mkdir()
    for number in range(13):
        pages = np.stack([smooth(20, 20, 1)[..., 0] + page for page in range(1 + number % 3)])
        (folder / f"pages/{number:02d}.tif").write_bytes(tiff(pages, photometric="minisblack"))


def write_runs(folder: Path) -> None:
    """Write fine-tuned runs of three tasks: classify, segment and detect."""
    random = np.random.default_rng(0)
    images, boxes = [], []
    for place in ("labelled/blue", "labelled/red", "street/images", "street/masks", "cells"):
        (folder / place).mkdir(parents=True)
    for number in range(12):
        pixels = random.integers(0, 256, (20, 24, 3), np.uint8)
        picture, name = Image.fromarray(pixels), f"{number}.png"
        for place in (f"labelled/{('blue', 'red')[number % 2]}", "street/images", "cells"):
            picture.save(folder / place / name)
        Image.fromarray((pixels[..., 0] > 100).astype(np.uint8)).save(folder / "street/masks" / name)
        images.append({"id": number, "file_name": name, "height": 20, "width": 24})
        boxes.append({"id": number, "image_id": number, "category_id": 1, "bbox": [2, 3, 10, 8], "area": 80})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}
    (folder / "cells/boxes.json").write_text(json.dumps(content))
    few = ["data.workers=0", "train.batch_size=8", "train.steps=2", "train.device=cpu"]
    encoder = ["method.encoder.width=32", "method.encoder.depth=1", "method.encoder.heads=2", "data.size=16"]
    quiet = Console(quiet=True)
    run = pretrain(folder / "labelled", out=folder / "pre", recipe="mae_nano", settings=[*few, *encoder], console=quiet)
    tasks = {
        "classify": ("labelled", ()),
        "segment": ("street", ("method.head=linear",)),
        "detect": ("cells", ("method.width=16", "method.convs=1", "data.size=[32,32]")),
    }
    for task, (data, more) in tasks.items():
        options = FinetuneOptions(task=task, settings=[*few, *more])
        finetune(run.path, str(folder / data), options, out=folder / task, console=quiet)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return {number of processes: the results of each of them}, and the folder."""
    folder = tmp_path_factory.mktemp("divided")
    write_data(folder)
    write_runs(folder)
    found = {}
    for count in (1, 2, 3):
        run_script(count, SCRIPT, folder / f"output-{count}", str(folder))
        place = folder / f"{count}-processes"
        found[count] = [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(count)]
    return folder, found


def reads(ranks: list[dict], name: str) -> Counter:
    """Return how often each file was read by all processes together."""
    return sum((Counter(rank[name]["reads"]) for rank in ranks), Counter())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["all", "workers", "sample", "mostly bad", "pages"])
def test_check_prints_and_stores_what_one_process_does(results, count, name):
    _, found = results
    (alone,), ranks = found[1], found[count]
    name = f"check {name}"
    assert alone[name]["err"]
    assert [rank[name]["code"] for rank in ranks] == [alone[name]["code"]] * count
    assert ranks[0][name]["err"] == alone[name]["err"]
    assert json.loads(ranks[0][name]["out"]) == json.loads(alone[name]["out"])
    assert all(rank[name]["out"] == rank[name]["err"] == "" for rank in ranks[1:]), "only the writer prints"


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["all", "workers", "sample", "mostly bad", "pages"])
def test_the_scan_cache_has_the_bytes_of_one_process(results, count, name):
    folder, _ = results
    alone, here = (
        {file.name: file.read_bytes() for file in (folder / f"{number}-processes/{name}/cache").iterdir()}
        for number in (1, count)
    )
    assert len(alone) == 1
    assert here == alone


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(
    "name",
    [
        "check all",
        "check workers",
        "check sample",
        "check mostly bad",
        "check pages",
        "rescan",
        "predict csv",
        "predict masks",
    ],
)
def test_processes_read_each_file_as_often_as_one_process(results, count, name):
    _, found = results
    assert reads(found[count], name) == reads(found[1], name)
    assert all(rank[name]["reads"] for rank in found[count]), "every process reads some of the files"


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("verb", ["check", "predict"])
def test_files_that_all_processes_read_are_detected(results, count, verb):
    _, found = results
    assert reads(found[count], f"{verb} control") != reads(found[1], f"{verb} control")


@pytest.mark.parametrize("count", [2, 3])
def test_a_later_scan_reads_what_the_cache_of_the_writer_lacks(results, count):
    _, found = results
    (alone,), ranks = found[1], found[count]
    assert alone["rescan"]["scan"]["known"] == "27", "28 of 37 files are readable, and one of them has changed"
    assert [rank["rescan"]["scan"] for rank in ranks] == [alone["rescan"]["scan"]] * count


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["csv", "json", "masks", "boxes"])
def test_predictions_have_the_bytes_of_one_process(results, count, name):
    _, found = results
    (alone,), ranks = found[1], found[count]
    name = f"predict {name}"
    assert [rank[name]["code"] for rank in ranks] == [0] * count
    assert alone[name]["files"]
    assert ranks[0][name]["files"] == alone[name]["files"]
    assert ranks[0][name]["err"] == alone[name]["err"]
    assert ranks[0][name]["err"].count("9 of 37 cannot be used") == 1
    assert json.loads(ranks[0][name]["out"]) == json.loads(alone[name]["out"])
    assert all(rank[name]["out"] == rank[name]["err"] == "" for rank in ranks[1:]), "only the writer prints"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_all_processes_reject_images_of_which_none_is_readable(results, count):
    _, found = results
    ranks = [rank["predict nothing"] for rank in found[count]]
    assert [rank["code"] for rank in ranks] == [2] * count
    said = "".join(rank["err"] for rank in ranks)
    assert said.count("error: none of the 5 files of ../broken can be used") == 1
    assert not any(rank["files"] for rank in ranks)


@pytest.mark.parametrize(("verb", "rank"), [("check", 1), ("predict", 0)])
def test_a_process_that_fails_ends_all_with_one_message(results, tmp_path, verb, rank):
    folder, _ = results
    started = start(2, [sys.executable, str(SCRIPT), str(folder), verb, str(rank)], tmp_path)
    codes = wait(started, 60)
    said = outputs(tmp_path)
    assert codes == [1, 1], said
    assert said.count("\nerror: ") == 1, said
    assert "a fault for this test" in said


def test_processes_with_different_images_are_rejected_with_one_message(results, tmp_path):
    folder, _ = results
    codes = wait(start(2, [sys.executable, str(SCRIPT), str(folder), "differ", "1"], tmp_path), 60)
    said = outputs(tmp_path)
    assert codes == [2, 2], said
    assert said.count("\nerror: the images differ between processes: ") == 1, said
    assert said.count("error: ") == 1, said
    assert "give all hosts the same files" in said
