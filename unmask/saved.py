"""Reads a trained method or encoder back out of a Run. Nothing here writes, and nothing knows the trainer's memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from unmask import checkpoint
from unmask.batch import ImageSpec
from unmask.config import Config
from unmask.method import Method
from unmask.plan import Plan, seed_weights
from unmask.run import Run


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
    return Config.model_validate(run.read("config.json"))


def read_plan(run: Run) -> Plan:
    """What the machine derived. Raises ValueError when plan.json is damaged."""
    return Plan.model_validate(run.read("plan.json"))


def load(run: str | Path, *, device: str = "cpu", step: int | None = None) -> Loaded:
    """The method of a Run at its newest sound checkpoint, or at `step`. Raises ValueError when there is none."""
    folder = Run.open(run)
    config, plan = read_config(folder), read_plan(folder)
    found, weights = checkpoint.load_model(folder, step)
    method = config.build(plan.images)
    method.load_state_dict(weights)
    return Loaded(method.to(device).eval(), config, plan, found, device)


def load_encoder(run: str | Path, *, device: str = "cpu", step: int | None = None) -> nn.Module:
    """The encoder of a Run, in eval mode: `encoder(images)` gives `Features`.

    images: (B, C, H, W) in the files' own dtype and units (uint8 0..255 nearly always); the encoder carries mean and
    standard deviation. It never masks.
    """
    return load(run, device=device, step=step).method.encoder


def untrained_encoder(config: Config, images: ImageSpec, *, device: str = "cpu") -> nn.Module:
    """The same encoder at its random start: the control of every probe."""
    seed_weights(config.train.seed)
    return config.build(images).encoder.to(device).eval()
