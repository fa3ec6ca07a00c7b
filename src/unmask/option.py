"""Declare options once for Python functions and for the command line, with type, default, help and checks.

A class of options is a frozen dataclass whose fields are annotated with `Option`:

    @dataclass(frozen=True)
    class GreetOptions(Options):
        '''Options of a greeting.'''

        _: KW_ONLY                          # fields before KW_ONLY are positional arguments
        times: Annotated[int, Option("How often.", at_least=1)] = 1

The request of a verb (`commands/declare.py`) inherits the options of the function that the verb calls. Modules that
declare options must not import torch, because `--help` imports them.
"""

# No `from __future__ import annotations` in modules that declare options: annotations are needed as objects.
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin

from unmask.errors import UserError, nearest

ONE = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path", NoneType: "None"}
SEVERAL = {int: "integers", float: "numbers", str: "strings", Path: "paths"}
"""Types of options in words."""


@dataclass(frozen=True)
class Option:
    """Declaration of an option, besides the type and the default of its field.

    help: a phrase for `--help` and for Python's `help`. metavar: placeholder of the value. flag: name on the command
    line, if it differs from the name of the field. default: what the default None means, in words. command_line: type
    of the value on the command line, if it differs from the type of the field. from_text: converts the value from the
    command line. at_least,
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
class After:
    """Names the inherited option after which an option that a subclass adds is listed."""

    name: str


@dataclass(frozen=True)
class Options:
    """Base class of options, which checks all values when an object is created."""

    def __post_init__(self) -> None:
        """Convert values (see `as_declared`) and check them. Raises UserError."""
        for each in options_of(type(self)):
            given = getattr(self, each.name)
            value = each.as_declared(given)
            if value is not given:
                object.__setattr__(self, each.name, value)
            if not _accepts(each.annotation, value):
                raise UserError(f"got {each.name}={given!r}; expected {_in_words(each.annotation)}")
            if value is not None:
                each.check(value)


@dataclass(frozen=True)
class DeclaredOption:
    """One option of a class: the field, its type, and its `Option`. after: see `After`."""

    field: Field[Any]
    annotation: Any
    option: Option
    after: str | None = None

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def flag(self) -> str:
        """Return the name on the command line, such as --test-split."""
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def repeatable(self) -> bool:
        return _sequence(self.annotation) is not None

    @property
    def positional(self) -> bool:
        return not self.field.kw_only

    def as_declared(self, value: Any) -> Any:
        """Convert a value to the declared type.

        A sequence, or a single value of a repeatable option, becomes a tuple. A path becomes a string if only strings
        are declared. Other values are returned unchanged, even if they are invalid.
        """
        if (sequence := _sequence(self.annotation)) is None:
            return _as_string(self.annotation, value)
        (kind,) = get_args(sequence)
        if isinstance(value, str | Path):
            return (_as_string(kind, value),) if _accepts(kind, _as_string(kind, value)) else value
        return tuple(_as_string(kind, each) for each in value) if isinstance(value, Iterable) else value

    def check(self, value: Any) -> None:
        """Raise UserError if the value is out of bounds or not one of the choices."""
        low, high = self.option.at_least, self.option.at_most
        if not ((low is None or value >= low) and (high is None or value <= high)):
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
        """Return the type of the option on the command line: Path for `str | Path`, a list for a sequence."""
        if self.option.command_line is not None:
            return self.option.command_line
        if (sequence := _sequence(self.annotation)) is not None:
            return list[_scalar(get_args(sequence)[0])]
        return _scalar(self.annotation)


def options_of(owner: type[Options]) -> list[DeclaredOption]:
    """Return the options of a class, positional options first, in the order of its fields.

    Raises TypeError for a field without `Option`.
    """
    found: list[DeclaredOption] = []
    for each in fields(owner):
        if each.name == "console":  # the console of requests is not an option
            continue
        kind, *details = get_args(each.type) if get_origin(each.type) is Annotated else (each.type,)
        option = next((detail for detail in details if isinstance(detail, Option)), None)
        if option is None:
            raise TypeError(
                f"{owner.__name__}.{each.name} is not an option; annotate it: Annotated[type, Option(help)]"
            )
        after = next((detail.name for detail in details if isinstance(detail, After)), None)
        found.append(DeclaredOption(each, kind, option, after))
    return _in_order(found)


def _in_order(found: Sequence[DeclaredOption]) -> list[DeclaredOption]:
    """Move positional options to the front, and each option with `after` behind the option of that name."""
    ordered = [each for each in found if each.after is None]
    for each in found:
        if each.after is not None:
            place = next(place for place, other in enumerate(ordered) if other.name == each.after)
            ordered.insert(place + 1, each)
    return sorted(ordered, key=lambda each: not each.positional)


# Types


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union; for other types, the type itself."""
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _sequence(kind: Any) -> Any:
    return next((each for each in _members(kind) if get_origin(each) is Sequence), None)


def _scalar(kind: Any) -> Any:
    members = [each for each in _members(kind) if each is not NoneType]
    return Path if Path in members else members[0]


def _as_string(kind: Any, value: Any) -> Any:
    """Return a path as a string if the type contains str but not Path, and other values unchanged."""
    return (
        str(value) if isinstance(value, Path) and str in (members := _members(kind)) and Path not in members else value
    )


def _accepts(kind: Any, value: Any) -> bool:
    """Return whether a value has the type `kind`.

    Integers count as numbers, booleans as neither; numpy's numbers are accepted.
    """
    members = _members(kind)
    if (sequence := _sequence(kind)) is not None and isinstance(value, tuple):
        return all(_accepts(get_args(sequence)[0], each) for each in value)
    if isinstance(value, bool):
        return bool in members
    if (isinstance(value, Integral) and int in members) or (isinstance(value, Real) and float in members):
        return True
    return any(isinstance(value, each) for each in members if isinstance(each, type))


def _in_words(kind: Any) -> str:
    """Return a type in words, such as "a string or None"."""
    words = []
    for each in _described(kind):
        if get_origin(each) is Sequence:
            words.append("a list of " + " or ".join(SEVERAL[part] for part in _described(get_args(each)[0])))
        elif each in ONE:
            words.append(ONE[each])
    return " or ".join(words)


def _described(kind: Any) -> list[Any]:
    """Return the members of a type that an error message names, which leave out str if Path is one of them."""
    members = _members(kind)
    return [each for each in members if each is not str or Path not in members]
