"""The encoder with its normalisation as an ONNX graph (.onnx); input in the dtype of the image files."""

from __future__ import annotations

from unmask.engine.load import Loaded
from unmask.interop.export_target import ExportedModel, ExportTarget
from unmask.interop.onnx_graph import encoder_graph


def to_onnx(loaded: Loaded) -> ExportedModel:
    """Convert the encoder to a graph whose input has the dtype of the image files.

    A runtime then rejects float images, which are usually scaled to 0..1 and would silently give wrong features.
    """
    return encoder_graph(loaded, loaded.plan.images.dtype)


TARGET = ExportTarget(to_onnx, suffix=".onnx", library_name="onnx", normalises=True)
