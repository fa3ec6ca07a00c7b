"""MAE implementations of other libraries, built with the sizes of an unmask recipe and with unmask's weights.

`step.py` times all of them, and `scaling.py` lightly's.

Each function returns (model, loss), where loss(images, noise=None) takes normalised images (B, 3, H, W). The patches
with the smallest values of noise (B, N) stay visible; without noise, the model draws its own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from unittest.mock import patch

import torch
from torch import Tensor, nn

from unmask.config import Config


def make_transformers(config: Config, official: str | None) -> tuple[nn.Module, Callable[..., Tensor]]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder, decoder = config.method.encoder, config.method.decoder  # type: ignore[attr-defined]
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=encoder.width, num_hidden_layers=encoder.depth, num_attention_heads=encoder.heads,
            intermediate_size=4 * encoder.width, image_size=config.data.size[0], patch_size=encoder.patch[0],
            decoder_hidden_size=decoder.width, decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.heads, decoder_intermediate_size=4 * decoder.width,
            norm_pix_loss=True, layer_norm_eps=1e-6, attn_implementation="sdpa",
        )
    )  # fmt: skip
    return model, lambda images, noise=None: model(images, noise=noise).loss


def make_official(config: Config, official: str | None) -> tuple[nn.Module, Callable[..., Tensor]]:
    sys.path.insert(0, str(official))
    import models_mae  # type: ignore[import-not-found]

    encoder, decoder = config.method.encoder, config.method.decoder  # type: ignore[attr-defined]
    model = models_mae.MaskedAutoencoderViT(
        img_size=config.data.size[0], patch_size=encoder.patch[0], embed_dim=encoder.width, depth=encoder.depth,
        num_heads=encoder.heads, decoder_embed_dim=decoder.width, decoder_depth=decoder.depth,
        decoder_num_heads=decoder.heads, norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), norm_pix_loss=True,
    )  # fmt: skip

    def loss(images: Tensor, noise: Tensor | None = None) -> Tensor:
        if noise is None:
            return model(images)[0]
        with patch("torch.rand", return_value=noise.clone()):
            return model(images)[0]

    return model, loss


class Lightly(nn.Module):
    """Build MAE from lightly's modules, as lightly's documentation does."""

    def __init__(self, config: Config) -> None:
        from lightly.models import utils  # type: ignore[import-not-found]
        from lightly.models.modules import (  # type: ignore[import-not-found]
            MAEDecoderTIMM,
            MaskedVisionTransformerTIMM,
        )
        from timm.models.vision_transformer import VisionTransformer  # type: ignore[import-not-found]

        super().__init__()
        self.utils = utils
        encoder, decoder = config.method.encoder, config.method.decoder  # type: ignore[attr-defined]
        self.patch, size = encoder.patch[0], config.data.size[0]
        vit = VisionTransformer(
            img_size=size, patch_size=self.patch, embed_dim=encoder.width, depth=encoder.depth, num_heads=encoder.heads,
            num_classes=0, global_pool="",
        )  # fmt: skip
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=(size // self.patch) ** 2, patch_size=self.patch, embed_dim=encoder.width,
            decoder_embed_dim=decoder.width, decoder_depth=decoder.depth, decoder_num_heads=decoder.heads,
        )  # fmt: skip

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        utils, tokens = self.utils, (len(images), self.backbone.sequence_length)
        if noise is None:
            keep, drop = utils.random_token_mask(tokens, mask_ratio=0.75, device=images.device)
        else:
            with patch("torch.rand", return_value=nn.functional.pad(noise, (1, 0))):  # a column for the class token
                keep, drop = utils.random_token_mask(tokens, mask_ratio=0.75, device=images.device)
        seen = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        masked = utils.repeat_token(self.decoder.mask_token, tokens)
        decoded = self.decoder.decode(utils.set_at_index(masked, keep, seen.type_as(masked)))
        guess = self.decoder.predict(utils.get_at_index(decoded, drop))
        truth = utils.get_at_index(utils.patchify(images, self.patch), drop - 1)
        mean, var = truth.mean(-1, keepdim=True), truth.var(-1, keepdim=True)
        return nn.functional.mse_loss(guess.float(), (truth - mean) / (var + 1e-6) ** 0.5)


def declare_operators() -> None:
    """Make torchvision, which lightly imports, importable beside another build of torch than its own.

    Its compiled operators then do not load. Vision transformers and transforms of PIL images use none of them.
    """
    try:
        import torchvision  # type: ignore[import-not-found]  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


KEPT: list[torch.library.Library] = []  # the declared names live as long as their library


def make_lightly(config: Config, official: str | None) -> tuple[nn.Module, Callable[..., Tensor]]:
    declare_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Lightly(config)
    return model, model


RIVALS = {"transformers": make_transformers, "official": make_official, "lightly": make_lightly}


def renamed(weights: Mapping[str, Tensor], rival: str) -> dict[str, Tensor]:
    """Return unmask's weights under the parameter names of the other library."""
    if rival == "transformers":
        return {new: part for name, value in weights.items() for new, part in _for_transformers(name, value)}
    found = {}
    for name, value in weights.items():
        room, _, rest = name.partition(".")
        if room == "encoder" and rest not in ("mean", "std"):
            found[f"backbone.vit.{rest}" if rival == "lightly" else rest] = value
        elif room == "decoder":
            rest = rest if rest == "mask_token" else f"decoder_{rest}"
            found[f"decoder.{rest}" if rival == "lightly" else rest] = value
    return found


def _for_transformers(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    places = {
        "encoder.blocks.": "vit.layers.", "decoder.blocks.": "decoder.decoder_layers.",
        "encoder.patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
        "encoder.cls_token": "vit.embeddings.cls_token", "encoder.pos_embed": "vit.embeddings.position_embeddings",
        "encoder.norm.": "vit.layernorm.", "decoder.embed.": "decoder.decoder_embed.",
        "decoder.mask_token": "decoder.mask_token", "decoder.pos_embed": "decoder.decoder_pos_embed",
        "decoder.norm.": "decoder.decoder_norm.", "decoder.pred.": "decoder.decoder_pred.",
    }  # fmt: skip
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    prefix = next((prefix for prefix in places if name.startswith(prefix)), None)
    if prefix is None:
        return []
    name = places[prefix] + name.removeprefix(prefix)
    if ".attn.qkv." in name:
        names = [name.replace("attn.qkv", f"attention.{letter}_proj") for letter in "qkv"]
        return list(zip(names, value.chunk(3), strict=True))
    for ours, theirs in parts.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return [(name, value)]
