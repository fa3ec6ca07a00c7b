"""Imports: which packages they load, which layers may import each other, and that they have no side effects."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unmask

ROOT = Path(unmask.__file__).parents[1]  # the folder `src`
HEAVY = ("torch", "numpy", "sklearn", "matplotlib", "pyarrow", "PIL")
REPORT = "import sys; print(' '.join(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)"


def loaded_by(code: str) -> set[str]:
    """Return the heavy packages that a fresh interpreter has loaded after running `code`."""
    script = f"{code}\n{REPORT.format(heavy=HEAVY)}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


HELP = """
import sys
from unmask.commands import main
sys.argv = ["unmask", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import unmask",
        "import unmask; unmask.__version__",
        "import unmask; dir(unmask)",
        "import unmask; [getattr(unmask, name) for name in unmask.__all__ if 'load' not in name and name != 'recipe'"
        " and name != 'open_safetensors']",
        "import unmask.run",
        "import unmask.console",
        "import unmask.cli",
        "import unmask.commands.probe, unmask.commands.ls",
        HELP.format(arguments=["--help"]),
        HELP.format(arguments=["--version"]),
        HELP.format(arguments=["pretrain", "--help"]),
        HELP.format(arguments=["probe", "--help"]),
        HELP.format(arguments=["ls", "--help"]),
    ],
    ids=[
        "unmask",
        "version",
        "dir",
        "api",
        "run",
        "console",
        "cli",
        "verbs",
        "help",
        "--version",
        "pretrain --help",
        "probe --help",
        "ls --help",
    ],
)
def test_light_imports_load_no_heavy_packages(code):
    assert loaded_by(code) == set()


def test_reading_a_report_does_not_load_torch():
    assert "torch" not in loaded_by("import unmask.report.run_page")


def test_negative_control_training_loop_loads_torch():
    assert {"torch", "numpy"} <= loaded_by("import unmask.engine.train")


def test_public_names_are_documented_and_resolve():
    names = {
        "__version__", "compare", "embed", "export", "finetune", "import_weights", "load", "load_encoder",
        "open_safetensors", "predict", "pretrain", "probe", "recipe", "reconstruct", "resume",
    }  # fmt: skip
    assert set(unmask.__all__) == names
    assert set(unmask.__all__) <= set(dir(unmask))
    for name in unmask.__all__:
        assert name in unmask.__doc__ or name == "__version__"
        assert getattr(unmask, name)
    with pytest.raises(AttributeError, match=r"no attribute 'lod'; public names are .*load"):
        _ = unmask.lod


def test_importing_every_module_has_no_side_effects():
    """Imports set no seeds, start no threads, handle no signals, write no files and print nothing."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "unmask").rglob("*.py"))
        if path.name != "__init__.py"
    ]
    code = f"""
import importlib, os, random, signal, threading
import numpy, torch, matplotlib.pyplot, sklearn.neighbors, sklearn.linear_model, sklearn.datasets, pyarrow.parquet
def state():
    return (torch.initial_seed(), torch.get_num_threads(), torch.get_default_dtype(), random.getstate()[1][:5],
            numpy.random.get_state()[1][:5].tolist(), [signal.getsignal(s) for s in (2, 15, 10)],
            threading.active_count(), os.getcwd(), sorted(os.listdir(".")), torch.cuda.is_initialized(),
            sorted(os.environ))
before = state()
for name in {names!r}:
    importlib.import_module(name)
for was, now in zip(before, state(), strict=True):
    assert was == now, (was, now)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_package_is_importable_beside_a_folder_of_its_name(tmp_path):
    """A folder `unmask` in the working directory, such as a clone, must not hide the installed package."""
    (tmp_path / "unmask" / "src" / "unmask").mkdir(parents=True)
    code = "import unmask; assert unmask.__file__, unmask.__path__; unmask.recipe"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_package_init_files_are_empty_and_nothing_imports_the_root():
    for path in (ROOT / "unmask").glob("*/**/__init__.py"):
        assert path.parent.name == "commands" or not path.read_text().strip(), f"{path} should be empty"
    for path in (ROOT / "unmask").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert line.strip() != "import unmask", f"{path} imports the root"


def test_import_layers_are_respected():
    """Run `lint-imports`, if it is installed, with the layers of pyproject.toml."""
    pytest.importorskip("importlinter")
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [tool, "--no-cache"],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stdout


def test_folders_of_tests_mirror_the_package():
    tests = Path(__file__).parent
    files = [path for path in tests.rglob("*.py") if "__pycache__" not in path.parts]
    folders = {path.parent.relative_to(tests) for path in files} - {Path("benchmarks"), Path("distributed")}
    assert not [folder for folder in folders if not (ROOT / "unmask" / folder).is_dir()]
    assert len({path.name for path in files}) == len(files), "pytest imports test files by their base name"


def test_no_two_modules_have_the_same_name_except_a_method_and_its_recipe():
    folders: dict[str, set[str]] = {}
    for path in (ROOT / "unmask").rglob("*.py"):
        if not path.stem.startswith("__"):
            folders.setdefault(path.stem.rstrip("_"), set()).add(path.parent.relative_to(ROOT / "unmask").as_posix())
    repeated = {name: found for name, found in folders.items() if len(found) > 1}
    assert not {name: found for name, found in repeated.items() if found != {"methods", "recipes"}}
    assert "mae" in repeated  # negative control
