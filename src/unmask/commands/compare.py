"""`unmask compare`: compare several runs on one page."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.evals.probe_kind import kind_descriptions
from unmask.option import Option
from unmask.shared_options import Device, TestData

if TYPE_CHECKING:
    from unmask.comparison.compare_runs import Comparison


@dataclass(frozen=True)
class CompareRequest(Request):
    """Compare several runs on one page: settings, compute, and the probes that all of them have."""

    runs: Annotated[Sequence[str | Path], Option("Two or more run folders.", metavar="RUN...")]
    _: KW_ONLY
    data: Annotated[
        str | None, Option("Labelled images, on which runs without a result of this probe are probed.", metavar="DATA")
    ] = None
    test: TestData = None
    kind: Annotated[str, Option("Kind of probe.", metavar="KIND", choices=kind_descriptions)] = "linear"
    shots: Annotated[
        int | None, Option("Number of training labels per class.", metavar="N", at_least=1, default="all")
    ] = None
    out: Annotated[
        str | Path,
        Option("Page to write, FILE.html (FILE.json with the same numbers is written beside it).", metavar="FILE"),
    ] = "comparison.html"
    device: Device = "auto"


@command(CompareRequest, panel=Panel.MEASURE, to_json=lambda result: result.to_json(), trains=True)
def compare(request: CompareRequest, console: Console) -> "Comparison":
    """Return the contents of FILE.json, which the page shows."""
    from unmask.comparison.compare_runs import ProbeWanted, compare

    wanted = ProbeWanted(
        data=request.data, test=request.test, kind=request.kind, shots=request.shots, device=request.device
    )
    return compare(request.runs, wanted, out=request.out, console=console)
