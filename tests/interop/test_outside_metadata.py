"""Metadata of other libraries: training arguments are read, and invalid metadata raises a clear error."""

import argparse
import json
import re
import sys
import types
import zipfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from test_import_weights import HEADS, batch_of, clock_of, official, official_beit, small_mae, some_images

from unmask.batch import ImageSpec
from unmask.console import Console
from unmask.engine import initial_weights
from unmask.engine.load import load, load_encoder, read_config
from unmask.errors import UserError
from unmask.interop import names
from unmask.interop.export_run import export_run
from unmask.interop.import_weights import import_weights
from unmask.interop.safetensors_file import open_safetensors
from unmask.nn.patches import unpatchify

# Training arguments in checkpoints


def namespace(**more):
    return argparse.Namespace(lr=1.0, model="mae_vit_base_patch16", output_dir=Path("out"), dist_url=None, **more)


@torch.no_grad()
@pytest.mark.parametrize("target", ["norm_pixels", "pixels"])
def test_target_and_mask_ratio_are_read_from_official_training_arguments(tmp_path, capsys, target):
    """Official MAE's PRETRAIN.md sets --norm_pix_loss; without this option, the target is plain pixels."""
    ours = small_mae(target=target, mask_ratio=0.5)
    args = namespace(norm_pix_loss=target == "norm_pixels", mask_ratio=0.5, input_size=16)
    torch.save({"model": official(ours), "optimizer": {}, "epoch": 3, "args": args}, tmp_path / "mae.pth")
    run = import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=HEADS, console=Console())
    loaded = load(run.path)
    assert (loaded.config.method.target, loaded.config.method.mask_ratio) == (target, 0.5)
    images = some_images(3, 3, 16, 16)
    assert loaded.method(batch_of(images), clock_of(images)).value == ours(batch_of(images), clock_of(images)).value
    said = capsys.readouterr().err
    assert f"norm_pix_loss={target == 'norm_pixels'}" in said
    assert "mask_ratio=0.5" in said
    assert "is taken to predict" not in said
    going_on = initial_weights.continued(run.path, "auto")
    assert (going_on.method.target, going_on.method.mask_ratio) == (target, 0.5)


def test_invalid_training_arguments_are_ignored_and_reported(tmp_path, capsys):
    args = namespace(norm_pix_loss=False, mask_ratio=[0.5], input_size="large")
    torch.save({"model": official(small_mae()), "args": args}, tmp_path / "mae.pth")
    run = import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=HEADS, console=Console())
    assert (read_config(run).method.target, read_config(run).method.mask_ratio) == ("pixels", 0.75)
    assert "invalid values are ignored: mask_ratio, input_size" in capsys.readouterr().err


def test_beit_normalisation_is_read_from_its_training_arguments(tmp_path):
    for given, mean in ((True, [123.675, 116.28, 103.53]), (False, [127.5] * 3)):
        content = {"model": official_beit(), "args": namespace(imagenet_default_mean_and_std=given)}
        torch.save(content, tmp_path / "beit.pth")
        encoder = load_encoder(import_weights(tmp_path / "beit.pth", tmp_path / f"run-{given}").path)
        assert encoder.mean.tolist() == pytest.approx(mean)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (24, 24)])
def test_an_official_simmim_checkpoint_is_imported_with_its_head(tmp_path, capsys, monkeypatch, size):
    """The settings of SimMIM are a yacs CfgNode, read without yacs; the head is a convolution and a pixel shuffle."""
    from unmask.methods import simmim

    encoder = {"width": 32, "depth": 2, "heads": 2, "patch": (4, 4), "positions": "absent", "relative_bias": True}
    config = simmim.Config.model_validate({"encoder": {**encoder, "layer_scale": 0.1}, "mask_ratio": 0.5})
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    ours = simmim.SimMIM(config, ImageSpec(3, size, "uint8", mean, std))
    for parameter in ours.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for block in ours.encoder.blocks:
        block.attn.qkv.bias[32:64] = 0  # SimMIM has no bias for keys
    weights = {name: value for name, value in ours.state_dict().items() if not name.startswith("head.")}
    theirs = {f"encoder.{name}": value for name, value in names.to_beit(weights).items()}
    shuffle = ours.head.weight.view(4, 4, 3, 32).permute(2, 0, 1, 3).reshape(48, 32, 1, 1)
    theirs |= {"decoder.0.weight": shuffle, "decoder.0.bias": ours.head.bias.view(4, 4, 3).permute(2, 0, 1).flatten()}

    images = some_images(2, 3, *size)
    tokens = ours.encoder(images).patches.mT.unflatten(2, ours.encoder.grid)  # as in the official SimMIM.forward
    drawn = torch.nn.functional.pixel_shuffle(
        torch.nn.functional.conv2d(tokens, theirs["decoder.0.weight"], theirs["decoder.0.bias"]), 4
    )
    torch.testing.assert_close(unpatchify(ours.head(ours.encoder(images).patches), ours.encoder.grid, (4, 4)), drawn)

    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    settings, data = module.CfgNode(), module.CfgNode(MASK_RATIO=0.5, MASK_PATCH_SIZE=8, IMG_SIZE=size[0])
    settings["DATA"] = data
    settings.__dict__ |= {"__immutable__": True, "__deprecated_keys__": set()}
    torch.save({"model": theirs, "config": settings, "epoch": 1, "lr_scheduler": {"t": (1, 2)}}, tmp_path / "ckpt.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    run = import_weights(tmp_path / "ckpt.pth", tmp_path / "run", console=Console())
    loaded = load(run.path)
    assert (loaded.config.method.name, loaded.config.method.mask_cell, loaded.config.method.mask_ratio) == (
        "simmim", (2, 2), 0.5,
    )  # fmt: skip
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in loaded.method.state_dict().items())
    assert loaded.method(batch_of(images), clock_of(images)).value == ours(batch_of(images), clock_of(images)).value
    assert "SimMIM, pre-trained" in capsys.readouterr().err


# Invalid and damaged files


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A file written by `unmask export --to safetensors`, with its header and tensors."""
    folder = tmp_path_factory.mktemp("exported")
    torch.save({"model": official(small_mae())}, folder / "mae.pth")
    run = import_weights(folder / "mae.pth", folder / "run", settings=HEADS)
    export_run(run.path, "safetensors", folder / "own.safetensors")
    with safetensors.safe_open(folder / "own.safetensors", "pt") as opened:
        header = opened.metadata()["unmask"]
    return header, safetensors.torch.load_file(folder / "own.safetensors")


def changed(header: str, *path: str, to) -> str:
    tree = json.loads(header)
    branch = tree
    for key in path[:-1]:
        branch = branch[key]
    branch[path[-1]] = to
    return json.dumps(tree)


ENCODER = ("config", "method", "encoder")
HEADERS = {
    "null": (lambda header: "null", "got null; expected a JSON object"),
    "a list": (lambda header: "[1, 2]", "got a list; expected a JSON object"),
    "a number": (lambda header: "7", "got 7; expected a JSON object"),
    "half": (lambda header: header[: len(header) // 2], "cannot be read"),
    "empty": (lambda header: "", "cannot be read"),
    "nested": (lambda header: "[" * 100_000, "cannot be read"),
    "no images": (lambda header: changed(header, "images", to=None), "images"),
    "images of text": (lambda header: changed(header, "images", "size", to="large"), "images.size"),
    "no mean": (lambda header: changed(header, "images", "mean", to=[]), "images.mean"),
    "three means of four": (lambda header: changed(header, "images", "mean", to=[1, 2, 3, 4]), "4 means"),
    "zero deviation": (lambda header: changed(header, "images", "std", to=[0, 1, 1]), "images.std"),
    "no finite mean": (lambda header: changed(header, "images", "mean", to=[float("nan"), 1, 1]), "images.mean"),
    "another dtype": (lambda header: changed(header, "images", "dtype", to="object"), "dtype"),
    "huge images": (lambda header: changed(header, "images", "size", to=[60_000, 60_000]), "patches of width"),
    "config null": (lambda header: changed(header, "config", to=None), "config"),
    "a list for config": (lambda header: changed(header, "config", to=[]), "config"),
    "no method": (lambda header: changed(header, "config", "method", to=None), "method"),
    "another method": (lambda header: changed(header, "config", "method", "name", to="../../x"), "method"),
    "unknown key": (lambda header: changed(header, *ENCODER, "evil", to=1), "evil"),
    "100,000 wide": (lambda header: changed(header, *ENCODER, "width", to=100_000), "100000"),
    "100,000 deep": (lambda header: changed(header, *ENCODER, "depth", to=100_000), "100000"),
    "900 deep": (lambda header: changed(header, *ENCODER, "depth", to=900), "missing: encoder.blocks."),
    "10^30 wide": (lambda header: changed(header, *ENCODER, "width", to=10**30), "1000000000000000000"),
    "wider": (lambda header: changed(header, *ENCODER, "width", to=48), "of another shape"),
    "wide decoder": (lambda header: changed(header, "config", "method", "decoder", "width", to=10**6), "1000000"),
    "licence of a list": (lambda header: changed(header, "licence", to=["x"]), "licence"),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_header_of_an_export_raises_an_error_with_the_file_name(exported, tmp_path, name):
    change, said = HEADERS[name]
    file = tmp_path / "own.safetensors"
    safetensors.torch.save_file(exported[1], file, {"unmask": change(exported[0])})
    for open_it in (lambda: import_weights(file, tmp_path / "run"), lambda: open_safetensors(file)):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            open_it()
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["missing", "more", "int", "shape", "nan"])
def test_tensors_that_do_not_match_the_header_are_rejected_by_name(exported, tmp_path, what):
    header, weights = exported[0], dict(exported[1])
    name = "encoder.blocks.0.attn.qkv.weight"
    if what == "missing":
        del weights[name]
    weights |= {
        "missing": {}, "more": {"evil": torch.ones(3)}, "int": {name: torch.ones_like(exported[1][name]).long()},
        "shape": {name: torch.ones(3, 3)}, "nan": {name: torch.full_like(exported[1][name], float("nan"))},
    }[what]  # fmt: skip
    safetensors.torch.save_file(weights, tmp_path / "own.safetensors", {"unmask": header})
    with pytest.raises(UserError, match="evil" if what == "more" else re.escape(name)):
        import_weights(tmp_path / "own.safetensors", tmp_path / "run")


CONFIGS = {
    "config.json": [
        {"image_size": "large"}, {"image_size": 10**9}, {"hidden_size": -1}, {"num_attention_heads": 0},
        {"num_attention_heads": [1]}, {"layer_norm_eps": 0}, {"layer_norm_eps": "x"}, {"id2label": {"x": "y"}},
        {"id2label": [1]}, {"mask_ratio": 7}, {"norm_pix_loss": "maybe"}, {"pretrained_cfg": {"mean": "x"}},
        {"pretrained_cfg": {"std": [0, 0, 0]}}, {"pretrained_cfg": {"crop_pct": 99}}, {"hidden_size": 1e300},
    ],
    "preprocessor_config.json": [
        {"image_mean": "x", "image_std": [1]}, {"image_mean": [1], "image_std": [1]}, {"rescale_factor": 0},
        {"image_mean": [1, 1, 1], "image_std": [0, 1, 1]}, {"size": "x"}, {"size": {"shortest_edge": -3}},
        {"do_center_crop": True, "size": {"shortest_edge": 4}, "crop_size": {}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("file", "content"), [(file, one) for file, all_of in CONFIGS.items() for one in all_of])
def test_invalid_settings_in_config_json_are_rejected(tmp_path, file, content):
    folder = tmp_path / "vit"
    folder.mkdir()
    safetensors.torch.save_file(official(small_mae()), folder / "model.safetensors")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        import_weights(folder, tmp_path / "run", settings=HEADS)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_invalid_shard_index_is_rejected(tmp_path):
    for number, content in enumerate(({}, {"weight_map": []}, {"weight_map": {"x": 3}}, {"weight_map": {}})):
        folder = tmp_path / f"shards-{number}"
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="weight_map"):
            import_weights(folder, tmp_path / "run")


def test_pickles_that_expand_far_beyond_the_file_size_are_rejected(tmp_path):
    state = official(small_mae())
    state["norm.weight"] = torch.zeros(1).expand(10**12)  # four bytes
    torch.save({"model": state}, tmp_path / "views.pth")
    with pytest.raises(UserError, match=r"its tensors up to norm\.weight have .* views of a smaller storage"):
        import_weights(tmp_path / "views.pth", tmp_path / "run")

    torch.save({"model": {"x": torch.zeros(4_000_000)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(UserError, match="bytes and unpacks to"):
        import_weights(tmp_path / "bomb.pth", tmp_path / "run")

    itself: dict = {"epoch": 1}
    itself["model"] = itself
    torch.save(itself, tmp_path / "itself.pth")
    with pytest.raises(UserError, match="a state dict"):
        import_weights(tmp_path / "itself.pth", tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"cls_token": torch.ones(())}, {"cls_token": torch.ones(32)}, {"pos_embed": torch.ones(17)},
        {"blocks.999999999.norm1.weight": torch.ones(3)}, {"blocks.0.mlp.fc1.weight": torch.ones(3)},
        {"decoder_embed.weight": torch.ones(())}, {"patch_embed.proj.weight": torch.ones(3, 3)},
        {"decoder_pred.weight": torch.ones(2, 2).long()}, {"norm.weight": torch.zeros(0)},
        {"norm.weight": torch.ones(32, dtype=torch.complex64)}, {"norm.weight": torch.ones(32).to_sparse()},
        {"blocks.0.attn.relative_position_bias_table": torch.ones(4)}, {"pos_embed": torch.ones(0, 17, 32)},
    ],
    ids=lambda change: f"{next(iter(change))} {tuple(next(iter(change.values())).shape)}",
)  # fmt: skip
def test_tensors_of_the_wrong_shape_or_type_are_rejected(tmp_path, change):
    torch.save({"model": official(small_mae()) | change}, tmp_path / "mae.pth")
    with pytest.raises(UserError):
        import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=HEADS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "stored", ["null", "[]", "{", "{}", '{"mean": 3}', '{"mean": [], "std": [], "heads": {}, "eval_share": 2}']
)
def test_damaged_export_metadata_is_rejected(tmp_path, stored):
    torch.save({"model": official(small_mae()), "unmask_imprint": stored}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="unmask_imprint"):
        import_weights(tmp_path / "mae.pth", tmp_path / "run", settings=HEADS)
