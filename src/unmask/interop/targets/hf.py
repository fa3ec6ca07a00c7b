"""A folder for transformers: the encoder as ViT, BEiT or ImageGPT, or a classifier, with its preprocessor."""

from __future__ import annotations

from unmask.engine.load import Loaded
from unmask.interop.export_target import ExportedModel, ExportTarget
from unmask.interop.transformers_models import to_transformers


def to_hf(loaded: Loaded) -> ExportedModel:
    """Convert the encoder, an iGPT, or a classifier.

    transformers' ViTMAE hides random patches at every call, so it is not used for features: `AutoModel` and the
    feature-extraction pipeline must return all tokens, reproducibly.
    """
    return to_transformers(loaded, whole=False)


TARGET = ExportTarget(to_hf, suffix="", library_name="transformers")
