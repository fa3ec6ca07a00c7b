"""`unmask report`: write the report of a run."""

from dataclasses import dataclass
from pathlib import Path

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import RunFolder
from unmask.console import Console


@dataclass(frozen=True)
class ReportRequest(Request):
    """Write RUN/report.html, a single file that needs no network."""

    run: RunFolder


@command(ReportRequest, panel=Panel.MEASURE, to_json=lambda path: {"report": str(path)})
def report(request: ReportRequest, console: Console) -> Path:
    """Return the path of the page."""
    from unmask.report.run_page import write_report

    path = write_report(Path(request.run))
    console.print(f"report: {path}")
    return path
