"""`unmask probe`: measure the frozen features of a run on labels."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unmask.commands.declare import Panel, command
from unmask.commands.options import RunRequest
from unmask.console import Console
from unmask.errors import UserError
from unmask.evals.probe_kind import kind_descriptions
from unmask.evals.probe_options import ProbeOptions
from unmask.option import After, Option, options_of
from unmask.system.processes import speaks

if TYPE_CHECKING:
    from unmask.results import CurveResult, ProbeResult

PAPER_LINEAR = "paper-linear"


def kinds() -> dict[str, str]:
    """Return the names of the kinds of probe: the files of `evals/probes/`, and MAE's own protocol."""
    return {**kind_descriptions(), PAPER_LINEAR: "MAE's own protocol, LARS on augmented images"}


@dataclass(frozen=True)
class ProbeRequest(ProbeOptions, RunRequest):
    """Measure the features of a frozen encoder on labelled images: one sub-folder per class, or a table of targets.

    paper-linear trains a run in a folder inside RUN, and accepts only the options --test, --shots N and --set.
    """

    _: KW_ONLY
    kind: Annotated[str, Option("Kind of probe.", metavar="KIND", choices=kinds), After("test")] = "knn"
    settings: Annotated[
        Sequence[str],
        Option(
            "paper-linear: change a setting of the training, KEY=VALUE; repeatable.", metavar="KEY=VALUE", flag="--set"
        ),
        After("mask_votes"),
    ] = ()


def result_json(result: "ProbeResult | CurveResult") -> dict[str, Any]:
    """Return the JSON object of a result."""
    from unmask.results import to_json

    return to_json(result)


RENAMED = {"--masks": "--mask-votes", "--draws": "--label-draws", "--task": "--target-type"}


@command(ProbeRequest, panel=Panel.MEASURE, together=True, renamed=RENAMED, to_json=result_json)
def probe(request: ProbeRequest, console: Console) -> "ProbeResult | CurveResult":
    """Return the result, which is also written to RUN/evals."""
    from unmask.report.run_page import write_report

    result = _paper_linear(request, console) if request.kind == PAPER_LINEAR else _frozen(request, console)
    if speaks():  # one process writes the report
        console.print(f"report: {write_report(Path(request.run))}")
    return result


def _frozen(request: ProbeRequest, console: Console) -> "ProbeResult | CurveResult":
    """Probe features of a frozen encoder."""
    from unmask.evals.run_probe import run_probe

    if request.settings:
        raise UserError(f"got --set with --kind {request.kind}; only {PAPER_LINEAR} has settings; leave --set out")
    return run_probe(request.run, request.kind, request, console)


def _paper_linear(request: ProbeRequest, console: Console) -> "ProbeResult":
    """Train MAE's linear probe. Raises UserError for options that have no effect on this probe."""
    from unmask.finetuning.paper_linear_probe import paper_linear

    for each in options_of(ProbeRequest):
        used = each.name in ("run", "data", "test", "kind", "shots", "settings")
        if not used and getattr(request, each.name) != each.field.default:
            raise UserError(f"got {each.flag}, which --kind {PAPER_LINEAR} does not use; leave it out")
    if request.shots is not None and not isinstance(request.shots, int):
        several = ",".join(map(str, request.shots))
        raise UserError(f"got --shots {several}; expected one number for a probe of kind {PAPER_LINEAR}")
    data, settings = str(request.data), request.settings
    return paper_linear(request.run, data, test=request.test, shots=request.shots, settings=settings, console=console)
