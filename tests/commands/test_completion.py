"""Test the shell completion of verbs and options."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["unmask", "pre"], "pretrain"),
        (["unmask", "pretrain", "--rec"], "--recipe"),
        (["unmask", "probe", "RUN", "DATA", "--kind", "att"], "attentive"),
        (["unmask", "export", "RUN", "--to", "onnx-"], "onnx-float"),
    ],
)
def test_shell_completes_verbs_options_and_values(shell, words, wanted):
    """Sets the environment variables that a shell sets when Tab is pressed after these words."""
    asked = {
        "_UNMASK_COMPLETE": f"complete_{shell}", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": " ".join(words), "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    code = "import sys; sys.argv = ['unmask']; from unmask.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert wanted in done.stdout, done.stderr
