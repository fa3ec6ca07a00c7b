"""`unmask set RUN KEY=VALUE...`: change settings of a run that has begun, and keep a record of it.

The files of a run contain digests, so they cannot be edited by hand. `unmask set` rejects changes that would invalidate
the weights, updates the plan if necessary, and records the change with its author, time and step in `provenance.json`
("edits"). The report shows this record.

`train.steps` and `train.epochs` make a run longer or shorter. From the step of the change on, the learning rate follows
the curve of a run of the new length. Over the share `optim.warmup` of the remaining steps, the learning rate changes
linearly from its last value to that curve. Earlier steps keep their schedule (`Plan.earlier`), so the run can still be
repeated exactly from any of its checkpoints.

The change is first written to a journal file and then applied. If a crash interrupts a change, the next `unmask resume`
or `unmask set` completes it.
"""

from __future__ import annotations

import getpass
import json
import math
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from unmask.config import Config, ConfigError, keys, override, parse, task_names
from unmask.console import Console
from unmask.engine import checkpoint
from unmask.engine.device import choose_device, choose_precision
from unmask.engine.load import read_config, read_plan
from unmask.engine.make_plan import require_micro_batch
from unmask.engine.training_plan import Plan
from unmask.run import CONFIG, EDITS, PLAN, PROVENANCE, Run

JOURNAL = ".edit.json"
LENGTH = ("train.steps", "train.epochs")
SCHEDULE = (*LENGTH, "optim.base_lr", "optim.final_lr", "optim.warmup")

_WEIGHTS = "the weights were trained with this setting; start a new run from them: unmask pretrain DATA --from {run}"
_ORDER = (
    "the order of the images depends on this setting; start a new run from these weights: "
    "unmask pretrain DATA --from {run}"
)
_TESTS = "the test images of a run must stay the same; start a new run: unmask finetune"
_BEGUN = "this setting only has an effect when a run begins"
REFUSED = {
    "recipe": "this setting records the origin of the others",
    "graft": "weights are only copied before the first step",
    "data.source": "a run keeps its images; if they have moved: unmask resume {run} --data NEW; for others start a new "
    "run from these weights: unmask pretrain DATA --from {run}",
    "data.exclude": "a run keeps its images; start a new run from these weights: unmask pretrain DATA --from {run}",
    "data.test": _TESTS, "data.annotations": _TESTS, "data.test_annotations": _TESTS, "data.test_split": _TESTS,
    "data.size": _WEIGHTS, "data.channels": _WEIGHTS, "data.mean": _WEIGHTS, "data.std": _WEIGHTS,
    "data.repeats": _ORDER, "train.batch_size": _ORDER, "train.seed": _ORDER,
    "data.nodata": _WEIGHTS, "data.alpha": _WEIGHTS, "data.pages": _WEIGHTS, "data.axes": _WEIGHTS,
    "data.held_out": _BEGUN, "data.scan_sample": _BEGUN, "data.cache_gib": f"{_BEGUN}; set data.cache",
    "method.name": _WEIGHTS, "method.encoder": _WEIGHTS, "method.decoder": _WEIGHTS, "method.tokenizer": _WEIGHTS,
    "method.palette": _WEIGHTS, "method.classes": _WEIGHTS, "method.ignored": _WEIGHTS,
    "method.values": _WEIGHTS, "method.stored_pixels": _WEIGHTS,
    "optim.name": "the stored moments belong to the current optimiser",
}  # fmt: skip
"""Settings, or groups of settings, that cannot be changed after a run has begun, with the reason."""
INEXACT = (
    "train.precision", "train.device", "train.micro_batch", "train.compile", "train.parallel", "train.recompute",
    "data.cache", "data.resize",
)  # fmt: skip
"""Settings that change results by rounding only."""


def set_values(run_folder: str | Path, assignments: Iterable[str], *, console: Console | None = None) -> dict[str, Any]:
    """Change settings of a run that is not training now; return the record of the change, or {} if nothing changed.

    assignments: KEY=VALUE, as for `--set`. Raises ConfigError for a setting that is unknown, invalid or cannot be
    changed, RunInUse, and RunError.
    """
    console = console or Console(quiet=True)
    asked = parse(assignments)
    if not asked:
        raise ConfigError("got no settings; expected KEY=VALUE, for example train.steps=20000")
    run = Run.open(run_folder)
    with run.lock():
        complete(run)
        config, plan = read_config(run), read_plan(run)
        run.add_digests()
        step = checkpoint.newest_step(run) or 0
        new = _checked(run, config, plan=plan, asked=asked, step=step)
        new_plan = replanned(config, new, plan=plan, asked=asked, step=step)
        changes = {key: [value_of(config, key), value_of(new, key)] for key in keys(new)}
        changes = {key: pair for key, pair in changes.items() if pair[0] != pair[1]}
        if not changes and new_plan == plan:
            console.print(f"{run.path}: already has these settings; nothing was changed")
            return {}
        edit = _record(step, changes or {key: [value, value] for key, value in asked.items()})
        tree = {"config": new.model_dump(mode="json"), "plan": new_plan.model_dump(mode="json"), "edit": edit}
        run.write(JOURNAL, tree)
        complete(run)
        _print_changes(run, changes, plan=plan, new=new_plan, step=step, console=console)
    return edit


def complete(run: Run) -> None:
    """Apply the change in the journal file, if there is one. The caller holds the run's lock."""
    if not (run.path / JOURNAL).exists():
        return
    found = run.read(JOURNAL)
    for name, value in ((PLAN, found["plan"]), (CONFIG, found["config"])):
        if run.read(name) != value:
            run.write(name, value)
    add_edit(run, found["edit"])
    step, steps = found["edit"]["step"], found["plan"]["steps"]
    if (run.path / "status.json").exists() and steps:
        state = run.status().state or "stopped"
        longer = state == "finished" and steps > step
        run.set_status("stopped" if longer else state, step, total=steps)
    (run.path / JOURNAL).unlink()


def add_edit(run: Run, edit: Mapping[str, Any]) -> None:
    """Append a change to the record in provenance.json, unless the record contains it already."""
    made = run.read_if_present(PROVENANCE)
    if edit not in made.get(EDITS, []):
        run.write(PROVENANCE, made | {EDITS: [*made.get(EDITS, []), dict(edit)]})


def _record(step: int, changes: Mapping[str, list[Any]]) -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # users in containers may have no name
        user = "unknown"
    now = time.strftime("%Y-%m-%d %H:%M:%S%z")
    return {"time": now, "by": f"{user}@{socket.gethostname()}", "step": step, "changes": dict(changes), "note": ""}


def _checked(run: Run, config: Config, plan: Plan, asked: Mapping[str, Any], step: int) -> Config:
    """Return the new configuration. Raises ConfigError for invalid changes."""
    for key in asked:
        for refused, why in REFUSED.items():
            if key == refused or key.startswith(f"{refused}."):
                raise ConfigError(f"{key} cannot be changed in a run that has begun: {why.format(run=run.path)}")
    wanted = [key for key in LENGTH if key in asked]
    if len(wanted) > 1:
        raise ConfigError("got both train.steps and train.epochs; leave one of them out")
    if wanted and asked[wanted[0]] is None:
        raise ConfigError(f"got {wanted[0]}=none; expected a number")
    if wanted and plan.steps == 0:
        raise ConfigError(
            f"{wanted[0]} cannot be set: the weights in {run.path} were imported, not trained; start a new run from "
            f"them: unmask pretrain DATA --from {run.path}"
        )
    other = [f"{key}=none" for key in LENGTH if wanted and key not in wanted]
    new = override(config, [*other, *(f"{key}={text_of(value)}" for key, value in asked.items())])
    supervised = config.method.name in task_names()
    if "train.test_every" in asked and not supervised:
        raise ConfigError(
            f"train.test_every was set, but a run of {config.method.name} is not tested on annotated images; leave it "
            "out"
        )
    if (new.optim.average is None) != (config.optim.average is None) and step:
        raise ConfigError(
            "optim.average can be changed, but neither set nor unset after the first step; start a new run"
        )
    require_micro_batch(new)
    require_same_weights(config, new, plan)
    return new


def require_same_weights(config: Config, new: Config, plan: Plan) -> None:
    """Raise ConfigError if the checkpoints of a run with the settings `config` would not fit the settings `new`."""
    with torch.device("meta"):
        methods = [each.build(plan.images) for each in (config, new)]
    before, after = (method.state_dict() for method in methods)
    shapes = {name: (before.get(name), after.get(name)) for name in [*before, *after]}
    for name, (old, now) in shapes.items():
        if old is None or now is None or old.shape != now.shape:
            sizes = [None if tensor is None else tuple(tensor.shape) for tensor in (old, now)]
            raise ConfigError(
                f"this cannot be changed in a run that has begun: its weights would no longer fit ({name}: {sizes[0]} "
                f"would become {sizes[1]}); start a new run"
            )
    own, other = ({n for n, value in method.named_parameters() if value.requires_grad} for method in methods)
    if own != other:
        name = min(own ^ other)
        raise ConfigError(
            f"this cannot be changed in a run that has begun: {name} would "
            f"{'no longer' if name in own else 'now'} be trained, and the stored optimiser state would not fit; start "
            "a new run"
        )


def replanned(config: Config, new: Config, plan: Plan, asked: Mapping[str, Any], step: int) -> Plan:
    """Return the plan for changed settings. Entries that do not depend on the changed settings stay the same."""
    train, changes = new.train, dict[str, Any]()
    if new.data.workers is not None:
        changes["workers"] = new.data.workers
    if new.data.cache is not None:
        changes["cached"] = new.data.cache
    if "train.device" in asked:
        changes["device"] = choose_device(train.device)
    if {"train.device", "train.precision"} & asked.keys():
        changes["precision"] = choose_precision(train.precision, changes.get("device", plan.device))[0]
    if train.micro_batch is not None:
        changes |= {"micro_batch": train.micro_batch, "accumulation": train.batch_size // train.micro_batch}
    if "train.parallel" in asked and train.parallel != "auto":  # "auto" keeps the engine of the run
        changes["parallel"] = train.parallel
    if train.picture_every is not None:
        changes["picture_every"] = train.picture_every
    if train.test_every is not None and config.method.name in task_names():
        changes["test_every"] = train.test_every
    plan = plan.model_copy(update=changes)
    return rescheduled(new, plan, asked, step) if set(SCHEDULE) & asked.keys() else plan


def rescheduled(new: Config, plan: Plan, asked: Mapping[str, Any], step: int) -> Plan:
    """Return the plan with a new length or learning rate from `step` on; see the module docstring."""
    steps = plan.steps
    if "train.steps" in asked and new.train.steps is not None:
        steps = new.train.steps
    elif "train.epochs" in asked and new.train.epochs is not None:
        steps = max(1, math.ceil(new.train.epochs * plan.num_images / plan.batch_size))
    if steps < max(1, step):
        raise ConfigError(
            f"got {steps} steps in all, but this run has done {step} already; give {step} to end the run here, or more"
        )
    peak = plan.peak_lr if "optim.base_lr" not in asked else new.optim.base_lr * plan.batch_size / 256
    warmup = round(new.optim.warmup * steps) if "optim.warmup" in asked or step <= plan.warmup_steps else None
    changes = {
        "steps": steps,
        "warmup_steps": plan.warmup_steps if warmup is None else warmup,
        "peak_lr": peak,
        "final_lr": new.optim.final_lr * peak,
        "epochs": steps * plan.batch_size / plan.num_images,
        "replans": (),
        "budget": None if set(LENGTH) & asked.keys() else plan.budget,
    }
    if all(getattr(plan, key) == value for key, value in changes.items() if key != "replans"):
        return plan
    if step == 0:
        return plan.model_copy(update=changes)
    ramp, last = round(new.optim.warmup * (steps - step)), plan.lr(step - 1)
    why = f"changed at step {step}: {steps} steps in all, {plan.steps} were planned"
    if steps > step:
        why += f"; the learning rate goes from {last:.3g} to the curve of the new length over {ramp} steps"
    # No step was trained since an earlier change at the same step, so keep the plan from before that change.
    before = plan.earlier if plan.earlier is not None and plan.since == step else plan
    earlier = before.model_copy(update={"excluded": (), "test_rows": (), "reasons": ()})
    begun = {"earlier": earlier, "since": step, "ramp": ramp, "from_lr": last, "reasons": (*plan.reasons, why)}
    return plan.model_copy(update=changes | begun)


def _print_changes(run: Run, changes: Mapping[str, Any], plan: Plan, new: Plan, step: int, console: Console) -> None:
    for key, (old, now) in changes.items():
        other = next((f" ({name} is set)" for name in LENGTH if key in LENGTH and name != key and now is None), "")
        console.print(f"{key}: {'none' if old is None else old} -> {'none' if now is None else now}{other}")
    for reason in new.reasons[len(plan.reasons) :]:
        console.print(f"  {reason}")
    if inexact := [key for key in INEXACT if key in changes]:
        console.print(f"  {', '.join(inexact)}: from now on results may differ from an unchanged run by rounding")
    if new.steps > step:
        console.print(f"{run.path}: recorded; continue with: unmask resume {run.path}")
    else:
        console.print(f"{run.path}: recorded")


def is_settable(key: str) -> bool:
    """Return whether `unmask set` can change this setting."""
    return not any(key == refused or key.startswith(f"{refused}.") for refused in REFUSED)


def text_of(value: Any) -> str:
    """Return the value of a setting as `--set` accepts it."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def value_of(config: Config, key: str) -> Any:
    """Return the value of a setting as JSON, or None if the configuration does not have this setting."""
    tree: Any = config.model_dump(mode="json")
    with suppress(KeyError):
        for part in key.split("."):
            tree = tree[part]
        return tree
    return None
