"""Convert an encoder with its normalisation, and a classifier if there is one, to an ONNX graph."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from unmask.batch import DTYPES, ImageSpec
from unmask.engine.load import Loaded
from unmask.interop.export_common import imported, largest, silence_libraries, task_left_out
from unmask.interop.export_target import ExportedModel, ExportError
from unmask.method import MeanTokenClassifier
from unmask.nn.blocks import Block
from unmask.nn.gpt import GPT
from unmask.nn.gpt import Block as GPTBlock
from unmask.nn.vit import ViT

OPSET = 18
ONE_FILE = 1 << 30  # larger weights are written to a second file, because ONNX files must be below 2 GiB


class ViTGraph(nn.Module):
    """`ViT.forward` for one image size, written such that the exported graph accepts any batch size."""

    def __init__(self, encoder: ViT, classifier: MeanTokenClassifier | None) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        patches = encoder.embed(encoder.patches(images))
        cls = encoder.cls_token if encoder.pos_embed is None else encoder.cls_token + encoder.pos_embed[:, :1]
        x = torch.cat([cls.expand(patches.shape[0], -1, -1), patches], 1)
        shared = None if encoder.relative_bias is None else encoder.relative_bias()
        for block in encoder.blocks:
            assert isinstance(block, Block)
            own = block.relative_bias
            x = block(x, shared if own is None else own())
        tokens = encoder.norm(x)
        if self.classifier is None:
            return tokens[:, 0], tokens[:, 1:]
        return tokens[:, 0], tokens[:, 1:], self.classifier.classify_tokens(x[:, 1:].mean(1))


class GPTGraph(nn.Module):
    """`GPT.forward` with explicit distances to colours, because ONNX has no cdist."""

    def __init__(self, encoder: GPT) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        pixels = encoder.shrink(images).flatten(1, 2)
        x = encoder.tokens[(pixels[:, :, None] - encoder.palette).square().sum(-1).argmin(-1)]
        if encoder.sos is not None:
            x = torch.cat([encoder.sos.expand(x.shape[0], 1, -1), x[:, :-1]], 1)
        x = x + encoder.positions
        for number, block in enumerate(encoder.blocks):
            assert isinstance(block, GPTBlock)
            if number == encoder.layer:
                return (block.norm1(x),)
            x = x + block.attn(block.norm1(x))[0]
            x = x + block.mlp(block.norm2(x))
        return (encoder.norm(x),)


class PlainGraph(nn.Module):
    """The forward pass of encoders without a class token, unchanged."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(images).patches,)


def encoder_graph(loaded: Loaded, dtype: str) -> ExportedModel:
    """Convert an encoder with its normalisation, and its classifier if there is one, to an ONNX graph.

    The graph accepts any number of images of one size. dtype: dtype of the images, which is also stored in the graph's
    metadata. The graph is made with torch.export, because the older tracer does not support RMS norm and is deprecated.
    """
    method, encoder, spec = loaded.method, loaded.method.encoder, loaded.plan.images
    classifier = method.mean_token_classifier
    if isinstance(encoder, ViT):
        graph, names = ViTGraph(encoder, classifier), ["cls", "patches", *["logits"] * (classifier is not None)]
    else:
        graph, names = GPTGraph(encoder) if isinstance(encoder, GPT) else PlainGraph(encoder), ["patches"]
    graph = graph.eval()

    def write(path: Path) -> None:
        require_onnx()
        size = sum(value.nbytes for value in graph.state_dict().values())
        example = torch.zeros(2, spec.channels, *spec.size, dtype=DTYPES[dtype])
        with silence_libraries(), torch.no_grad():
            program = torch.onnx.export(
                graph, (example,), input_names=["images"], output_names=names, opset_version=OPSET, dynamo=True,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, verbose=False,
            )  # fmt: skip
        assert program is not None, "dynamo=True returns a program"
        for node in program.model.graph:
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # it contains paths of this machine
        program.model.metadata_props["unmask.input"] = json.dumps(
            {"name": "images", "dtype": dtype, "units": units(spec), "normalised": False, "layout": "BCHW",
             "size": spec.size, "channels": spec.channels, "mean": spec.mean, "std": spec.std}
        )  # fmt: skip
        program.save(path, external_data=size > ONE_FILE)

    def check(path: Path, images: Tensor) -> float:
        onnxruntime = imported("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = encoder(images)
        ours = {"cls": found.cls, "patches": found.patches}
        if classifier is not None:
            ours["logits"] = classifier.logits(images)
        pairs = []
        for part in (slice(None), slice(1)):  # check batches of three images and of one
            theirs = session.run(names, {"images": images[part].to(DTYPES[dtype]).numpy()})
            pairs += [
                (torch.from_numpy(np.asarray(out)), ours[name][part]) for name, out in zip(names, theirs, strict=True)
            ]
        return largest(*pairs)

    height, width = spec.size
    notes = () if classifier else task_left_out(loaded, "a graph from images to features")
    if sum(value.nbytes for value in graph.state_dict().values()) > ONE_FILE:
        notes = (*notes, "the weights are too large for one file: they are in a second file that ends in .data; keep "
                 "both files together")  # fmt: skip
    return ExportedModel(
        what="the encoder as an ONNX graph" + (", with its classifier" if classifier else ""),
        library="onnxruntime",
        load="import onnxruntime\n\nsession = onnxruntime.InferenceSession(PATH)\n"
        f'{", ".join(names)}{"," if len(names) == 1 else ""} = session.run({json.dumps(names)}, {{"images": images}})',
        returns=f"`images` is {dtype} (B, {spec.channels}, {height}, {width}) in the files' own units "
        f"({units(spec)}), not normalised: the graph normalises them. Outputs: {', '.join(names)}.",
        write=write,
        check=check,
        notes=notes,
        classifies=classifier is not None,
    )


def units(images: ImageSpec) -> str:
    return {"uint8": "0 to 255", "uint16": "0 to 65535"}.get(images.dtype, "those of the files")


def require_onnx() -> None:
    """Raise ExportError if the packages that write ONNX files are not installed."""
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"--to onnx needs {name}, which is not installed; install it with: pip install "
                              "'unmask[onnx]'")  # fmt: skip
