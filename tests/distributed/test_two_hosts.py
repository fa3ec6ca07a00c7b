"""scripts/two-hosts: a training on two hosts ends on both when the link is cut, and continues."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/two-hosts"
LIMIT = 400

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed"),
]


def namespaces_work() -> bool:
    made = subprocess.run(["ip", "netns", "add", "unmask-try"], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", "unmask-try"], check=True)
    return made


@pytest.mark.parametrize("launcher", ["launch", "torchrun"])
def test_both_hosts_end_after_a_cut_and_the_same_commands_continue(tmp_path, launcher):
    if not namespaces_work():
        pytest.skip("this system does not allow network namespaces")
    process = subprocess.Popen(
        ["bash", SCRIPT, tmp_path, launcher],
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        out, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the script removes its namespaces and processes
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert "weights equal those of an uninterrupted run" in out
