"""Export targets: every file in `interop/targets/` is a target, and a new one needs only one file."""

import subprocess
import sys

import pytest
from conftest import pretrain

import unmask.interop.targets
from unmask.errors import UserError
from unmask.interop.export_run import export_run
from unmask.interop.export_target import ExportTarget
from unmask.interop.find_target import find_target, target_names, target_summary

NEW_TARGET = '''"""Names and shapes of the tensors as text (.txt)."""

from unmask.interop.export_common import weights_of
from unmask.interop.export_target import ExportedModel, ExportTarget


def to_text(loaded):
    lines = [f"{name} {tuple(value.shape)}" for name, value in weights_of(loaded.method).items()]
    return ExportedModel(
        what="a list of tensors",
        library="nothing",
        load="print(open(PATH).read())",
        returns="Text.",
        write=lambda path: path.write_text("\\n".join(lines)),
        check=lambda path, images: 0.0 if path.read_text().splitlines() == lines else 1.0,
    )


TARGET = ExportTarget(to_text, suffix=".txt", library_name="text")
'''


def test_every_target_file_declares_a_target_and_a_summary():
    assert {"hf", "hf-pretraining", "official", "onnx", "onnx-float", "safetensors", "timm"} <= {*target_names()}
    for name in target_names():
        target = find_target(name)
        assert isinstance(target, ExportTarget)
        assert not target.suffix or target.suffix.startswith(".")
        assert target.suffix in target_summary(name), "--help names the extension"
        assert 20 < len(target_summary(name)) < 120


def test_an_unknown_target_is_rejected_with_the_nearest_name():
    with pytest.raises(UserError, match="target 'tim' is not known; did you mean timm"):
        find_target("tim")


def test_listing_targets_imports_no_torch():
    code = (
        "import sys\nfrom unmask.interop.find_target import target_names, target_summary\n"
        "print([target_summary(name) for name in target_names()])\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_a_new_target_needs_only_one_file(tmp_path, monkeypatch):
    folder = tmp_path / "targets"
    folder.mkdir()
    (folder / "tensor_list.py").write_text(NEW_TARGET)
    monkeypatch.setattr(unmask.interop.targets, "__path__", [*unmask.interop.targets.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "unmask.interop.targets.tensor_list", raising=False)
    assert "tensor-list" in target_names()
    assert target_summary("tensor-list") == "Names and shapes of the tensors as text (.txt)."

    settings = ["data.size=[16,16]", "train.batch_size=4", "train.steps=1", "data.workers=0", "train.device=cpu"]
    run = pretrain("shapes:8", recipe="mae_nano", out=tmp_path / "run", settings=settings)
    summary = export_run(run.path, "tensor-list", tmp_path / "out.txt")
    assert summary.difference == 0.0
    assert "encoder.cls_token (1, 1, " in (tmp_path / "out.txt").read_text()
    assert "library_name: text" in (tmp_path / "out.txt.md").read_text()
