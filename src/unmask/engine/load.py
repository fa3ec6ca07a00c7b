"""Reads a trained method or encoder back out of a Run. Nothing here writes, and nothing knows the trainer's memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from torch import nn

from unmask.config import Config, explain
from unmask.engine import checkpoint, copy_weights
from unmask.engine.build import build_method
from unmask.engine.device import choose_device
from unmask.engine.plan import Plan
from unmask.method import Method
from unmask.nn import positions
from unmask.nn.default_dtype import float32_default
from unmask.run import Run, RunError

Read = TypeVar("Read", bound=BaseModel)


@dataclass(frozen=True)
class Loaded:
    """A method as a Run holds it, in eval mode on `device`, with the two objects that describe it.

    licence: of weights that were imported, or that training began with; "" where nobody has said.
    """

    method: Method
    config: Config
    plan: Plan
    step: int
    device: str
    licence: str = ""


def licence_of(run: Run) -> str:
    """Return the licence of imported weights, and of weights trained from them; "" where there is none."""
    made = run.read("provenance.json") if (run.path / "provenance.json").exists() else {}
    return str(made.get("imported", {}).get("licence") or made.get("licence") or "")


def read_config(run: Run) -> Config:
    """Return the configuration of a run. Raises UserError when config.json is damaged."""
    return _read(run, "config.json", Config)


def read_plan(run: Run) -> Plan:
    """Return the plan of a run. Raises UserError when plan.json is damaged."""
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
    """Return the method of a Run at its newest sound checkpoint, or at `step`.

    Raises ValueError when there is none, or when its weights are not those of the whole method that config.json
    describes: missing ones are never made up. device: "auto", "cpu", "cuda", "cuda:N" or "mps"; ConfigError for one
    that this machine does not have.
    """
    device = choose_device(device)
    folder = Run.open(run)
    config, plan = read_config(folder), read_plan(folder)
    found, weights = checkpoint.load_model(folder, step)
    with float32_default():
        method = config.build(plan.images)
    copy_weights.require_fit(method, weights, f"the checkpoint of step {found} of {folder.path}")
    method.load_state_dict(weights)
    return Loaded(method.to(device).eval(), config, plan, found, device, licence_of(folder))


def take_weights(method: Method, config: Config) -> None:
    """Perform the grafts of `config` on a fresh method. Raises ValueError for weights that do not fit.

    Positions that were learnt, or made, for another grid of patches are interpolated to the method's own.
    """
    for entry in config.graft:
        run = Run.open(entry.run)
        _, weights = checkpoint.load_model(run, entry.step)
        old, new = _grid(run), method.encoder.grid
        if old is not None and old != new:
            weights = {name: positions.fitted(name, value, old, new) for name, value in weights.items()}
        copy_weights.graft(method, [(entry.source, entry.target, weights)])


def _grid(run: Run) -> tuple[int, int] | None:
    """Return the grid of patches that a Run's encoder was trained on; None where it has no patches."""
    patch = read_config(run).method.model_dump()["encoder"].get("patch")
    size = read_plan(run).images.size
    return None if patch is None else (size[0] // patch[0], size[1] // patch[1])


def load_encoder(run: str | Path, *, device: str = "cpu", step: int | None = None) -> nn.Module:
    """Load the encoder of a Run in eval mode; `encoder(images)` returns `Features`. It never masks.

    images: (B, C, H, W) of any real dtype, in the files' units (uint8 0..255 nearly always); the encoder holds mean and
    standard deviation. Float images in another range raise UserError; `encoder(images, scale="unit")` takes 0..1 for
    8-bit and 16-bit data, and scale="data" takes the values as they are. `.half()` and `.bfloat16()` work.
    """
    return load(run, device=device, step=step).method.encoder


def untrained_encoder(loaded: Loaded) -> nn.Module:
    """Return the encoder with random initial weights, the control of every probe; fixed buffers are the run's own."""
    method = build_method(loaded.config, loaded.plan.images)
    kept = {name: value for name, value in loaded.method.state_dict().items() if name.startswith(method.fixed)}
    method.load_state_dict(kept, strict=False)
    return method.encoder.to(loaded.device).eval()
