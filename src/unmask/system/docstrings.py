"""Read the docstring of a module without importing it, for lists of files that are options of a command."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path


def first_line(module: str) -> str:
    """Return the first line of a module's docstring, or an empty string if it has none.

    module: full name of the module, whose packages are imported.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"got module {module}; expected a file of the package")
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_bytes())) or "").partition("\n")[0]
