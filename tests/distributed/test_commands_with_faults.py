"""`pretrain` and `resume` in several processes, with bad input, a full disk, damaged files and non-finite steps.

Every message is printed once, and all processes have the same exit code.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from command_group import Command, write_commands
from conftest import small, write_images
from group import outputs, start, wait

from unmask.run import Run

SCRIPT = Path(__file__).with_name("command_group.py")
LIMIT = 240
HOST = socket.gethostname()
END = "--- end of "  # printed by each process after a command
WIDE = ("method.encoder.width=64", "method.encoder.depth=2")  # checkpoints that are larger than a small file


class Group:
    """Runs commands in several processes. folder: has images and runs, and what the processes have seen."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, write_images(folder / "images", 24)

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def pretrain(self, name: str, *settings: str, out: str | Path | None = None, **faults) -> Command:
        words = ["pretrain", str(self.images), "--recipe", "mae_nano", "--out", str(out or self.run_folder(name))]
        return Command(name, [*words, *small("train.batch_size=12", *settings)], **faults)

    def resume(self, name: str, **faults) -> Command:
        return Command(name, ["resume", str(self.run_folder(name))], **faults)

    def start(self, size: int, *commands: Command, **environment: str):
        """Start processes that run the commands one after another; return them and the folder of their output."""
        name = f"{size}-{commands[0].name}"
        file = write_commands(self.folder / f"{name}.json", list(commands))
        (self.folder / "seen").mkdir(exist_ok=True)
        command = [sys.executable, str(SCRIPT), str(file), str(self.folder / "seen")]
        output = self.folder / "output" / name
        return start(size, command, output, **environment), output

    def run(self, size: int, *commands: Command) -> tuple[list[int], str]:
        """Run commands, and return the exit codes and the output of all processes."""
        started, output = self.start(size, *commands)
        return wait(started, LIMIT), outputs(output)

    def steps(self, name: str, rank: int) -> list[dict]:
        file = self.folder / "seen" / name / f"steps-{rank}.jsonl"
        return [json.loads(line) for line in file.read_bytes().splitlines()]

    def codes(self, name: str) -> list[int]:
        return [int(file.read_text()) for file in sorted((self.folder / "seen" / name).glob("code-*"))]

    def checkpoints(self, name: str) -> list[str]:
        return sorted(path.name for path in (self.run_folder(name) / "checkpoints").glob("step-*"))


def printed(text: str, name: str) -> str:
    """Return what the processes of a group have printed during one of several commands."""
    parts = [part.partition("\n")[2].partition(f"{END}{name}\n") for part in text.split("--- rank-")[1:]]
    assert all(end for _, end, _ in parts), text
    return "".join(before.rpartition(END)[2].partition("\n")[2] if END in before else before for before, _, _ in parts)


def lines(text: str, start: str) -> list[str]:
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.lower().startswith(start)]


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    return Group(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def stopped(group):
    """The runs `dense` and `dcp` of two processes, which were stopped at step 6."""
    settings = ("train.steps=8", "train.checkpoint_every=2", "train.keep_checkpoints=3")
    sharded = ("train.checkpoint_format=dcp", "train.parallel=fsdp")
    dense = group.pretrain("dense", *settings, stop_after=6)
    codes, text = group.run(2, dense, group.pretrain("dcp", *settings, *sharded, stop_after=6))
    assert codes == [75, 75], text
    return group


@pytest.fixture(scope="module")
def rejected(group, stopped):
    """{case: (exit codes, output)} of commands with bad input, as far as possible in one group of processes."""
    other, elsewhere = write_images(group.folder / "other", 23), group.folder / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(group.run_folder("dense"), group.folder / "seen/resume/run")
    kwargs = {"folder": str(elsewhere)}
    plain = group.pretrain("plain")
    data, missing = ([plain.words[0], str(path), *plain.words[2:]] for path in (other, elsewhere / "images"))
    common = [
        group.pretrain("batch", "train.batch_size=13"),
        group.pretrain("out", out="run", **kwargs),
        group.pretrain("versions", versions="unmask 0, torch 1, Python 2"),
        group.pretrain("data", instead=data),
        Command("option", [*plain.words, "--typo"]),
    ]
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = {"MASTER_PORT": str(taken.getsockname()[1]), "UNMASK_PEER_SECONDS": "2"}
        started = {
            "common": group.start(3, *common),
            "missing": group.start(4, group.pretrain("missing", instead=missing)),
            "resume": group.start(2, Command("resume", ["resume", "run"], **kwargs)),
            "port": group.start(2, group.pretrain("port"), **port),
        }
        found = {case: (wait(processes, LIMIT), outputs(output)) for case, (processes, output) in started.items()}
    codes, text = found.pop("common")
    assert codes == [2, 2, 2], text
    return found | {each.name: (group.codes(each.name), printed(text, each.name)) for each in common}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "batch",
            "got train.batch_size=13 for 3 processes; expected a multiple of 3; use --set train.batch_size=12 or",
        ),
        ("out", f"elsewhere/run is not the same on all hosts: rank 1 on {HOST} does not see what rank 0 has written"),
        (
            "versions",
            f"and unmask 0, torch 1, Python 2 in rank 1 on {HOST}; expected the same in all; install the same",
        ),
        ("data", "and 23 images with fingerprint "),
        ("missing", f"rank 1 on {HOST}: {os.sep}"),
        ("option", "No such option: --typo"),
        ("resume", f"rank 1 on {HOST}: run is not a folder"),
        ("port", f"expected a free port, but another program on {HOST} uses it; set MASTER_PORT to another port"),
    ],
)
def test_bad_input_is_reported_once_and_all_processes_exit_with_2(rejected, case, message):
    codes, text = rejected[case]
    found = lines(text, "error: ")
    assert len(codes) == {"missing": 4, "resume": 2, "port": 2}.get(case, 3)
    assert set(codes) == {2}, text
    assert len(found) == 1, text
    assert message in found[0]


@pytest.fixture(scope="module")
def trained(group):
    """(exit codes, output) of two processes, with NaN in one of them, and with a disk that is full for one or both."""
    sharded = ("train.parallel=fsdp", "train.checkpoint_format=dcp")
    plain = ("train.steps=9", "train.checkpoint_every=2")
    return group.run(
        2,
        group.pretrain("skipped", *plain, not_finite=[5]),
        group.pretrain("back", *plain, "train.checkpoint_every=4", not_finite=[5, 6, 7]),
        group.pretrain("back in shards", *plain, *sharded, "train.checkpoint_every=4", not_finite=[5, 6, 7]),
        group.pretrain("full", *plain, *WIDE, full_disk=[4, 5], rank=0),
        group.pretrain("full in shards", *plain, *sharded, *WIDE, full_disk=[4, 5], rank=1),
        group.pretrain("full to the end", *plain, *sharded, *WIDE, full_disk=[4, 99], rank=1),
    )


def test_all_processes_skip_a_step_that_is_not_finite_in_one(group, trained):
    first, second = (group.steps("skipped", rank) for rank in (0, 1))
    assert first == second
    assert [row["step"] for row in first] == list(range(1, 10))
    assert [row["before"] == row["after"] for row in first] == [step == 5 for step in range(1, 10)]
    skipped = [
        line for line in lines(printed(trained[1], "skipped"), "warning: ") if "step 5 had a non-finite loss" in line
    ]
    assert len(skipped) == 1, trained[1]
    assert "lists its 12 images" in skipped[0]


@pytest.mark.parametrize("name", ["back", "back in shards"])
def test_all_processes_go_back_to_the_same_checkpoint_after_three_such_steps(group, trained, name):
    first, second = (group.steps(name, rank) for rank in (0, 1))
    assert first == second
    assert [row["step"] for row in first] == [*range(1, 8), *range(5, 10)]
    assert first[7]["before"] == first[3]["after"], "the weights of step 4"
    assert first[7]["consumed"] > first[6]["consumed"], "other images than before"
    back = [
        line
        for line in lines(printed(trained[1], name), "warning: ")
        if "in a row: going back from step 7 to 4" in line
    ]
    assert len(back) == 1, trained[1]


@pytest.mark.parametrize(("name", "rank"), [("full", 0), ("full in shards", 1)])
def test_training_continues_on_a_full_disk(group, trained, name, rank):
    found = [line for line in lines(printed(trained[1], name), "warning: ") if "could not be written" in line]
    assert len(found) == 1, trained[1]
    assert f"by rank {rank} on {HOST}: the disk is full; training continues" in found[0]
    assert "checkpoint of step 4" in found[0]
    assert group.checkpoints(name) == ["step-00000008", "step-00000009"]
    assert [row["step"] for row in group.steps(name, 0)] == list(range(1, 10))


def test_a_disk_that_stays_full_ends_all_processes_with_one_message(group, trained):
    codes, text = trained
    found = lines(printed(text, "full to the end"), "error: ")
    assert codes == [1, 1], text
    assert len(found) == 1, text
    assert "the last weights (step 9) could not be written; free disk space" in found[0]
    assert group.checkpoints("full to the end") == ["step-00000001", "step-00000002"]


def test_a_process_that_is_stopped_by_a_signal_is_named_after_the_time_limit(group):
    started, output = group.start(2, group.pretrain("stopped", "train.steps=100000"), UNMASK_PEER_SECONDS="4")
    seen, deadline = group.folder / "seen/stopped/steps-1.jsonl", time.monotonic() + LIMIT
    while not seen.exists() or len(seen.read_bytes().splitlines()) < 3:
        assert started[1].poll() is None, outputs(output)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    code = wait(started[:1], LIMIT)
    seconds = time.monotonic() - began
    started[1].kill()
    wait(started, LIMIT)
    text = outputs(output)
    message = f"error: rank 1 on {HOST} (process {started[1].pid}) has not answered for 4 s; all processes end"
    assert (code, lines(text, "error: ")) == ([1], [message]), text
    assert 3 < seconds < 20
    assert Run(group.run_folder("stopped")).status().state == "failed"


def flipped(content: bytes) -> bytes:
    """Return the content with one bit changed in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGE = {
    "bit": lambda path, content: path.write_bytes(flipped(content)),
    "truncated": lambda path, content: path.write_bytes(content[:-4]),
    "missing": lambda path, content: path.unlink(),
}
DAMAGE["manifest"] = DAMAGE["truncated"]
FILES = {"dense": "model.safetensors", "dcp": "dcp/shard-00002-model-00001-of-00001.safetensors"}
CASES = [f"{kind} {damage}" for kind in FILES for damage in ("none", *DAMAGE)]


@pytest.fixture(scope="module", params=[1, 3])
def resumed(group, stopped, request):
    """The stopped runs, continued by 1 or 3 processes with the newest checkpoint damaged."""
    size = request.param
    for case in CASES:
        kind, damage = case.split()
        copy = group.run_folder(f"{size} {case}")
        shutil.copytree(group.run_folder(kind), copy)
        path = copy / "checkpoints/step-00000006" / ("MANIFEST.json" if damage == "manifest" else FILES[kind])
        if damage != "none":
            DAMAGE[damage](path, path.read_bytes())
    return size, *group.run(size, *(group.resume(f"{size} {case}") for case in CASES))


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_checkpoint_is_named_and_all_processes_use_the_one_before(group, resumed, case):
    size, codes, text = resumed
    assert codes == [0] * size, text
    kind, damage = case.split()
    name = f"{size} {case}"
    found = [line for line in lines(printed(text, name), "warning: ") if "a checkpoint cannot be used" in line]
    used = 6 if damage == "none" else 4
    for rank in range(size):
        steps = group.steps(name, rank)
        assert [row["step"] for row in steps] == list(range(used + 1, 9))
        assert steps[0]["before"] == group.steps(kind, 0)[used - 1]["after"], "the weights of that step"
    assert [row["step"] for row in Run(group.run_folder(name)).metrics()] == list(range(1, 9))
    assert len(found) == (damage != "none"), text
    if found:
        assert "was renamed to step-00000006.corrupt; trying the previous one" in found[0]
        assert ("MANIFEST.json" if damage == "manifest" else FILES[kind]) in found[0]
