"""Find export targets: every file in `interop/targets/` declares one.

Listing the targets imports neither their files nor torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

import unmask.interop.targets
from unmask.errors import UserError, nearest
from unmask.system.docstrings import first_line

if TYPE_CHECKING:
    from unmask.interop.export_target import ExportTarget


def target_names() -> tuple[str, ...]:
    """Return the names of the export targets, sorted."""
    return tuple(sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(unmask.interop.targets.__path__)))


def target_summary(name: str) -> str:
    """Return the first line of the target's docstring without importing the file."""
    return first_line(f"unmask.interop.targets.{name.replace('-', '_')}")


def find_target(name: str) -> ExportTarget:
    """Import an export target by its name. Raises UserError with the nearest names for an unknown name."""
    if name not in target_names():
        raise UserError(f"target {name!r} is not known; {nearest(name, target_names())}")
    return importlib.import_module(f"unmask.interop.targets.{name.replace('-', '_')}").TARGET
