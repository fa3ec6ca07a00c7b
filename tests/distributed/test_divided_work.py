"""Several processes check and predict images like one process, and read every file once."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images
from corpus import file_of, noisy, npy, smooth, tiff
from group import run_script

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
    (folder / "pages").mkdir()
    for number in range(13):
        pages = np.stack([smooth(20, 20, 1)[..., 0] + page for page in range(1 + number % 3)])
        (folder / f"pages/{number:02d}.tif").write_bytes(tiff(pages, photometric="minisblack"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return {number of processes: the results of each of them}, and the folder."""
    folder = tmp_path_factory.mktemp("divided")
    write_data(folder)
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
@pytest.mark.parametrize("name", ["all", "workers", "sample", "mostly bad", "pages"])
def test_processes_read_each_file_as_often_as_one_process(results, count, name):
    _, found = results
    name = f"check {name}"
    assert reads(found[count], name) == reads(found[1], name)
    assert all(rank[name]["reads"] for rank in found[count]), "every process reads some of the files"


@pytest.mark.parametrize("count", [2, 3])
def test_files_that_all_processes_read_are_detected(results, count):
    _, found = results
    assert reads(found[count], "control") != reads(found[1], "control")
