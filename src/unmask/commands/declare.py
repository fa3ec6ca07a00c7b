"""Declare a verb once, for the command line and for Python.

A verb is one file of this folder with a frozen dataclass, whose fields are the options, and one function:

    @dataclass(frozen=True)
    class ReportRequest(Request):
        '''Write RUN/report.html, a single file that needs no network.'''

        run: RunFolder                      # fields before KW_ONLY are positional arguments
        _: KW_ONLY
        step: Annotated[int | None, Option("Checkpoint to use.", default="the newest")] = None

    @command(ReportRequest, panel=Panel.MEASURE)
    def report(request: ReportRequest, console: Console) -> Path: ...

This makes `report` a function `report(run, *, step=None, console=None)` that type checkers understand. The command
`unmask report RUN --step N --json` is built from the same fields (`command_line.py`). Other modules are imported inside
the function, so that `--help` does not load them.
"""

# No `from __future__ import annotations` here or in a verb's file: annotations are needed as objects, not as strings.
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from enum import StrEnum
from functools import update_wrapper
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin

from unmask.console import Console
from unmask.errors import UserError, nearest

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75
"""Exit codes: done; failed; bad usage or input; stopped on request and resumable. Interrupted is 130."""


class Panel(StrEnum):
    """Titles under which `unmask --help` lists the verbs, in this order."""

    START = "Start"
    TRAIN = "Train"
    MEASURE = "Look and measure"
    EXCHANGE = "Exchange weights"
    FILES = "Files"


@dataclass(frozen=True)
class Option:
    """Declaration of an option, besides the type and the default of its field.

    help: a phrase for `--help` and for Python's `help`. metavar: placeholder of the value. flag: name on the command
    line, if it differs from the field's. default: the default in words, if it is None. command_line: type of the value
    on the command line, if it differs from the field's. from_text: converts the value from the command line. at_least,
    at_most: bounds of a number. choices: returns the allowed words with their meanings, which may be "".
    """

    help: str
    metavar: str | None = None
    flag: str | None = None
    default: str | None = None
    command_line: Any = None
    from_text: Callable[[Any], Any] | None = None
    at_least: float | None = None
    at_most: float | None = None
    choices: Callable[[], Mapping[str, str]] | None = None


@dataclass(frozen=True)
class Request:
    """Base class of requests: the values of all options in one call of a verb.

    console: prints messages and progress; None prints to stderr. It is only for Python, not a command-line option.
    """

    _: KW_ONLY
    console: Console | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Put a single value of a repeatable option into a tuple, and check all values. Raises UserError."""
        for each in options_of(type(self)):
            value = getattr(self, each.name)
            if each.repeatable and isinstance(value, str | Path):
                value = (value,)
                object.__setattr__(self, each.name, value)
            if value is not None:
                each.check(value)


@dataclass(frozen=True)
class DeclaredOption:
    """One option of a request class: the field, its type without None, and its `Option`."""

    field: Field[Any]
    type: Any
    option: Option

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def flag(self) -> str:
        """Return the name on the command line, such as --test-split."""
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def repeatable(self) -> bool:
        return _sequence(self.type) is not None

    @property
    def positional(self) -> bool:
        return not self.field.kw_only

    def check(self, value: Any) -> None:
        """Raise UserError if the value is out of bounds or not one of the choices."""
        low, high = self.option.at_least, self.option.at_most
        if (low is not None and value < low) or (high is not None and value > high):
            raise UserError(f"got {self.flag} {value}; expected {low} " + ("or more" if high is None else f"to {high}"))
        if self.option.choices is not None and value not in (known := list(self.option.choices())):
            meant = nearest(str(value), known)
            raise UserError(
                f"got {self.flag} {value}; expected {', '.join(known[:-1])} or {known[-1]}"
                + (f"; {meant}" if meant.startswith("did you mean") else "")
            )

    def help(self) -> str:
        """Return the help text with the choices, if any."""
        if self.option.choices is None:
            return self.option.help
        words = [f"{name} ({meaning})" if meaning else name for name, meaning in self.option.choices().items()]
        return f"{self.option.help.removesuffix('.')}: {', '.join(words[:-1])} or {words[-1]}."

    def command_line_type(self) -> Any:
        """Return the type on the command line: Path for `str | Path`, a list for a sequence."""
        if self.option.command_line is not None:
            return self.option.command_line
        if (sequence := _sequence(self.type)) is not None:
            return list[_scalar(get_args(sequence)[0])]
        return _scalar(self.type)


def _members(kind: Any) -> list[Any]:
    """Return the members of a union without None; for other types, a list with the type itself."""
    members = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return [each for each in members if each is not type(None)]


def _sequence(kind: Any) -> Any:
    return next((each for each in _members(kind) if get_origin(each) is Sequence), None)


def _scalar(kind: Any) -> Any:
    members = _members(kind)
    return Path if Path in members else members[0]


def options_of(request: type[Request]) -> list[DeclaredOption]:
    """Return the options of a request class, in the order of its fields. Raises TypeError for a field without one."""
    found = []
    for each in fields(request):
        if each.name == "console":
            continue
        if get_origin(each.type) is not Annotated:
            raise TypeError(
                f"{request.__name__}.{each.name} is not an option; annotate it: Annotated[type, Option(help)]"
            )
        kind, option = get_args(each.type)
        found.append(DeclaredOption(each, kind, option))
    return found


@dataclass(frozen=True)
class Command:
    """One verb. `call` gets the request and a Console; the other functions get the result of `call`.

    trains: rejects launchers of several processes, such as torchrun. renamed: {option of an earlier version: new
    option}. to_json: returns the object that --json prints; None prints the result itself. text: returns the output
    without --json; None prints nothing. exit_code: returns the exit code; None means 0.
    """

    request: type[Request]
    call: Callable[[Any, Console], Any]
    panel: Panel
    trains: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)
    to_json: Callable[[Any], Any] | None = None
    text: Callable[[Any], str] | None = None
    exit_code: Callable[[Any], int] | None = None

    @property
    def help(self) -> str:
        return inspect.cleandoc(self.request.__doc__ or "")


P = ParamSpec("P")
R = TypeVar("R", bound=Request)
T = TypeVar("T")


def command(
    request: Callable[P, R], *, panel: Panel, **more: Any
) -> Callable[[Callable[[R, Console], T]], Callable[P, T]]:
    """Decorator that declares a function of (request, console) as a verb, and returns a function of the options.

    request: the class, a frozen dataclass. more: see `Command`.
    """

    def declared(call: Callable[[R, Console], T]) -> Callable[P, T]:
        verb = Command(request, call, panel, **more)  # type: ignore[arg-type]

        def with_keywords(*args: P.args, **kwargs: P.kwargs) -> T:
            asked = request(*args, **kwargs)
            return call(asked, asked.console or Console())

        update_wrapper(with_keywords, call)
        del with_keywords.__wrapped__
        result = inspect.signature(call).return_annotation
        with_keywords.__signature__ = signature(verb.request, result)  # type: ignore[attr-defined]
        with_keywords.__annotations__ = {
            **{each.name: each.annotation for each in with_keywords.__signature__.parameters.values()},  # type: ignore[attr-defined]
            "return": result,
        }
        with_keywords.__doc__ = _documentation(verb)
        with_keywords.command = verb  # type: ignore[attr-defined]
        return with_keywords

    return declared


def signature(request: type[Request], result: Any) -> inspect.Signature:
    """Return the signature of the Python function: the options with their plain types, then `console`."""
    constructor = inspect.signature(request).parameters
    parameters = [constructor[each.name].replace(annotation=each.type) for each in options_of(request)]
    return inspect.Signature([*parameters, constructor["console"]], return_annotation=result)


def _documentation(verb: Command) -> str:
    """Return the docstring of the Python function: help text, return value, and options."""
    lines = [verb.help, "", inspect.cleandoc(verb.call.__doc__ or ""), "", "Args:"]
    for each in options_of(verb.request):
        default = f" Default: {each.option.default}." if each.option.default else ""
        lines.append(f"    {each.name}: {each.help()}{default}")
    lines.append(
        "    console: Prints messages and progress, by default to stderr; `Console(quiet=True)` prints only warnings."
    )
    return "\n".join([*lines, "", "Raises UserError for input that the caller can correct."])
