"""`unmask plan`: print the costs of a recipe."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Settings


@dataclass(frozen=True)
class PlanRequest(Request):
    """Print the costs of a recipe without data: parameters, FLOPs, learning rate and steps; for GPUs also memory,
    traffic and speed.
    """

    recipe: Annotated[str, Option("Recipe from `unmask recipes`.", metavar="RECIPE")]
    _: KW_ONLY
    nodes: Annotated[int | None, Option("Number of machines with GPUs.", metavar="N", default="1", at_least=1)] = None
    gpus: Annotated[
        int | None,
        Option(
            "Number of GPUs in each machine, to print the engine, micro-batch, memory and traffic of each.",
            metavar="N",
            default="1",
            at_least=1,
        ),
    ] = None
    memory: Annotated[
        float | None, Option("Memory of each GPU in GiB.", metavar="GIB", default="80, as in an A100 or H100")
    ] = None
    images_per_second: Annotated[
        float | None, Option("Training speed of one GPU that you measured, to print that of all.", metavar="R")
    ] = None
    tflops: Annotated[
        float | None,
        Option("Speed of one GPU in 10^12 FLOPs per second of training, if images/s are unknown.", metavar="R"),
    ] = None
    verify: Annotated[bool, Option("Compare the sizes with torch, in a simulated group of that many processes.")] = (
        False
    )
    settings: Settings = ()


@command(PlanRequest, panel=Panel.START)
def plan(request: PlanRequest, console: Console) -> dict[str, Any]:
    """Return the costs."""
    from unmask.engine.cluster_plan import GPU_MEMORY, Cluster
    from unmask.engine.recipe_costs import costs_and_plan, print_costs

    given = (request.nodes, request.gpus, request.memory, request.images_per_second, request.tflops)
    cluster = None
    if request.verify or any(value is not None for value in given):
        cluster = Cluster(
            nodes=request.nodes or 1,
            gpus=request.gpus or 1,
            memory=GPU_MEMORY if request.memory is None else request.memory,
            images_per_second=request.images_per_second,
            tflops=request.tflops,
        )
    found, plan = costs_and_plan(request.recipe, settings=request.settings, cluster=cluster, verify=request.verify)
    print_costs(found, console, plan)
    return found
