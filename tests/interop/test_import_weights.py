"""Import of weights: outputs stay the same, and invalid files are rejected with a clear error."""

import argparse
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import pretrain, write_images
from safetensors.torch import save_file

from unmask.batch import ImageSpec
from unmask.config import ConfigError, task_class, task_names
from unmask.console import Console
from unmask.engine import initial_weights
from unmask.engine.load import licence_of, load, load_encoder
from unmask.errors import UserError
from unmask.interop.foreign.metadata import Preprocessor, SourceMetadata
from unmask.interop.foreign.state_dicts import IMAGENET
from unmask.interop.foreign.vit_checkpoints import normalisation_of
from unmask.interop.import_weights import import_weights
from unmask.methods.mae import MAE
from unmask.methods.mae import Config as MAEConfig
from unmask.nn.decoders import DecoderConfig
from unmask.nn.masks import Mask
from unmask.nn.vit import ViTConfig

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
         "image_size": 16, "patch_size": 4}  # fmt: skip
HEADS = ["method.encoder.heads=2", "method.decoder.heads=2"]
CLOSE = 1e-5


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def saved(model: torch.nn.Module, folder: Path, preprocessor: dict | None = None) -> Path:
    """A folder saved by transformers, with weights far from zero so that every tensor affects the outputs."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "pos_embed" not in name:
                start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(start + 0.15 * torch.randn_like(parameter))
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def some_images(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    assert other.std() > 0.05
    return float((one - other).abs().max())


def normalised(images: torch.Tensor, encoder: torch.nn.Module) -> torch.Tensor:
    return (images - encoder.mean[:, None, None]) / encoder.std[:, None, None]


def small_mae(size=(16, 16), channels=3, **changes) -> MAE:
    """Return a method of unmask with weights far from their initialisation."""
    torch.manual_seed(0)
    encoder = ViTConfig(width=32, depth=2, heads=2, patch=(4, 4))
    config = MAEConfig(encoder=encoder, decoder=DecoderConfig(width=16, depth=1, heads=2), **changes)
    mean, std = (values[:1] * channels if channels != 3 else values for values in IMAGENET)
    method = MAE(config, ImageSpec(channels, size, "uint8", mean, std)).eval()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def official(method: MAE, *, whole: bool = True) -> dict[str, torch.Tensor]:
    """Return unmask's weights under the names of official files."""
    state = {}
    for name, value in method.state_dict().items():
        if name.startswith("encoder.") and name not in ("encoder.mean", "encoder.std"):
            state[name.removeprefix("encoder.")] = value
        elif name == "decoder.mask_token":
            state["mask_token"] = value
        elif name.startswith("decoder.") and whole:
            state["decoder_" + name.removeprefix("decoder.")] = value
    return state if whole else {name: value for name, value in state.items() if name != "mask_token"}


@torch.no_grad()
def test_an_imported_vitmae_makes_the_same_predictions(transformers, tmp_path):
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **SMALL, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
            decoder_intermediate_size=64, norm_pix_loss=True, layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    run = import_weights(saved(theirs, tmp_path / "vitmae"), tmp_path / "run")
    method = load(run.path).method
    assert isinstance(method, MAE)
    images, noise = some_images(3, 3, 16, 16), torch.rand(3, 16)
    order = noise.argsort(1)
    patches = method.encoder.patches(images)
    guess = method.guess(patches, Mask(keep=order[:, :4], drop=order[:, 4:]))
    out = theirs(normalised(images, method.encoder), noise=noise)
    expected = out.logits.gather(1, order[:, 4:, None].expand(-1, -1, 48))
    assert far(guess, expected) < CLOSE
    truth = method.target(patches, images).gather(1, order[:, 4:, None].expand(-1, -1, 48))
    assert float(method.target.loss(guess, truth)) == pytest.approx(float(out.loss), rel=1e-5)
    assert run.read("provenance.json")["imported"]["kind"].startswith("transformers ViTMAE, full: ViT 2 x 32, patch 4")


@torch.no_grad()
@pytest.mark.parametrize("make", ["ViTMAEModel", "ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"])
def test_imported_encoders_of_transformers_compute_the_same_features(transformers, tmp_path, make):
    config = transformers.ViTMAEConfig(**SMALL, mask_ratio=0.0) if "MAE" in make else transformers.ViTConfig(
        **SMALL, **({"encoder_stride": 4} if "Masked" in make else {}))  # fmt: skip
    theirs = getattr(transformers, make)(config)
    run = import_weights(saved(theirs, tmp_path / "vit"), tmp_path / "run")
    encoder = load_encoder(run.path)
    images = some_images(2, 3, 16, 16)
    core = getattr(theirs, "vit", theirs)
    expected = core(normalised(images, encoder)).last_hidden_state
    if "MAE" in make:  # ViTMAE shuffles patches even if none is hidden
        noise = torch.arange(16.0).expand(2, -1)
        expected = core(normalised(images, encoder), noise=noise).last_hidden_state
    found = encoder(images)
    assert far(torch.cat([found.cls[:, None], found.patches], 1), expected) < CLOSE
    assert load(run.path).config.method.name == "encoder"
    with pytest.raises(UserError, match=r"an encoder only \(imported from vit\)"):
        load(run.path).method.picture(batch_of(images), clock_of(images))
    with pytest.raises(ConfigError, match="choose one with --recipe"):
        initial_weights.continued(run.path, "auto")
    taken = initial_weights.continued(run.path, "mae_base")
    assert (taken.graft[0].source, taken.data.size) == ("encoder.", (16, 16))


@torch.no_grad()
@pytest.mark.parametrize("bias", ["shared", "each_block", "absolute"])
def test_an_imported_beit_of_transformers_computes_the_same_features(transformers, tmp_path, bias):
    theirs = transformers.BeitForMaskedImageModeling(
        transformers.BeitConfig(
            **SMALL, vocab_size=16, use_mask_token=True, use_absolute_position_embeddings=bias == "absolute",
            use_shared_relative_position_bias=bias == "shared", use_relative_position_bias=bias == "each_block",
            layer_scale_init_value=0.0 if bias == "absolute" else 0.1, drop_path_rate=0.0,
        )
    )  # fmt: skip
    look = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 1 / 255}
    run = import_weights(saved(theirs, tmp_path / "beit", look), tmp_path / "run")
    encoder = load_encoder(run.path)
    assert encoder.mean.tolist() == pytest.approx([102, 127.5, 153])
    assert encoder.std.tolist() == pytest.approx([51, 76.5, 102])
    images = some_images(2, 3, 16, 16)
    expected = theirs.layernorm(theirs.beit(normalised(images, encoder)).last_hidden_state)
    found = encoder(images)
    assert far(torch.cat([found.cls[:, None], found.patches], 1), expected) < CLOSE
    assert not encoder.blocks[0].attn.qkv.bias[32:64].any()


@torch.no_grad()
def test_a_fine_tuned_beit_of_transformers_is_imported_with_its_classes(transformers, tmp_path):
    theirs = transformers.BeitForImageClassification(
        transformers.BeitConfig(
            **SMALL, use_relative_position_bias=True, drop_path_rate=0.0, layer_scale_init_value=0.1,
            id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2},
        )
    )  # fmt: skip
    run = import_weights(saved(theirs, tmp_path / "beit"), tmp_path / "run")
    loaded = load(run.path)
    images = some_images(2, 3, 16, 16)
    assert loaded.config.method.classes == ("cat", "dog", "owl")
    assert far(loaded.method.logits(images), theirs(normalised(images, loaded.method.encoder)).logits) < CLOSE
    assert loaded.method.encoder.mean.tolist() == [127.5] * 3


@torch.no_grad()
@pytest.mark.parametrize("head", [True, False])
def test_imagegpt_of_transformers_is_imported_with_its_palette(transformers, tmp_path, head):
    config = transformers.ImageGPTConfig(vocab_size=9, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    theirs = (transformers.ImageGPTForCausalImageModeling if head else transformers.ImageGPTModel)(config)
    clusters = (some_images(8, 3).double() / 127.5 - 1).tolist()
    folder = saved_gpt(theirs, tmp_path / "gpt", {"clusters": clusters, "size": {"height": 4, "width": 4}})
    run = import_weights(folder, tmp_path / "run")
    method = load(run.path).method
    images = some_images(3, 3, 4, 4, seed=1)
    ids = method.encoder.ids(images)
    pixels = (images.double() / 127.5 - 1).flatten(2).transpose(1, 2)
    assert torch.equal(ids, torch.cdist(pixels, torch.tensor(clusters).double()).argmin(-1))
    shifted = torch.cat([torch.full((3, 1), 8), ids[:, :-1]], 1)
    out = theirs(input_ids=shifted)
    if head:
        assert far(method.head(method.encoder.run(ids)), out.logits) < CLOSE
        assert float(method.picture(batch_of(images), clock_of(images)).numbers["loss"]) > 0
    else:
        assert far(method.encoder.run(ids), out.last_hidden_state) < CLOSE
        with pytest.raises(ConfigError, match="encoder only"):
            initial_weights.continued(run.path, "auto")


def saved_gpt(model: torch.nn.Module, folder: Path, preprocessor: dict) -> Path:
    folder = saved(model, folder, preprocessor)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def batch_of(images: torch.Tensor):
    from unmask.batch import Batch

    return Batch(images, torch.arange(len(images)), torch.zeros(len(images), dtype=torch.int64))


def clock_of(images: torch.Tensor):
    from unmask.method import Clock
    from unmask.rng import Draws

    batch = batch_of(images)
    return Clock(0, 1, Draws(0, batch.epoch, batch.index))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
@pytest.mark.parametrize("target", ["norm_pixels", "pixels"])
def test_an_official_mae_is_imported_with_its_decoder(tmp_path, size, target):
    ours = small_mae(size, target=target)
    torch.save({"model": official(ours), "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae.pth")
    settings = [*HEADS, *[f"method.target={target}"] * (target == "pixels"), f"data.size={list(size)}"]
    run = import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=settings)
    loaded = load(run.path)
    images = some_images(3, 3, *size)
    assert loaded.config.method.encoder.positions == "sincos"
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in loaded.method.state_dict().items())
    assert loaded.method(batch_of(images), clock_of(images)).value == ours(batch_of(images), clock_of(images)).value
    assert loaded.plan.images.size == size
    assert (loaded.plan.steps, loaded.plan.num_images, loaded.step) == (0, 0, 0)
    kept = run.read("provenance.json")["imported"]
    assert kept["licence"].startswith("CC-BY-NC 4.0")
    assert len(kept["files"][0]["sha256"]) == 64
    assert kept["kind"].startswith("official MAE, full or visualise: ViT 2 x 32, patch 4,")
    assert run.read("status.json")["state"] == "finished"


@torch.no_grad()
def test_an_official_encoder_with_a_name_prefix_is_imported(tmp_path, capsys):
    ours = small_mae()
    state = {f"module.encoder.{name}": value for name, value in official(ours, whole=False).items()}
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "mae.safetensors")
    run = import_weights(
        tmp_path / "mae.safetensors", tmp_path / "run", settings=["method.encoder.heads=2"], console=Console()
    )
    images = some_images(2, 3, 16, 16)
    assert torch.equal(load_encoder(run.path)(images).patches, ours.encoder(images).patches)
    said = capsys.readouterr().err
    assert "official MAE, encoder only: ViT 2 x 32" in said
    assert "normalisation: mean 123.675, 116.28, 103.53, std 58.395, 57.12, 57.375 (ImageNet's, as in MAE)" in said
    assert "--set data.mean=[...]" in said
    assert "licence of the weights: CC-BY-NC 4.0" in said


@torch.no_grad()
def test_a_fine_tuned_official_file_is_imported_as_a_classifier(tmp_path):
    ours = small_mae()
    state = {name: value for name, value in official(ours, whole=False).items() if not name.startswith("norm.")}
    head = {"fc_norm.weight": torch.rand(32) + 0.5, "fc_norm.bias": torch.rand(32),
            "head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}  # fmt: skip
    torch.save({"model": state | head}, tmp_path / "tuned.pth")
    run = import_weights(tmp_path / "tuned.pth", tmp_path / "run", settings=["method.encoder.heads=2"])
    method, images = load(run.path).method, some_images(2, 3, 16, 16)
    *_, last = ours.encoder.layers(ours.encoder.embed(ours.encoder.patches(images)))
    mean = torch.nn.functional.layer_norm(
        last[:, 1:].mean(1), (32,), head["fc_norm.weight"], head["fc_norm.bias"], 1e-6
    )
    assert far(method.logits(images), mean @ head["head.weight"].T + head["head.bias"]) < CLOSE
    assert load(run.path).config.method.classes == ("class 0", "class 1", "class 2")


@torch.no_grad()
def test_a_gray_image_has_the_same_features_with_one_channel_and_with_three(tmp_path):
    ours = small_mae()
    torch.save(official(ours, whole=False), tmp_path / "mae.pth")
    heads = "method.encoder.heads=2"
    run = import_weights(tmp_path / "mae.pth", tmp_path / "gray", settings=[heads, "data.channels=1"])
    gray = some_images(2, 1, 16, 16)
    expected = ours.encoder(gray.expand(-1, 3, -1, -1))
    assert far(load_encoder(run.path)(gray).patches, expected.patches) < CLOSE
    by_hand = ["data.channels=1", "data.mean=[100]", "data.std=[50]"]
    run = import_weights(tmp_path / "mae.pth", tmp_path / "hand", settings=[heads, *by_hand])
    encoder = load_encoder(run.path)
    assert torch.equal(encoder.patch_embed.proj.weight, ours.encoder.patch_embed.proj.weight.sum(1, keepdim=True))
    assert (encoder.mean.tolist(), encoder.std.tolist()) == ([100], [50])


@torch.no_grad()
def test_four_channels_repeat_the_projection_and_drop_the_decoder(tmp_path, capsys):
    ours = small_mae()
    torch.save(official(ours), tmp_path / "mae.pth")
    settings = ["method.encoder.heads=2", "data.channels=4"]
    run = import_weights(tmp_path / "mae.pth", tmp_path / "four", settings=settings, console=Console())
    encoder, weight = load_encoder(run.path), ours.encoder.patch_embed.proj.weight
    assert torch.equal(encoder.patch_embed.proj.weight, weight[:, [0, 1, 2, 0]] * 0.75)
    assert encoder.mean.tolist() == pytest.approx([123.675, 116.28, 103.53, 123.675])
    assert encoder(some_images(1, 4, 16, 16)).patches.isfinite().all()
    assert load(run.path).config.method.name == "encoder"
    said = capsys.readouterr().err
    assert "is repeated and scaled to fit 4" in said
    assert "for 3 channels instead of 4, so only the encoder is imported" in said


@torch.no_grad()
def test_another_image_size_interpolates_positions_in_two_dimensions(tmp_path, capsys):
    ours = small_mae()
    torch.save(official(ours), tmp_path / "mae.pth")
    settings = [*HEADS, "data.size=[12,24]"]
    run = import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=settings, console=Console())
    images = some_images(2, 3, 12, 24)
    method = load(run.path).method
    # Import and encoder both interpolate positions; neither may change the row of the class token.
    assert far(method.encoder(images).patches, ours.encoder(images).patches) < CLOSE
    table = ours.decoder.pos_embed[:, 1:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, (3, 6), mode="bicubic", align_corners=False)
    assert torch.equal(method.decoder.pos_embed[:, 1:], table.permute(0, 2, 3, 1).reshape(1, 18, 16))
    assert torch.equal(method.decoder.pos_embed[:, :1], ours.decoder.pos_embed[:, :1])
    assert "interpolated from 4 x 4 to 3 x 6" in capsys.readouterr().err


def official_beit(width=32, depth=2, heads=2, codes=16, *, each_block: bool = False) -> dict[str, torch.Tensor]:
    """Return a BEiT like the released files: fused qkv, query and value biases, LayerScale, relative position bias."""
    torch.manual_seed(1)
    table, index = torch.randn(7 * 7 + 3, heads), torch.zeros(17, 17, dtype=torch.int64)
    state = {"cls_token": torch.randn(1, 1, width), "mask_token": torch.randn(1, 1, width),
             "patch_embed.proj.weight": torch.randn(width, 3, 4, 4), "patch_embed.proj.bias": torch.randn(width),
             "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
             "lm_head.weight": torch.randn(codes, width), "lm_head.bias": torch.randn(codes)}  # fmt: skip
    names = ["rel_pos_bias."] if not each_block else [f"blocks.{number}.attn." for number in range(depth)]
    for name in names:
        state |= {f"{name}relative_position_bias_table": table.clone(), f"{name}relative_position_index": index}
    for number in range(depth):
        block = {"gamma_1": (width,), "gamma_2": (width,), "norm1.weight": (width,), "norm1.bias": (width,),
                 "norm2.weight": (width,), "norm2.bias": (width,), "attn.q_bias": (width,), "attn.v_bias": (width,),
                 "attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
                 "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
                 "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}  # fmt: skip
        state |= {f"blocks.{number}.{name}": torch.randn(shape) * 0.2 for name, shape in block.items()}
    return state


@torch.no_grad()
def test_official_beit_is_imported_as_encoder_or_whole_with_its_dvae(tmp_path, capsys):
    state = official_beit()
    torch.save({"model": state}, tmp_path / "beit.pth")
    alone = import_weights(tmp_path / "beit.pth", tmp_path / "alone", console=Console())
    said = capsys.readouterr().err
    assert "predicts the codes of a dVAE that is not in the file" in said
    assert "BEiT, pre-trained: ViT 2 x 32" in said
    assert "licence of the weights: MIT" in said
    encoder = load_encoder(alone.path)
    assert encoder.mean.tolist() == [127.5] * 3
    bias = encoder.blocks[1].attn.qkv.bias
    assert torch.equal(bias, torch.cat([state["blocks.1.attn.q_bias"], torch.zeros(32), state["blocks.1.attn.v_bias"]]))
    torch.save({"model": official_beit(each_block=True)}, tmp_path / "each.pth")
    each = load_encoder(import_weights(tmp_path / "each.pth", tmp_path / "each").path)
    images = some_images(2, 3, 16, 16)
    assert far(each(images).patches, encoder(images).patches) < CLOSE
    larger = import_weights(tmp_path / "each.pth", tmp_path / "larger", settings=["data.size=[24,16]"])
    images = some_images(2, 3, 24, 16)
    assert far(load_encoder(larger.path)(images).patches, each(images).patches) < CLOSE

    save_dalle(tmp_path / "dalle")
    dvae = import_weights(tmp_path / "dalle", tmp_path / "dvae")
    patch = torch.nn.functional.interpolate(state["patch_embed.proj.weight"], (8, 8))
    torch.save({"model": state | {"patch_embed.proj.weight": patch}}, tmp_path / "beit.pth")
    settings = ["method.mask=random"]
    whole = import_weights(tmp_path / "beit.pth", tmp_path / "whole", settings=settings, tokenizer=dvae.path)
    method = load(whole.path).method
    images = some_images(2, 3, 32, 32)
    assert method.encoder.grid == (4, 4)
    ids = load(dvae.path).method.encoder.logits(images).argmax(1).flatten(1)
    assert torch.equal(method.target.tokenizer.ids(images), ids)
    assert torch.equal(method.mask_token, state["mask_token"])
    assert float(method(batch_of(images), clock_of(images)).value) > 0
    with pytest.raises(ConfigError, match=r"is a run of encoder; expected the run of a dVAE"):
        import_weights(tmp_path / "beit.pth", tmp_path / "no", tokenizer=alone.path)


def save_dalle(
    folder: Path, width: int = 8, codes: int = 16
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Write state dicts with the names of openai/DALL-E to two files."""
    torch.manual_seed(2)
    halves = []
    for side, first, last, kernels in (("encoder", 3, codes, (3, 3, 3, 1)), ("decoder", codes, 6, (1, 3, 3, 3))):
        state = {}

        def conv(name, inside, outside, kernel, state=state):
            state[f"{name}.w"] = torch.randn(outside, inside, kernel, kernel) * (2 / (inside * kernel**2)) ** 0.5
            state[f"{name}.b"] = torch.randn(outside) * 0.1

        widths = [width * n for n in ((1, 2, 4, 8) if side == "encoder" else (8, 4, 2, 1))]
        before = width if side == "encoder" else 128
        conv("blocks.input", first, before, 7 if side == "encoder" else 1)
        for group, after in enumerate(widths, 1):
            for block in (1, 2):
                name, hidden = f"blocks.group_{group}.block_{block}", after // 4
                if before != after:
                    conv(f"{name}.id_path", before, after, 1)
                ways = [before, hidden, hidden, hidden, after]
                for number, kernel in enumerate(kernels, 1):
                    conv(f"{name}.res_path.conv_{number}", ways[number - 1], ways[number], kernel)
                before = after
        conv("blocks.output.conv", before, last, 1)
        folder.mkdir(exist_ok=True)
        torch.save(state, folder / f"{side}.pth")
        halves.append(state)
    return halves[0], halves[1]


def dalle_forward(state: dict[str, torch.Tensor], x: torch.Tensor, side: str) -> torch.Tensor:
    """The published network, reimplemented from dall_e/encoder.py, decoder.py and utils.py."""

    def conv(name, x):
        weight = state[f"{name}.w"]
        return torch.nn.functional.conv2d(x, weight, state[f"{name}.b"], padding=(weight.shape[-1] - 1) // 2)

    x = conv("blocks.input", x)
    for group in range(1, 5):
        for block in (1, 2):
            name, y = f"blocks.group_{group}.block_{block}", x
            for number in range(1, 5):
                y = conv(f"{name}.res_path.conv_{number}", y.relu())
            around = conv(f"{name}.id_path", x) if f"{name}.id_path.w" in state else x
            x = around + y / 64
        if group < 4:
            pool, up = torch.nn.functional.max_pool2d, torch.nn.functional.interpolate
            x = pool(x, 2) if side == "encoder" else up(x, scale_factor=2, mode="nearest")
    return conv("blocks.output.conv", x.relu())


@torch.no_grad()
def test_an_imported_dalle_dvae_computes_the_same_codes_and_images(tmp_path):
    encoder, decoder = save_dalle(tmp_path / "dalle")
    method = load(import_weights(tmp_path / "dalle", tmp_path / "run").path).method
    images = some_images(2, 3, 32, 24)
    logits = dalle_forward(encoder, 0.8 * (images / 255) + 0.1, "encoder")
    assert far(method.encoder.logits(images), logits) < CLOSE
    shares = torch.nn.functional.one_hot(logits.argmax(1), 16).permute(0, 3, 1, 2).float()
    painted = dalle_forward(decoder, shares, "decoder")
    assert far(method.decoder(shares), painted) < CLOSE
    unmapped = ((painted[:, :3].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    assert (method.encoder.images(painted) / 255 - unmapped).abs().max() < CLOSE
    assert method.encoder.spec.size == (256, 256)
    half = tmp_path / "dalle" / "encoder.pth"
    for source, channels, match in ((tmp_path / "dalle", 1, "this dVAE is for 3 channels"),
                                    (half, 3, "expected encoder and decoder")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            import_weights(source, tmp_path / "no", settings=[f"data.channels={channels}"])


def test_every_command_accepts_an_imported_run(tmp_path, unmask):
    photos = write_images(tmp_path / "photos", 12, classes=2)
    torch.save(official(small_mae()), tmp_path / "mae.pth")
    code, out, err = unmask("import", tmp_path / "mae.pth", "--out", tmp_path / "whole", "--json",
                            *[word for key in HEADS for word in ("--set", key)])  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["run"] == str(tmp_path / "whole")
    torch.save(official(small_mae(), whole=False), tmp_path / "encoder.pth")
    import_weights(tmp_path / "encoder.pth", tmp_path / "encoder", settings=HEADS[:1])
    for run in (tmp_path / "whole", tmp_path / "encoder"):
        code, out, err = unmask("embed", run, photos, "--out", run / "all.npz", "--device", "cpu", "--json")
        assert code == 0, err
        assert np.load(run / "all.npz")["mean"].shape == (12, 32)
        code, out, err = unmask("probe", run, photos, "--controls", "--device", "cpu", "--json")
        assert code == 0, err
        assert len(json.loads(out)["rows"]) > 2
        assert unmask("report", run)[0] == 0
    files = sorted(photos.glob("*/*.png"))[:2]
    drawn = ["--out", tmp_path / "drawn.png", "--device", "cpu", "--json"]
    code, out, err = unmask("reconstruct", tmp_path / "whole", *files, *drawn)
    assert code == 0, err
    assert json.loads(out)["loss"] > 0
    code, _, err = unmask("reconstruct", tmp_path / "encoder", *files, *drawn)
    assert (code, "an encoder only (imported from encoder.pth)" in err) == (2, True)


def test_training_continues_from_an_imported_run(tmp_path, unmask):
    photos = write_images(tmp_path / "photos", 12, classes=2)
    torch.save(official(small_mae()), tmp_path / "mae.pth")
    torch.save(official(small_mae(), whole=False), tmp_path / "encoder.pth")
    whole = import_weights(tmp_path / "mae.pth", tmp_path / "whole", settings=HEADS).path
    encoder = import_weights(tmp_path / "encoder.pth", tmp_path / "encoder", settings=HEADS[:1]).path
    short = ["train.steps=1", "train.batch_size=4", "data.workers=0", "train.device=cpu"]
    done = pretrain(photos, from_run=whole, out=tmp_path / "on", settings=short)
    assert licence_of(done).startswith("CC-BY-NC 4.0"), "runs trained from the weights inherit their licence"
    assert done.read("status.json")["state"] == "finished"
    size = [f"method.encoder.{key}" for key in ("width=32", "depth=2", "heads=2", "patch=4")]
    done = pretrain(photos, from_run=encoder, recipe="mae_nano", out=tmp_path / "on2", settings=[*short, *size])
    assert done.read("config.json")["graft"][0]["source"] == "encoder."
    code, _, err = unmask("resume", whole)
    assert (code, "contains imported weights; nothing to train" in err) == (0, True)
    code, _, err = unmask("pretrain", photos, "--config", encoder)
    assert (code, "of an imported encoder, which has no training task" in err) == (2, True), err
    assert "learns from labels" not in err


def test_an_imported_encoder_cannot_be_trained_or_tested(tmp_path, unmask):
    photos = write_images(tmp_path / "photos", 4)
    torch.save(official(small_mae(), whole=False), tmp_path / "encoder.pth")
    run = import_weights(tmp_path / "encoder.pth", tmp_path / "encoder", settings=HEADS[:1]).path
    assert "encoder" not in task_names()
    assert all(task_class(name).annotation for name in task_names())
    code, _, err = unmask("resume", run, "--data", photos)
    assert (code, "contains imported weights; nothing to train" in err) == (0, True), err
    code, _, err = unmask("set", run, "train.test_every=3")
    assert (code, "a run of encoder is not tested on annotated images" in err) == (2, True), err


@pytest.fixture
def unmask(capsys, monkeypatch):
    """Run the command line in this process and return (exit code, stdout, stderr)."""
    from unmask import commands

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["unmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            commands.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return call


class Code:
    def __reduce__(self):
        return os.system, ("touch it-ran",)


def test_pickles_with_code_and_files_that_are_not_checkpoints_are_rejected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = official(small_mae())
    torch.save({"model": state, "more": Code()}, "code.pth")
    torch.save({"model": state, "more": Code()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("raw.pkl").write_bytes(pickle.dumps({"model": Code()}))
    torch.save(torch.nn.Linear(2, 2), "module.pth")
    torch.save({"model": state}, "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:-5000])
    torch.save({"model": state}, "whole-old.pth", _use_new_zipfile_serialization=False)
    Path("cut-old.pth").write_bytes(Path("whole-old.pth").read_bytes()[:-500])
    save_file({"a": torch.zeros(3)}, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-5])
    Path("text.pth").write_text("hello")
    Path("empty.pth").touch()
    Path("graph.onnx").write_bytes(b"\x08\x07")
    torch.save({"epoch": 3}, "epoch.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"model": {"a": torch.zeros(2)}}, "other.pth")
    Path("folder").mkdir()
    for name, match in {
        "code.pth": r"code.pth: it contains posix.system besides tensors, so loading it could run code",
        "old.pth": "could run code",
        "raw.pkl": r"raw.pkl: got a pickle that torch.save did not write; it was not loaded",
        "graph.onnx": "got an ONNX graph",
        "module.pth": "contains torch.nn.modules.linear.Linear",
        "cut.pth": "damaged, truncated",
        "cut-old.pth": "damaged, truncated",
        "cut.safetensors": "not a valid safetensors file",
        "text.pth": "not a weights file",
        "empty.pth": "is empty",
        "epoch.pth": "got a dict with epoch; expected a state dict",
        "list.pth": "got a list without any weights",
        "other.pth": r"unrecognised checkpoint with 1 tensors \(a\)",
        "folder": "folder has no weights",
        "nothing.pth": "does not exist",
    }.items():
        with pytest.raises(UserError, match=match):
            import_weights(name, "run")
    assert not Path("it-ran").exists()
    assert not Path("run").exists()


def test_incomplete_or_contradictory_imports_are_rejected(tmp_path):
    state = official(small_mae())
    names = {
        "hole": ({name: value for name, value in state.items() if not name.startswith("blocks.0.")}, [],
                 r"blocks.0 is missing, but there is blocks.1"),
        "missing": ({name: value for name, value in state.items() if "blocks.1.mlp" not in name}, [],
                    r"4 missing: encoder.blocks.1.mlp.fc1.bias"),
        "left": (state | {f"blocks.0.extra{n}": torch.zeros(1) for n in range(7)}, [],
                 r"7 tensors do not belong.*blocks.0.extra0.*extra4 and 2 more"),
        "shape": (state | {"decoder_pred.weight": torch.zeros(47, 16)}, [],
                  r"1 of another shape: decoder.pred.weight \(47, 16\) instead of \(48, 16\)"),
        "nan": (state | {"norm.bias": torch.full((32,), float("nan"))}, [], "not finite in encoder.norm.bias"),
        "heads": (state, ["method.encoder.heads=5"], "got method.encoder.heads=5, which does not divide the width 32"),
        "width": (state, ["method.encoder.width=64"], "width=64 was set, but the weights have 32"),
        "patch": (state, ["method.encoder.patch=8"], r"patch=\(8, 8\) was set, but the weights have \(4, 4\)"),
        "size": (state, ["data.size=[16,18]"], "image width 18 is not a multiple of patch size 4"),
        "typo": (state, ["method.encoder.widht=64"], "did you mean method.encoder.width"),
        "source": (state, ["data.source=x"], "data.source cannot be set"),
        "graft": (state, ["graft=[]"], "graft cannot be set"),
        "means": (state, ["data.mean=[1,2]"], "2 means and 3 standard deviations"),
        "rectangle": (official(small_mae((8, 24))), [], "got positions for 12 patches, which is not a square number"),
        "other rectangle": (official(small_mae((8, 24))), ["data.size=[8,8]"], "but the weights have positions for 12"),
        "four": (official(small_mae(channels=4)), [], "for 4 channels, for which no normalisation is published"),
    }  # fmt: skip
    for name, (tensors, settings, match) in names.items():
        torch.save({"model": tensors}, tmp_path / "mae.pth")
        heads = [key for key in HEADS if not any(key.startswith(one.split("=")[0]) for one in settings)]
        with pytest.raises(UserError, match=match):
            import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=[*heads, *settings])
        assert not (tmp_path / "run").exists(), name
    with pytest.raises(ConfigError, match="unknown number of heads for the width 32 of this encoder"):
        import_weights(tmp_path / "mae.pth", tmp_path / "run")
    torch.save(state, tmp_path / "mae.pth")
    import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=HEADS)
    for source, out, match in ((tmp_path / "mae.pth", "run", "a folder that is not empty"),
                               (tmp_path / "run", "new", "is already a run")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            import_weights(source, tmp_path / out, settings=HEADS)
    with pytest.raises(ConfigError, match="predicts no codes; leave it out"):
        import_weights(tmp_path / "mae.pth", tmp_path / "new", settings=HEADS, tokenizer=tmp_path / "run")


@torch.no_grad()
def test_weights_with_four_channels_need_a_normalisation_from_the_user(tmp_path):
    ours = small_mae(channels=4)
    torch.save(official(ours), tmp_path / "mae.pth")
    by_hand = ["data.mean=[1,2,3,4]", "data.std=[5,6,7,8]"]
    method = load(import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=[*HEADS, *by_hand]).path).method
    assert isinstance(method, MAE)
    assert method.encoder.std.tolist() == [5, 6, 7, 8]


@torch.no_grad()
def test_sharded_and_timm_folders_are_imported_with_their_preprocessing(tmp_path):
    ours, folder = small_mae(), tmp_path / "vit"
    state = {name: value.clone() for name, value in official(ours, whole=False).items()}
    folder.mkdir()
    names = sorted(state)
    middle = [name for name in names if name.startswith("blocks.1.")]  # names with a common prefix
    shards = {
        "model-00001.safetensors": [name for name in names if name not in middle],
        "model-00002.safetensors": middle,
    }
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    timm = {"architecture": "vit", "pretrained_cfg": {"mean": [0.5, 0.4, 0.2], "std": [0.1, 0.2, 0.4]}}
    (folder / "config.json").write_text(json.dumps(timm))
    run = import_weights(folder, tmp_path / "run", settings=HEADS[:1])
    encoder = load_encoder(run.path)
    assert encoder.mean.tolist() == pytest.approx([127.5, 102, 51])
    assert torch.equal(encoder.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
    assert [file["name"] for file in run.read("provenance.json")["imported"]["files"]] == sorted(shards)
    (folder / "model-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot read .*model-00002.safetensors|not a valid safetensors file"):
        import_weights(folder, tmp_path / "no", settings=HEADS[:1])
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        import_weights(folder, tmp_path / "no", settings=HEADS[:1])


def test_images_are_not_normalised_if_the_preprocessor_does_not_normalise():
    def normalisation(**settings):
        preprocessor = Preprocessor(image_mean=[1, 1, 1], image_std=[1, 1, 1], **settings)
        return normalisation_of(SourceMetadata(preprocessor=preprocessor), 3, halves=False)

    found = normalisation(do_normalize=False, do_rescale=True)
    assert (found.mean, found.std) == ((0.0,) * 3, (255.0,) * 3)
    found = normalisation(do_normalize=True, do_rescale=False)
    assert (found.mean, found.std) == ((1.0,) * 3, (1.0,) * 3)
