"""Train and probe the cells of a table, or resume interrupted runs."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from unmask.comparison.cells import LENGTHS
from unmask.comparison.paper_tables import PRETRAINED, TOKENIZER
from unmask.comparison.table_plan import PlannedCell, TablePlan
from unmask.comparison.table_results import FAILURES, KINDS, find_probe
from unmask.config import parse
from unmask.console import Console
from unmask.engine import checkpoint, pretraining
from unmask.engine.continue_run import resume
from unmask.engine.load import read_plan
from unmask.errors import TrainingFailed, UserError
from unmask.evals.probe_options import ProbeOptions
from unmask.evals.run_probe import run_probes
from unmask.finetuning import configure, final_test, finetune_run
from unmask.recipes import catalogue
from unmask.report.run_page import write_report
from unmask.results import read_results, read_score
from unmask.run import Run


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Context manager that treats SIGTERM like SIGINT, so that SIGTERM also stops the table between two runs."""
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


def make_cell(folder: Path, plan: TablePlan, cell: PlannedCell, seed: int, console: Console) -> None:
    """Train and measure one cell with one seed, skipping what is finished already.

    folder: folder of the table. If the cell fails, the error message is written to failures.json, and no error is
    raised, so that the other cells continue. Raises KeyboardInterrupt if training was stopped.
    """
    name = cell.run_name(seed)
    try:
        run = train_cell(folder, plan, cell=cell, seed=seed, console=console)
        if cell.fine_tunes:
            if read_score(run) is None:
                console.print(f"{name}: testing")
                final_test.measure_run(run)
        elif not cell.shared:
            probe_cell(run, plan, cell=cell, seed=seed, console=console)
        if not run.report_file.exists():
            write_report(run.path)
        fault = None
    except (TrainingFailed, UserError, torch.OutOfMemoryError, OSError) as error:
        fault = str(error)
        console.warn(f"{name} failed: {fault}")
    record_failure(folder, name, fault)


def record_failure(folder: Path, name: str, fault: str | None) -> None:
    """Write the error message of a failed run to failures.json, or remove an earlier one if `fault` is None."""
    failures = Run(folder).read_if_present(FAILURES)
    if failures.get(name) != fault:
        others = {other: reason for other, reason in failures.items() if other != name}
        Run(folder).write(FAILURES, others if fault is None else others | {name: fault})


def train_cell(folder: Path, plan: TablePlan, cell: PlannedCell, seed: int, console: Console) -> Run:
    """Train or resume one cell and return its finished run. Raises KeyboardInterrupt if training was stopped."""
    path = folder / cell.run_name(seed)
    if (path / "plan.json").exists():
        run = Run.open(path)
        if run.finished and checkpoint.is_complete(run, read_plan(run).steps):
            return run
        console.print(f"{path.name}: resuming")
        run = (finetune_run.resume if cell.fine_tunes else resume)(path, console=console)
    else:
        shutil.rmtree(path, ignore_errors=True)  # what is left of an earlier attempt cannot be resumed
        console.print(f"{path.name}: {cell.steps} steps")
        run = start_cell(path, folder, plan=plan, cell=cell, seed=seed, console=console)
    if run.status().state == "stopped":
        raise KeyboardInterrupt
    return run


def start_cell(path: Path, folder: Path, plan: TablePlan, cell: PlannedCell, seed: int, console: Console) -> Run:
    """Train one cell from the beginning. path: folder of its run. folder: folder of the table."""
    request = plan.asked
    settings = [*without_length(cell.settings), f"train.steps={cell.steps}", f"train.seed={seed}"]
    if cell.fine_tunes:
        tuning = finetune_run.FinetuneOptions(
            test=request.test,
            shots=request.shots,
            recipe=configure.PLAIN,
            settings=[*settings, f"train.test_every={cell.steps}"],
        )
        weights = request.from_run or finished_run(folder, PRETRAINED, "pre-training")
        return finetune_run.finetune(weights, request.data, tuning, out=path, console=console)
    tokenizer = None
    if cell.tokenizer:
        tokenizer = request.tokenizer or finished_run(folder, TOKENIZER, "tokenizer")
    settings = [*own_size(cell.recipe, settings), *settings]  # all cells have the same image size
    options = pretraining.PretrainOptions(recipe=cell.recipe, settings=settings, tokenizer=tokenizer)
    return pretraining.pretrain(request.data, options, out=path, console=console)


def own_size(recipe: str, settings: Sequence[str]) -> list[str]:
    """Return the recipe's image size as a setting, or [] if the user has set one.

    Without this setting, the size would depend on the images.
    """
    if "data.size" in parse(settings):
        return []
    height, width = catalogue.find(recipe).data.size
    return [f"data.size=[{height},{width}]"]


def without_length(settings: Sequence[str]) -> list[str]:
    """Return the settings without training length, which the plan of the table determines."""
    return [setting for setting in settings if setting.partition("=")[0].strip() not in LENGTHS]


def finished_run(folder: Path, name: str, what: str) -> Path:
    """Return the folder of the run of a shared cell. Raises TrainingFailed if the run is not finished."""
    run = Run(folder / name)
    if not run.finished:
        raise TrainingFailed(f"the {what} could not be trained; see the row of the {what}")
    return run.path


def probe_cell(run: Run, plan: TablePlan, cell: PlannedCell, seed: int, console: Console) -> None:
    """Measure the missing probes of a run; the split and the labels are the same for all training seeds."""
    controls = cell.controls and seed == 0
    missing = [kind for kind in KINDS if find_probe(run, kind, plan, controls=controls) is None]
    if not missing:
        return
    for fault in read_results(run).damaged:
        console.warn(f"{fault}; measuring it again")
    console.print(f"{run.path.name}: probing")
    options = ProbeOptions(
        data=plan.asked.data, test=plan.asked.test, shots=plan.shots, controls=controls, device=plan.device
    )
    run_probes(run.path, missing, options, Console(quiet=True))  # the scores are printed with the row of the table
