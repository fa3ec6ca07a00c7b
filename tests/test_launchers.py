"""The files of docs/launchers are valid, the page shows all of them, and the command line accepts their commands."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from unmask.commands import parse_command

ROOT = Path(__file__).resolve().parents[1]
FOLDER, PAGE = ROOT / "docs/launchers", ROOT / "docs/scale-out.md"
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())
SCRIPTS = [path for path in FILES if path.suffix in (".sh", ".sbatch")]
VALUES = {
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "ADDRESS": "node0:29500",
    "JOB_COMPLETION_INDEX": "1",
    "NUMBER": "1",
}


def commands(text: str) -> list[list[str]]:
    """Return the words after `unmask` of every command in a shell script, with values in place of variables."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        line = line.partition("#")[0]
        if match := re.search(r"(?:^|-m |exec )unmask ((?:launch|pretrain|finetune|resume)\b.*)", line.strip()):
            words = match[1].replace(' "$@"', "")
            words = re.sub(r"\$\{?(\w+)(?::-[^}]*)?\}?", lambda name: VALUES.get(name[1], name[1].lower()), words)
            found.append(shlex.split(words))
    return found


def scripts_of(path: Path) -> str:
    """Return the shell commands in a file."""
    if path.suffix != ".yaml":
        return path.read_text()
    texts = []

    def walk(tree):
        if isinstance(tree, str):
            texts.append(tree)
        for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
            walk(part)

    for document in yaml.safe_load_all(path.read_text()):
        walk(document)
    return "\n".join(texts)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_have_no_syntax_error(path):
    subprocess.run(["bash", "-n", path], check=True, timeout=30)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=lambda path: path.name)
def test_yaml_files_contain_valid_shell_scripts(path):
    for document in yaml.safe_load_all(path.read_text()):
        assert isinstance(document, dict)
    subprocess.run(["bash", "-n"], input=scripts_of(path), text=True, check=True, timeout=30)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".py"], ids=lambda path: path.name)
def test_the_command_line_accepts_the_commands_and_they_continue_their_run(path):
    found = commands(scripts_of(path))
    assert found, f"{path} contains no command"
    for words in found:
        given = parse_command(words)
        if words[0] == "launch":
            words = given["command"]
            given = parse_command(words)
        assert given["resume"] == "auto"
        assert given["out"] is not None


def test_the_check_of_commands_can_fail():
    assert commands('exec unmask launch --node-rank "$NUMBER" pretrain d --typo') == [
        ["launch", "--node-rank", "1", "pretrain", "d", "--typo"]
    ]
    with pytest.raises(Exception, match="typo"):
        parse_command(["pretrain", "d", "--typo"])


def test_the_ray_script_calls_pretrain_with_options_that_exist():
    import inspect

    import unmask

    tree = ast.parse((FOLDER / "ray_train.py").read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "unmask.pretrain"
    ]
    assert len(calls) == 1
    assert {keyword.arg for keyword in calls[0].keywords} <= set(inspect.signature(unmask.pretrain).parameters)
    assert "auto" in {ast.literal_eval(each.value) for each in calls[0].keywords if each.arg == "resume"}


def test_the_page_shows_every_file():
    shown = set(re.findall(r"literalinclude\} launchers/(\S+)", PAGE.read_text()))
    assert shown == {path.name for path in FILES}
