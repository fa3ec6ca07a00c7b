"""Test the verbs that use a run."""

import json

import numpy as np
from conftest import write_images
from PIL import Image


def test_reconstruct_embed_probe_report_and_resume_work_on_a_run(unmask, run_folder, images, tmp_path):
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
        assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    code, out, err = unmask("report", "run", "--json")
    assert code == 0, err
    page = (run_folder / "report.html").read_text()
    assert f"Linear probe on {labelled}, tested on a held-out fifth of {labelled}, 5 labels per class" in page
    assert unmask("resume", "run")[0] == 0


def test_check_reports_broken_files_and_a_forecast(unmask, images):
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


def test_excluded_images_are_not_used_by_any_verb(unmask, run_folder, tmp_path):
    write_images(tmp_path / "labelled", 40, classes=2)
    (tmp_path / "labelled" / "thumbs").mkdir()
    for number in range(8):
        Image.new("RGB", (20, 24), (number, 0, 0)).save(tmp_path / "labelled" / "thumbs" / f"{number}.png")
    code, out, err = unmask("probe", "run", "labelled", "--exclude", "thumbs", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["names"] == ["class0", "class1"]
    assert (found["data"]["name"], found["data"]["excluded"]) == ("labelled", ["thumbs"])
    assert len(json.loads(unmask("probe", "run", "labelled", "--json")[1])["names"]) == 3
    assert len(list((run_folder / "evals").glob("probe-knn*"))) == 2, (
        "the data sets differ, so neither result replaces the other"
    )
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
    assert "give DATA too" in err
