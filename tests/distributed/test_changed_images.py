"""Processes that resume a run agree on how its images have changed."""

import json
from pathlib import Path

from conftest import SMALL_RUN, pretrain, write_images
from group import run_script
from PIL import Image

from unmask.console import Console

SCRIPT = Path(__file__).with_name("resume_group.py")


def test_all_processes_continue_with_the_same_changed_images(tmp_path):
    """Images that are held out have other rows afterwards, because one was added before them."""
    images, quiet = write_images(tmp_path / "images", 30), Console(quiet=True)
    settings = [*SMALL_RUN, "train.steps=2", "data.held_out=4"]
    run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=settings, console=quiet)
    run.set_status("stopped", 2, total=6)
    Image.new("RGB", (24, 20), "red").save(images / "0000-added.png")
    run_script(2, SCRIPT, tmp_path / "output", str(run.path), str(tmp_path / "seen"))
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(2)]
    assert seen[0] == seen[1]
    assert len(seen[0]["rows"]) == 27
    held_out = json.loads(seen[0]["plan"])["held_out"]
    assert sorted([*held_out, *seen[0]["rows"]]) == list(range(31))
    assert len(run.read("provenance.json")["data_changes"]) == 1
