"""unmask: self-supervised pre-training of vision transformers by masked image modelling, on your own images.

The few public names, handed out when first asked for, so that importing the package loads neither torch nor anything
else:

    load_encoder(run)          the encoder of a run: encoder(images) gives Features(cls, patches, grid)
    load(run)                  the whole method, with its config and plan
    open_safetensors(file)     the method of a file that `unmask export --to safetensors` wrote
    pretrain(data, ...)        what `unmask pretrain` does; resume(run) goes on with it
    recipe(name)               a Config to look at or to change
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers only
    from unmask.engine.load import load, load_encoder
    from unmask.engine.pretrain import pretrain
    from unmask.engine.resume import resume
    from unmask.interop.safetensors_file import open_safetensors
    from unmask.recipes.catalogue import find as recipe

    __version__: str

__all__ = ["__version__", "load", "load_encoder", "open_safetensors", "pretrain", "recipe", "resume"]

_PLACES = {
    "load": "unmask.engine.load:load",
    "load_encoder": "unmask.engine.load:load_encoder",
    "open_safetensors": "unmask.interop.safetensors_file:open_safetensors",
    "pretrain": "unmask.engine.pretrain:pretrain",
    "recipe": "unmask.recipes.catalogue:find",
    "resume": "unmask.engine.resume:resume",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("unmask")
    if name not in _PLACES:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}; public names are {', '.join(__all__)}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
