"""Sphinx directive that writes the command reference from the command line itself.

    ```{command-reference}
    ```

The directive reads the same click commands as `unmask --help`, so the page always has all verbs and options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

from unmask.commands import app

PARAGRAPH = re.compile(r"\n\s*\n")


def reference(app: Any) -> str:
    """Return the reference of all verbs of `app` as Markdown: a section for each panel of `unmask --help`."""
    command = get_command(app)
    context = command.make_context("unmask", [], resilient_parsing=True)
    lines, panel = [], None
    for name in command.list_commands(context):  # type: ignore[attr-defined]
        verb = command.get_command(context, name)  # type: ignore[attr-defined]
        if verb.hidden:
            continue
        if verb.rich_help_panel != panel:
            panel = verb.rich_help_panel
            lines += [f"## {panel}", ""]
        lines += verb_lines(name, verb)
    return "\n".join(lines)


def verb_lines(name: str, verb: Any) -> Iterator[str]:
    """Yield the Markdown lines of one verb: heading, usage, help text, table of arguments and options."""
    arguments = [each for each in verb.params if each.param_type_name == "argument"]
    options = [each for each in verb.params if each.param_type_name == "option" and not each.hidden]
    usage = " ".join(["unmask", name, *(_usage(each) for each in arguments), "[OPTIONS]"])
    yield from (f"### `{name}`", "", "```bash", usage, "```", "")
    for paragraph in PARAGRAPH.split(inspect.cleandoc(verb.help or "")):
        yield from (escape(" ".join(paragraph.split())), "")
    rows = [(_argument_name(each), each) for each in arguments] + [(_option_name(each), each) for each in options]
    if rows:
        yield from ("| name | meaning | default |", "|---|---|---|")
        for label, parameter in rows:
            text = escape(" ".join((getattr(parameter, "help", None) or "").split()))
            yield f"| {label} | {text} | {_default(parameter)} |"
        yield ""


def escape(text: str) -> str:
    """Escape Markdown characters in a plain help text, except in `code`."""
    parts = re.split(r"(`[^`]+`)", text)
    plain = (re.sub(r"([\\*_<>\[\]|#])", r"\\\1", part).replace("--", "\\--") for part in parts[::2])
    code = (part.replace("|", "\\|") for part in parts[1::2])
    return "".join(piece for pair in zip(plain, [*code, ""], strict=True) for piece in pair)


def _usage(argument: Any) -> str:
    name = _argument_name(argument).strip("`")
    return name if argument.required else f"[{name}]"


def _argument_name(argument: Any) -> str:
    return f"`{argument.metavar or argument.name.upper()}`"


def _option_name(option: Any) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    if option.is_flag:
        return f"`{names}`"
    return f"`{names} {option.metavar or _type_name(option)}`"


def _type_name(option: Any) -> str:
    """Return the type name of an option without a metavar, from Typer's annotation or click's `type`."""
    annotation = getattr(getattr(option, "type_descriptor", None), "annotation", None)
    known = {str: "TEXT", int: "INTEGER", float: "FLOAT", Path: "PATH"}
    return known.get(annotation, getattr(getattr(option, "type", None), "name", "value").upper())


def _default(parameter: Any) -> str:
    """Return the default as typed on the command line, or in words; "" for flags."""
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return escape(parameter.show_default)
    plain = isinstance(value, str | int | float | Path) and value is not False
    return f"`{value}`" if plain and str(value) not in ("", ".") else ""


class CommandReference(SphinxDirective):
    """Directive `command-reference`: one section for each verb."""

    def run(self) -> list[nodes.Node]:
        """Return the sections of all verbs."""
        return self.parse_text_to_nodes(reference(app), allow_section_headings=True)


def setup(sphinx: Sphinx) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    sphinx.add_directive("command-reference", CommandReference)
    return {"parallel_read_safe": True}
