"""Render an HTML page from a template of this package, as a single file that needs no network."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from unmask.results import ACCURACY, show_score


def render(template: str, **values: Any) -> bytes:
    """Fill in a template of `report/templates` and return the page as UTF-8."""
    files = resources.files("unmask.report") / "templates"
    loader = FunctionLoader(lambda name: files.joinpath(name).read_text("utf-8"))
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["percent"] = lambda value: show_score(value, ACCURACY)
    pages.filters["score"] = show_score
    pages.filters["decimals"] = lambda value: "not defined" if value is None else f"{value:.3f}"
    return pages.get_template(template).render(**values).encode("utf-8", "backslashreplace")


def png_url(file: Path) -> str:
    """Return a PNG file as a data URL."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")
