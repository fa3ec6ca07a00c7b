"""Reads a trained method or encoder back out of a Run. Nothing here writes, and nothing knows the trainer's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from unmask import checkpoint
from unmask.checkpoint import CheckpointError
from unmask.config import Config, explain
from unmask.method import Method
from unmask.plan import Plan, seed_weights
from unmask.run import Run, RunError

Read = TypeVar("Read", bound=BaseModel)
NAMED_FAULTS = 3


@dataclass(frozen=True)
class Loaded:
    """A method as a Run holds it, in eval mode on `device`, with the two objects that describe it."""

    method: Method
    config: Config
    plan: Plan
    step: int
    device: str


def read_config(run: Run) -> Config:
    """What the person wrote. Raises ValueError when config.json is damaged."""
    return _read(run, "config.json", Config)


def read_plan(run: Run) -> Plan:
    """What the machine derived. Raises ValueError when plan.json is damaged."""
    return _read(run, "plan.json", Plan)


def _read(run: Run, name: str, kind: type[Read]) -> Read:
    try:
        return kind.model_validate(run.read(name))
    except ValidationError as error:
        raise RunError(
            f"{run.path / name} is not what this version of unmask reads: {explain(error)}; restore the file, or use "
            "the version that wrote it (provenance.json names it)"
        ) from None


def load(run: str | Path, *, device: str = "cpu", step: int | None = None) -> Loaded:
    """The method of a Run at its newest sound checkpoint, or at `step`.

    Raises ValueError when there is none, or when its weights are not those of the whole method that config.json
    describes: missing ones are never made up.
    """
    folder = Run.open(run)
    config, plan = read_config(folder), read_plan(folder)
    found, weights = checkpoint.load_model(folder, step)
    method = config.build(plan.images)
    require_fit(method, weights, f"the checkpoint of step {found} of {folder.path}")
    method.load_state_dict(weights)
    return Loaded(method.to(device).eval(), config, plan, found, device)


def require_fit(method: Method, weights: Mapping[str, Tensor], what: str) -> None:
    """Raises CheckpointError, in one sentence, unless `weights` are exactly the tensors of `method`."""
    wanted = method.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing and not extra and not any(name.startswith("encoder.") for name in missing):
        raise CheckpointError(
            f"{what} holds only the encoder: the {len(missing)} tensors of the rest ({_some(missing)}) are missing, "
            "and nothing can be rebuilt without them; use the run or the file that has the decoder too"
        )
    faults = [f"{name} is missing" for name in missing] + [f"{name} is not known" for name in extra]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, {tuple(tensor.shape)} was expected"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        raise CheckpointError(
            f"{what} does not fit the method that its config.json describes: {_some(faults, '; ')}; has config.json "
            "been changed, or the checkpoint been copied from another run?"
        )


def _some(names: list[str], between: str = ", ") -> str:
    more = len(names) - NAMED_FAULTS
    return between.join(names[:NAMED_FAULTS]) + (f" and {more} more" if more > 0 else "")


def load_encoder(run: str | Path, *, device: str = "cpu", step: int | None = None) -> nn.Module:
    """The encoder of a Run, in eval mode: `encoder(images)` gives `Features`.

    images: (B, C, H, W) in the files' own dtype and units (uint8 0..255 nearly always); the encoder carries mean and
    standard deviation. It never masks.
    """
    return load(run, device=device, step=step).method.encoder


def untrained_encoder(loaded: Loaded) -> nn.Module:
    """The same encoder at its random start: the control of every probe. What is fixed (a palette) is the run's own."""
    seed_weights(loaded.config.train.seed)
    method = loaded.config.build(loaded.plan.images)
    kept = {name: value for name, value in loaded.method.state_dict().items() if name.startswith(method.fixed)}
    method.load_state_dict(kept, strict=False)
    return method.encoder.to(loaded.device).eval()
