"""Train and probe the cells of a table, or resume what was interrupted."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unmask.comparison.cells import LENGTHS
from unmask.comparison.paper_tables import PRETRAINED, SHARED, TOKENIZER
from unmask.comparison.table_results import find_probe
from unmask.config import parse
from unmask.console import Console
from unmask.engine import checkpoint, pretrain
from unmask.engine import resume as pretraining
from unmask.engine.load import read_plan
from unmask.errors import TrainingFailed, UserError
from unmask.evals.probe_options import ProbeOptions
from unmask.evals.run_probe import run_probes
from unmask.finetuning import configure, final_test, finetune
from unmask.recipes import catalogue
from unmask.report.run_page import write_report
from unmask.results import find_score
from unmask.run import Run

KINDS = ("linear", "knn")


# ------------------------------------------------------------------------------------------------------ one cell


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM as SIGINT: while a cell trains both ask the loop to stop, between trainings they end the table."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_folder(folder: Path, cell: dict[str, Any], seed: int) -> Path:
    return folder / (cell["name"] if cell["name"] in SHARED else f"{cell['name']}-seed-{seed}")


def make(folder: Path, decided: dict[str, Any], cell: dict[str, Any], seed: int, console: Console) -> None:
    """Train and probe one cell, or what is left of that. Raises KeyboardInterrupt when training was asked to stop.

    What makes a cell fail is written to failures.json, and the other cells go on.
    """
    place = run_folder(folder, cell, seed)
    failures = Run(folder).read("failures.json") if (folder / "failures.json").exists() else {}
    try:
        run = train_cell(place, folder, decided, cell, seed, console)
        if cell["fine_tunes"]:
            if find_score(run) is None:
                console.say(f"{place.name}: testing")
                final_test.measure_run(run)
        elif cell["name"] not in SHARED:
            probe_cell(run, decided, cell, seed, console)
        if not run.report_file.exists():
            write_report(run.path)
        fault = None
    except (TrainingFailed, UserError, torch.OutOfMemoryError, OSError) as error:
        fault = str(error)
        console.warn(f"{place.name} failed: {fault}")
    if failures.get(place.name) != fault:
        failures = {name: said for name, said in failures.items() if name != place.name}
        Run(folder).write("failures.json", failures | ({} if fault is None else {place.name: fault}))


def train_cell(
    place: Path, folder: Path, decided: dict[str, Any], cell: dict[str, Any], seed: int, console: Console
) -> Run:
    """The finished_run Run of one cell. Raises KeyboardInterrupt when it was asked to stop."""
    if (place / "plan.json").exists():
        run = Run.open(place)
        if run.finished and checkpoint.is_complete(run, read_plan(run).steps):
            return run
        console.say(f"{place.name}: going on")
        run = (finetune if cell["fine_tunes"] else pretraining).resume(place, console=console)
    else:
        shutil.rmtree(place, ignore_errors=True)  # begun, and ended before there was anything to go on with
        console.say(f"{place.name}: {cell['steps']} steps")
        asked = decided["asked"]
        settings = [*without_length(cell["settings"]), f"train.steps={cell['steps']}", f"train.seed={seed}"]
        if not cell["fine_tunes"]:  # one size for all cells, whatever the images
            settings = [*own_size(cell["recipe"], settings), *settings]
        if cell["fine_tunes"]:
            weights = asked["from_run"] or finished_run(folder, PRETRAINED, "pre-training")
            options = finetune.FinetuneOptions(
                test=asked["test"],
                shots=asked["shots"],
                recipe=configure.PLAIN,
                settings=[*settings, f"train.test_every={cell['steps']}"],
            )
            run = finetune.finetune(weights, asked["data"], options, out=place, console=console)
        else:
            with_tokenizer = {}
            if cell["tokenizer"]:
                with_tokenizer["tokenizer"] = asked["tokenizer"] or finished_run(folder, TOKENIZER, "tokenizer")
            run = pretrain.pretrain(
                asked["data"], recipe=cell["recipe"], out=place, settings=settings, console=console, **with_tokenizer
            )
    if run.status().state == "stopped":
        raise KeyboardInterrupt
    return run


def own_size(recipe: str, settings: Sequence[str]) -> list[str]:
    """The recipe's own size as a setting, where none is set: by name alone it would follow the images."""
    if "data.size" in parse(settings):
        return []
    height, width = catalogue.find(recipe).data.size
    return [f"data.size=[{height},{width}]"]


def without_length(settings: Sequence[str]) -> list[str]:
    """The length is the table's, so what was asked for stands in `steps` already."""
    return [setting for setting in settings if setting.partition("=")[0].strip() not in LENGTHS]


def finished_run(folder: Path, name: str, what: str) -> Path:
    """The Run of a shared cell. Raises TrainingFailed when it has not come to its end."""
    run = Run(folder / name)
    if not run.finished:
        raise TrainingFailed(f"its {what} could not be trained; see the row of the {what}")
    return run.path


def probe_cell(run: Run, decided: dict[str, Any], cell: dict[str, Any], seed: int, console: Console) -> None:
    """Every kind of probe that is missing: the same split and the same labels whatever the seed of the training."""
    controls = cell["controls"] and seed == 0
    missing = [kind for kind in KINDS if find_probe(run, kind, decided, controls=controls) is None]
    if not missing:
        return
    for fault in run.results("probe-*")[1]:
        console.warn(f"{fault}; it is measured again now")
    console.say(f"{run.path.name}: probing")
    asked = decided["asked"]
    options = ProbeOptions(
        data=asked["data"], test=asked["test"], shots=decided["shots"], controls=controls, device=decided["device"]
    )
    run_probes(run.path, missing, options, Console(quiet=True))  # the row of the table shows the results
