"""`unmask plan`: print the costs of a recipe."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.option import Option
from unmask.shared_options import Settings


@dataclass(frozen=True)
class PlanRequest(Request):
    """Print the costs of a recipe without data: parameters, FLOPs, learning rate and steps."""

    recipe: Annotated[str, Option("Recipe from `unmask recipes`.", metavar="RECIPE")]
    _: KW_ONLY
    gpus: Annotated[
        int | None, Option("Number of GPUs, to print the images per GPU as well.", metavar="N", at_least=1)
    ] = None
    settings: Settings = ()


@command(PlanRequest, panel=Panel.START)
def plan(request: PlanRequest, console: Console) -> dict[str, Any]:
    """Return the costs."""
    from unmask.engine.recipe_costs import print_costs, recipe_costs

    found = recipe_costs(request.recipe, settings=request.settings, gpus=request.gpus)
    print_costs(found, console)
    return found
