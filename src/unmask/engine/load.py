"""Load a trained method or encoder from a run folder. Only reads files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from unmask.config import Config, explain
from unmask.engine import checkpoint, copy_weights
from unmask.engine.build import build_method
from unmask.engine.device import choose_device
from unmask.engine.training_plan import Plan
from unmask.engine.world import current
from unmask.method import Method
from unmask.nn import positions
from unmask.nn.default_dtype import float32_default
from unmask.run import PROVENANCE, Run, RunError

Read = TypeVar("Read", bound=BaseModel)


@dataclass(frozen=True)
class Loaded:
    """A method from a run, in eval mode on `device`, with its configuration and plan.

    licence: licence of imported or initial weights, or "" if unknown.
    """

    method: Method
    config: Config
    plan: Plan
    step: int
    device: str
    licence: str = ""


def licence_of(run: Run) -> str:
    """Return the licence of weights that were imported or trained from imported weights, or "" if unknown."""
    made = run.read_if_present(PROVENANCE)
    return str(made.get("imported", {}).get("licence") or made.get("licence") or "")


def read_config(run: Run) -> Config:
    """Return the configuration of a run. Raises UserError if config.json is damaged."""
    return _read(run, "config.json", Config)


def read_plan(run: Run) -> Plan:
    """Return the plan of a run. Raises UserError if plan.json is damaged."""
    return _read(run, "plan.json", Plan)


def _read(run: Run, name: str, kind: type[Read]) -> Read:
    try:
        return kind.model_validate(run.read(name))
    except ValidationError as error:
        raise RunError(
            f"{run.path / name} is invalid in this version of unmask: {explain(error)}; restore the file, or use the "
            "version that wrote it (see provenance.json)"
        ) from None


def load(run: str | Path, *, device: str = "cpu", step: int | None = None) -> Loaded:
    """Load the method of a run from its newest intact checkpoint, or from the checkpoint of `step`.

    device: "auto", "cpu", "cuda", "cuda:N" or "mps". Raises UserError if there is no such checkpoint, if the weights do
    not match the method in config.json exactly, or if this machine does not have the device.
    """
    device = choose_device(device)
    folder = Run.open(run)
    config, plan = read_config(folder), read_plan(folder)
    found, weights = _weights_of(folder, step)
    with float32_default():
        method = config.build(plan.images)
    copy_weights.require_fit(method, weights, f"the checkpoint of step {found} of {folder.path}")
    method.load_state_dict(weights)
    return Loaded(
        method=method.to(device).eval(), config=config, plan=plan, step=found, device=device, licence=licence_of(folder)
    )


def _weights_of(run: Run, step: int | None) -> tuple[int, dict[str, Tensor]]:
    """Return (step, weights) of a checkpoint, the one that the writer finds to be the newest intact one."""
    world = current()
    read = world.on_writer(lambda: checkpoint.load_model(run, step))
    found = world.from_writer(lambda: None if read is None else read[0])
    return checkpoint.load_model(run, found) if read is None else read


def take_weights(method: Method, config: Config) -> None:
    """Copy the initial weights of `config` (its `graft`) into a method. Raises UserError for weights that do not fit.

    Position embeddings for another grid of patches are interpolated to the method's grid.
    """
    for entry in config.graft:
        run = Run.open(entry.run)
        _, weights = checkpoint.load_model(run, entry.step)
        old, new = _grid(run), method.encoder.grid
        if old is not None and old != new:
            weights = {name: positions.fitted(name, value, old, new) for name, value in weights.items()}
        copy_weights.graft(method, [(entry.source, entry.target, weights)])


def _grid(run: Run) -> tuple[int, int] | None:
    """Return the grid of patches of a run's encoder, or None if the encoder has no patches."""
    patch = read_config(run).method.model_dump()["encoder"].get("patch")
    size = read_plan(run).images.size
    return None if patch is None else (size[0] // patch[0], size[1] // patch[1])


def load_encoder(run: str | Path, *, device: str = "cpu", step: int | None = None) -> nn.Module:
    """Load the encoder of a run in eval mode. `encoder(images)` returns `Features`, without masking.

    images: (B, C, H, W) of any real dtype, in the files' units (uint8 0..255 nearly always); the encoder normalises
    them. Float images whose values are not in the files' range raise UserError. With scale="unit", images of 8-bit and
    16-bit data have values in 0..1 instead, and with scale="data", values are not checked. `.half()` and `.bfloat16()`
    work.
    """
    return load(run, device=device, step=step).method.encoder


def untrained_encoder(loaded: Loaded) -> nn.Module:
    """Return the encoder with random initial weights, the control of every probe.

    Its fixed buffers, such as a palette, are copied from the run.
    """
    method = build_method(loaded.config, loaded.plan.images)
    kept = {name: value for name, value in loaded.method.state_dict().items() if name.startswith(method.fixed)}
    method.load_state_dict(kept, strict=False)
    return method.encoder.to(loaded.device).eval()
