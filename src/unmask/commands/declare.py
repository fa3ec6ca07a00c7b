"""Declare the options and the function of a verb once, for the command line and for Python.

A verb is one file of this folder with a frozen dataclass, whose fields are the options, and one function:

    @dataclass(frozen=True)
    class ReportRequest(Request):
        '''Write RUN/report.html, a single file that needs no network.'''

        run: RunFolder                      # fields before KW_ONLY are positional arguments
        _: KW_ONLY
        step: Annotated[int | None, Option("Checkpoint to use.", default="the newest")] = None

    @command(ReportRequest, panel=Panel.MEASURE)
    def report(request: ReportRequest, console: Console) -> Path: ...

The decorator turns `report` into a function `report(run, *, step=None, console=None)` whose signature type checkers
understand. `command_line.py` builds the command `unmask report RUN --step N --json` from the same fields. A verb's
function imports other modules in its body, so that `--help` does not load them.
"""

# Do not use `from __future__ import annotations` here or in a verb's file: annotations are needed as objects, not as
# strings.
import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from functools import update_wrapper
from typing import Any, ParamSpec, TypeVar

from unmask.console import Console
from unmask.errors import nearest
from unmask.option import Options, options_of

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 75
"""Exit codes: 0 done, 1 failed, 2 bad usage or input, 75 stopped on request and resumable. Interrupted is 130."""


class Panel(StrEnum):
    """Titles under which `unmask --help` lists the verbs, in this order."""

    START = "Start"
    TRAIN = "Train"
    MEASURE = "Look and measure"
    EXCHANGE = "Exchange weights"
    FILES = "Files"


@dataclass(frozen=True)
class Request(Options):
    """Base class of requests: the values of all options in one call of a verb.

    console: prints messages and progress, to stderr if it is None; a parameter of the Python function, not a
    command-line option.
    """

    _: KW_ONLY
    console: Console | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Command:
    """Declaration of a verb.

    request: class of the options. call: function of a request and a Console; the functions below get its result. panel:
    title in `unmask --help`. together: whether the processes of a launcher such as torchrun execute the verb together.
    passes_on: whether everything after the first positional argument belongs to it, options too.
    renamed: {option of an earlier version: new option}. to_json: returns the object that --json prints (None: the
    result itself). text: returns the output without --json (None: no output). exit_code: returns the exit code (None:
    always 0).
    """

    request: type[Request]
    call: Callable[[Any, Console], Any]
    panel: Panel
    together: bool = False
    passes_on: bool = False
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
    """Decorator that declares a function of (request, console) as a verb, and replaces it by a function of the options.

    request: the class of the options, a frozen dataclass. more: other fields of `Command`.
    """

    def declared(call: Callable[[R, Console], T]) -> Callable[P, T]:
        verb = Command(request, call, panel, **more)  # type: ignore[arg-type]

        def with_keywords(*args: P.args, **kwargs: P.kwargs) -> T:
            if unknown := [name for name in kwargs if name not in with_keywords.__signature__.parameters]:  # type: ignore[attr-defined]
                hint = nearest(unknown[0], with_keywords.__signature__.parameters)  # type: ignore[attr-defined]
                raise TypeError(f"{call.__name__}() got an unexpected keyword argument {unknown[0]!r}; {hint}")
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
    """Return the signature of a verb's Python function: the options with their plain types, then `console`."""
    constructor = inspect.signature(request).parameters
    parameters = [constructor[each.name].replace(annotation=each.annotation) for each in options_of(request)]
    return inspect.Signature([*parameters, constructor["console"]], return_annotation=result)


def _documentation(verb: Command) -> str:
    """Return the docstring of a verb's Python function: help text, return value, and options."""
    lines = [verb.help, "", inspect.cleandoc(verb.call.__doc__ or ""), "", "Args:"]
    for each in options_of(verb.request):
        default = f" Default: {each.option.default}." if each.option.default else ""
        lines.append(f"    {each.name}: {each.help()}{default}")
    lines.append(
        "    console: Prints messages and progress, by default to stderr; `Console(quiet=True)` prints only warnings."
    )
    return "\n".join([*lines, "", "Raises UserError for input that the caller can correct."])
