"""The command line. Every file of this folder except `NOT_VERBS` declares one verb.

The file of a verb is imported when the verb is called, and imports the modules that it needs when it runs, so `--help`
and `report` never load torch. Messages go to stderr; with --json, one JSON object goes to stdout. Exit codes: 0 done, 1
failed, 2 bad usage or input, 75 stopped on request and resumable, 130 interrupted.
"""

# No `from __future__ import annotations` here: typer needs the annotations as objects, not as strings.
import difflib
import importlib
import os
import pkgutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from unmask.commands import options
from unmask.commands.command_line import build
from unmask.commands.declare import FAILED, STOPPED, USAGE, Command, Panel
from unmask.commands.trained_run import is_unfinished
from unmask.console import escape_controls
from unmask.errors import TrainingFailed, UserError, nearest
from unmask.option import options_of
from unmask.run import RunInUse, held_here
from unmask.system import processes
from unmask.system.launched_process import LaunchedProcess
from unmask.system.output_sinks import install
from unmask.system.shell_command import as_shell_command
from unmask.system.stop_requests import INTERRUPTED, interrupts

NOT_VERBS = ("command_line", "declare", "options", "trained_run")  # files of this folder that declare no verb


class Verbs(Mapping[str, Any]):
    """Mapping from verb names to click commands, which imports the file of a verb when its command is looked up."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(verb_files())

    def __len__(self) -> int:
        return len(verb_files())

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = build(name, declared(name))
        return self._built[name]


def verb_files() -> dict[str, str]:
    """Return {verb: file name without .py}, for example {"import": "import_"}, because Python reserves `import`."""
    return _listing(tuple(__path__))


@cache
def _listing(folders: tuple[str, ...]) -> dict[str, str]:
    stems = (module.name for module in pkgutil.iter_modules(folders))
    return {stem.removesuffix("_"): stem for stem in stems if stem not in NOT_VERBS}


def declared(name: str) -> Command:
    """Return the declaration of a verb. Raises KeyError for an unknown name."""
    module = importlib.import_module(f"{__name__}.{verb_files()[name]}")
    found = (getattr(value, "command", None) for value in vars(module).values())
    return next(each for each in found if isinstance(each, Command))


VERBS = Verbs()


def parse_command(words: Sequence[str]) -> dict[str, Any]:
    """Parse a command line without running it; return {option: value}. `--help` prints the help and exits.

    Raises an error of click if the command line is wrong.
    """
    name, *rest = words
    if name not in VERBS:
        raise UserError(f"got {name}; expected a command; {nearest(name, VERBS)}")
    return VERBS[name].make_context(f"unmask {name}", list(rest)).params


class _Group(TyperGroup):
    """Click group that lists the verbs by panel."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = VERBS  # type: ignore[assignment]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the list of verbs without building their options."""
        verbs = {name: declared(name) for name in VERBS}
        self.commands = {  # type: ignore[assignment]
            name: TyperCommand(name, help=verb.help, rich_help_panel=verb.panel.value) for name, verb in verbs.items()
        }
        super().format_help(ctx, formatter)
        self.commands = VERBS  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        panels = list(Panel)
        return sorted(VERBS, key=lambda name: panels.index(declared(name).panel))


app = typer.Typer(
    name="unmask",
    help="Pre-train vision transformers on your own images by hiding most of each image and learning to rebuild it.",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from importlib.metadata import version as of

        print(f"unmask {of('unmask')}")
        raise typer.Exit


_first = True


def main() -> None:
    """Run the program and exit. An error that the user can correct is printed in one line."""
    global _first
    if not _first:  # raised if this process has run a command before
        options.restart_clock()
    _first = False
    if "OMP_WAIT_POLICY" not in os.environ:
        # Torch's threads spin while they wait for one another. If other programs use the cores too, long spinning makes
        # a training step up to a hundred times slower. Without other programs, limiting the spinning costs nothing
        # (docs/LOG.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    process = LaunchedProcess()
    if process.ends_with is not None:
        sys.exit(process.exit_code(process.ends_with))
    held_here.clear()
    outputs = install() if sys.stdout in (sys.__stdout__, None) else None  # a test may capture stdout
    with interrupts(), as_shell_command(sys.argv[1:]):
        code = _run()
    for name in ("SIGINT", "SIGTERM") if outputs else ():  # a signal that arrives now ends the process
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    if outputs and (lost := outputs.finish()) is not None:
        if lost:
            print(escape_controls(f"error: {lost}"), file=sys.stderr)
        code = code or FAILED
    sys.exit(process.exit_code(code))


def _run() -> int:
    """Run the verb of the command line and return the exit code."""
    try:
        code = app(standalone_mode=False)  # typer returns the exit code of typer.Exit
    except (KeyboardInterrupt, typer.Abort):  # typer usually catches Ctrl-C and returns 130
        code = INTERRUPTED
    except Exception as error:
        return explain(error)
    if code == INTERRUPTED and processes.error_prefix() is not None:
        print(_interrupted(), file=sys.stderr)
    return code if isinstance(code, int) else 0


def _interrupted() -> str:
    """Return the message after Ctrl-C, with the command that resumes the unfinished runs of this process, if any."""
    names = dict.fromkeys(str(run.path) for run in held_here if is_unfinished(run))
    if not names:
        return "Interrupted."
    return "Interrupted. Continue with: " + " or ".join(f"unmask resume {name}" for name in names)


def explain(error: Exception) -> int:
    """Print an error and return the exit code. Unexpected errors are printed with a traceback."""
    if callable(getattr(error, "show", None)):
        return _explain_usage(error)
    prefix = processes.error_prefix()
    if isinstance(error, RunInUse):  # 75, because scripts can retry when the other process has finished
        message, code = str(error), STOPPED
    elif isinstance(error, UserError):
        message, code = str(error), USAGE
    elif isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        message, code = _explain_path(error), USAGE
    elif isinstance(error, TrainingFailed):
        message, code = str(error), FAILED
    elif type(error).__name__ == "OutOfMemoryError":
        message, code = f"{error}. Try --set train.micro_batch=N with a smaller N, or a smaller model", FAILED
    elif isinstance(error, OSError):
        message, code = f"{error.strerror or error} ({error.filename or 'no file named'})", FAILED
    else:
        import traceback

        if prefix is not None:
            print(escape_controls("".join(traceback.format_exception(error))), file=sys.stderr)
        message, code = f"this is a fault in unmask: {type(error).__name__}: {error}", FAILED
    if prefix is not None:
        print(escape_controls(f"error: {prefix}{message}"), file=sys.stderr)
    return code


def _explain_path(error: OSError) -> str:
    """Return a message about a path that cannot be used, without the number of the error."""
    if error.filename is None or error.strerror is None:
        return str(error)
    remedy = "; choose another path, or change its permissions" if isinstance(error, PermissionError) else ""
    return f"{error.filename}: {error.strerror}{remedy}"


def _explain_usage(error: Any) -> int:
    """Print one of click's usage errors, with a hint for a renamed option or for an option that is a setting."""
    if not processes.speaks_for_host():
        return getattr(error, "exit_code", USAGE)
    if isinstance(message := getattr(error, "message", None), str):
        error.message = escape_controls(message)
    hint = _renamed_option(error) or _nearest_option(error) or _hint_for_option(error)
    if hint and hasattr(error, "possibilities"):
        error.possibilities = None  # show our hint instead of the similar names that click suggests
    error.show()
    if hint:
        print(escape_controls(hint), file=sys.stderr)
    return getattr(error, "exit_code", USAGE)


def _renamed_option(error: Any) -> str:
    """Return a hint with the new name of a renamed option, or "" for other options."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if context is None or context.info_name not in verb_files():
        return ""
    now = declared(context.info_name).renamed.get(str(option))
    return "" if now is None else f"got {option}; expected {now}, its new name"


def _nearest_option(error: Any) -> str:
    """Return a hint with the verb's options of similar names, or whose choices include the name; "" for others."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if not option or context is None or context.info_name not in verb_files():
        return ""
    wrong = str(option).lstrip("-").lower()
    flags = [flag for parameter in context.command.params for flag in parameter.opts if flag.startswith("--")]
    names = [flag.removeprefix("--") for flag in flags]
    close = difflib.get_close_matches(wrong, names, 2, 0.8)
    close += [name for name in names if len(name) > 2 and (wrong.startswith(name) or name.startswith(wrong))]
    hints = [f"--{name}" for name in dict.fromkeys(close)]
    for each in options_of(declared(context.info_name).request):
        if each.option.choices is not None and wrong in each.option.choices():
            hints.append(f"{each.flag} {wrong}")
    return f"Did you mean {' or '.join(hints)}?" if hints else ""


def _hint_for_option(error: Exception) -> str:
    """Return the hint to use --set for an option that is a setting, such as --lr, or "" for other options."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if not option or context is None or not any("--set" in parameter.opts for parameter in context.command.params):
        return ""
    from unmask.config import keys, nearest_setting
    from unmask.recipes.catalogue import find

    found = nearest_setting(str(option).lstrip("-").replace("-", "_"), keys(find("mae_nano")))
    if not found.startswith("did you mean"):
        return "Change settings with --set KEY=VALUE; `unmask recipes NAME` lists the keys of a recipe."
    key = found.removeprefix("did you mean ").rstrip("?").split(" or ")[0]
    scaled = ", the rate for 256 images: training uses VALUE x batch size / 256" if key == "optim.base_lr" else ""
    return f"{option} is a setting: use --set {key}=VALUE{scaled} (`unmask recipes NAME` lists all settings)"
