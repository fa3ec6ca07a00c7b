"""The terminal receives no control characters from file names, labels or foreign files."""

import sys

import pytest

from unmask import commands
from unmask.console import Console, escape_controls
from unmask.errors import UserError

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202egnp.exe\r\u2028\udce9"


def test_control_characters_are_escaped_and_text_is_unchanged():
    assert escape_controls("Vögel 鳥 \t 1 %\nnext") == "Vögel 鳥 \t 1 %\nnext"
    shown = escape_controls(HOSTILE)
    assert shown == r"\x1b]0;owned\x07\x1b[31mred\x9b2J\u202egnp.exe\r\u2028\udce9"
    assert shown.isprintable()


@pytest.mark.parametrize("live", [False, True])
def test_console_prints_no_control_characters(capsys, live):
    console = Console()
    console.live = live
    console.print(HOSTILE)
    console.warn(HOSTILE)
    with console.progress(HOSTILE, 2) as bar:
        bar.update(2, HOSTILE)
    said = capsys.readouterr().err
    assert "owned" in said
    for raw in ("\x1b]0", "\x1b[31mred", "\x9b", "\u202e", "\x07"):
        assert raw not in said


@pytest.mark.parametrize("error", [UserError(HOSTILE), RuntimeError(HOSTILE)])
def test_errors_are_escaped(capsys, error):
    assert commands.explain(error) in (1, 2)
    said = capsys.readouterr().err
    assert r"\x1b]0;owned\x07" in said
    assert "\x1b" not in said


def test_list_of_runs_prints_no_control_characters(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("unmask.commands.ls.table", lambda found: [HOSTILE])
    monkeypatch.setattr(sys, "argv", ["unmask", "ls", str(tmp_path)])
    with pytest.raises(SystemExit):
        commands.main()
    said = capsys.readouterr().out
    assert r"\x1b]0;owned\x07" in said
    assert "\x1b" not in said


def test_time_left_is_shown_for_steps_of_any_length(monkeypatch, capsys):
    """With steps of 40 seconds, rich's own estimate over the last 30 seconds would show nothing."""
    now = 1000.0
    monkeypatch.setattr("unmask.console.time.monotonic", lambda: now)
    with Console().progress("training", 10, start=4) as bar:
        bar.update(4)
        for step in (5, 6):
            now += 40
            bar.update(step, "loss 1")
        bar.begin(6)
        now += 60
        bar.update(7)
    assert capsys.readouterr().err.splitlines() == [
        "training 4/10  ",
        "training 5/10  loss 1  3 min 20 s left",
        "training 6/10  loss 1  2 min 40 s left",
        "training 7/10  3 min 00 s left",
    ]
