"""The command line. Each verb imports what it needs when it runs, so that `--help` and `report` never load torch.

Human text goes to stderr; with --json one machine-readable object goes to stdout. Exit codes: 0 done, 1 failed, 2 bad
usage or input, 75 stopped on request and resumable, 130 interrupted.
"""

# No `from __future__ import annotations` here: typer reads the annotations as they are.
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.console import Console, escape_controls
from unmask.errors import TrainingFailed, UserError
from unmask.run import RunInUse, held_here
from unmask.system.output_sinks import install
from unmask.system.processes import refuse_several_processes
from unmask.system.stop_requests import INTERRUPTED, interrupts

FAILED, USAGE, STOPPED = 1, 2, 75
TRAINING = ("demo", "pretrain", "resume", "finetune", "probe", "ablate", "compare")  # what trains, if only a probe
started = time.monotonic()
"""When the command started: a time budget counts from here."""
_first = True
FOLLOWS = "*"

app = typer.Typer(
    name="unmask",
    help="Pre-train vision transformers on your own images by hiding most of each image and learning to rebuild it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Images: a folder, list file, glob, tar, zip or parquet; or an embedded set: shapes, digits.",
        show_default=False,
    ),
]
SeveralData = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Images: a folder, list file, glob, tar, zip or parquet, a folder or glob of parquet or tar shards; or an "
        "embedded set: shapes, digits. Several are read as one.",
        show_default=False,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="Leave out images whose name, or a folder of it, matches, e.g. thumbs or '*_mask.png'; repeatable.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change any setting, e.g. train.steps=1000; repeatable."),
]
TestData = Annotated[
    str | None, typer.Option(metavar="DATA", help="Test images; default a fifth of DATA.", show_default=False)
]
Step = Annotated[int | None, typer.Option(help="An earlier checkpoint; default the newest.", show_default=False)]
Budget = Annotated[
    str | None, typer.Option(metavar="TIME", help="Plan the steps that fit, e.g. 30m, 2h.", show_default=False)
]
NewRun = Annotated[
    Path | None,
    typer.Option(metavar="RUN", help="New run folder; default runs/<data>-<recipe>.", show_default=False),
]
ImageFiles = Annotated[
    list[str], typer.Argument(metavar="IMAGE...", help="Image files, or one DATA.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N, mps.")]


def main() -> None:
    """Entry point: runs the app and turns errors for people into one clear line and an exit code."""
    global started, _first
    if not _first:  # more than one command in this process
        started = time.monotonic()
    _first = False
    if "OMP_WAIT_POLICY" not in os.environ:
        # Torch's threads spin while they wait for one another. When something else needs the cores too, long spinning
        # makes a step up to a hundred times slower; short spinning costs nothing when alone (docs/LOG.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    held_here.clear()
    outputs = install() if sys.stdout in (sys.__stdout__, None) else None  # not where a test captures it
    with interrupts():
        code = _run()
    for name in ("SIGINT", "SIGTERM") if outputs else ():  # from here on they simply end the process
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    if outputs and (lost := outputs.finish()) is not None:
        if lost:
            print(escape_controls(f"error: {lost}"), file=sys.stderr)
        code = code or FAILED
    sys.exit(code)


def _run() -> int:
    """Run the verb; returns the exit code."""
    try:
        code = app(standalone_mode=False)  # what a verb leaves with (typer.Exit) is returned, not raised
    except (KeyboardInterrupt, typer.Abort):  # typer makes the exit code of it by itself, unless it comes too soon
        code = INTERRUPTED
    except Exception as error:
        return _explain(error)
    if code == INTERRUPTED:
        print(_interrupted(), file=sys.stderr)
    return code if isinstance(code, int) else 0


def _interrupted() -> str:
    """What an interruption left behind, as far as runs are concerned."""
    names = dict.fromkeys(str(run.path) for run in held_here if (run.path / "plan.json").exists())
    if not names:
        return "interrupted; no run was begun"
    return "interrupted; continue with: " + " or ".join(f"unmask resume {name}" for name in names)


def _explain(error: Exception) -> int:
    """Says what went wrong and returns the exit code; what we did not foresee keeps its traceback."""
    show = getattr(error, "show", None)  # click's own usage errors
    if callable(show):
        if isinstance(said := getattr(error, "message", None), str):
            vars(error)["message"] = escape_controls(said)
        show()
        if hint := _hint_for_option(error):
            print(escape_controls(hint), file=sys.stderr)
        return getattr(error, "exit_code", USAGE)
    if isinstance(error, RunInUse):  # a moment later it may be free: whoever restarts commands should try again
        message, code = str(error), STOPPED
    elif isinstance(error, UserError | FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        message, code = str(error), USAGE
    elif isinstance(error, TrainingFailed):
        message, code = str(error), FAILED
    elif type(error).__name__ == "OutOfMemoryError":
        message, code = f"{error}. Try --set train.micro_batch=N with a smaller N, or a smaller recipe", FAILED
    elif isinstance(error, OSError):
        message, code = f"{error.strerror or error} ({error.filename or 'no file named'})", FAILED
    else:
        import traceback

        print(escape_controls("".join(traceback.format_exception(error))), file=sys.stderr)
        message, code = f"this is a fault in unmask: {type(error).__name__}: {error}", FAILED
    print(escape_controls(f"error: {message}"), file=sys.stderr)
    return code


def _hint_for_option(error: Exception) -> str:
    """For an unknown option that is a setting, such as --lr or --batch-size: how to give it with --set."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if not option or context is None or not any("--set" in parameter.opts for parameter in context.command.params):
        return ""
    from unmask.config import keys, nearest
    from unmask.recipes.catalogue import find

    found = nearest(str(option).lstrip("-").replace("-", "_"), keys(find("mae_nano")))
    if not found.startswith("did you mean"):
        return "Settings are changed with --set KEY=VALUE; `unmask recipes NAME` lists the keys of a recipe."
    key = found.removeprefix("did you mean ").rstrip("?").split(" or ")[0]
    scaled = ", the rate for 256 images: training uses VALUE x batch size / 256" if key == "optim.base_lr" else ""
    return f"{option} is a setting: use --set {key}=VALUE{scaled} (`unmask recipes NAME` lists all settings)"


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=True))


def _seconds(text: str | None) -> float | None:
    """'30m', '2h', '90s', '1.5h' -> seconds."""
    if text is None:
        return None
    from unmask.engine.time_budget import seconds_of

    return seconds_of(text)


def _budget(text: str | None) -> Any:
    """A time budget that counts from the start of the command."""
    from unmask.engine.time_budget import Budget

    seconds = _seconds(text)
    return None if seconds is None else Budget(seconds, started)


def _mask_options(values: str | None, names: Path | None) -> Any:
    """What --mask-values and --class-names stand for; None without them."""
    if values is None and names is None:
        return None
    from unmask.data.segmentation_masks import MaskOptions

    try:
        ids = () if values is None else tuple(int(value) for value in values.split(","))
    except ValueError:
        raise UserError(f"got --mask-values {values}; expected ids with commas, for example 0,255") from None
    return MaskOptions(ids, names)


def _ended(run: Any, as_json: bool, console: Console) -> None:
    """Writes the report and leaves with the code that the Run's status asks for."""
    from unmask.report.run_page import write_report

    status, report = run.status(), None
    try:
        report = write_report(run.path, say=console.warn)
        console.say(f"report: {report}")
    except (OSError, UserError) as error:  # the training is done, and must not look as if it had failed
        console.warn(f"no report was written: {error}; mend that, then: unmask report {run.path}")
    if as_json:
        _print_json({"run": str(run.path), "report": None if report is None else str(report), **status})
    if status["state"] == "stopped":
        console.say(f"stopped at step {status['step']} of {status['total']}; go on with: unmask resume {run.path}")
        raise typer.Exit(STOPPED)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="New run folder; default demo-run.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Fewer steps for a quick look; the verdict will be weaker.")] = None,
    as_json: AsJson = False,
) -> None:
    """No data needed: pre-train on drawn shapes, look, probe, report. About four minutes on two cores."""
    from unmask.demo import run_demo

    summary = run_demo(out, Console(), steps=steps)
    if as_json:
        _print_json(summary)
    if summary.get("state") == "stopped":
        raise typer.Exit(STOPPED)


@app.command()
def check(
    data: SeveralData,
    exclude: Exclude = None,
    sample: Annotated[int | None, typer.Option(help="Check only this many files, evenly spread.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Checking processes; chosen when left out.", show_default=False)
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Preflight: counts, sizes, channels, statistics, broken files, a recipe and a time forecast."""
    from unmask.engine.preflight import check_data

    code, summary = check_data(
        data, Console(), sample=sample, workers=workers or 0, settings=settings or [], exclude=exclude or ()
    )
    if as_json:
        _print_json(summary)
    raise typer.Exit(code)


@app.command()
def pretrain(
    data: SeveralData,
    exclude: Exclude = None,
    recipe: Annotated[str, typer.Option(help="A name from `unmask recipes`, or auto.")] = "auto",
    out: NewRun = None,
    budget: Budget = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Use the settings of another run: its folder or config.json, in place of --recipe.",
            show_default=False,
        ),
    ] = None,
    from_run: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Start from these weights, with that run's settings; with --recipe only the encoder is taken.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="The dVAE whose codes beit, or mae with target=tokens, predict.", show_default=False
        ),
    ] = None,
    palette: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="igpt: colours of a file of `unmask palette`, or of a run.", show_default=False
        ),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="mae: a FILE with patches to hide: # in .txt, true in .npy, black in .png.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Pre-train an encoder on your images. Labels are not used."""
    from unmask.engine.pretrain import pretrain

    console = Console()
    run = pretrain(
        data,
        exclude=exclude or (),
        recipe=recipe,
        config=config,
        out=out,
        budget=_budget(budget),
        settings=settings or (),
        from_run=from_run,
        tokenizer=tokenizer,
        palette=palette,
        masks=masks,
        console=console,
    )
    _ended(run, as_json, console)


@app.command("import")
def import_(
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Weights of official MAE or BEiT, timm, transformers or DALL-E's dVAE: a file, or a folder with its "
            "config.json.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="RUN", help="New run folder.", show_default=False)],
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="For a pre-trained BEiT: the dVAE, imported before.", show_default=False),
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Make a run from weights of another library; --set data.size and data.channels fit them to other images."""
    from unmask.interop.import_weights import import_weights

    run = import_weights(weights, out, settings=settings or (), tokenizer=tokenizer, console=Console())
    if as_json:
        _print_json({"run": str(run.path), **run.read("provenance.json")["imported"]})


@app.command()
def export(
    run: RunFolder,
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="timm; hf (encoder for transformers), hf-pretraining (with decoder or head); official (MAE's code); "
            "onnx (input as in the files), onnx-float; safetensors (all of it, for unmask).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="A new .safetensors, .pth or .onnx file, or for hf and hf-pretraining a new folder.",
            show_default=False,
        ),
    ],
    step: Step = None,
    as_json: AsJson = False,
) -> None:
    """A run's weights for timm, transformers (hf), the official MAE code or ONNX, tested there, with a model card."""
    from unmask.interop.export import export_run

    summary = export_run(run, to, out, step=step, console=Console())
    if as_json:
        _print_json(summary)


@app.command()
def palette(
    data: Data,
    colours: Annotated[int, typer.Option(help="How many.")] = 512,
    size: Annotated[int, typer.Option(help="Images are shrunk to this many pixels first.")] = 32,
    out: Annotated[Path, typer.Option(metavar="FILE", help="FILE.json; a picture is drawn beside it.")] = Path(
        "palette.json"
    ),
    as_json: AsJson = False,
) -> None:
    """The colours an iGPT would make for these images, as a file that several runs can share."""
    from unmask.evals.palette_file import make_palette

    summary = make_palette(data, colours=colours, size=size, out=out, console=Console())
    if as_json:
        _print_json(summary)


@app.command()
def pack(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Images with names: a folder, glob, tar, zip or parquet.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new .tar, which is DATA to every command.")],
    exclude: Exclude = None,
    short_side: Annotated[int, typer.Option(metavar="PIXELS", help="Longer ones are shrunk to it.")] = 512,
    quality: Annotated[int, typer.Option(help="Of the JPEGs, 1 to 100.")] = 90,
    workers: Annotated[
        int | None, typer.Option(help="Processes, 0 for none; default one to a core.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Copy images into one tar, large ones shrunk, to train faster on the very same crops and masks."""
    from unmask.data.pack import pack

    summary = pack(
        data, out, short_side=short_side, quality=quality, workers=workers, exclude=exclude or (), console=Console()
    )
    if as_json:
        _print_json(summary)


@app.command()
def resume(
    run: RunFolder,
    allow_dataset_change: Annotated[
        bool, typer.Option("--allow-dataset-change", help="Go on although the image files are not the same any more.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA", help="Where the images lie now, if they have moved; repeatable.", show_default=False
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Fine-tuned runs: where the test images lie now.", show_default=False),
    ] = None,
    annotations: Annotated[
        str | None, typer.Option(metavar="PATH", help="The same for masks or boxes.", show_default=False)
    ] = None,
    test_annotations: Annotated[
        str | None, typer.Option(metavar="PATH", help="The same for those of the test images.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a run exactly where it stopped; --data if its images have moved."""
    from unmask.config import task_names
    from unmask.engine import pretrain as pretrain_module
    from unmask.engine.load import read_config
    from unmask.finetuning import finetune
    from unmask.run import Run

    console = Console()
    supervised = read_config(Run.open(run)).method.name in task_names()
    places = pretrain_module.Places(tuple(data or ()), test, annotations, test_annotations)
    done = (finetune if supervised else pretrain_module).resume(
        run,
        allow_dataset_change=allow_dataset_change,
        places=None if places == pretrain_module.Places() else places,
        console=console,
    )
    _ended(done, as_json, console)


@app.command("set")
def set_(
    run: RunFolder,
    settings: Annotated[
        list[str],
        typer.Argument(metavar="KEY=VALUE...", help="Settings, e.g. train.steps=20000.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Change settings of a run that has begun, such as its length; recorded in the run, then resume it."""
    from unmask.engine.edit_run import set_values

    edit = set_values(run, settings, console=Console())
    if as_json:
        _print_json({"run": str(run), **edit})


@app.command()
def finetune(
    run: RunFolder,
    data: Data,
    exclude: Exclude = None,
    task: Annotated[str, typer.Option(help="classify (sub-folders), segment (masks) or detect (boxes).")] = "classify",
    test: TestData = None,
    annotations: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="segment: folder of masks; detect: COCO .json or folder of VOC .xml. Default beside the images.",
            show_default=False,
        ),
    ] = None,
    test_annotations: Annotated[
        str | None, typer.Option(metavar="PATH", help="The same for the test images.", show_default=False)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="detect: images of ImageSets/Main/NAME.txt only.", show_default=False),
    ] = None,
    test_split: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same for the test images.", show_default=False)
    ] = None,
    ignore: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="segment: an id in the masks that is no class, besides 255; repeatable."),
    ] = None,
    mask_values: Annotated[
        str | None,
        typer.Option(
            metavar="ID,ID...",
            help="segment: the ids in the masks that are classes, in order, e.g. 0,255.",
            show_default=False,
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="segment: names of the ids (codes.txt, label_colors.txt, ...); default classes.txt beside the masks.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="finetune_..., scratch_..., segment_..., detect_... of `unmask recipes`, or auto.")
    ] = "auto",
    out: NewRun = None,
    last_blocks: Annotated[
        float | None,
        typer.Option(
            help="Train only the head and the last N blocks: 0 for the head alone, 0.5 adds the last MLP; default all.",
            show_default=False,
        ),
    ] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Random weights instead: the control.")] = False,
    shots: Annotated[
        int | None,
        typer.Option(help="Labels per class (segment, detect: images); default all.", show_default=False),
    ] = None,
    budget: Budget = None,
    steps_of: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Steps and batch size as in this run, for --from-scratch.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train your task from a run's encoder and test it: classes, masks or boxes."""
    from unmask.finetuning.finetune import fine_tune

    console = Console()
    done = fine_tune(
        run,
        data,
        task=task,
        exclude=exclude or (),
        out=out,
        test=test,
        annotations=annotations,
        test_annotations=test_annotations,
        split=split,
        test_split=test_split,
        ignored=ignore or (),
        mask_options=_mask_options(mask_values, class_names),
        shots=shots,
        recipe=recipe,
        last_blocks=last_blocks,
        from_scratch=from_scratch,
        budget=_budget(budget),
        steps_of=steps_of,
        settings=settings or (),
        console=console,
    )
    _ended(done, as_json, console)


@app.command()
def predict(
    run: RunFolder,
    images: ImageFiles,
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH", help="FILE.csv, .json or .parquet; masks: a folder; boxes: FILE.json.", show_default=False
        ),
    ],
    least: Annotated[
        float,
        typer.Option(metavar="SCORE", help="Boxes: leave out those with a lower score, 0.05 to 1."),
    ] = 0.05,
    step: Step = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Predict classes with probabilities, masks or boxes with a fine-tuned run. Overwrites --out."""
    from unmask.finetuning.predict import predict

    summary = predict(run, images, out, least=least, step=step, device=device, console=Console())
    if as_json:
        _print_json(summary)


@app.command()
def reconstruct(
    run: RunFolder,
    images: ImageFiles,
    out: Annotated[Path, typer.Option(metavar="PNG", help="The picture to write.")] = Path("reconstruction.png"),
    step: Step = None,
    seed: Annotated[int, typer.Option(help="Another seed hides other patches.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw what a run makes of images: original, masked, prediction, pasted."""
    from unmask.evals.reconstruct import reconstruct_images

    numbers = reconstruct_images(run, images, out, step=step, seed=seed, device=device, console=Console())
    if as_json:
        _print_json({"picture": str(out), **numbers})


@app.command()
def probe(
    run: RunFolder,
    data: Data,
    exclude: Exclude = None,
    test: TestData = None,
    kind: Annotated[
        str,
        typer.Option(
            help="knn, linear, attentive (a learned query over all tokens), or paper-linear (MAE's own protocol: LARS "
            "on augmented images, a training of its own)."
        ),
    ] = "knn",
    shots: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Labels per class; default all. Several, as 1,5,10, make a label-budget curve.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Choices of labels for each point of a curve. Default 5.", show_default=False)
    ] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Also raw pixels and an untrained encoder.")] = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Also another run's encoder; repeatable.", show_default=False),
    ] = None,
    targets: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A .csv or .parquet with a column path (relative to DATA) and targets, instead of class folders.",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B", help="Target columns of the table; default all.", show_default=False)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="classes, multilabel or regression; default what the columns look like.", show_default=False),
    ] = None,
    test_targets: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The table of --test; default the same one.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses the shots and the default test part.")] = 0,
    step: Step = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="best, last or a number: 0 is what the first block is given, the embedded patches (igpt: tokens), 1 "
            "what the second is given, and so on. Default best for igpt, else the last.",
            show_default=False,
        ),
    ] = None,
    masks: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            help="igpt bert: a NUMBER of random masks under which each test image is seen, the majority counts; 0 "
            "hides nothing. Default 1.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="paper-linear: any setting of its training; repeatable."),
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """How good are the features? A frozen encoder measured on your labels: sub-folder names, or a table.

    paper-linear is a training, kept in a folder inside RUN; it takes DATA, --test, one number of --shots, and --set.
    """
    from unmask.evals.probe import KINDS, require_kind
    from unmask.evals.probe_labels import shots_of
    from unmask.evals.probes.attentive import ATTENTIVE
    from unmask.evals.run_probe import probe_run
    from unmask.report.run_page import write_report

    require_kind(kind, (*KINDS, ATTENTIVE, "paper-linear"))
    if kind == "paper-linear":
        _paper_linear(
            run,
            data,
            test,
            shots,
            {
                "--draws": draws,
                "--controls": controls,
                "--against": against,
                "--exclude": exclude,
                "--targets": targets,
                "--columns": columns,
                "--task": task,
                "--test-targets": test_targets,
                "--seed": seed,
                "--step": step,
                "--layer": layer,
                "--masks": masks,
                "--device": None if device == "auto" else device,
            },
            settings or (),
            as_json,
        )
        return
    if settings:
        raise UserError(f"--set {settings[0]} came, but a probe of kind {kind} is no training; leave it out")
    console = Console()
    summary = probe_run(
        run,
        data,
        test=test,
        kind=kind,
        shots=shots_of(shots),
        draws=draws,
        controls=controls,
        against=against or (),
        targets=targets,
        columns=None if columns is None else [name.strip() for name in columns.split(",")],
        task=task,
        test_targets=test_targets,
        seed=seed,
        step=step,
        device=device,
        exclude=exclude or (),
        layer=layer,
        masks=masks,
        console=console,
    )
    console.say(f"report: {write_report(run)}")
    if as_json:
        _print_json(summary)


def _paper_linear(
    run: Path, data: str, test: str | None, shots: str | None, others: dict[str, Any], settings: Any, as_json: bool
) -> None:
    """The probe that is a training; `others` are options that mean nothing to it, with what came for them."""
    from unmask.evals.probe_labels import shots_of
    from unmask.finetuning.paper_linear_probe import paper_linear
    from unmask.report.run_page import write_report

    if came := [option for option, value in others.items() if value]:
        raise UserError(f"{came[0]} came, which --kind paper-linear has no use for; leave it out")
    number = shots_of(shots)
    if isinstance(number, tuple | list):
        raise UserError(f"--shots {shots} came; a probe of kind paper-linear takes one number")
    console = Console()
    summary = paper_linear(run, data, test=test, shots=number, settings=settings, console=console)
    console.say(f"report: {write_report(run)}")
    if as_json:
        _print_json(summary)


@app.command()
def embed(
    run: RunFolder,
    data: SeveralData,
    out: Annotated[Path, typer.Option(metavar="FILE", help="FILE.parquet or FILE.npz.", show_default=False)],
    exclude: Exclude = None,
    step: Step = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Features of every image, never masked: columns name, label (where there is one), cls and mean (over patches)."""
    from unmask.evals.embed import embed_images

    summary = embed_images(run, data, out, exclude=exclude or (), step=step, device=device, console=Console())
    if as_json:
        _print_json(summary)


@app.command()
def ablate(
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help="1a, 1b, 1c, 1d, 1e, 1f, fig5, fig7, fig9 of the MAE paper, or family.",
            show_default=False,
        ),
    ],
    data: Data,
    test: TestData = None,
    recipe: Annotated[
        str | None, typer.Option(help="Base of every cell; default mae_nano.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Default runs/<data>-table-<TABLE>; goes on with it.", show_default=False),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="For the whole table, e.g. 1h.", show_default=False)
    ] = None,
    seeds: Annotated[int, typer.Option(help="Train every cell with so many seeds.")] = 1,
    shots: Annotated[
        int | None, typer.Option(help="Labels per class for the probes; default 5000 in all.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A dVAE for cells that need one; default trains one.", show_default=False),
    ] = None,
    from_run: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN", help="What fig9 fine-tunes; default trains one.", show_default=False),
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train and probe every cell of a table of the paper, beside the paper's numbers. Run again to go on with it."""
    from unmask.comparison.ablate import ablate

    summary = ablate(
        table,
        data,
        test=test,
        recipe=recipe,
        out=out,
        budget=_seconds(budget),
        seeds=seeds,
        shots=shots,
        tokenizer=tokenizer,
        from_run=from_run,
        settings=settings or (),
        console=Console(),
    )
    if as_json:
        _print_json(summary)
    if summary["state"] != "finished":
        raise typer.Exit(STOPPED if summary["state"] == "stopped" else FAILED)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Two or more run folders.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Probe those that lack it on these.", show_default=False)
    ] = None,
    test: TestData = None,
    kind: Annotated[str, typer.Option(help="knn or linear.")] = "linear",
    shots: Annotated[int | None, typer.Option(help="Labels per class; default all.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="FILE.html; FILE.json comes with it.")] = Path(
        "comparison.html"
    ),
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Several runs beside one another: what they are, what they cost, and the probes that they share."""
    from unmask.comparison.compare import compare

    summary = compare(runs, data=data, test=test, kind=kind, shots=shots, out=out, device=device, console=Console())
    if as_json:
        _print_json(summary)


@app.command("ls")
def list_(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where to look for runs; default this folder.", show_default=False)
    ] = Path(),
    as_json: AsJson = False,
) -> None:
    """List runs: state, step, image size, loss, newest probe, and the space they take."""
    from unmask.list_runs import list_runs, table

    found = list_runs(folder)
    if as_json:
        _print_json([vars(each) for each in found])
        return
    print(escape_controls("\n".join(table(found))))


@app.command()
def prune(
    run: RunFolder,
    keep_checkpoints: Annotated[int, typer.Option(metavar="N", help="Newest checkpoints to keep.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Free disk space: remove older checkpoints and stored features; the run stays usable and resumable."""
    from unmask.engine.prune import prune_run

    found = prune_run(run, keep_checkpoints=keep_checkpoints, dry_run=dry_run, console=Console())
    if as_json:
        _print_json(found)


@app.command()
def report(run: RunFolder, as_json: AsJson = False) -> None:
    """Write RUN/report.html: one file that opens offline."""
    from unmask.report.run_page import write_report

    path = write_report(run)
    Console().say(f"report: {path}")
    if as_json:
        _print_json({"report": str(path)})


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `unmask recipes`.", show_default=False)],
    gpus: Annotated[
        int | None, typer.Option(help="Also say how many images each of so many GPUs gets.", show_default=False)
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """What a recipe costs, counted without data: parameters, FLOPs, learning rate, steps."""
    from unmask.engine.costs import recipe_costs, say_costs

    found = recipe_costs(recipe, settings=settings or (), gpus=gpus)
    say_costs(found, Console())
    if as_json:
        _print_json(found)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show every setting of one recipe.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """The recipes, or every setting of one."""
    from unmask.engine.image_size import follows_images
    from unmask.recipes.catalogue import AUTO, all_recipes, describe, find, first_line, grouped

    if name is not None:
        print(json.dumps(find(name).model_dump(mode="json")) if as_json else describe(name))
        if not as_json and follows_images(name):
            print("\ndata.size and the patch follow your images, unless one of the two is set.")
        return
    if as_json:
        _print_json({key: first_line(function) for key, function in all_recipes().items()})
        return
    width = max(map(len, all_recipes()))
    print(f"{'auto':{width}} {FOLLOWS} Picks one of {', '.join(AUTO)} from image count, size and device, and says why.")
    for title, group in grouped().items():
        print(f"\n{title}")
        for name in group:
            mark = FOLLOWS if follows_images(name) else " "
            print(f"{name:{width}} {mark} {first_line(all_recipes()[name])}")
    print(
        f"\n{FOLLOWS} the image size follows your images, unless data.size or the patch is set; the others keep theirs."
    )


@app.command()
def doctor(
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA", help="Images: what would limit training on them?", show_default=False),
    ] = None,
    exclude: Exclude = None,
    recipe: Annotated[str, typer.Option(help="With DATA: a name from `unmask recipes`, or auto.")] = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="With DATA: a dVAE whose codes are predicted.", show_default=False),
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Versions, device, and a self-test of a few seconds; with DATA, where the time goes and what to do about it."""
    from unmask.engine.diagnose import examine, examine_data

    if data is not None:
        summary = examine_data(
            data, Console(), recipe=recipe, exclude=exclude or (), settings=settings or (), tokenizer=tokenizer
        )
        if as_json:
            _print_json(summary)
        return
    if recipe != "auto" or settings or exclude or tokenizer is not None:
        raise UserError(
            "got --recipe, --set, --exclude or --tokenizer without DATA, where they have no effect; name images too"
        )
    good, summary = examine(Console())
    if as_json:
        _print_json(summary)
    raise typer.Exit(0 if good else FAILED)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if context.invoked_subcommand in TRAINING:
        refuse_several_processes()
    if version:
        from importlib.metadata import version as of

        print(f"unmask {of('unmask')}")
        raise typer.Exit


if __name__ == "__main__":
    main()
