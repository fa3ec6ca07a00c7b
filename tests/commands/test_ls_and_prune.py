"""Test `unmask ls` and `unmask prune`."""

import json


def test_ls_lists_every_run_and_prune_deletes_checkpoints_and_features(unmask, run_folder):
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


def test_ls_reports_an_empty_or_missing_folder(unmask, tmp_path):
    assert "no runs here" in unmask("ls")[1]
    assert unmask("ls", "nowhere")[0] == 2


def test_prune_deletes_nothing_without_an_intact_checkpoint(unmask, run_folder):
    for folder in (run_folder / "checkpoints").glob("step-*"):
        (folder / "model.safetensors").write_bytes(b"damaged")
    code, _, err = unmask("prune", "run")
    assert code == 2
    assert "no intact checkpoint" in err
    assert len(list((run_folder / "checkpoints").glob("step-*"))) == 2


def test_ls_lists_damaged_runs(unmask, run_folder):
    (run_folder / "plan.json").write_text("{")
    (run_folder / "status.json").write_text("[]")
    code, out, _ = unmask("ls")
    assert code == 0
    assert "run " in out


def test_prune_keeps_the_only_copy_of_a_partly_rewritten_checkpoint(unmask, run_folder):
    """After a crash between the two renames of `checkpoint.save`, the copy has another name until a resume."""
    newest = max((run_folder / "checkpoints").glob("step-*"))
    aside = newest.with_name(f"{newest.name}.old")
    newest.rename(aside)
    assert unmask("prune", "run")[0] == 0
    assert aside.is_dir()
    assert unmask("resume", "run")[0] == 0
    assert newest.is_dir()
