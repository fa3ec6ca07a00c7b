"""Shared by all verbs that train: write the report, print how to continue, choose the exit code."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmask.commands.declare import DONE, STOPPED
from unmask.console import Console
from unmask.errors import UserError
from unmask.system.processes import speaks

if TYPE_CHECKING:
    from unmask.run import Run


def conclude(run: "Run", console: Console) -> "Run":
    """Write the report of a run after training, and print how to continue it if it was stopped."""
    from unmask.report.run_page import write_report

    if not speaks():  # another process of this command writes the report
        return run
    try:
        console.print(f"report: {write_report(run.path, log=console.warn)}")
    except (OSError, UserError) as error:  # the training has succeeded even if the report cannot be written
        console.warn(f"no report was written: {error}; fix that, then: unmask report {run.path}")
    status = run.status()
    if status.state == "stopped":
        console.print(f"stopped at step {status.step} of {status.steps}; continue with: unmask resume {run.path}")
    return run


def is_unfinished(run: "Run") -> bool:
    """Return whether `unmask resume` has work to do: steps to train, or the test of a fine-tuned run."""
    if not (run.path / "plan.json").exists():
        return False
    if not run.finished:
        return True
    from unmask.config import task_names
    from unmask.results import read_score

    try:
        return run.read("config.json")["method"]["name"] in task_names() and read_score(run) is None
    except UserError:
        return False


def run_json(run: "Run") -> dict[str, Any]:
    """Return the object that --json prints: folder, report and status of the run."""
    report = Path(run.path) / "report.html"
    return {"run": str(run.path), "report": str(report) if report.exists() else None, **run.status().to_json()}


def run_exit_code(run: "Run") -> int:
    """Return 75 for a run that was stopped and can be resumed, else 0."""
    return STOPPED if run.status().state == "stopped" else DONE
