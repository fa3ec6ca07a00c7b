"""`unmask launch`: run a command in several processes, with torchrun."""

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from typing import Annotated

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.option import Option


@dataclass(frozen=True)
class LaunchRequest(Request):
    """Run a command in several processes, one per GPU, on this host and others."""

    command: Annotated[
        Sequence[str],
        Option(
            "Another unmask command with its options, e.g. pretrain DATA.", metavar="COMMAND...", command_line=list[str]
        ),
    ]
    _: KW_ONLY
    gpus: Annotated[
        int | None, Option("Number of GPUs to use on this host.", metavar="N", default="all", at_least=1)
    ] = None
    processes: Annotated[
        int | None,
        Option("Number of processes on this host, if they use no GPU.", metavar="N", default="1", at_least=1),
    ] = None
    nodes: Annotated[int, Option("Number of hosts; start the same command on each.", metavar="N", at_least=1)] = 1
    node_rank: Annotated[int | None, Option("Number of this host, from 0.", metavar="N", default="0", at_least=0)] = (
        None
    )
    address: Annotated[
        str | None,
        Option("Name and free port of host 0, e.g. node0:29500.", metavar="HOST:PORT", default="only this host"),
    ] = None
    max_restarts: Annotated[
        int,
        Option(
            "How often to restart all processes after one has failed; the command needs --resume auto.",
            metavar="N",
            at_least=0,
        ),
    ] = 0
    timeout: Annotated[
        int, Option("Seconds without an answer after which a process counts as dead.", metavar="SECONDS", at_least=1)
    ] = 60
    join_timeout: Annotated[
        int, Option("Seconds to wait for the other hosts at the start.", metavar="SECONDS", at_least=1)
    ] = 900
    shutdown_timeout: Annotated[
        int,
        Option("Seconds to stop after SIGINT, SIGTERM or SIGUSR1 until SIGKILL.", metavar="SECONDS", at_least=1),
    ] = 120


@command(LaunchRequest, panel=Panel.TRAIN, passes_on=True, exit_code=int)
def launch(request: LaunchRequest, console: Console) -> int:
    """Return the exit code of the processes if it is the same in all, else 1."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings about names of hosts; torch reads this once
    from unmask.engine import torchrun
    from unmask.errors import UserError

    name, *_ = words = list(request.command)
    # Verbs do not import one another, but this one parses the command line of another verb.
    given = import_module("unmask.commands").parse_command(words)
    if name == "launch":
        raise UserError("got `unmask launch` of `unmask launch`; expected a command such as pretrain")
    if request.max_restarts and given.get("resume", "auto") == "never":
        raise UserError(
            f"got --max-restarts {request.max_restarts} and {name} without --resume auto; a restarted command would "
            f"reject its own run; add --resume auto --out RUN to the command"
        )
    return torchrun.run(
        words,
        torchrun.Layout(request.gpus, request.processes, request.nodes, request.node_rank, request.address),
        torchrun.Limits(request.max_restarts, request.timeout, request.join_timeout, request.shutdown_timeout),
        console,
    )
