"""Several processes embed and probe images with the bytes of one process, and read every image once."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import SMALL_RUN, pretrain, write_images
from group import outputs, run_script, start, wait

SCRIPT = Path(__file__).with_name("feature_group.py")
SHORT = (*SMALL_RUN, "train.steps=2", "train.picture_every=9")
PIXELS = ("data.size=[6,6]", "data.workers=0", "train.batch_size=8", "train.device=cpu", "method.encoder.width=32",
          "method.encoder.heads=2", "method.encoder.depth=2", "train.steps=2", "train.picture_every=9")  # fmt: skip
COUNTS = (2, 3)  # 12 batches, the last of them smaller
PROBES = ("pooled", "tokens", "curve", "ranks", "layers")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the folder, and {number of processes: the results of each of them}."""
    folder = tmp_path_factory.mktemp("features")
    data = write_images(folder / "data", 43, classes=2)
    for number in (3, 20):
        (data / f"class1/{number:04d}broken.png").write_bytes(b"nothing")
    pretrain(data, recipe="mae_nano", out=folder / "run", settings=SHORT)
    pretrain(data, recipe="igpt_bert_nano", out=folder / "pixels", settings=PIXELS)
    found = {}
    for count in (1, *COUNTS):
        run_script(count, SCRIPT, folder / f"output-{count}", str(folder))
        place = folder / f"{count}-processes"
        found[count] = [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(count)]
    return folder, found


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["all.npz", "all.parquet", "cached.npz", "again.npz"])
def test_tables_have_the_bytes_of_one_process(results, count, name):
    folder, _ = results
    assert (folder / f"{count}-processes" / name).read_bytes() == (folder / "1-processes" / name).read_bytes()


@pytest.mark.parametrize("count", COUNTS)
def test_cached_features_and_results_have_the_bytes_of_one_process(results, count):
    folder, _ = results

    def files(number: int) -> dict:
        runs = folder / f"{number}-processes"
        return {
            str(file.relative_to(runs)): file.read_bytes().replace(str(runs).encode(), b"RUNS")
            for run in ("run", "pixels")
            for part in ("features", "evals")
            for file in sorted((runs / run / part).rglob("*"))
            if file.is_file()
        }

    alone, here = files(1), files(count)
    kinds = ["attentive", "knn", "linear", "rankme"]
    assert [Path(name).name for name in alone if name.startswith("run/evals/probe")] == [
        f"probe-{kind}-data.json" for kind in kinds
    ]
    assert any(name.endswith(".arrays") for name in alone), "features are cached"
    assert list(here) == list(alone)
    assert {name for name in alone if here[name] != alone[name]} == set()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", PROBES)
def test_all_processes_return_the_result_of_one_and_one_of_them_prints_it(results, count, name):
    folder, found = results
    (alone,), ranks = found[1], found[count]

    def text(value: object, number: int) -> str:
        return json.dumps(value).replace(str(folder / f"{number}-processes"), "RUNS")

    assert alone[name]["messages"]
    for rank in ranks:
        assert text(rank[name]["results"], count) == text(alone[name]["results"], 1)
    assert text(ranks[0][name]["messages"], count) == text(alone[name]["messages"], 1)
    assert all(rank[name]["messages"] == [] for rank in ranks[1:])


def reads(ranks: list[dict], name: str) -> Counter:
    """Return how often the processes read each row, all together."""
    return sum((Counter(rank[name]["counts"]) for rank in ranks), Counter())


@pytest.mark.parametrize("count", COUNTS)
def test_every_image_is_computed_once_by_one_of_the_processes(results, count):
    _, found = results
    assert set(reads(found[count], "cached").values()) == {1}
    assert len(reads(found[count], "cached")) == 43
    assert all(rank["cached"]["counts"] for rank in found[count]), "every process computes some of them"
    assert reads(found[count], "again") == {}, "the features are cached"
    assert reads(found[count], "npz") == reads(found[1], "npz"), "unreadable files are tried again to name the fault"


@pytest.mark.parametrize("count", COUNTS)
def test_unreadable_images_of_all_processes_are_reported_once(results, count):
    _, found = results
    assert any("2 of 45 cannot be used" in line for line in found[1][0]["npz"]["messages"])
    assert found[count][0]["npz"]["messages"] == found[1][0]["npz"]["messages"]
    assert all(rank["npz"]["messages"] == [] for rank in found[count][1:])


@pytest.mark.parametrize("count", COUNTS)
def test_images_that_all_processes_compute_are_detected(results, count):
    folder, found = results
    assert reads(found[count], "control") != reads(found[1], "control")
    control = (folder / f"{count}-processes/control.npz").read_bytes()
    assert control != (folder / "1-processes/control.npz").read_bytes()


def test_a_process_that_fails_ends_all_with_one_message(results, tmp_path):
    folder, _ = results
    codes = wait(start(2, [sys.executable, str(SCRIPT), str(folder), "embed"], tmp_path), 60)
    said = outputs(tmp_path)
    assert codes == [1, 1], said
    assert said.count("error: ") == 1, said
    assert "a fault for this test" in said
    assert not (folder / "failed.npz").exists()


def test_processes_with_different_labels_are_rejected_with_one_message(results, tmp_path):
    folder, _ = results
    names = sorted(str(file.relative_to(folder / "data")) for file in (folder / "data").rglob("*.png"))
    for rank in (0, 1):
        lines = [f"{name},{number % 2}" for number, name in enumerate(names) if rank == 0 or number % 5]
        (folder / f"targets-{rank}.csv").write_text("\n".join(["path,even", *lines]))
    codes = wait(start(2, [sys.executable, str(SCRIPT), str(folder), "probe"], tmp_path), 60)
    said = outputs(tmp_path)
    assert codes == [2, 2], said
    assert said.count("error: ") == said.count("error: the labelled images differ between processes: ") == 1, said
