"""`unmask ablate`: train and probe every cell of one of the paper's tables, and set the numbers beside the paper's.

A folder holds the whole table: `ablation.json` (what was asked for, and the steps of every cell, decided once), one Run
for each cell and seed, and after every cell `table.json` and `table.html`, which are made from the Runs alone. So the
same command goes on where it was stopped: finished cells are passed over, a half-trained one is resumed exactly, a
missing probe is made. Seeds are the outer loop: the table is full once before the second seed begins.

The cells of fig9 are classifiers instead, fine-tuned from one pre-trained Run, which is trained first or given.

The tables themselves are in `comparison/paper_tables.py`, how numbers are set beside the paper's in
`comparison/table_page.py`.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unmask.comparison.paper_tables import PRETRAINED, SHARED, TOKENIZER, Cell, Table, find_table
from unmask.comparison.table_page import POOL, find_probe, write_table
from unmask.config import Config, ConfigError, parse
from unmask.console import Console, duration
from unmask.data.scan import Scan
from unmask.data.sources.open_source import Source, open_source, require_labels
from unmask.data.splits import HOLD_OUT_FOR_TEST, hold_out
from unmask.engine import checkpoint, pretrain
from unmask.engine.costs import promised_tokenizer
from unmask.engine.device import autocast, choose_device, wait_for
from unmask.engine.flops import count_flops
from unmask.engine.image_size import consequence
from unmask.engine.load import read_config, read_plan
from unmask.engine.plan import BUDGET_SHARE, Plan, example_batch, fresh_method, measure_step_seconds, with_loading
from unmask.errors import TrainingFailed, UserError
from unmask.evals.images import EVAL_BATCH
from unmask.evals.probe import few_shots, require_classes
from unmask.evals.run_probe import probe_kinds
from unmask.finetuning import finetune
from unmask.method import Method
from unmask.nn.modes import eval_mode
from unmask.recipes import catalogue
from unmask.report.run_page import write_report
from unmask.results import find_score
from unmask.run import Run, RunError

KINDS = ("linear", "knn")
MOST_LABELS = 5_000  # by default: a probe of a small encoder then takes seconds, and its test images tell more
MEASURE_SECONDS = 2.0
MEASURED_BATCHES = 3
FIT_SECONDS = 3.0
FEWEST_STEPS = 20
LENGTHS = ("train.steps", "train.epochs")
PRETRAINING_SHARE = 2 / 3  # of a budget for training, where every cell is fine-tuned from one pre-training


@dataclass(frozen=True)
class Asked:
    """What a person asked for; a table is one experiment, so none of it may change while it is made (but `seeds`)."""

    table: str
    data: str
    test: str | None
    recipe: str
    settings: tuple[str, ...]
    budget: float | None
    seeds: int
    shots: int | None
    tokenizer: str | None
    from_run: str | None

    def saved(self) -> dict[str, Any]:
        return vars(self) | {"settings": list(self.settings)}


def ablate(
    table: str,
    data: str,
    *,
    test: str | None = None,
    recipe: str | None = None,
    out: str | Path | None = None,
    budget: float | None = None,
    seeds: int = 1,
    shots: int | None = None,
    settings: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    from_run: str | Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Make the table in `out`, or go on making it, and return what `table.json` holds; "state" says how it ended.

    data, test: labelled images; the labels are used by the probes, and by fine-tuning, only. recipe: the base of every
    cell, mae_nano when None (`family` has its own). budget: seconds for the whole table; None for the recipe's own
    length. shots: labels per class for the probes, None for as many as keep a probe short (for fine-tuning: all).
    tokenizer: a dVAE's Run for the cells that need one; None trains one first. from_run: the pre-trained Run that fig9
    fine-tunes; None trains one first. State "finished", "stopped" (resumable), or "failed" when a cell could not be
    made. Raises ValueError for what a person can mend, before anything is trained.
    """
    console = console or Console()
    which = find_table(table)
    asked = Asked(
        table, str(data), test, choose_recipe(which, recipe, from_run), tuple(settings), budget, seeds, shots,
        None if tokenizer is None else str(tokenizer), None if from_run is None else str(from_run),
    )  # fmt: skip
    refuse_settings(which, asked)
    source, most_shots = require_probe(asked)
    folder = Path(out) if out is not None else default_out(asked, source)
    with claim(folder):
        decided = read_decided(folder, asked, source)
        if decided is None:
            decided = decide(which, asked, source, min(asked.shots or most_shots, most_shots), console)
            Run(folder).write("ablation.json", decided)
        say_decided(decided, console)
        stopped, said = False, sentences(write_table(folder, "running"))
        try:
            with terminable():
                for seed in range(asked.seeds):
                    for cell in decided["cells"]:
                        if cell["name"] not in SHARED or seed == 0:
                            make(folder, decided, cell, seed, console)
                            now = sentences(write_table(folder, "running"))
                            if now[cell["name"]] != said[cell["name"]]:  # what was there before is in the table below
                                console.say(now[cell["name"]])
                            said = now
        except KeyboardInterrupt:
            stopped = True
        summary = write_table(folder, "stopped" if stopped else "finished")
    for row in summary["rows"]:
        console.say("  " + row["sentence"])
    console.say(summary["agreement"]["sentence"])
    if summary["helped"]:
        console.say(summary["helped"])
    for line in summary["not_comparable"]:
        console.warn(line)
    console.say(f"table: {folder / 'table.html'}")
    if stopped:
        console.say(f"stopped; go on with: {shlex.join(['unmask', *sys.argv[1:]])} (the same command)")
    return summary


def sentences(summary: dict[str, Any]) -> dict[str, str]:
    return {row["name"]: row["sentence"] for row in summary["rows"]}


# ------------------------------------------------------------------------------------------- before anything is trained


def choose_recipe(table: Table, recipe: str | None, from_run: str | Path | None = None) -> str:
    """The base recipe. Raises ConfigError for one, or for a run, that the table cannot be made from."""
    if from_run is not None:
        if table.measure != "fine_tuned":
            raise ConfigError(
                f"--from was given, but every cell of table {table.name} is a pre-training of its own; leave it out"
            )
        if recipe is not None:
            raise ConfigError(
                f"both --from and --recipe {recipe} came; the run of --from has its recipe: leave one out"
            )
        return read_config(Run.open(from_run)).recipe
    if table.name == "family":
        if recipe is not None:
            raise ConfigError(
                f"recipe {recipe!r} came, but every method of the family has its own recipe; leave --recipe out"
            )
        return "mae_nano"
    method = catalogue.find(recipe or "mae_nano").method.name
    if method != "mae":
        raise ConfigError(
            f"recipe {recipe!r} trains {method}, but table {table.name} varies settings of mae; choose one of "
            f"{', '.join(name for name in catalogue.all_recipes() if name.startswith('mae'))}"
        )
    return recipe or "mae_nano"


def refuse_settings(table: Table, asked: Asked) -> None:
    """Settings that the table itself varies, or that belong to an option, would be ignored without a word."""
    keys = parse(asked.settings)
    if asked.seeds < 1:
        raise ConfigError(f"{asked.seeds} seeds came; at least 1 was expected")
    if "train.seed" in keys:
        raise ConfigError("train.seed cannot be set: the cells are trained with seeds 0, 1, ...; say how many: --seeds")
    if clash := [key for key in table.varies if key in keys and not (key in LENGTHS and asked.budget is None)]:
        what = f"the budget decides {clash[0]}" if clash[0] in LENGTHS else f"table {table.name} varies {clash[0]}"
        raise ConfigError(f"{clash[0]} cannot be set: {what}; leave it out")
    pretrain.refuse_conflicts(keys, asked.budget)
    if asked.from_run is not None and (learnt := [key for key in keys if not key.startswith(("data.", "train."))]):
        raise ConfigError(
            f"{learnt[0]} was set, but the run of --from is trained already, and a fine-tuned cell takes only settings "
            "of data and train; leave it out"
        )
    for cell in all_cells(table, asked):
        drafted(table, cell, asked)


def all_cells(table: Table, asked: Asked) -> tuple[Cell, ...]:
    """The cells that this version can make, first what they are all made from where that has to be trained."""
    known = catalogue.all_recipes()
    cells = tuple(
        cell for cell in table.cells(base_config(table, asked)) if cell.recipe is None or cell.recipe in known
    )
    if asked.tokenizer is None and any(cell.tokenizer for cell in cells):
        return Cell(TOKENIZER, "the tokenizer (dVAE)", recipe=tokenizer_recipe(table, asked)[0]), *cells
    if asked.tokenizer is not None and not any(cell.tokenizer for cell in cells):
        raise ConfigError(f"--tokenizer was given, but no cell of table {table.name} needs one; leave it out")
    if table.measure == "fine_tuned" and asked.from_run is None:
        return Cell(PRETRAINED, "the pre-training (MAE)"), *cells
    return cells


def base_config(table: Table, asked: Asked) -> Config:
    """What the cells are variations of: the recipe or, where all are fine-tuned from one Run, that Run's own."""
    if table.measure != "fine_tuned":
        return catalogue.find(asked.recipe)
    if asked.from_run is None:
        return pretrain.resolve(catalogue.find(asked.recipe), [*table.base, *asked.settings])
    run = Run.open(asked.from_run)
    config, spec = read_config(run), read_plan(run).images
    data = config.data.model_copy(update={"size": spec.size, "channels": spec.channels})
    train = config.train.model_copy(update={"steps": read_plan(run).steps})
    return pretrain.resolve(config.model_copy(update={"data": data, "train": train}), list(asked.settings))


def tokenizer_recipe(table: Table, asked: Asked) -> tuple[str, str]:
    """The recipe of the dVAE that is trained first, and the size, as KEY=VALUE, at which each patch has a code."""
    settings = [text for text in asked.settings if table.name != "family" or not text.strip().startswith("method.")]
    config: Any = pretrain.resolve(catalogue.find(asked.recipe), [*table.base, *settings])
    patch, size = config.method.encoder.patch, config.data.size
    name = "dvae_small" if min(patch) >= 8 else "dvae_nano"
    dvae: Any = catalogue.find(name)
    code = dvae.method.encoder.patch
    return name, f"data.size=[{size[0] // patch[0] * code[0]},{size[1] // patch[1] * code[1]}]"


def fine_tunes(table: Table, cell: Cell) -> bool:
    return table.measure == "fine_tuned" and cell.name != PRETRAINED


def recipe_of(table: Table, cell: Cell, asked: Asked) -> str:
    return finetune.PLAIN if fine_tunes(table, cell) else cell.recipe or asked.recipe


def cell_settings(table: Table, cell: Cell, asked: Asked) -> list[str]:
    """Of one cell but for its length and seed: the table's base, then what was asked for, then what the cell varies.

    The dVAE that cells are tokenized with is no cell of the comparison: of what was asked for it gets the part that is
    not about the method. A fine-tuned cell has what its pre-training has, which is known from that.
    """
    if fine_tunes(table, cell):
        return [*(asked.settings if asked.from_run is not None else ()), *cell.settings]
    if cell.name == TOKENIZER:
        own = ("method.", "data.size")
        kept = [setting for setting in asked.settings if not setting.strip().startswith(own)]
        return [*kept, tokenizer_recipe(table, asked)[1]]
    return [*table.base, *asked.settings, *cell.settings]


def draft_settings(table: Table, cell: Cell, asked: Asked) -> list[str]:
    """`cell_settings` as far as they are known before the tokenizer is trained: its size, and a promise of weights."""
    settings, recipe = cell_settings(table, cell, asked), recipe_of(table, cell, asked)
    if not cell.tokenizer:
        return settings
    if asked.tokenizer is not None:
        return pretrain.with_options(None, recipe, settings, tokenizer=asked.tokenizer, palette=None, masks=None)
    return [*promised_tokenizer(recipe, settings, tokenizer_recipe(table, asked)[0])[1], *settings]


def drafted(table: Table, cell: Cell, asked: Asked, source: Source | None = None) -> Config:
    """The configuration of a cell as far as it is known before anything is trained, tried out."""
    settings = draft_settings(table, cell, asked)
    if not fine_tunes(table, cell):
        pretrain.drafted(None, recipe_of(table, cell, asked), settings, None)
        return pretrain.resolve(catalogue.find(recipe_of(table, cell, asked)), settings, source=source)
    classes = ["one", "other"] if source is None else source.classes
    config = pretrain.resolve(finetune.fine_tuning(base_config(table, asked), classes), settings, source=source)
    pretrain.require_method(config)
    return config


def require_probe(asked: Asked) -> tuple[Source, int]:
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


def default_out(asked: Asked, source: Source) -> Path:
    stem = "".join(letter if letter.isalnum() else "-" for letter in Path(source.name).name.split(".")[0]).strip("-")
    return Path("runs") / f"{stem or 'images'}-table-{asked.table}"


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold the folder for one ablation. Raises RunError when something else lies in it."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file; a table needs a folder: choose another --out")
    if folder.is_dir() and not (folder / "ablation.json").exists():
        inside = [entry.name for entry in folder.iterdir() if entry.name != ".lock" and entry.suffix != ".partial"]
        if inside:
            raise RunError(
                f"{folder} is not empty ({', '.join(sorted(inside)[:3])}) and holds no ablation.json to go on with; "
                "choose another --out"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the folder {folder} cannot be made: {error.strerror}; choose another --out") from error
    with Run(folder).lock():
        yield


def read_decided(folder: Path, asked: Asked, source: Source) -> dict[str, Any] | None:
    """What was decided when this table was begun; None for a new one. Raises ConfigError when something else is asked.

    More seeds than at first may be asked for; the cells keep their steps.
    """
    if not (folder / "ablation.json").exists():
        return None
    decided = Run(folder).read("ablation.json")
    was = decided["asked"]
    for key, value in asked.saved().items():
        if key != "seeds" and was.get(key) != value:
            raise ConfigError(
                f"{folder} was begun with {key} {was.get(key)!r}, now {value!r} came; a table is one experiment: give "
                "what was given then, or choose another --out"
            )
    if asked.seeds < was["seeds"]:
        raise ConfigError(f"{folder} was begun with {was['seeds']} seeds, now {asked.seeds} came; give as many or more")
    if source.fingerprint() != decided["fingerprint"]:
        raise pretrain.DataError(
            f"the images of {asked.data} have changed since this table was begun, so its cells could not be compared; "
            "bring the old files back, or choose another --out"
        )
    if asked.seeds > was["seeds"]:
        decided["asked"] = asked.saved()
        Run(folder).write("ablation.json", decided)
    return decided


# ------------------------------------------------------------------------------------------- how long each cell trains


def decide(table: Table, asked: Asked, source: Source, shots: int, console: Console) -> dict[str, Any]:
    """The object that ablation.json holds: the cells with their settings, steps, FLOPs and measured times."""
    began = time.perf_counter()
    cells = all_cells(table, asked)
    first = drafted(table, _base(cells), asked)
    found = pretrain.scan_all(source, first, console)
    scanning = time.perf_counter() - began
    console.say("all cells: " + consequence(found.median_size, first.data.size, pretrain.patch_of(first)))
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
        share_out(cells, asked, measured)

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
        "versions": pretrain.provenance_versions(),
        "git": pretrain.git_state(),
        "command": shlex.join(["unmask", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def share_out(cells: Sequence[Cell], asked: Asked, measured: dict[str, dict[str, Any]]) -> None:
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
    table: Table, cell: Cell, asked: Asked, source: Source, found: Scan, device: str, shots: int
) -> dict[str, Any]:
    """What one cell costs: FLOPs as counted, parameters and, for a budget, seconds as measured."""
    config = drafted(table, cell, asked, source)
    images, plan = pretrain.prepare(source, found, config, device, budget=None, reasons=())
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
    load = pretrain.batch_seconds(images, batch, workers, cached=plan.cached).median
    decode = pretrain.batch_seconds(images, batch, 0, cached=False).median / batch
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


def say_decided(decided: dict[str, Any], console: Console) -> None:
    asked = decided["asked"]
    console.say(
        f"{decided['title']}: {len(decided['cells'])} cells, {asked['seeds']} seed{'s' * (asked['seeds'] > 1)}, recipe "
        f"{asked['recipe']}; {decided['reason']}"
        + (f"; probes with {decided['shots']} labels per class" * (decided["measure"] == "linear"))
    )
    if decided["missing"]:
        console.warn(f"not in this version: {', '.join(decided['missing'])}")


# ------------------------------------------------------------------------------------------------------ one cell


@contextmanager
def terminable() -> Iterator[None]:
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
                finetune.score(run)
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
    """The finished Run of one cell. Raises KeyboardInterrupt when it was asked to stop."""
    if (place / "plan.json").exists():
        run = Run.open(place)
        if run.finished and checkpoint.is_complete(run, read_plan(run).steps):
            return run
        console.say(f"{place.name}: going on")
        run = (finetune if cell["fine_tunes"] else pretrain).resume(place, console=console)
    else:
        shutil.rmtree(place, ignore_errors=True)  # begun, and ended before there was anything to go on with
        console.say(f"{place.name}: {cell['steps']} steps")
        asked = decided["asked"]
        settings = [*without_length(cell["settings"]), f"train.steps={cell['steps']}", f"train.seed={seed}"]
        if not cell["fine_tunes"]:  # one size for all cells, whatever the images
            settings = [*own_size(cell["recipe"], settings), *settings]
        if cell["fine_tunes"]:
            weights = asked["from_run"] or finished(folder, PRETRAINED, "pre-training")
            run = finetune.fine_tune(
                weights,
                asked["data"],
                out=place,
                test=asked["test"],
                shots=asked["shots"],
                recipe=finetune.PLAIN,
                settings=[*settings, f"train.test_every={cell['steps']}"],
                console=console,
            )
        else:
            with_tokenizer = {}
            if cell["tokenizer"]:
                with_tokenizer["tokenizer"] = asked["tokenizer"] or finished(folder, TOKENIZER, "tokenizer")
            run = pretrain.pretrain(
                asked["data"], recipe=cell["recipe"], out=place, settings=settings, console=console, **with_tokenizer
            )
    if run.status().get("state") == "stopped":
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


def finished(folder: Path, name: str, what: str) -> Path:
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
    probe_kinds(
        run.path,
        decided["asked"]["data"],
        test=decided["asked"]["test"],
        kinds=missing,
        shots=decided["shots"],
        controls=controls,
        seed=0,
        step=None,
        device=decided["device"],
        console=Console(quiet=True),  # the row of the table says it all
    )
