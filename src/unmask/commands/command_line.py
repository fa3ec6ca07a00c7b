"""Build the typer command of a verb from its declaration."""

import inspect
import json
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer
from typer.main import get_command

from unmask.commands.declare import DONE, Command
from unmask.console import Console, escape_controls
from unmask.option import DeclaredOption, options_of
from unmask.system.processes import launched, reject_launchers, speaks

AS_JSON = typer.Option("--json", help="Print one JSON object on stdout.")


def build(name: str, verb: Command) -> Any:
    """Return the click command of a verb, which parses the options, runs the verb and exits with its exit code."""

    def run(as_json: bool, **values: Any) -> None:
        reject_launchers(name, together=verb.together)
        with _together(verb):
            result = verb.call(verb.request(**_given(verb, values)), Console(silent=not speaks()))
        if not speaks():  # another process of this command prints the result
            pass
        elif as_json:
            print(json.dumps(result if verb.to_json is None else verb.to_json(result), ensure_ascii=True))
        elif verb.text is not None:
            print(escape_controls(verb.text(result)))
        raise typer.Exit(DONE if verb.exit_code is None else verb.exit_code(result))

    parameters = [_parameter(each) for each in options_of(verb.request)]
    parameters.append(_keyword("as_json", Annotated[bool, AS_JSON], False))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    settings = {"allow_interspersed_args": not verb.passes_on}
    app.command(name, help=verb.help, rich_help_panel=verb.panel.value, context_settings=settings)(run)
    return get_command(app)


def _together(verb: Command) -> AbstractContextManager[object]:
    """Return the context manager in which all processes that a launcher has started execute a verb."""
    if not verb.together or launched() == 1:
        return nullcontext()
    from unmask.engine.world import joined

    return joined()


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(each: DeclaredOption) -> inspect.Parameter:
    """Return the typer parameter of an option, with its type on the command line, help and default."""
    option, default = each.option, each.field.default
    required = each.field.default is each.field.default_factory  # both are MISSING
    shown = option.default or not (required or default in (None, ()))
    common: dict[str, Any] = {"help": each.help(), "metavar": option.metavar, "show_default": shown}
    if (choices := option.choices) is not None:
        common["autocompletion"] = lambda incomplete: [word for word in choices() if word.startswith(incomplete)]
    declared = typer.Argument(**common) if each.positional else typer.Option(each.flag, **common)
    value = inspect.Parameter.empty if required else None if default == () else default
    return _keyword(each.name, Annotated[_or_none(each.command_line_type(), value), declared], value)


def _or_none(kind: Any, default: Any) -> Any:
    return kind | None if default is None else kind


def _given(verb: Command, values: dict[str, Any]) -> dict[str, Any]:
    """Return {field: converted value} of the options that were given; the other fields keep their defaults."""
    given = {}
    for each in options_of(verb.request):
        value = values[each.name]
        if value is None or value == []:
            continue
        given[each.name] = value if each.option.from_text is None else each.option.from_text(value)
    return given
