"""`unmask recipes`: list the recipes, or all settings of one recipe."""

from dataclasses import dataclass
from typing import Annotated, Any

from unmask.commands.declare import Panel, Request, command
from unmask.console import Console
from unmask.option import Option

FOLLOWS = "*"


@dataclass(frozen=True)
class RecipesRequest(Request):
    """List the recipes, or all settings of one recipe."""

    name: Annotated[str | None, Option("Show all settings of this recipe.", metavar="NAME")] = None


@dataclass(frozen=True)
class Listed:
    """Output of the command: `data` with --json, else `text`."""

    text: str
    data: dict[str, Any]


@command(RecipesRequest, panel=Panel.START, to_json=lambda listed: listed.data, text=lambda listed: listed.text)
def recipes(request: RecipesRequest, console: Console) -> Listed:
    """Return the recipes with their descriptions, or all settings of one recipe."""
    return _all() if request.name is None else _one(request.name)


def _one(name: str) -> Listed:
    from unmask.engine.image_size import follows_images
    from unmask.recipes.catalogue import describe, find

    text = describe(name)
    if follows_images(name):
        text += "\n\ndata.size and the patch are chosen from your images, unless one of the two is set."
    return Listed(text, find(name).model_dump(mode="json"))


def _all() -> Listed:
    from unmask.engine.image_size import follows_images
    from unmask.recipes.catalogue import AUTO, all_recipes, first_line, grouped

    found = all_recipes()
    width = max(map(len, found))
    lines = [
        f"{'auto':{width}} {FOLLOWS} Chooses {', '.join(AUTO[:-1])} or {AUTO[-1]} by the number and size of the images "
        "and by device, and prints the reasons."
    ]
    for title, group in grouped().items():
        lines += ["", title]
        for name in group:
            lines.append(f"{name:{width}} {FOLLOWS if follows_images(name) else ' '} {first_line(found[name])}")
    lines += [
        "",
        f"{FOLLOWS} the image size is chosen from your images, unless data.size or the patch is set; other recipes "
        "have a fixed size.",
    ]
    return Listed("\n".join(lines), {name: first_line(function) for name, function in found.items()})
