"""Test that one declaration of a verb defines its options, its Python function and its JSON."""

import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import pytest
from typer.main import get_command

import unmask
from unmask import commands
from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.errors import UserError
from unmask.option import Option, options_of

GREET = '''
"""`unmask greet`: a verb for a test."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.option import Option
from unmask.console import Console


@dataclass(frozen=True)
class GreetRequest(Request):
    """Greet somebody.

    Only for tests.
    """

    name: Annotated[str, Option("Whom to greet.", metavar="NAME")]
    _: KW_ONLY
    times: Annotated[int, Option("How often.", at_least=1, at_most=9)] = 1
    mood: Annotated[str, Option("How.", choices=lambda: {"kindly": "", "loudly": "in a loud voice"})] = "kindly"
    others: Annotated[Sequence[str], Option("More people; repeatable.", flag="--and", metavar="NAME")] = ()
    card: Annotated[str | Path | None, Option("A card to bring.", default="none")] = None
    numbers: Annotated[
        Sequence[int] | None,
        Option("Numbers.", command_line=str, from_text=lambda text: [int(each) for each in text.split(",")]),
    ] = None
    hat: Annotated[bool, Option("Raise the hat.")] = False
    age: Annotated[int, Option("Of the greeter.", at_least=1)] = 40


@command(
    GreetRequest,
    panel=Panel.START,
    renamed={"--often": "--times"},
    to_json=vars,
    text=lambda request: f"hello {request.name}",
    exit_code=lambda request: 1 if request.mood == "loudly" else 0,
)
def greet(request: GreetRequest, console: Console) -> GreetRequest:
    """Return the request."""
    console.print("greeting")
    return request
'''


@pytest.fixture
def greet(tmp_path, monkeypatch):
    """Add the file of a verb, `greet`, to a folder in which the package looks for verbs."""
    (tmp_path / "greet.py").write_text(GREET)
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    yield
    sys.modules.pop("unmask.commands.greet", None)
    commands.VERBS._built.pop("greet", None)


@pytest.fixture
def run(monkeypatch, capfd):
    """Return a function that runs a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unmask", *arguments])
        with pytest.raises(SystemExit) as stop:
            commands.main()
        return stop.value.code, *capfd.readouterr()

    return run


def test_new_file_adds_a_verb(greet, run):
    code, out, _ = run("--help")
    assert code == 0
    assert "greet" in out
    code, out, _ = run("greet", "--help")
    words = " ".join(out.replace("│", " ").split())
    for part in (
        "Greet somebody.",
        "Only for tests.",
        "Whom to greet.",
        "How often.",
        "[default: 1]",
        "kindly or loudly (in a loud voice).",
        "(none)",
        "--and",
    ):
        assert part in words
    assert run("greet", "Ada") == (0, "hello Ada\n", "greeting\n")


def test_command_line_fills_the_request_and_json_prints_the_result(greet, run):
    given = ["Ada", "--times", "2", "--mood", "loudly", "--and", "Bo", "--and", "Cy", "--numbers", "1,2", "--hat"]
    code, out, _ = run("greet", *given, "--json")
    assert code == 1, "the declaration computes the exit code from the result"
    found = json.loads(out)
    del found["console"]
    assert found == {
        "name": "Ada", "times": 2, "mood": "loudly", "others": ["Bo", "Cy"], "card": None, "numbers": [1, 2],
        "hat": True, "age": 40,
    }  # fmt: skip


def test_python_function_has_the_same_options(greet):
    from unmask.commands.greet import GreetRequest, greet  # type: ignore[import-not-found]

    quiet = Console(quiet=True)
    assert greet("Ada", times=3, others="Bo", console=quiet) == GreetRequest("Ada", times=3, others=("Bo",))
    assert str(inspect.signature(greet)).startswith("(name: str, *, times: int = 1, mood: str = 'kindly', others:")
    assert list(inspect.signature(greet).parameters)[-1] == "console"
    for part in (
        "Greet somebody.",
        "Return the request.",
        "times: How often.",
        "card: A card to bring. Default: none.",
    ):
        assert part in greet.__doc__
    with pytest.raises(TypeError, match="tims"):
        greet("Ada", tims=3)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("times", 0, "got --times 0; expected 1 to 9"),
        ("times", 10, "got --times 10; expected 1 to 9"),
        ("age", 0, "got --age 0; expected 1 or more"),
        ("mood", "angrily", "got --mood angrily; expected kindly or loudly"),
        ("mood", "loudy", "got --mood loudy; expected kindly or loudly; did you mean loudly?"),
    ],
)
def test_bounds_and_choices_apply_to_command_line_and_python(greet, run, option, value, expected):
    from unmask.commands.greet import greet  # type: ignore[import-not-found]

    with pytest.raises(UserError, match=re.escape(expected)):
        greet("Ada", **{option: value})
    code, out, err = run("greet", "Ada", f"--{option}", str(value))
    assert (code, out, err) == (2, "", f"error: {expected}\n")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("hat", "no", "got hat='no'; expected true or false"),
        ("hat", 1, "got hat=1; expected true or false"),
        ("times", True, "got times=True; expected an integer"),
        ("times", 2.5, "got times=2.5; expected an integer"),
        ("times", None, "got times=None; expected an integer"),
        ("mood", ["kindly"], "got mood=['kindly']; expected a string"),
        ("others", [1], "got others=[1]; expected a list of strings"),
        ("others", 1, "got others=1; expected a list of strings"),
        ("numbers", "1,2", "got numbers='1,2'; expected a list of integers or None"),
        ("card", 7, "got card=7; expected a path or None"),
    ],
)
def test_values_of_a_wrong_type_are_rejected(greet, option, value, expected):
    from unmask.commands.greet import greet  # type: ignore[import-not-found]

    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        greet("Ada", **{option: value})


def test_numbers_of_numpy_and_paths_in_place_of_strings_are_accepted(greet):
    from unmask.commands.greet import greet  # type: ignore[import-not-found]

    made = greet(Path("Ada"), times=np.int64(2), numbers=np.array([1, 2]), others=Path("Bo"), card=Path("card.png"))
    assert (made.name, made.times, made.numbers, made.others) == ("Ada", 2, (1, 2), ("Bo",))
    assert made.card == Path("card.png"), "an option that declares paths gets a path, not a string"


def test_invalid_arguments_are_usage_errors(greet, run):
    for arguments, expected in [
        (["greet"], "Missing argument"),
        (["greet", "Ada", "--times", "often"], "valid int"),
        (["greet", "Ada", "--tims", "3"], r"No such option: --tims.*--times"),
        (["greet", "Ada", "--often", "3"], "got --often; expected --times, its new name"),
        (["gret"], "No such command 'gret'"),
    ]:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert re.search(expected, " ".join(err.replace("│", " ").split())), err


def test_field_without_an_option_raises_type_error():
    @dataclass(frozen=True)
    class Broken(Request):
        """No option."""

        name: str

    with pytest.raises(TypeError, match=r"Broken\.name is not an option; annotate it"):
        options_of(Broken)


def test_union_of_a_value_and_a_sequence_is_repeatable():
    @dataclass(frozen=True)
    class Several(Request):
        """Runs."""

        runs: Annotated[str | Path | Sequence[str | Path], Option("Runs.")]
        _: KW_ONLY
        size: Annotated[int | None, Option("Size.")] = None

    @command(Several, panel=Panel.START)
    def several(request: Several, console: Console) -> Several:
        """Return the request."""
        return request

    assert several("a").runs == ("a",)
    assert several(["a", Path("b")]).runs == ("a", Path("b"))
    assert [each.command_line_type() for each in options_of(Several)] == [list[Path], int]


# All verbs and public names


@pytest.fixture(scope="module")
def verbs():
    return dict(get_command(commands.app).commands)  # type: ignore[attr-defined]


def test_verbs_are_the_files_of_the_folder(verbs):
    files = {path.stem for path in Path(commands.__file__).parent.glob("*.py")} - {"__init__", *commands.NOT_VERBS}
    assert set(verbs) == {stem.removesuffix("_") for stem in files}
    assert len(verbs) >= 22


def test_every_option_has_a_help_that_ends_in_a_full_stop(verbs):
    for name, verb in verbs.items():
        assert verb.help, name
        for parameter in verb.params:
            assert parameter.help.endswith((".", "?")), f"{name}: {parameter.name}: {parameter.help}"
            assert "default" not in parameter.help.lower().replace("defaults", ""), f"{name}: {parameter.name}"


WRONG = {bool: ("no", 1, None), int: ("3", True, 1.5), float: ("0.5", True), str: (1, True), Path: (1, True)}


@pytest.mark.parametrize("name", sorted(commands.verb_files()))
def test_every_option_of_every_verb_rejects_values_of_a_wrong_type(name):
    request = commands.declared(name).request
    options = options_of(request)
    required = {
        each.name: "x" if each.option.choices is None else next(iter(each.option.choices()))
        for each in options
        if each.field.default is MISSING
    }
    assert request(**required)
    for each in options:
        kinds = [kind for kind in get_args(each.annotation) or [each.annotation] if kind in WRONG]
        wrong = [object(), [object()]]
        if len(kinds) == 1 or set(kinds) == {str, Path}:
            wrong += WRONG[kinds[-1]]
        for value in wrong:
            with pytest.raises(UserError, match=rf"^got {each.name}=.*; expected [\w ]+$"):
                request(**required | {each.name: value})


PUBLIC = {"import_weights": "import", **{name: name for name in unmask.__all__ if name in commands.verb_files()}}
# keywords that differ from the options: a built-in name, a reserved word
KEYWORDS = {"set": "settings", "from": "from_run"}


def test_public_functions_include_these_verbs():
    assert set(PUBLIC) >= {
        "pretrain", "resume", "reconstruct", "embed", "probe", "finetune", "predict", "import_weights", "export",
        "compare",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_function_and_verb_have_the_same_options_and_defaults(verbs, name):
    keywords = dict(inspect.signature(getattr(unmask, name)).parameters)
    assert keywords.pop("console").default is None
    parsed = {}
    for parameter in verbs[PUBLIC[name]].params:
        (flag,) = (flag for flag in parameter.opts if len(flag) > 2)
        option = flag.removeprefix("--").replace("-", "_")
        parsed[KEYWORDS.get(option, option)] = parameter
    for own in ("json", "help"):
        parsed.pop(own, None)
    assert list(parsed) == list(keywords)
    for keyword, parameter in parsed.items():
        positional = parameter.param_type_name == "argument"
        assert positional == (keywords[keyword].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        required = keywords[keyword].default is inspect.Parameter.empty
        assert parameter.required == required
        if not required:
            assert (parameter.default or None) == (keywords[keyword].default or None), keyword


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_function_documents_its_options(name):
    function = getattr(unmask, name)
    assert function.__doc__ == inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in function.__doc__
    assert "\nReturn " in function.__doc__
