"""`unmask compare`: compare several runs on one page."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.comparison.probe_wanted import ProbeWanted
from unmask.console import Console
from unmask.option import After, Option

if TYPE_CHECKING:
    from unmask.comparison.compare_runs import Comparison


@dataclass(frozen=True)
class CompareRequest(ProbeWanted, Request):
    """Compare several runs on one page: settings, compute, and the probes that all of them have."""

    runs: Annotated[Sequence[str | Path], Option("Two or more run folders.", metavar="RUN...")]
    _: KW_ONLY
    out: Annotated[
        str | Path,
        Option("Page to write, FILE.html (FILE.json with the same numbers is written beside it).", metavar="FILE"),
        After("shots"),
    ] = "comparison.html"


@command(CompareRequest, panel=Panel.MEASURE, to_json=lambda result: result.to_json())
def compare(request: CompareRequest, console: Console) -> "Comparison":
    """Return the contents of FILE.json, which the page shows."""
    from unmask.comparison.compare_runs import compare

    return compare(request.runs, request, out=request.out, console=console)
