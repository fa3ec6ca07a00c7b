"""`unmask launch`: exit codes, signals, restarts and messages, with a small program in place of a training."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from unmask.engine.torchrun import Layout
from unmask.errors import UserError

LIMIT = 60
PROGRAM = """
    import os, signal, sys, time
    from pathlib import Path
    from unmask.system.launched_process import LaunchedProcess

    process, what, rank = LaunchedProcess(), sys.argv[1], int(os.environ["RANK"])
    number = os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(f"{rank}.{number}.pid").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    if process.ends_with is not None:
        sys.exit(process.exit_code(process.ends_with))
    caught = []
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        signal.signal(getattr(signal, name), lambda got, frame: caught.append(signal.Signals(got).name))
    Path(f"{rank}.{number}.ready").touch()
    if what == "exit":  # exit CODE of rank 0, CODE of rank 1
        sys.exit(process.exit_code(int(sys.argv[2 + rank])))
    if what == "once":  # fails at first
        sys.exit(process.exit_code(1 if number == "0" else 0))
    if what in ("usage", "usage-waits") and rank == 0:
        while not Path(f"1.{number}.ready").exists():  # a process that starts later would end before it is ready
            time.sleep(0.01)
        sys.exit(process.exit_code(2))
    if what == "usage":
        time.sleep(0.5)
        os._exit(2)
    if what == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while not caught or what == "stubborn":
        time.sleep(0.01)
    Path(f"{rank}.caught").write_text(",".join(caught))
    sys.exit(process.exit_code(75))
"""
DRIVER = (
    "import sys; from unmask.engine import torchrun; torchrun.MODULE = 'program'; from unmask.commands import main; "
)
DRIVER += "import unmask.commands as c; c.parse_command = lambda words: {}; main()"


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def launching(*arguments, **environment):
    """Start `unmask launch` on PROGRAM; whatever is left of it at the end is killed."""
    command = [sys.executable, "-c", DRIVER, "launch", *map(str, arguments)]
    environment = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        for pid in pids():
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()


def launch(*arguments, **environment) -> tuple[int, str]:
    with launching(*arguments, **environment) as process:
        _, err = process.communicate(timeout=LIMIT)
    assert "Traceback" not in err
    return process.returncode, err


def pids() -> list[int]:
    return [int(file.read_text().split()[0]) for file in Path().glob("*.pid") if file.read_text()]


def wait_until(condition) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


def all_ended() -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids())


def ready(*names) -> bool:
    return all(Path(f"{name}.ready").exists() for name in names)


@pytest.mark.parametrize(("codes", "code"), [((0, 0), 0), ((75, 75), 75), ((2, 2), 2), ((130, 130), 130), ((0, 75), 1)])
def test_the_exit_code_is_that_of_the_processes_if_they_agree(place, codes, code):
    assert launch("--processes", 2, "exit", *codes) == (code, "Interrupted.\n" if code == 130 else "")


def test_a_failure_is_returned_without_messages_of_the_launcher(place):
    assert launch("--processes", 2, "exit", 1, 1) == (1, "")


def test_only_failures_are_restarted(place):
    assert launch("--processes", 2, "--max-restarts", 2, "once") == (0, "")
    assert {file.name for file in place.glob("*.pid")} == {"0.0.pid", "1.0.pid", "0.1.pid", "1.1.pid"}
    for code in (75, 2):
        for file in place.glob("*.pid"):
            file.unlink()
        assert launch("--processes", 2, "--max-restarts", 2, "exit", code, code) == (code, "")
        assert {file.name for file in place.glob("*.pid")} == {"0.0.pid", "1.0.pid"}


def test_a_killed_process_ends_the_others_and_is_named(place):
    code, err = launch("--processes", 2, "killed")
    assert code == 1
    assert "(local rank 1) was ended by SIGKILL, perhaps because memory ran out" in err
    assert len(err.splitlines()) == 1
    assert all_ended()


@pytest.mark.parametrize("what", ["usage", "usage-waits"])
def test_wrong_input_that_one_process_reports_ends_all_and_is_not_repeated(place, what):
    assert launch("--processes", 2, "--max-restarts", 2, "--timeout", 5, what) == (2, "")
    assert {file.name for file in place.glob("*.ready")} == {"0.0.ready", "1.0.ready"}
    assert all_ended()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_to_the_launcher_reaches_all_processes_and_nothing_is_restarted(place, name):
    with launching("--processes", 2, "--max-restarts", 3, "wait") as process:
        wait_until(lambda: ready("0.0", "1.0"))
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, err) == (75, "")
    assert [Path(f"{rank}.caught").read_text() for rank in (0, 1)] == [name, name]
    assert {file.name for file in place.glob("*.pid")} == {"0.0.pid", "1.0.pid"}


def test_processes_that_do_not_stop_are_killed_and_not_restarted(place):
    with launching("--processes", 2, "--max-restarts", 3, "--shutdown-timeout", 1, "stubborn") as process:
        wait_until(lambda: ready("0.0", "1.0"))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT)
        assert all_ended()
    assert process.returncode == 1, err
    assert "did not stop in time and were killed" in err


def test_processes_end_with_a_launcher_that_is_killed(place):
    with launching("--processes", 2, "wait") as process:
        wait_until(lambda: ready("0.0", "1.0"))
        process.kill()
        process.wait()
        wait_until(all_ended)


def test_cores_are_shared_among_the_processes(place):
    def threads(**environment):
        assert launch("--processes", 2, "exit", 0, 0, **environment)[0] == 0
        return [file.read_text().split()[1] for file in place.glob("*.pid")]

    assert threads(OMP_NUM_THREADS=None) == [str(max(1, len(os.sched_getaffinity(0)) // 2))] * 2
    assert threads(OMP_NUM_THREADS="3") == ["3", "3"]


def test_two_hosts_are_one_group_and_each_returns_the_code_of_its_processes(place):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ("--processes", 1, "--nodes", 2, "--address", f"localhost:{port}", "--node-rank")
    with launching(*options, 0, "exit", 75, 75) as first, launching(*options, 1, "exit", 75, 75) as second:
        assert [process.communicate(timeout=LIMIT)[1] for process in (first, second)] == ["", ""]
    assert [process.returncode for process in (first, second)] == [75, 75]
    assert {file.name for file in place.glob("*.pid")} == {"0.0.pid", "1.0.pid"}


def test_a_port_in_use_and_a_missing_host_are_sentences(place):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        options = ("--processes", 1, "--nodes", 2, "--address", f"localhost:{taken.getsockname()[1]}")
        code, err = launch(*options, "--node-rank", 0, "exit", 0)
        assert (code, len(err.splitlines())) == (2, 1)
        assert "that port is in use on this host; choose another port" in err
    code, err = launch(*options, "--node-rank", 0, "--join-timeout", 2, "exit", 0)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "not all hosts have joined at localhost:" in err


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(gpus=2, processes=2), "got both --gpus and --processes"),
        (Layout(nodes=2), "without --address"),
        (Layout(nodes=2, address="a:1"), "without --node-rank"),
        (Layout(nodes=2, address="a:1", node_rank=2), "got --node-rank 2 with --nodes 2; expected 0 to 1"),
        (Layout(nodes=2, address="a", node_rank=0), "got --address a; expected HOST:PORT"),
        (Layout(node_rank=1), "got --node-rank 1 with --nodes 1; expected 0 to 0"),
    ],
)
def test_contradictory_options_are_rejected(layout, message):
    with pytest.raises(UserError, match=message):
        [layout.local_processes(), layout.host_and_port()].clear()


def test_one_host_needs_no_address_but_scripts_may_give_one():
    assert Layout(nodes=1, node_rank=0, address="node0:29500").host_and_port() is None


def test_the_command_is_checked_before_any_process_starts(unmask):
    for words, message in (
        (["bogus"], "got bogus; expected a command"),
        (["pretrain", "d", "--nope"], "No such option: --nope"),
        (["--max-restarts", "1", "pretrain", "d"], "without --resume auto"),
        (["launch", "recipes"], "expected a command such as pretrain"),
    ):
        code, _, err = unmask("launch", *words)
        assert code == 2
        assert message in err


def test_help_loads_no_torch():
    command = "import sys, unmask.commands as c; sys.argv[1:] = ['launch', '--help']\n"
    command += "try: c.main()\nfinally: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", command], check=True, stdout=subprocess.DEVNULL, timeout=LIMIT)
