"""`unmask probe`: measure the frozen features of a run on labels."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from unmask.commands.declare import Option, Panel, Request, command, options_of
from unmask.commands.options import Data, Device, Exclude, RunFolder, Step, TestData, texts
from unmask.console import Console
from unmask.errors import UserError
from unmask.evals.probe_kind import kind_names, require_kind
from unmask.evals.probe_options import ProbeOptions, parse_shots

PAPER_LINEAR = "paper-linear"


def names_from_text(text: str) -> list[str]:
    """Return 'a, b' as a list of names."""
    return [name.strip() for name in text.split(",")]


@dataclass(frozen=True)
class ProbeRequest(Request):
    """How good are the features? A frozen encoder measured on your labels: sub-folder names, or a table.

    paper-linear is a training, kept in a folder inside RUN; it takes DATA, --test, one number of --shots, and --set.
    """

    run: RunFolder
    data: Data
    _: KW_ONLY
    exclude: Exclude = ()
    test: TestData = None
    kind: Annotated[
        str,
        Option(
            f"{', '.join(kind_names())}, or {PAPER_LINEAR} (MAE's own protocol: LARS on augmented images, a training "
            "of its own)."
        ),
    ] = "knn"
    shots: Annotated[
        int | Sequence[int] | None,
        Option(
            "Labels per class. Several, as 1,5,10, make a label-budget curve.",
            metavar="N[,N...]",
            default="all",
            command_line=str,
            from_text=parse_shots,
        ),
    ] = None
    draws: Annotated[int | None, Option("Choices of labels for each point of a curve.", default="5")] = None
    controls: Annotated[bool, Option("Also probe raw pixels and an untrained encoder.")] = False
    against: Annotated[
        str | Path | Sequence[str | Path], Option("Also probe another run's encoder; repeatable.", metavar="RUN")
    ] = ()
    targets: Annotated[
        str | Path | None,
        Option(
            "A .csv or .parquet with a column path (relative to DATA) and targets, instead of class folders.",
            metavar="FILE",
        ),
    ] = None
    columns: Annotated[
        Sequence[str] | None,
        Option(
            "Target columns of the table.", metavar="A,B", default="all", command_line=str, from_text=names_from_text
        ),
    ] = None
    task: Annotated[str | None, Option("classes, multilabel or regression.", default="what the columns look like")] = (
        None
    )
    test_targets: Annotated[
        str | Path | None, Option("The table of --test.", metavar="FILE", default="the same one")
    ] = None
    seed: Annotated[int, Option("Random seed of the held-out fifth and of the labels that --shots leaves.")] = 0
    step: Step = None
    layer: Annotated[
        str | None,
        Option(
            "best, last or a number: 0 is what the first block is given, the embedded patches (igpt: tokens), 1 what "
            "the second is given, and so on.",
            default="best for igpt, else last",
        ),
    ] = None
    mask_votes: Annotated[
        int | None,
        Option(
            "igpt bert: random patch masks under which each test image is seen, the majority counts; 0 hides nothing.",
            metavar="NUMBER",
            default="1",
        ),
    ] = None
    settings: Annotated[
        Sequence[str],
        Option("paper-linear: any setting of its training; repeatable.", metavar="KEY=VALUE", flag="--set"),
    ] = ()
    device: Device = "auto"


@command(ProbeRequest, panel=Panel.MEASURE, trains=True, renamed={"--masks": "--mask-votes"})
def probe(request: ProbeRequest, console: Console) -> dict[str, Any]:
    """Return what was written to RUN/evals."""
    from unmask.report.run_page import write_report

    require_kind(request.kind, (PAPER_LINEAR,))
    summary = _paper_linear(request, console) if request.kind == PAPER_LINEAR else _frozen(request, console)
    console.say(f"report: {write_report(Path(request.run))}")
    return summary


def _frozen(request: ProbeRequest, console: Console) -> dict[str, Any]:
    """Probe features of a frozen encoder."""
    from unmask.evals.run_probe import run_probe
    from unmask.results import to_json

    if request.settings:
        raise UserError(f"--set applies only to --kind {PAPER_LINEAR}; got --kind {request.kind}; leave --set out")
    shots = request.shots
    options = ProbeOptions(
        data=str(request.data),
        test=None if request.test is None else str(request.test),
        exclude=tuple(request.exclude),
        shots=shots if shots is None or isinstance(shots, int) else tuple(shots),
        draws=request.draws,
        controls=request.controls,
        against=tuple(Path(run) for run in texts(request.against)),
        targets=_path(request.targets),
        test_targets=_path(request.test_targets),
        columns=None if request.columns is None else tuple(request.columns),
        task=request.task,
        seed=request.seed,
        step=request.step,
        layer=request.layer,
        mask_votes=request.mask_votes,
        device=request.device,
    )
    return to_json(run_probe(request.run, request.kind, options, console))


def _paper_linear(request: ProbeRequest, console: Console) -> dict[str, Any]:
    """Train MAE's linear probe. Raises UserError for an option that has no effect on it."""
    from unmask.finetuning.paper_linear_probe import paper_linear

    for each in options_of(ProbeRequest):
        used = each.name in ("run", "data", "test", "kind", "shots", "settings")
        if not used and getattr(request, each.name) != each.field.default:
            raise UserError(f"got {each.flag}, which --kind {PAPER_LINEAR} does not use; leave it out")
    if request.shots is not None and not isinstance(request.shots, int):
        several = ",".join(map(str, request.shots))
        raise UserError(f"got --shots {several}; expected one number for a probe of kind {PAPER_LINEAR}")
    return paper_linear(
        request.run,
        str(request.data),
        test=request.test,
        shots=request.shots,
        settings=request.settings,
        console=console,
    )


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
