"""`unmask probe`: measure the frozen features of a run on labels."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.commands.options import RunFolder, texts
from unmask.console import Console
from unmask.errors import UserError
from unmask.evals.probe_kind import kind_descriptions
from unmask.evals.probe_options import ProbeOptions, parse_shots
from unmask.option import Option, options_of
from unmask.shared_options import Data, Device, Exclude, Step, TestData

if TYPE_CHECKING:
    from unmask.results import CurveResult, ProbeResult

PAPER_LINEAR = "paper-linear"


def kinds() -> dict[str, str]:
    """Return the names of the kinds of probe: the files of `evals/probes/`, and MAE's own protocol."""
    return {**kind_descriptions(), PAPER_LINEAR: "MAE's own protocol, LARS on augmented images"}


def target_types() -> dict[str, str]:
    """Return the types of targets with their descriptions."""
    return {"classes": "one class per image", "multilabel": "columns of 0 and 1", "regression": "numbers"}


def names_from_text(text: str) -> list[str]:
    """Parse 'a, b' as a list of names."""
    return [name.strip() for name in text.split(",")]


@dataclass(frozen=True)
class ProbeRequest(Request):
    """Measure the features of a frozen encoder on labelled images: one sub-folder per class, or a table of targets.

    paper-linear trains a run in a folder inside RUN, and accepts only the options --test, --shots N and --set.
    """

    run: RunFolder
    data: Data
    _: KW_ONLY
    exclude: Exclude = ()
    test: TestData = None
    kind: Annotated[str, Option("Kind of probe.", metavar="KIND", choices=kinds)] = "knn"
    shots: Annotated[
        int | Sequence[int] | None,
        Option(
            "Number of training labels per class; several numbers, such as 1,5,10, measure a label-budget curve.",
            metavar="N[,N...]",
            default="all",
            command_line=str,
            from_text=parse_shots,
        ),
    ] = None
    label_draws: Annotated[
        int | None,
        Option("Number of random choices of labels for each point of a label-budget curve.", metavar="N", default="5"),
    ] = None
    controls: Annotated[bool, Option("Also probe two baselines: raw pixels and the untrained encoder.")] = False
    against: Annotated[
        str | Path | Sequence[str | Path], Option("Also probe the encoder of this run; repeatable.", metavar="RUN")
    ] = ()
    targets: Annotated[
        str | Path | None,
        Option(
            "Table of targets (.csv or .parquet) instead of class folders; paths in its column path are relative to "
            "DATA.",
            metavar="FILE",
        ),
    ] = None
    columns: Annotated[
        Sequence[str] | None,
        Option(
            "Target columns of the table.",
            metavar="A,B,...",
            default="all",
            command_line=str,
            from_text=names_from_text,
        ),
    ] = None
    target_type: Annotated[
        str | None, Option("Type of the targets.", metavar="TYPE", default="inferred", choices=target_types)
    ] = None
    test_targets: Annotated[
        str | Path | None, Option("Table of targets for the --test images.", metavar="FILE", default="the same table")
    ] = None
    seed: Annotated[int, Option("Random seed for the held-out fifth and for the choice of labels.", metavar="N")] = 0
    step: Step = None
    layer: Annotated[
        str | None,
        Option(
            "Layer to take features from: best, last or a number; 0 is the input of the first block, 1 that of the "
            "second, and so on.",
            metavar="LAYER",
            default="best for igpt, else last",
        ),
    ] = None
    mask_votes: Annotated[
        int | None,
        Option(
            "igpt bert: classify each test image under this many random patch masks, and use the majority; 0 uses no "
            "mask.",
            metavar="N",
            default="1",
            at_least=0,
        ),
    ] = None
    settings: Annotated[
        Sequence[str],
        Option(
            "paper-linear: change a setting of the training, KEY=VALUE; repeatable.", metavar="KEY=VALUE", flag="--set"
        ),
    ] = ()
    device: Device = "auto"


def result_json(result: "ProbeResult | CurveResult") -> dict[str, Any]:
    """Return the JSON object of a result."""
    from unmask.results import to_json

    return to_json(result)


RENAMED = {"--masks": "--mask-votes", "--draws": "--label-draws", "--task": "--target-type"}


@command(ProbeRequest, panel=Panel.MEASURE, trains=True, renamed=RENAMED, to_json=result_json)
def probe(request: ProbeRequest, console: Console) -> "ProbeResult | CurveResult":
    """Return the result, which is also written to RUN/evals."""
    from unmask.report.run_page import write_report

    result = _paper_linear(request, console) if request.kind == PAPER_LINEAR else _frozen(request, console)
    console.print(f"report: {write_report(Path(request.run))}")
    return result


def _frozen(request: ProbeRequest, console: Console) -> "ProbeResult | CurveResult":
    """Probe features of a frozen encoder."""
    from unmask.evals.run_probe import run_probe

    if request.settings:
        raise UserError(f"got --set with --kind {request.kind}; only {PAPER_LINEAR} has settings; leave --set out")
    shots = request.shots
    options = ProbeOptions(
        data=str(request.data),
        test=None if request.test is None else str(request.test),
        exclude=tuple(request.exclude),
        shots=shots if shots is None or isinstance(shots, int) else tuple(shots),
        draws=request.label_draws,
        controls=request.controls,
        against=tuple(Path(run) for run in texts(request.against)),
        targets=_path(request.targets),
        test_targets=_path(request.test_targets),
        columns=None if request.columns is None else tuple(request.columns),
        task=request.target_type,
        seed=request.seed,
        step=request.step,
        layer=request.layer,
        mask_votes=request.mask_votes,
        device=request.device,
    )
    return run_probe(request.run, request.kind, options, console)


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


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
