"""Test the contents of a release: wheel, sdist, version, workflows and container."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
NOT_RELEASED = shutil.ignore_patterns(".*", "build", "dist", "runs", "demo-run", "_build", "__pycache__", "*.egg-info")


def run(*command: str | Path, where: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command that must succeed; return its standard output."""
    done = subprocess.run(
        [str(part) for part in command], cwd=where, env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Build the sdist or wheel of a source tree with the build backend only: no build environment, no network."""
    code = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    out.mkdir()
    run(sys.executable, "-c", code, out, where=source)
    (built,) = out.iterdir()
    return built


def package_files(root: Path) -> set[str]:
    """Return the paths of all package files, relative to `root`."""
    found = (path for path in (root / "unmask").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root).as_posix() for path in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT, folder / "checkout", ignore=NOT_RELEASED)
    sdist = build("sdist", folder / "checkout", folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return sdist, build("wheel", source, folder / "wheel")


def test_wheel_contains_only_the_whole_package(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = wheel.read(f"{about}/METADATA").decode()
        licence = wheel.read(f"{about}/licenses/LICENSE")
    assert {name for name in names if not name.startswith(about)} == package_files(ROOT / "src")
    assert "unmask/py.typed" in names
    assert any(name.endswith(".jinja") for name in names)
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert f"\nVersion: {PROJECT['version']}\n" in metadata
    assert metadata.endswith((ROOT / "README.md").read_text())


def test_sdist_contains_tests_scripts_and_metadata(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CITATION.cff", "LICENSE", "constraints.txt", "scripts/test", "tests/conftest.py"} <= names
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names


@pytest.mark.slow
def test_demo_runs_from_the_wheel(built, tmp_path):
    """The demo runs in a new environment outside the checkout, with the dependencies of this environment."""
    venv.create(tmp_path / "fresh", with_pip=True)
    programs = tmp_path / "fresh" / ("Scripts" if os.name == "nt" else "bin")
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(programs / "python", "-c", asked, where=tmp_path, environment=outside).strip())
    run(
        programs / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[1],
        where=tmp_path, environment=outside,
    )  # fmt: skip
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(borrowed) + "\n")

    imported = run(
        programs / "python", "-c", "import unmask; print(unmask.__file__)", where=tmp_path, environment=outside
    )
    assert Path(imported.strip()).is_relative_to(packages)
    version = run(programs / "unmask", "--version", where=tmp_path, environment=outside)
    assert version.split() == ["unmask", PROJECT["version"]]
    printed = run(
        programs / "unmask", "demo", "--steps", "6", "--out", "demo", "--json", where=tmp_path, environment=outside
    )
    assert json.loads(printed)
    assert "<svg" in (tmp_path / "demo" / "report.html").read_text()


def test_version_is_defined_once():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == PROJECT["version"]
    repeated = [path for path in (ROOT / "src").rglob("*.py") if f'"{PROJECT["version"]}"' in path.read_text()]
    assert not repeated, "these files repeat the version; read it with importlib.metadata instead"


def test_workflows_test_all_supported_pythons_and_the_oldest_and_newest_torch():
    matrix = WORKFLOWS["test"]["jobs"]["tests"]["strategy"]["matrix"]
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if line.startswith("Programming Language")]
    assert matrix["python"] == named
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    (least,) = (line.partition(">=")[2] for line in PROJECT["dependencies"] if re.match(r"torch\b", line))
    pinned = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert matrix["torch"] == [f"{least}.0", pinned[1]]


def steps(workflow: dict) -> list[str]:
    return [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]


def test_workflows_run_existing_scripts():
    commands = "\n".join(command for workflow in WORKFLOWS.values() for command in steps(workflow))
    called = set(re.findall(r"bash (scripts/\w+)", commands))
    assert {"scripts/check", "scripts/docs", "scripts/test"} <= called
    assert not [script for script in called if not (ROOT / script).is_file()]
    hook = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"][0]
    assert hook["entry"] == "bash scripts/check"


def test_workflows_run_every_benchmark_with_tiny():
    (command,) = (command for command in steps(WORKFLOWS["test"]) if "--tiny" in command)
    listed = re.search(r"for name in (.+); do", command)
    assert listed is not None
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "command_line(" in path.read_text()}
    assert set(listed[1].split()) == scripts - {"measure"}


def test_container_gets_all_files_for_the_build():
    wanted = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == wanted
    assert {"src", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]} <= wanted
    extras = re.search(r"^ARG EXTRAS=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert extras is not None
    assert set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()
