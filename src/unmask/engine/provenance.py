"""Record how a run was made: versions, device, git state and shell command."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from typing import Any

import torch

from unmask.engine.training_plan import Plan
from unmask.engine.versions import provenance_versions
from unmask.system.shell_command import shell_command


def provenance(plan: Plan) -> dict[str, Any]:
    """Return versions, device, git state of the working folder, and the shell command (None in calls from Python)."""
    device = torch.cuda.get_device_name(plan.device) if plan.device.startswith("cuda") else platform.processor()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shell_command(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device or platform.machine(),
        "cores": os.cpu_count(),
        "versions": provenance_versions(),
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Return the commit of the working folder and whether it has uncommitted changes, or None outside a repository."""
    try:
        ask = {"capture_output": True, "text": True, "timeout": 5, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], **ask).stdout.strip()
        return {"commit": commit, "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
