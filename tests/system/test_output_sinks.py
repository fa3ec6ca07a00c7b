"""Commands complete their work even if nothing reads their output."""

import io
import json
import os
import subprocess
import sys
import time

import pytest

from unmask.console import Console
from unmask.system.output_sinks import Outputs, Sink

CODE = """
import sys
sys.argv = ["unmask", *{arguments!r}]
from unmask import commands
commands.main()
"""


def shell(command: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a shell command, with UNMASK replaced by the command line `unmask` and these arguments."""
    code = CODE.format(arguments=list(arguments))
    return subprocess.run(
        ["bash", "-c", command.replace("UNMASK", f'{sys.executable} -c "$CODE"')],
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_scan_does_not_depend_on_stderr(images, stderr):
    done = shell(f"UNMASK {stderr}", "check", str(images), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["files"] == found["good"] == len(list(images.rglob("*.*")))


def test_closed_pipe_does_not_end_packing(images, tmp_path):
    out = tmp_path / "packed.tar"
    done = shell("UNMASK 2>&1 | head -c 1; exit ${PIPESTATUS[0]}", "pack", str(images), str(out), "--workers", "0")
    assert done.returncode == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("stdout", "reason"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_lost_json_output_is_an_error_after_the_work(images, tmp_path, stdout, reason):
    out = tmp_path / "packed.tar"
    done = shell(f"UNMASK {stdout}", "pack", str(images), str(out), "--workers", "0", "--json")
    assert done.returncode == 1
    assert f"error: stdout cannot be written to ({reason}); the work itself is done" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.exists()


def test_closed_stderr_does_not_receive_the_number_of_a_file(tmp_path):
    """Otherwise the next opened file would get descriptor 2, and warnings of C code would be written to that file."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom unmask.system.output_sinks import install\ninstall()\n"
        f"file = open({str(tmp_path / 'data')!r}, 'wb')\nassert file.fileno() > 2, file.fileno()\n"
        "os.write(2, b'words')\nprint('more', file=sys.stderr)\n"
    )
    done = subprocess.run(["bash", "-c", f"{sys.executable} {script} <&- 2>&-"], timeout=120)
    assert done.returncode == 0
    assert (tmp_path / "data").read_bytes() == b""


def test_reader_that_never_reads_delays_output_once(monkeypatch):
    monkeypatch.setattr("unmask.system.output_sinks.PATIENCE", 0.3)
    here, there = os.pipe()
    sink = Sink(there, may_drop=True)
    began = time.monotonic()
    for _ in range(200):
        assert sink.write(b"x" * 1000) == 1000
    assert time.monotonic() - began < 3
    assert sink.lost
    assert sink.error is None
    os.read(here, 1 << 20)
    sink.write(b"end")
    assert os.read(here, 1 << 20) == b"end"
    os.close(here)
    sink.write(b"gone")
    sink.write(b"gone")
    assert isinstance(sink.error, BrokenPipeError)
    os.close(there)


def test_lost_stdout_output_is_reported():
    fine, gone = Sink(1, may_drop=False), Sink(1, may_drop=False, error=BrokenPipeError(32, "Broken pipe"))
    assert Outputs(fine, fine).finish() is None
    gone.write(b"{}")
    assert Outputs(gone, fine).finish() == ""


class Broken(io.StringIO):
    """A terminal that has been closed."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("stream", [Broken(True), Broken(False), None], ids=["terminal", "file", "none"])
def test_console_without_stderr_prints_nothing_and_raises_nothing(monkeypatch, stream, capsys):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("CI", raising=False)
    console = Console()
    console.print("words")
    console.warn("words")
    with console.progress("step", 3) as bar:
        bar.update(1, "words")
        time.sleep(0.2)  # rich draws in another thread
        bar.update(3, "words")
    assert capsys.readouterr().out == ""
