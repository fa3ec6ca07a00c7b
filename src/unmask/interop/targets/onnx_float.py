"""The encoder with its normalisation as an ONNX graph (.onnx); float32 input in the units of the image files."""

from __future__ import annotations

from unmask.engine.load import Loaded
from unmask.interop.export_target import ExportedModel, ExportTarget
from unmask.interop.onnx_graph import encoder_graph


def to_onnx_float(loaded: Loaded) -> ExportedModel:
    """Convert the encoder to a graph with float32 input, for runtimes and pipelines that support only float32."""
    return encoder_graph(loaded, "float32")


TARGET = ExportTarget(to_onnx_float, suffix=".onnx", library_name="onnx", normalises=True)
