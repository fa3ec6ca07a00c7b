"""Resume a run whose data have moved or changed since it began."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from unmask.config import Config, ConfigError, task_names
from unmask.console import Console
from unmask.data.scan.identity import Difference
from unmask.data.sources.source import Source
from unmask.engine import dataset_record
from unmask.engine.load import read_config
from unmask.engine.supervision import Supervise, Supervision
from unmask.engine.training_data import DataError
from unmask.engine.training_plan import Plan
from unmask.run import Run


@dataclass(frozen=True)
class DataLocations:
    """New locations of the data of a run, with None or () for data that have not moved."""

    data: tuple[str, ...] = ()
    test: str | None = None
    annotations: str | None = None
    test_annotations: str | None = None

    def applied(self, config: Config) -> Config:
        """Return the configuration with these locations as absolute paths.

        Raises ConfigError for a location of data that the run does not have.
        """
        for name in ("test", "annotations", "test_annotations"):
            if getattr(self, name) is not None and getattr(config.data, name) is None:
                raise ConfigError(f"got --{name.replace('_', '-')}, but this run has no such data; leave it out")
        others = {name: getattr(self, name) for name in ("test", "annotations", "test_annotations")}
        changes: dict[str, Any] = {
            name: os.path.abspath(place) if os.path.exists(place) else place
            for name, place in others.items()
            if place is not None
        }
        if self.data:
            changes["source"] = self.data[0] if len(self.data) == 1 else self.data
        return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def record_move(run: Run, before: Config, config: Config, console: Console) -> None:
    """Record the new and the old locations of a run's data."""
    keys = ("source", "test", "annotations", "test_annotations")
    old, new = ({key: getattr(each.data, key) for key in keys} for each in (before, config))
    if old == new:
        return
    moved = {key: [old[key], new[key]] for key in keys if old[key] != new[key]}
    run.write("config.json", config.model_dump(mode="json"))
    summary = "; ".join(f"{key} {then} -> {now}" for key, (then, now) in moved.items())
    console.print(dataset_record.note_change(run, "moved", summary=summary, places=moved))


def recording_move(supervise: Supervise, before: Config, console: Console) -> Supervise:
    """Return a function that calls `supervise` and, if it finds all data at the new locations, records them."""

    def both(run: Run, config: Config, plan: Plan, source: Source) -> Supervision:
        made = supervise(run, config, plan, source)
        record_move(run, before, config, console)
        return made

    return both


def explain_refusal(config: Config, plan: Plan, source: Source, found: Difference) -> str:
    """Return why a run cannot continue with these images, and what to do."""
    if found.unknown:
        return (
            f"the images of {config.data.place} cannot be compared with those at the start of this run: "
            f"{found.unknown}. Restore it from a backup, or, if the images are unchanged, give --allow-dataset-change "
            "to record them again"
        )
    return (
        f"the images of {config.data.place} have changed since this run began "
        f"({plan.num_images + len(plan.excluded)} files then, {len(source)} now), so it cannot be resumed exactly: "
        f"{found.lines()}. Restore the old files, or give --allow-dataset-change to continue anyway"
    )


def accept_unverified(plan: Plan, source: Source, run: Run, found: Difference) -> Plan:
    """Record images with unchanged names and sizes whose contents cannot be compared; return the plan."""
    reason = dataset_record.note_change(run, "recorded anew", summary=f"--allow-dataset-change: {found.lines()}")
    plan = plan.model_copy(update={"reasons": (*plan.reasons, reason)})
    run.write("plan.json", plan.model_dump(mode="json"))
    dataset_record.write_record(run, source)  # last, so that a run that is killed before this rejects the images again
    return plan


def plan_for_changed_data(source: Source, plan: Plan, run: Run, found: Difference) -> Plan:
    """Record a changed data set in the run and return the plan for it. Raises DataError.

    Images that were unreadable or held out stay excluded. These images are identified by name, because row numbers may
    have changed.
    """
    if read_config(run).method.name in task_names():
        raise DataError(
            f"the images of {source.name} have changed, and test images that are held out of them could no longer be "
            f"identified: {found.lines()}. Restore the old files, or start a new run"
        )
    unreadable = {entry["name"] for entry in run.quarantine() if entry.get("code") != "CHANGED"}
    bad = [row for row, name in enumerate(source.names) if name in unreadable]
    if len(bad) == len(source):
        raise DataError(
            f"this run recorded all {len(source)} files of {source.name} as unreadable; restore the images, or start a "
            "new run"
        )
    known = source.fingerprint() == plan.fingerprint  # then the row numbers in the plan are still valid
    held_out = plan.held_out if known else dataset_record.rows_now(run, plan.held_out, source)
    excluded = tuple(sorted({*bad, *held_out}))
    if len(excluded) == len(source):
        raise DataError(
            f"{source.name} contains no image that this run can train on: {len(held_out)} are held out, {len(bad)} "
            "unreadable; restore the images"
        )
    summary = f"--allow-dataset-change: {found.lines(3)}"
    reason = dataset_record.note_change(run, "changed", summary=summary, **found.as_json())
    changes = {
        "fingerprint": source.fingerprint(),
        "num_images": len(source) - len(excluded),
        "excluded": excluded,
        "held_out": held_out,
        "epochs": plan.steps * plan.batch_size / (len(source) - len(excluded)),
        "reasons": (*plan.reasons, reason),
    }
    plan = plan.model_copy(update=changes)
    run.write("plan.json", plan.model_dump(mode="json"))
    dataset_record.write_record(run, source)  # last, so that a run that is killed before this rejects the images again
    return plan
