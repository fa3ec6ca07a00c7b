"""Decide how many steps each cell of a table trains: equal steps, equal FLOPs, or what a time budget allows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from unmask.comparison.cells import (
    LENGTHS,
    all_cells,
    base_config,
    cell_settings,
    draft_config,
    fine_tunes,
    recipe_of,
)
from unmask.comparison.paper_tables import PRETRAINED, SHARED, Cell, Table
from unmask.comparison.run_facts import ImageFlops
from unmask.comparison.table_plan import CellCost, PlannedCell, TablePlan, TableRequest
from unmask.comparison.table_results import POOL
from unmask.config import Config, parse
from unmask.console import Console, duration
from unmask.data.annotations.labels import require_labels
from unmask.data.annotations.splits import HOLD_OUT_FOR_TEST, hold_out
from unmask.data.scan.scan import Scan
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.engine import provenance, resolve, training_data
from unmask.engine.build import build_method
from unmask.engine.device import autocast, choose_device, wait_for
from unmask.engine.flops import count_flops
from unmask.engine.image_size import consequence
from unmask.engine.make_plan import BUDGET_SHARE
from unmask.engine.measure import example_batch, measure_step_seconds, with_loading
from unmask.engine.training_plan import Plan
from unmask.errors import UserError
from unmask.evals.images import EVAL_BATCH
from unmask.evals.labelled_images import few_shots, require_classes
from unmask.method import Method
from unmask.nn.modes import eval_mode
from unmask.system.shell_command import shell_command

MOST_LABELS = 5_000  # default limit on training labels of all classes, so that probing a small encoder takes seconds
MEASURE_SECONDS = 2.0
MEASURED_BATCHES = 3
FIT_SECONDS = 3.0
FEWEST_STEPS = 20
PRETRAINING_SHARE = 2 / 3  # share of the training time for pre-training, in tables of fine-tuned cells


@dataclass(frozen=True)
class Measured:
    """A cell with its cost and planned steps.

    planned_steps: steps according to its recipe and settings. length: training length relative to the table's steps.
    """

    cell: Cell
    cost: CellCost
    planned_steps: int
    length: float = 1.0

    @property
    def seconds(self) -> float:
        """Training time of this cell in seconds, divided by the steps of the table."""
        assert self.cost.step_seconds is not None, "step_seconds is measured when there is a budget"
        return self.length * self.cost.step_seconds


@dataclass(frozen=True)
class Experiment:
    """A table with its request, its images, and the number of labels per class for its probes."""

    table: Table
    request: TableRequest
    source: Source
    shots: int

    @property
    def set_by_hand(self) -> bool:
        """Whether the user's settings include a training length."""
        return any(key in LENGTHS for key in parse(self.request.settings))


def require_probe(request: TableRequest) -> tuple[Source, int]:
    """Open the training images; return them and the number of labels per class for the probes.

    Raises UserError if the images cannot be probed, before any time is spent on training.
    """
    source = require_labels(open_source(request.data))
    assert source.labels is not None
    require_classes(source.classes)
    rows = np.arange(len(source))
    if request.test is None:
        rows, held = hold_out(source.labels, rows, 0, HOLD_OUT_FOR_TEST)
        if not len(held):
            raise UserError(
                f"{request.data} has one image per class, so none can be held out; give test images with --test"
            )
    else:
        test = require_labels(open_source(request.test), source.classes)
        if unknown := set(test.classes) - set(source.classes):
            raise UserError(
                f"{test.name} has classes that {request.data} does not have ({', '.join(sorted(unknown)[:6])}); test "
                "images must be in sub-folders of the same names"
            )
    if request.shots is not None:
        few_shots(rows, source.labels[rows], classes=source.classes, shots=request.shots, seed=0)
    smallest = int(np.bincount(source.labels[rows], minlength=len(source.classes)).min())
    limit = max(1, request.shots or min(smallest, MOST_LABELS // len(source.classes)))
    return source, min(request.shots or limit, limit)


def plan_table(experiment: Experiment, console: Console) -> TablePlan:
    """Decide the settings and steps of every cell; with a time budget, also measure the speed of the cells."""
    table, request, source = experiment.table, experiment.request, experiment.source
    began = time.perf_counter()
    cells = all_cells(table, request)
    first = draft_config(table, _base(cells), request)
    source, scan = training_data.scan_source(source, first, console)
    experiment = replace(experiment, source=source)
    scanning = time.perf_counter() - began
    console.print("all cells: " + consequence(scan.median_size, first.data.size, resolve.patch_of(first)))
    device = choose_device(first.train.device)
    measured = []
    with console.progress("measuring cells", len(cells)) as bar:
        for number, cell in enumerate(cells, 1):
            measured.append(measure_cell(experiment, cell, scan, device))
            bar.update(number)
    measured = with_lengths(experiment, measured)
    steps, reason = steps_without_budget(experiment, measured)
    if request.budget is not None:
        steps, reason = steps_in_budget(
            experiment, measured, budget=request.budget, scanning=scanning, spent=time.perf_counter() - began
        )
    tuned = max(1, round(steps * _base_of(measured).length))
    if table.measure == "fine_tuned" and tuned != steps:
        reason += f"; this is the length of pre-training, and each cell is fine-tuned for {tuned} steps"
    return TablePlan(
        asked=request,
        title=table.title,
        axis=table.axis,
        note=table.note,
        log=table.log,
        base=table.base,
        missing=tuple(cell.label for cell in table.cells(base_config(table, request)) if cell not in cells),
        measure=table.measure,
        steps=steps,
        reason=reason,
        shots=experiment.shots,
        pool=POOL,
        device=device,
        fingerprint=source.fingerprint(),
        cells=tuple(planned_cell(experiment, each, steps) for each in measured),
        versions=provenance.provenance_versions(),
        git=provenance.git_state(),
        command=shell_command() or "",
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def planned_cell(experiment: Experiment, measured: Measured, steps: int) -> PlannedCell:
    """Return the plan of a cell. steps: training steps of a cell of length 1."""
    table, request, cell = experiment.table, experiment.request, measured.cell
    return PlannedCell(
        name=cell.name,
        label=cell.label,
        theirs=cell.theirs,
        at=cell.at,
        recipe=recipe_of(table, cell, request),
        settings=tuple(cell_settings(table, cell, request)),
        varied=cell.settings,
        steps=max(1, round(steps * measured.length)),
        equal=cell.equal,
        base=cell.base,
        controls=with_controls(table, cell),
        tokenizer=cell.tokenizer,
        fine_tunes=fine_tunes(table, cell),
        paper=cell.paper,
        **vars(measured.cost),
    )


# Lengths and steps


def with_lengths(experiment: Experiment, measured: Sequence[Measured]) -> list[Measured]:
    """Return the cells with their lengths relative to the table's steps.

    All fine-tuned cells have the same length. Together they get a third of the training time, or all of it if the user
    gives the pre-trained run.
    """
    base, request = _base_of(measured), experiment.request
    base_flops = base.cost.batch_size * base.cost.training_flops
    lengths = {
        each.cell.name: base_flops / each.cost.batch_size / each.cost.training_flops
        if each.cell.equal == "compute"
        else each.cell.length
        for each in measured
    }
    if experiment.table.measure == "fine_tuned":
        tuned = [each for each in measured if each.cell.name != PRETRAINED]
        length = None
        if request.from_run is not None and (request.budget is not None or experiment.set_by_hand):
            length = 1.0
        elif request.budget is not None:
            first = next(each for each in measured if each.cell.name == PRETRAINED)
            length = first.seconds * (1 / PRETRAINING_SHARE - 1) / (request.seeds * sum(each.seconds for each in tuned))
        if length is not None:
            lengths |= {each.cell.name: length for each in tuned}
    return [Measured(each.cell, each.cost, each.planned_steps, lengths[each.cell.name]) for each in measured]


def steps_without_budget(experiment: Experiment, measured: Sequence[Measured]) -> tuple[int, str]:
    """Return the steps of a cell of length 1 according to recipe and settings, and an explanation as text."""
    base = _base_of(measured)
    if experiment.table.measure == "linear" and base.length != 1 and not experiment.set_by_hand:
        # The base row, not the row of length 1, has the steps of the recipe, as in the paper.
        steps = max(1, round(base.planned_steps / base.length))
        return steps, (
            f"{steps} steps for 1x: the base row {base.cell.label} has the {base.planned_steps} steps of the recipe"
        )
    return base.planned_steps, f"{base.planned_steps} steps, as planned by the recipe or the settings"


def steps_in_budget(
    experiment: Experiment, measured: Sequence[Measured], budget: float, scanning: float, spent: float
) -> tuple[int, str]:
    """Return the steps of a cell of length 1 with which the table fits the budget, and an explanation as text.

    budget: seconds for the whole table. scanning: seconds that every run takes to scan the images. spent: seconds that
    have already passed. Raises UserError if the budget allows fewer than FEWEST_STEPS steps.
    """
    request, table = experiment.request, experiment.table
    runs = {each.cell.name: 1 if each.cell.name in SHARED else request.seeds for each in measured}
    count = sum(runs.values())
    probes = len(measured) * request.seeds + 2 * sum(with_controls(table, each.cell) for each in measured)
    probing = sum(each.cost.probe_seconds or 0.0 for each in measured) / len(measured) * probes
    reading = sum((scanning + (each.cost.reading_seconds or 0.0)) * runs[each.cell.name] for each in measured)
    left = BUDGET_SHARE * budget - probing - reading - spent
    one_step = sum(each.seconds * runs[each.cell.name] for each in measured)
    steps = int(left / one_step) if left > 0 else 0
    if steps < FEWEST_STEPS:
        least = (probing + reading + FEWEST_STEPS * one_step) / BUDGET_SHARE
        raise UserError(
            f"a budget of {duration(budget)} is too short for {count} runs: reading and probing alone take about "
            f"{duration(probing + reading)}; give at least {duration(least)}, fewer seeds, or fewer labels with --shots"
        )
    return steps, (
        f"{steps} steps: {count} runs in {duration(budget)}, of which reading and probing take about "
        f"{duration(reading + probing)}"
    )


def _base(cells: Sequence[Cell]) -> Cell:
    return next(cell for cell in cells if cell.base)


def _base_of(measured: Sequence[Measured]) -> Measured:
    return next(each for each in measured if each.cell.base)


def with_controls(table: Table, cell: Cell) -> bool:
    """Return whether the cell is probed with controls.

    The base row of a table is; in the family, every row with equal steps is, because the encoders differ.
    """
    if table.measure == "fine_tuned":
        return False
    return cell.base or (table.name == "family" and cell.name.endswith("-equal-steps"))


# Costs


def measure_cell(experiment: Experiment, cell: Cell, scan: Scan, device: str) -> Measured:
    """Count the FLOPs and parameters of a cell and, with a time budget, measure its speed."""
    table, request, source = experiment.table, experiment.request, experiment.source
    config = draft_config(table, cell, request, source)
    images, plan = training_data.plan_training(training_data.TrainingRequest(source, scan, config, device))
    flops = count_flops(config, plan.images)
    seconds: Mapping[str, float] = {}
    if request.budget is not None:
        batch, workers = config.train.batch_size, plan.workers
        load = training_data.batch_seconds(images, batch, workers, cached=plan.cached).median
        decode = training_data.batch_seconds(images, batch, 0, cached=False).median / batch
        compute = measure_step_seconds(
            config,
            plan.images,
            micro=plan.micro_batch,
            precision=plan.precision,
            device=device,
            seconds=MEASURE_SECONDS,
        )
        tested = len(open_source(request.test)) if request.test is not None else len(source) // 5
        probed, fitting = tested + experiment.shots * len(source.classes), FIT_SECONDS
        if table.measure == "fine_tuned":  # the pre-trained run is not tested
            probed, fitting = tested * fine_tunes(table, cell), 0.0
        seconds = {
            "step_seconds": with_loading(compute, load, workers),
            "reading_seconds": decode * plan.num_images * plan.cached,
            "probe_seconds": probed * (decode + encode_seconds(config, plan)) + fitting,
        }
    cost = CellCost(
        batch_size=plan.batch_size,
        parameters=plan.parameters,
        encoder_parameters=plan.encoder_parameters,
        flops=ImageFlops(**vars(flops), forward=flops.forward),
        precision=plan.precision,
        **seconds,
    )
    return Measured(cell, cost, plan.steps)


@torch.no_grad()
def encode_seconds(config: Config, plan: Plan) -> float:
    """Return the measured seconds per image of the encoder's forward pass."""
    method: Method = build_method(config, plan.images).to(plan.device)
    batch = example_batch(plan.images, EVAL_BATCH, plan.device)
    with eval_mode(method), autocast(plan.precision, plan.device):
        wait_for(method.encoder(batch.images).patches.flatten()[0])  # warm-up
        began = time.perf_counter()
        for _ in range(MEASURED_BATCHES):
            wait_for(method.encoder(batch.images).patches.flatten()[0])
    return (time.perf_counter() - began) / (EVAL_BATCH * MEASURED_BATCHES)
