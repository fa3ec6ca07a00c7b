"""`ablation.json`: the request for a table and the settings and steps of its cells, decided when the table is begun."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from unmask.comparison.paper_tables import SHARED, Paper
from unmask.comparison.run_facts import ImageFlops
from unmask.config import ConfigError
from unmask.data.sources.source import Source
from unmask.engine.training_data import DataError
from unmask.run import Run

PLAN_FILE = "ablation.json"


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """The user's request for a table; after the table has begun, only `seeds` can be changed.

    table: a name in `paper_tables.TABLES`. data, test: labelled images; only probes and fine-tuning use the labels.
    recipe: the base of every cell, by default mae_nano (`family` has its own recipes). settings: KEY=VALUE for every
    cell. budget: seconds for the whole table, by default the length of the recipe. shots: labels per class, by default
    a number that keeps probes short, or all labels in fine-tuning. tokenizer: run of a dVAE for the cells that need
    one, by default trained first. from_run: pre-trained run that fig9 fine-tunes, by default trained first.
    """

    table: str
    data: str
    test: str | None = None
    recipe: str | None = None
    settings: tuple[str, ...] = ()
    budget: float | None = None
    seeds: int = 1
    shots: int | None = None
    tokenizer: str | None = None
    from_run: str | None = None

    @property
    def base_recipe(self) -> str:
        """The recipe that every cell varies; valid after `choose_recipe`."""
        assert self.recipe is not None, "choose_recipe replaces None"
        return self.recipe


@dataclass(frozen=True, kw_only=True)
class CellCost:
    """The cost of a cell: counted FLOPs and, with a time budget, measured seconds."""

    batch_size: int
    parameters: int
    encoder_parameters: int
    flops: ImageFlops
    precision: str
    step_seconds: float | None = None
    reading_seconds: float | None = None
    probe_seconds: float | None = None

    @property
    def training_flops(self) -> int:
        """FLOPs of the forward and backward pass of one image."""
        assert self.flops.training is not None, "every cell has a training task"
        return self.flops.training


@dataclass(frozen=True, kw_only=True)
class PlannedCell(CellCost):
    """A cell with its cost, final settings and steps; the fields that are not listed here are those of `Cell`.

    settings: all settings except length and seed. varied: the settings that distinguish this cell. controls: whether
    its probes include controls. fine_tunes: whether it is fine-tuned from another run.
    """

    name: str
    label: str
    theirs: str
    at: float | None
    recipe: str
    settings: tuple[str, ...]
    varied: tuple[str, ...]
    steps: int
    equal: str
    base: bool
    controls: bool
    tokenizer: bool
    fine_tunes: bool
    paper: Paper

    @property
    def shared(self) -> bool:
        """Whether other cells start from the run of this cell; if so, the cell is not compared with others."""
        return self.name in SHARED

    def run_name(self, seed: int) -> str:
        """Return the folder name of the run of this cell with a training seed."""
        return self.name if self.shared else f"{self.name}-seed-{seed}"


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """The plan of a table, decided when it is begun.

    missing: labels of the cells that this version cannot train. steps: the steps of a cell of length 1. reason: how the
    steps were chosen, as text. shots: labels per class for the probes. pool: the pooling by which cells are compared.
    fingerprint: fingerprint of the images. versions, git, time: provenance of the process that made the plan. command:
    the shell command, or "" for a call from Python.
    """

    asked: TableRequest
    title: str
    axis: str
    note: str
    log: bool
    base: tuple[str, ...]
    missing: tuple[str, ...]
    measure: str
    steps: int
    reason: str
    shots: int
    pool: str
    device: str
    fingerprint: str
    cells: tuple[PlannedCell, ...]
    versions: dict[str, Any] = field(default_factory=dict)
    git: dict[str, Any] | None = None
    command: str = ""
    time: str = ""

    def runs_of(self, cell: PlannedCell) -> range:
        """Return the seeds with which a cell is trained; a shared cell is trained only once."""
        return range(1 if cell.shared else self.asked.seeds)


_PLAN = TypeAdapter(TablePlan)


def write_plan(folder: Path, plan: TablePlan) -> None:
    """Write the plan of a table into its folder."""
    Run(folder).write(PLAN_FILE, _PLAN.dump_python(plan, mode="json"))


def has_plan(folder: Path) -> bool:
    """Return whether a table was begun in this folder."""
    return (folder / PLAN_FILE).exists()


def load_plan(folder: Path) -> TablePlan:
    """Read the plan of a table from its folder."""
    return _PLAN.validate_python(Run(folder).read(PLAN_FILE))


def continue_plan(folder: Path, request: TableRequest, source: Source) -> TablePlan:
    """Read the plan of a table that was begun before, and set the number of seeds that is requested now.

    Raises ConfigError if anything else in the request differs, and DataError if the images have changed.
    """
    plan = load_plan(folder)
    for key, value in vars(request).items():
        before = getattr(plan.asked, key)
        if key != "seeds" and before != value:
            raise ConfigError(
                f"{folder} was begun with {key} {before!r}, got {value!r}; only --seeds can change: repeat the "
                "first command, or choose another --out"
            )
    if request.seeds < plan.asked.seeds:
        raise ConfigError(
            f"{folder} was begun with {plan.asked.seeds} seeds, got {request.seeds}; request at least "
            f"{plan.asked.seeds}, or choose another --out"
        )
    if source.fingerprint() != plan.fingerprint:
        raise DataError(
            f"the images of {request.data} have changed since this table was begun, so cells cannot be compared; "
            "restore the old files, or choose another --out"
        )
    if request.seeds > plan.asked.seeds:
        plan = replace(plan, asked=request)
        write_plan(folder, plan)
    return plan
