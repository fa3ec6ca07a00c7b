"""Convert an iGPT to transformers' ImageGPT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.engine.load import Loaded
from unmask.interop import names
from unmask.interop.export_common import (
    largest,
    weights_of,
)
from unmask.interop.export_target import ExportedModel, ExportError
from unmask.interop.transformers_folder import TransformersModel, folder
from unmask.methods.igpt import IGPT
from unmask.nn.gpt import GPT


def to_image_gpt(loaded: Loaded) -> ExportedModel:
    """Convert an iGPT, with its palette in the preprocessor if the images are 8-bit RGB."""
    method, encoder = loaded.method, loaded.method.encoder
    assert isinstance(encoder, GPT)
    if encoder.sos is None:
        raise ExportError(
            "this iGPT predicts hidden tokens (objective=bert), but transformers' ImageGPT predicts the next token; "
            "use --to onnx or --to safetensors"
        )
    head = method.head if isinstance(method, IGPT) else None
    colours, spec, depth = len(encoder.palette), loaded.plan.images, len(encoder.blocks)
    config = {
        "model_type": "imagegpt", "vocab_size": colours + 1, "n_positions": encoder.grid[0] * encoder.grid[1],
        "n_embd": encoder.width, "n_layer": depth, "n_head": loaded.config.method.model_dump()["encoder"]["heads"],
        "activation_function": "quick_gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    notes = (f"the start token is {colours}, one more than the last colour", )  # fmt: skip
    if spec.channels == 3 and spec.dtype == "uint8":
        more = {"preprocessor_config.json": {
            "image_processor_type": "ImageGPTImageProcessor", "do_resize": True, "do_normalize": True,
            "size": {"height": encoder.grid[0], "width": encoder.grid[1]}, "do_color_quantize": True,
            "resample": 3 if encoder.patch == (1, 1) else 4, "clusters": (encoder.palette / 127.5 - 1).tolist(),
        }}  # fmt: skip
        if encoder.patch != (1, 1):
            notes = (*notes, f"a token is the mean of {encoder.patch[0]} x {encoder.patch[1]} pixels; the preprocessor "
                     "rounds these means, so it sometimes chooses another colour")  # fmt: skip
    else:
        more = {"palette.json": {"colours": encoder.palette.tolist(), "dtype": spec.dtype}}
        notes = (*notes, "no preprocessor: ImageGPT's supports only 8-bit RGB; palette.json contains the colours in "
                 "the files' units, and a token is the index of the nearest one")  # fmt: skip

    def compare(model: Any, images: Tensor) -> float:
        ids = encoder.ids(images)
        given = torch.cat([torch.full_like(ids[:, :1], colours), ids[:, :-1]], 1)
        out = model(input_ids=given, output_hidden_states=True)
        core = model.transformer if head is not None else model
        last = core.ln_f if encoder.layer == depth else core.h[encoder.layer].ln_1
        features = out.hidden_states[encoder.layer]
        pairs = [(features if encoder.layer == depth else last(features), encoder(images).patches)]
        if head is not None:
            pairs.append((out.logits, head(encoder.run(ids))))
        return largest(*pairs)

    where = f"`model.{'transformer.' * (head is not None)}h[{encoder.layer}].ln_1(hidden_states[{encoder.layer}])`"
    return folder(
        loaded,
        TransformersModel(
            name="ImageGPTForCausalImageModeling" if head is not None else "ImageGPTModel",
            config=config,
            weights=names.to_image_gpt(weights_of(method), prefix="transformer." if head is not None else ""),
            compare=compare,
            returns="Pass the tokens with the start token first and without the last one; the features of this package "
            + (
                f"are {where}, with `output_hidden_states=True`."
                if encoder.layer < depth
                else "are the last hidden state."
            ),
            notes=notes,
            more=more,
        ),
    )
