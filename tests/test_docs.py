"""Test that commands, files, links and messages named in the documents exist, and that the example method works."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from typer.main import get_command

from unmask.commands import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES, ROOT / "CONTRIBUTING.md"]
GAP = "…"  # placeholder for names and numbers in a quoted message


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST generate them."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
def test_example_method_of_the_guide_passes_the_contract(tmp_path):
    method, recipe = blocks((ROOT / "docs" / "write-a-method.md").read_text("utf-8"), "python")
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


@pytest.mark.slow
def test_example_probe_of_the_guide_is_found_and_measures(tmp_path, run_folder):
    (probe,) = blocks((ROOT / "docs" / "write-a-probe.md").read_text("utf-8"), "python")
    shutil.copytree(ROOT / "src", tmp_path / "src")
    (tmp_path / "src" / "unmask" / "evals" / "probes" / "nearest_mean.py").write_text(probe)
    arguments = ["probe", run_folder, "shapes:200", "--kind", "nearest_mean", "--shots", "5", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "unmask", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")}, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kind"] == "nearest_mean"
    assert {row["pool"] for row in result["rows"]} == {"cls", "mean"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_option_named_in_the_documents_exists(document):
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    text = document.read_text("utf-8")
    in_blocks = re.findall(r"^unmask [a-z].*$", "\n".join(blocks(text, r"\w*")).replace("\\\n", " "), re.MULTILINE)
    in_sentences = re.findall(r"`(unmask [a-z][^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for line in [*in_blocks, *in_sentences]:
        words = line.split("#")[0].split()
        assert words[1] in verbs, line
        named = [words[1], *(word for word in words[2:] if words[1] == "launch" and word in verbs)]
        known = {name for verb in named for parameter in verbs[verb].params for name in parameter.opts} | {"--help"}
        for word in words[2:]:
            option = re.match(r"\[?(--[a-z-]+)", word)
            assert option is None or option[1] in known, f"{line}: {option[1]} is not an option of {words[1]}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_in_the_documents_exists(document):
    for name in re.findall(r"(?:\]\(|`)((?:docs|src|tests|benchmarks|scripts)/[\w./-]+)", document.read_text("utf-8")):
        if "meancolour" not in name and "nearest_mean" not in name:
            assert (ROOT / name).exists(), f"{document.name} names {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_points_to_an_existing_file_and_heading(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text("utf-8"))):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {link}"


def literals() -> list[str]:
    """Return all string literals of the source; in f-strings, GAP replaces the formatted values."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_quoted_message_occurs_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    texts = literals()
    quoted = blocks(page, "text")
    assert len(quoted) > 20
    for message in quoted:
        pieces = [re.escape(piece.strip()) for piece in message.split(GAP) if piece.strip()]
        pattern = re.compile(".*".join(pieces), re.DOTALL)
        assert any(pattern.search(text) for text in texts), f"no message of the code reads: {message}"


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    listed = {line for block in blocks(index, "{toctree}") for line in block.splitlines() if line and line[0] != ":"}
    assert listed == {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES} - {"index"}


def test_tree_in_the_readme_matches_the_package():
    (tree,) = blocks((ROOT / "README.md").read_text("utf-8"), "text")
    first, *lines = tree.splitlines()
    inside = {line.split()[0] for line in lines if line.startswith("  ")}
    outside = {line.split()[0] for line in lines if not line.startswith("  ")}
    package = ROOT / first.split()[0]
    for name in inside:
        assert (package / name).exists(), f"README names {name}"
    for name in outside:
        assert (ROOT / name).exists(), f"README names {name}"
    folders = {f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()}
    assert folders <= inside, f"the tree in README leaves out {folders - inside}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").split()) < 700


@pytest.mark.slow
def test_site_has_every_command_and_every_public_name(tmp_path):
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    pytest.importorskip("myst_parser", reason="pip install '.[docs]'")
    pytest.importorskip("furo", reason="pip install '.[docs]'")
    import unmask

    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "--builder", "html"]
    command = [*build, "-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = tmp_path / "site" / "reference"
    commands, api = (pages / "commands.html").read_text("utf-8"), (pages / "api.html").read_text("utf-8")
    for verb, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f'<section id="{verb}">' in commands
        for option in (name for parameter in command.params for name in parameter.opts if name.startswith("--")):
            assert f">{option}" in commands, f"{verb} {option}"
    for name in unmask.__all__:
        assert f'id="unmask.{name}"' in api
