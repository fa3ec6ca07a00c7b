"""Render an HTML page from a template of this package."""

from __future__ import annotations

from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def page(template: str, **values: Any) -> bytes:
    """A template of this package filled in: one HTML file that opens offline."""
    files = resources.files("unmask.report") / "templates"
    loader = FunctionLoader(lambda name: files.joinpath(name).read_text("utf-8"))
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    pages.filters["decimals"] = lambda value: "not defined" if value is None else f"{value:.3f}"
    return pages.get_template(template).render(**values).encode("utf-8", "backslashreplace")
