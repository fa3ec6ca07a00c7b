"""How long each cell of a table trains: equal steps, equal compute, or a share of a time budget."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unmask.comparison.cells import (
    LENGTHS,
    AblationRequest,
    all_cells,
    base_config,
    cell_settings,
    draft_config,
    fine_tunes,
    recipe_of,
)
from unmask.comparison.paper_tables import PRETRAINED, SHARED, Cell, Table
from unmask.comparison.table_results import POOL
from unmask.config import Config, parse
from unmask.console import Console, duration
from unmask.data.annotations.labels import require_labels
from unmask.data.annotations.splits import HOLD_OUT_FOR_TEST, hold_out
from unmask.data.scan.scan import Scan
from unmask.data.sources.open_source import open_source
from unmask.data.sources.source import Source
from unmask.engine import provenance, resolve, training_data
from unmask.engine.build import fresh_method
from unmask.engine.device import autocast, choose_device, wait_for
from unmask.engine.flops import count_flops
from unmask.engine.image_size import consequence
from unmask.engine.make_plan import BUDGET_SHARE
from unmask.engine.measure import example_batch, measure_step_seconds, with_loading
from unmask.engine.plan import Plan
from unmask.errors import UserError
from unmask.evals.images import EVAL_BATCH
from unmask.evals.labelled_images import few_shots, require_classes
from unmask.method import Method
from unmask.nn.modes import eval_mode

MOST_LABELS = 5_000  # by default: a probe of a small encoder then takes seconds, and its test images tell more
MEASURE_SECONDS = 2.0
MEASURED_BATCHES = 3
FIT_SECONDS = 3.0
FEWEST_STEPS = 20
PRETRAINING_SHARE = 2 / 3  # of a budget for training, where every cell is fine-tuned from one pre-training


def require_probe(asked: AblationRequest) -> tuple[Source, int]:
    """The data, and the most labels per class a probe can have by default. Raises ValueError when it cannot be probed.

    Checked before training, because a table whose cells cannot be measured is of no use to anybody.
    """
    source = require_labels(open_source(asked.data))
    assert source.labels is not None
    require_classes(source.classes)
    rows = np.arange(len(source))
    if asked.test is None:
        rows, held = hold_out(source.labels, rows, 0, HOLD_OUT_FOR_TEST)
        if not len(held):
            raise UserError(f"{asked.data} has one image per class, so none can be held out; give others with --test")
    else:
        test = require_labels(open_source(asked.test), source.classes)
        if unknown := set(test.classes) - set(source.classes):
            raise UserError(
                f"{test.name} has classes that {asked.data} has not ({', '.join(sorted(unknown)[:6])}); test images "
                "must lie in sub-folders of the same names"
            )
    if asked.shots is not None:
        few_shots(rows, source.labels[rows], source.classes, asked.shots, 0)
    poorest = int(np.bincount(source.labels[rows], minlength=len(source.classes)).min())
    return source, max(1, asked.shots or min(poorest, MOST_LABELS // len(source.classes)))


# ------------------------------------------------------------------------------------------- how long each cell trains


def plan_table(table: Table, asked: AblationRequest, source: Source, shots: int, console: Console) -> dict[str, Any]:
    """The object that ablation.json holds: the cells with their settings, steps, FLOPs and measured times."""
    began = time.perf_counter()
    cells = all_cells(table, asked)
    first = draft_config(table, _base(cells), asked)
    found = training_data.scan_all(source, first, console)
    scanning = time.perf_counter() - began
    console.say("all cells: " + consequence(found.median_size, first.data.size, resolve.patch_of(first)))
    device = choose_device(first.train.device)
    measured: dict[str, dict[str, Any]] = {}
    with console.progress("measuring cells", len(cells)) as bar:
        for number, cell in enumerate(cells, 1):
            measured[cell.name] = measure(table, cell, asked, source, found, device, shots)
            bar.update(number)
    base = measured[_base(cells).name]
    for cell in cells:
        about, length = measured[cell.name], cell.length
        if cell.equal == "compute":
            length = base["batch_size"] * base["flops"]["training"] / about["batch_size"] / about["flops"]["training"]
        about["length"] = length
    if table.measure == "fine_tuned":
        set_fine_tuning_length(cells, asked, measured)

    steps, reason = base["plan_steps"], f"{base['plan_steps']} steps, as the recipe or the settings ask"
    set_by_hand = any(key in LENGTHS for key in parse(asked.settings))
    if table.measure == "linear" and base["length"] != 1 and not set_by_hand:
        # The row that the others are compared with is the one that the paper trains as long as its recipe says.
        steps = max(1, round(base["plan_steps"] / base["length"]))
        reason = (
            f"{steps} steps for 1x: the recipe's {base['plan_steps']} are those of {_base(cells).label}, the base row"
        )
    if asked.budget is not None:
        many = {cell.name: 1 if cell.name in SHARED else asked.seeds for cell in cells}
        probed = len(cells) * asked.seeds + 2 * sum(_controls(table, cell) for cell in cells)
        probing = sum(about["probe_seconds"] for about in measured.values()) / len(cells) * probed
        reading = sum((scanning + measured[name]["reading_seconds"]) * times for name, times in many.items())
        left = BUDGET_SHARE * asked.budget - probing - reading - (time.perf_counter() - began)
        each = sum(times * measured[name]["length"] * measured[name]["step_seconds"] for name, times in many.items())
        steps = int(left / each) if left > 0 else 0
        if steps < FEWEST_STEPS:
            least = (probing + reading + FEWEST_STEPS * each) / BUDGET_SHARE
            raise UserError(
                f"a budget of {duration(asked.budget)} is too short for {sum(many.values())} runs: reading and probing "
                f"alone take about {duration(probing + reading)}; give at least {duration(least)}, fewer seeds, or "
                "fewer labels with --shots"
            )
        reason = (
            f"{steps} steps: {sum(many.values())} runs in {duration(asked.budget)}, of which about "
            f"{duration(reading + probing)} go into reading and probing"
        )
    tuned = max(1, round(steps * base["length"]))
    if table.measure == "fine_tuned" and tuned != steps:
        reason += f"; so many for the pre-training, each cell is fine-tuned for {tuned}"
    return {
        "asked": asked.saved(),
        "title": table.title,
        "axis": table.axis,
        "note": table.note,
        "log": table.log,
        "base": list(table.base),
        "missing": [cell.label for cell in table.cells(base_config(table, asked)) if cell not in cells],
        "measure": table.measure,
        "steps": steps,
        "reason": reason,
        "shots": shots,
        "pool": POOL,
        "device": device,
        "fingerprint": source.fingerprint(),
        "cells": [
            {
                "name": cell.name,
                "label": cell.label,
                "theirs": cell.theirs,
                "at": cell.at,
                "recipe": recipe_of(table, cell, asked),
                "settings": cell_settings(table, cell, asked),
                "varied": list(cell.settings),
                "steps": max(1, round(steps * measured[cell.name]["length"])),
                "equal": cell.equal,
                "base": cell.base,
                "controls": _controls(table, cell),
                "tokenizer": cell.tokenizer,
                "fine_tunes": fine_tunes(table, cell),
                "paper": cell.paper._asdict(),
                **{key: value for key, value in measured[cell.name].items() if key not in ("plan_steps", "length")},
            }
            for cell in cells
        ],
        "versions": provenance.provenance_versions(),
        "git": provenance.git_state(),
        "command": shlex.join(["unmask", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def set_fine_tuning_length(cells: Sequence[Cell], asked: AblationRequest, measured: dict[str, dict[str, Any]]) -> None:
    """Lengths of a table whose cells are fine-tuned: all equal and, in a budget, a third of it; of a given Run all."""
    tuned = [measured[cell.name] for cell in cells if cell.name != PRETRAINED]
    said = asked.from_run is not None and any(key in LENGTHS for key in parse(asked.settings))
    if asked.budget is not None or said:
        length = 1.0
        if asked.from_run is None:
            each = asked.seeds * sum(about["step_seconds"] for about in tuned)
            length = measured[PRETRAINED]["step_seconds"] * (1 / PRETRAINING_SHARE - 1) / each
        for about in tuned:
            about["length"] = length


def _base(cells: Sequence[Cell]) -> Cell:
    return next(cell for cell in cells if cell.base)


def _controls(table: Table, cell: Cell) -> bool:
    """Raw pixels and the untrained encoder stand in the table once; of the family every encoder is another."""
    if table.measure == "fine_tuned":
        return False
    return cell.base or (table.name == "family" and cell.name.endswith("-equal-steps"))


def measure(
    table: Table, cell: Cell, asked: AblationRequest, source: Source, found: Scan, device: str, shots: int
) -> dict[str, Any]:
    """What one cell costs: FLOPs as counted, parameters and, for a budget, seconds as measured."""
    config = draft_config(table, cell, asked, source)
    images, plan = training_data.prepare(source, found, config, device, budget=None, reasons=())
    about: dict[str, Any] = {
        "plan_steps": plan.steps,
        "batch_size": plan.batch_size,
        "parameters": plan.parameters,
        "encoder_parameters": plan.encoder_parameters,
        "flops": {**vars(flops := count_flops(config, plan.images)), "forward": flops.forward},
        "precision": plan.precision,
    }
    if asked.budget is None:
        return about
    batch, workers = config.train.batch_size, plan.workers
    load = training_data.batch_seconds(images, batch, workers, cached=plan.cached).median
    decode = training_data.batch_seconds(images, batch, 0, cached=False).median / batch
    compute = measure_step_seconds(
        config, plan.images, plan.micro_batch, plan.precision, device, seconds=MEASURE_SECONDS
    )
    tested = len(open_source(asked.test)) if asked.test is not None else len(source) // 5
    probed, fitting = tested + shots * len(source.classes), FIT_SECONDS
    if table.measure == "fine_tuned":  # a cell is tested, the pre-training is not
        probed, fitting = tested * fine_tunes(table, cell), 0.0
    return about | {
        "step_seconds": with_loading(compute, load, workers),
        "reading_seconds": decode * plan.num_images * plan.cached,
        "probe_seconds": probed * (decode + encode_seconds(config, plan)) + fitting,
    }


@torch.no_grad()
def encode_seconds(config: Config, plan: Plan) -> float:
    """Time for one image of a probe to pass the encoder."""
    method: Method = fresh_method(config, plan.images).to(plan.device)
    batch = example_batch(plan.images, EVAL_BATCH, plan.device)
    with eval_mode(method), autocast(plan.precision, plan.device):
        wait_for(method.encoder(batch.images).patches.flatten()[0])  # warms up
        began = time.perf_counter()
        for _ in range(MEASURED_BATCHES):
            wait_for(method.encoder(batch.images).patches.flatten()[0])
    return (time.perf_counter() - began) / (EVAL_BATCH * MEASURED_BATCHES)
