"""Recognition of state dicts by names and shapes, and rejection of unsupported networks."""

import pytest
import torch

from unmask.errors import ForeignError
from unmask.interop.foreign.metadata import NetworkConfig, Preprocessor, SourceMetadata
from unmask.interop.foreign.recognise import recognise
from unmask.interop.foreign.state_dicts import unwrap
from unmask.interop.foreign.vit_checkpoints import is_sincos
from unmask.nn.positions import sincos


def vit(width=32, depth=2, places=16, patch=4, *, table="learned", **more: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return a plain vision transformer under official names. more: further tensors, by name and shape."""
    torch.manual_seed(0)
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + places, width),
              "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,)}  # fmt: skip
    for number in range(depth):
        for name, shape in {
            "norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
            "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,),
        }.items():  # fmt: skip
            shapes[f"blocks.{number}.{name}"] = shape
    state = {name: torch.randn(shape) for name, shape in {**shapes, **more}.items()}
    if table == "sincos":
        side = int(places**0.5)
        state["pos_embed"] = torch.cat([torch.zeros(1, width), sincos(width, (side, side))])[None]
    return state


HEAD = {"head.weight": (5, 32), "head.bias": (5,)}
POOLED = {"fc_norm.weight": (32,), "fc_norm.bias": (32,)}
DECODER = {"decoder_embed.weight": (512, 768), "decoder_pred.weight": (768, 512), "mask_token": (1, 1, 512),
           "decoder_blocks.7.norm1.weight": (512,), "decoder_norm.weight": (512,)}  # fmt: skip


def test_each_network_is_recognised_with_its_size():
    base = {"width": 768, "depth": 12, "places": 196, "patch": 16}
    blocks = {f"decoder_blocks.{number}.norm1.bias": (512,) for number in range(8)}
    decoder = {name: shape for name, shape in DECODER.items() if "_blocks" not in name} | blocks
    gamma = {f"blocks.{number}.gamma_1": (32,) for number in range(2)}
    codes = {"lm_head.weight": (8, 32), "lm_head.bias": (8,), "mask_token": (1, 1, 32)}
    small = "ViT 2 x 32, patch 4, at 16"
    for state, expected, method in [
        (vit(**base, table="sincos", **decoder), "official MAE, full or visualise: ViT-B/16 at 224, decoder 8 x 512",
         "mae"),
        (vit(table="sincos"), f"official MAE, encoder only: {small}", "encoder"),
        (vit(**POOLED, **HEAD), f"official MAE or timm ViT, fine-tuned: {small}, 5 classes", "classify"),
        (vit(), f"timm ViT, encoder only: {small}", "encoder"),
        (vit(**HEAD), f"timm ViT, encoder only: {small}", "encoder"),
        (vit(**gamma, **codes), f"BEiT, pre-trained: {small}", "beit"),
        (vit(**gamma, **POOLED, **HEAD), f"BEiT, fine-tuned: {small}, 5 classes", "classify"),
    ]:  # fmt: skip
        found = recognise(state)
        assert (found.name, found.method["name"]) == (expected, method)
    whole = recognise(vit(**base, table="sincos", **decoder))
    assert (whole.method["encoder"]["heads"], whole.method["decoder"]["heads"]) == (12, 16)
    assert any("method.target=pixels" in note for note in whole.notes)
    left_out = recognise(vit(**HEAD)).notes
    assert any("the classifier on the class token is left out" in note for note in left_out)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"reg_token": (1, 4, 32)}, r"register tokens \(reg_token\)"),
        ({"blocks.0.attn.q_norm.weight": (16,)}, "a norm on queries and keys"),
        ({"blocks.0.mlp.fc1_g.weight": (8, 32)}, "a gated MLP"),
        ({"blocks.0.mlp.fc2.weight": (32, 64)}, "128 outputs and 64 inputs, a gated MLP"),
        ({"norm_pre.weight": (32,)}, "a norm before the first block"),
        ({"attn_pool.q.weight": (32, 32)}, "attention pooling"),
        ({"dist_token": (1, 1, 32)}, "a distillation token"),
        ({"cls_token": (1, 1, 16)}, "belong to different networks"),
        ({"patch_embed.proj.weight": (32, 48)}, "expected 4 dimensions"),
        ({"blocks.4.norm1.weight": (32,)}, r"blocks.2 is missing \(and 1 more\), but there is blocks.4"),
        ({"blocks.0.lora_a": (1,)}, "1 tensors do not belong .*blocks.0.lora_a"),
    ],
)
def test_unsupported_parts_are_rejected_by_name(more, match):
    with pytest.raises(ForeignError, match=match):
        recognise(vit(**more))


def test_missing_tensors_are_rejected():
    for missing, match in {"cls_token": "no class token", "pos_embed": "neither pos_embed nor"}.items():
        state = vit()
        del state[missing]
        with pytest.raises(ForeignError, match=match):
            recognise(state)
    with pytest.raises(ForeignError, match="at least one block"):
        recognise({name: value for name, value in vit().items() if not name.startswith("blocks")})


def described(network):
    return SourceMetadata(network=NetworkConfig(**network))


def test_config_json_of_another_network_is_rejected():
    about = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    assert recognise(vit(), described(about)).method["encoder"]["heads"] == 4
    for change, match in [
        ({"hidden_size": 64}, "hidden_size=64, but the tensors have 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3, but the tensors have 2"),
        ({"image_size": 32}, r"images of 32 pixels, that is 8 x 8 patches.*the weights have positions for 16"),
        ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
    ]:
        with pytest.raises(ForeignError, match=match):
            recognise(vit(), described(about | change))


def test_positions_without_a_class_token_row_get_a_row_of_zeros():
    state = vit()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    found = recognise(state).weights["encoder.pos_embed"]
    assert torch.equal(found, torch.cat([torch.zeros(1, 1, 32), state["pos_embed"]], 1))


def test_fixed_positions_are_distinguished_from_learned_ones():
    for grid in ((4, 4), (3, 5), (14, 14)):
        table = torch.cat([torch.zeros(1, 32), sincos(32, grid)])[None]
        assert is_sincos(table + 1e-4)
        assert not is_sincos(table + 0.02 * torch.randn_like(table))


def test_wrappers_and_prefixes_are_removed():
    state = vit()
    for wrapped in (
        {"model": state, "epoch": 1},
        {"state_dict": {f"module.model.{name}": value for name, value in state.items()}},
        {"model": {"state_dict": {f"_orig_mod.{name}": value for name, value in state.items()}}},
    ):
        assert unwrap(wrapped).keys() == state.keys()
    for content, match in (({"epoch": 1}, "got a dict with epoch"), ({}, "without any weights"), (None, "a NoneType")):
        with pytest.raises(ForeignError, match=match):
            unwrap(content)


def test_an_imagegpt_without_a_palette_or_with_biases_is_rejected():
    state = {"transformer.wte.weight": torch.rand(9, 32), "transformer.h.0.ln_1.weight": torch.rand(32)}
    with pytest.raises(ForeignError, match="without its palette"):
        recognise(state)
    with pytest.raises(ForeignError, match="expected 8 colours"):
        recognise(state, SourceMetadata(preprocessor=Preprocessor(clusters=[[0, 0, 0]])))
    with pytest.raises(ForeignError, match="biases"):
        recognise(state | {"transformer.h.0.attn.c_attn.bias": torch.ones(96)})
