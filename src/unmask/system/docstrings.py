"""Read the docstring and constants of a module without importing the module, for the help texts of options."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def first_line(module: str) -> str:
    """Return the first line of a module's docstring, or "" if it has none. module: full name of the module."""
    return (ast.get_docstring(_parsed(module)) or "").partition("\n")[0]


def class_constant(module: str, name: str) -> str | None:
    """Return the text that a class of the module assigns to `name` in its body, or None without such a class."""
    for each in _parsed(module).body:
        for line in each.body if isinstance(each, ast.ClassDef) else ():
            targets = line.targets if isinstance(line, ast.Assign) else ()
            if name in [target.id for target in targets if isinstance(target, ast.Name)]:
                return ast.literal_eval(line.value)  # type: ignore[attr-defined]
    return None


def _parsed(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"got module {module}; expected a file of the package")
    return ast.parse(Path(spec.origin).read_bytes())
