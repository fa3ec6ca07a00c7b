"""The documents are true: the method in the guide passes the contract, and every command named exists."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from unmask.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_the_method_of_the_guide_is_one_file_and_one_recipe_and_passes_the_contract(tmp_path):
    method, recipe = blocks((ROOT / "docs" / "adding_a_method.md").read_text(), "python")
    for name in ("src", "tests", "pyproject.toml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    (tmp_path / "src" / "unmask" / "methods" / "meancolour.py").write_text(method)
    (tmp_path / "src" / "unmask" / "recipes" / "meancolour.py").write_text(recipe)
    command = [sys.executable, "-m", "pytest", "-q", "tests/methods/test_contract.py", "-k", "meancolour"]
    path = str(tmp_path / "src")
    environment = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_option_named_in_the_documents_exists(document):
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for line in re.findall(r"(?:^|`)\s*(unmask [a-z][^`\n]*)", document.read_text(), re.MULTILINE):
        words = line.split("#")[0].split()
        assert words[1] in verbs, line
        known = {name for parameter in verbs[words[1]].params for name in parameter.opts} | {"--help"}
        for word in words[2:]:
            option = re.match(r"\[?(--[a-z-]+)", word)
            assert option is None or option[1] in known, f"{line}: {option[1]} is no option of {words[1]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_in_the_documents_exists(document):
    for name in re.findall(r"(?:\]\(|`)((?:docs|src|tests|benchmarks|scripts)/[\w./-]+)", document.read_text()):
        if "meancolour" not in name:
            assert (ROOT / name).exists(), f"{document.name} names {name}"
