"""Find export targets: every file in `interop/targets/` is one. Listing them imports neither the files nor torch."""

from __future__ import annotations

import importlib.util
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

import unmask.interop.targets
from unmask.errors import UserError, nearest

if TYPE_CHECKING:
    from unmask.interop.export_target import ExportTarget


def target_names() -> tuple[str, ...]:
    """Return the names of the export targets, sorted."""
    return tuple(sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(unmask.interop.targets.__path__)))


def target_summary(name: str) -> str:
    """Return the first line of the target's docstring without importing the file."""
    spec = importlib.util.find_spec(f"unmask.interop.targets.{name.replace('-', '_')}")
    assert spec is not None, f"{name} is not a target"
    assert spec.origin is not None, f"{name} has no source file"
    return Path(spec.origin).read_text("utf-8").split('"""')[1].strip().splitlines()[0]


def find_target(name: str) -> ExportTarget:
    """Import a target by its name. Raises UserError with the nearest names for an unknown name."""
    if name not in target_names():
        raise UserError(f"target {name!r} is not known; {nearest(name, target_names())}")
    return importlib.import_module(f"unmask.interop.targets.{name.replace('-', '_')}").TARGET
