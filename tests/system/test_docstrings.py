"""Test that the first line of a module's docstring is read without importing the module."""

import sys

import pytest

from unmask.system.docstrings import first_line


def test_the_first_line_is_read_without_importing_the_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "described.py").write_text('r"""One line.\n\nAnother.\n"""\nraise RuntimeError\n')
    (tmp_path / "undescribed.py").write_text("raise RuntimeError\n")
    assert first_line("described") == "One line."
    assert first_line("undescribed") == ""
    assert not {"described", "undescribed"} & set(sys.modules)
    with pytest.raises(ModuleNotFoundError, match="got module nowhere"):
        first_line("nowhere")
