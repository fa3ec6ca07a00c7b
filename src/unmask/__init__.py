"""unmask: self-supervised pre-training of vision transformers by masked image modelling, on your own images.

Public names are imported when they are first used, so that `import unmask` loads neither torch nor other modules. A run
is a folder; functions that train return it as a `Run`.

    pretrain(data, ...)            pre-train an encoder on images
    resume(run)                    continue a run where it stopped
    finetune(run, data, ...)       train classes, masks or boxes from a run's encoder, and test it
    import_weights(file, out=...)  make a run from weights of another library

    probe(run, data, ...)          measure the frozen features on labels
    reconstruct(run, images, ...)  draw images beside their reconstructions
    embed(run, data, out=...)      write the features of every image to a table
    predict(run, images, out=...)  apply a fine-tuned run to images
    compare(runs, ...)             several runs in one page
    export(run, to=..., out=...)   write the weights for another library

    load_encoder(run)              the encoder of a run: encoder(images) returns Features(cls, patches, grid)
    load(run)                      the whole method, with its config and plan
    open_safetensors(file)         the method in a file that `unmask export --to safetensors` wrote
    recipe(name)                   a Config to look at or to change

The functions that are also verbs of the command line take its options as keywords: `--test-split` is `test_split`,
`--set` is `settings`, and `--from` is `from_run`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers only
    from unmask.commands.compare import compare
    from unmask.commands.embed import embed
    from unmask.commands.export import export
    from unmask.commands.finetune import finetune
    from unmask.commands.import_ import import_weights
    from unmask.commands.predict import predict
    from unmask.commands.pretrain import pretrain
    from unmask.commands.probe import probe
    from unmask.commands.reconstruct import reconstruct
    from unmask.commands.resume import resume
    from unmask.engine.load import load, load_encoder
    from unmask.interop.safetensors_file import open_safetensors
    from unmask.recipes.catalogue import find as recipe

    __version__: str

__all__ = [
    "__version__",
    "compare",
    "embed",
    "export",
    "finetune",
    "import_weights",
    "load",
    "load_encoder",
    "open_safetensors",
    "predict",
    "pretrain",
    "probe",
    "recipe",
    "reconstruct",
    "resume",
]

_PLACES = {
    "compare": "unmask.commands.compare:compare",
    "embed": "unmask.commands.embed:embed",
    "export": "unmask.commands.export:export",
    "finetune": "unmask.commands.finetune:finetune",
    "import_weights": "unmask.commands.import_:import_weights",
    "load": "unmask.engine.load:load",
    "load_encoder": "unmask.engine.load:load_encoder",
    "open_safetensors": "unmask.interop.safetensors_file:open_safetensors",
    "predict": "unmask.commands.predict:predict",
    "pretrain": "unmask.commands.pretrain:pretrain",
    "probe": "unmask.commands.probe:probe",
    "recipe": "unmask.recipes.catalogue:find",
    "reconstruct": "unmask.commands.reconstruct:reconstruct",
    "resume": "unmask.commands.resume:resume",
}


def __getattr__(name: str) -> Any:
    """Import and return a public name."""
    if name == "__version__":
        from importlib.metadata import version

        return version("unmask")
    if name not in _PLACES:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}; public names are {', '.join(__all__)}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
