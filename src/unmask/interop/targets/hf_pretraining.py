"""A folder for transformers with the decoder or head of the pre-training (ViTMAE, BEiT, ImageGPT)."""

from __future__ import annotations

from unmask.engine.load import Loaded
from unmask.interop.export_target import ExportedModel, ExportError, ExportTarget
from unmask.interop.transformers_models import to_transformers
from unmask.methods.beit import BEiT
from unmask.methods.igpt import IGPT
from unmask.methods.mae import MAE


def to_hf_pretraining(loaded: Loaded) -> ExportedModel:
    """Convert the whole pre-training method. Raises ExportError if transformers has no model for the method."""
    exported = to_transformers(loaded, whole=True)
    if isinstance(loaded.method, (MAE, BEiT, IGPT)) and exported.whole:
        return exported
    raise ExportError(
        f"transformers has no pre-training model for this run of {loaded.config.method.name}"
        + (f" ({exported.notes[0]})" if exported.notes and isinstance(loaded.method, (MAE, BEiT)) else "")
        + "; use --to hf for the encoder"
    )


TARGET = ExportTarget(to_hf_pretraining, suffix="", library_name="transformers")
