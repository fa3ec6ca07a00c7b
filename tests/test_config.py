"""Settings: every key can be set, wrong keys are rejected with similar names, and JSON round-trips."""

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import unmask.config
from unmask.config import Config, ConfigError, keys, method_class, method_names, override, parse
from unmask.recipes.catalogue import all_recipes, choose, find


@pytest.mark.parametrize("name", list(all_recipes()))
def test_recipes_are_documented_valid_and_round_trip(name):
    assert len(all_recipes()[name].__doc__.strip().splitlines()[0]) > 20
    config = find(name)
    assert Config.model_validate(json.loads(config.model_dump_json())) == config
    assert config.recipe == name
    patch = getattr(config.method.encoder, "patch", (1, 1))  # a dense autoencoder has no patches
    assert config.data.size[0] % patch[0] == 0


OTHER = {
    "recipe": "mine", "data.source": "x", "data.size": [64, 32], "data.crop.kind": "center",
    "data.crop.scale": [0.5, 1], "data.crop.ratio": [1, 1], "data.crop.flip": 0, "data.crop.eval_share": 0.9,
    "data.crop.jitter": 0.3, "data.crop.interpolation": "bilinear",
    "data.channels": 4, "data.mean": [1, 2, 3], "data.std": [1, 2, 3], "data.workers": 3, "data.cache": False,
    "data.cache_gib": 2, "data.max_bad_fraction": 0.5, "data.scan_sample": 7,
    "data.alpha": "band", "data.pages": "samples", "data.axes": "CHW", "data.nodata": -9999.0, "data.min_valid": 0.2,
    "data.exclude": ["thumbs"], "data.held_out": 9,
    "data.repeats": 2, "data.resize": "device", "optim.base_lr": 0.5,
    "optim.betas": [0.5, 0.6], "optim.eps": 0.001, "optim.weight_decay": 0.4, "optim.warmup": 0.2,
    "optim.final_lr": 0.1, "optim.clip": 2.0, "optim.name": "lars", "optim.layer_decay": 0.7, "optim.average": 0.9,
    "data.test": "y", "data.annotations": "masks", "data.test_annotations": "more", "data.test_split": "val",
    "train.test_every": 6, "method.encoder.norm_eps": 1e-5, "train.steps": 3, "train.epochs": 4, "train.batch_size": 12,
    "train.micro_batch": 6, "train.seed": 5, "train.precision": "fp32", "train.device": "cpu", "train.compile": True,
    "train.parallel": "fsdp", "train.recompute": True,
    "train.log_every": 2, "train.checkpoint_every": 9, "train.checkpoint_minutes": 1, "train.checkpoint_format": "dcp",
    "train.keep_checkpoints": 3,
    "train.picture_every": 8, "train.picture_images": 2, "method.name": "mae", "method.mask_ratio": 0.6,
    "method.target": "pixels", "method.encoder.width": 64, "method.encoder.depth": 2, "method.encoder.heads": 4,
    "method.encoder.patch": [8, 4], "method.encoder.mlp_ratio": 2, "method.encoder.positions": "learned",
    "method.encoder.relative_bias": True, "method.encoder.layer_scale": 0.1, "method.decoder.width": 32,
    "method.decoder.depth": 1, "method.decoder.heads": 2, "method.mask": "block", "method.smallest_block": 3,
    "method.pattern": [["#...", "#..."]], "method.mask_tokens": "encoder", "method.pca_coefficients": 5,
    "method.pca_whiten": True, "method.loss_on": "all",
    "method.tokenizer": {"arch": "small", "codes": 8, "width": 8, "depth": 1, "patch": [4, 4], "loss": "mse"},
    "graft": [{"run": "a", "source": "encoder.", "target": "encoder.", "step": 3}],
}  # fmt: skip
GOES_WITH = {
    "method.smallest_block": ["method.mask=block"], "method.pattern": ["method.mask=pattern"],
    "method.tokenizer": ["method.target=tokens"], "method.pca_coefficients": ["method.target=pca"],
    "method.pca_whiten": ["method.target=pca"],
}  # fmt: skip


@pytest.mark.parametrize("key", keys(find("mae_nano")))
def test_every_setting_can_be_changed_from_the_command_line(key):
    assert key in OTHER, "add a value for this new setting to OTHER"
    value = OTHER[key]
    before = find("mae_nano")
    setting = f"{key}={value if isinstance(value, str) else json.dumps(value)}"
    after = override(before, [*GOES_WITH.get(key, []), setting])
    found = json.loads(after.model_dump_json())
    for part in key.split("."):
        found = found[part]
    assert found == value or key == "method.name"
    if key != "method.name":
        assert after != before


SOURCES = {
    path: path.read_text()
    for path in Path(unmask.config.__file__).parent.rglob("*.py")
    if path.name != "config.py" and path.parent.name != "recipes"
}


@pytest.mark.parametrize("key", keys(find("mae_nano")))
def test_every_setting_is_used_somewhere(key):
    """A setting whose name occurs only in its definition would be ignored silently."""
    leaf = key.split(".")[-1]
    asked = re.compile(rf"(config|train|data|optim|crop|encoder|decoder|method)\.{leaf}\b")
    assert [path.name for path, text in SOURCES.items() if asked.search(text)], f"nothing reads {key}"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.step=5", "'train.step' is not a setting; did you mean train.steps"),
        ("steps=5", "did you mean train.steps"),
        ("method.mask_ration=0.5", "did you mean method.mask_ratio"),
        ("train.steps", "expected KEY=VALUE"),
        ("train.steps=many", "train.steps='many' does not fit: .*integer"),
        ("train.steps=0", "greater than 0"),
        ("method.mask_ratio=1.5", "less than 1"),
        ("method.target=colour", "'norm_pixels', 'pixels'"),
        ("train.precision=fp16", "'auto', 'fp32' or 'bf16'"),
        ("data.size=big", "data.size"),
        ("method.name=mea", "method 'mea' is not known; did you mean mae"),
        ("train={}", "'train' is not a setting"),
        ("data.size=-32", "greater than 0"),
        ("method.encoder.patch=0", r"patch\.0=0 does not fit: .*greater than 0"),
        ("method.encoder.patch=[4,-4]", r"patch\.1=-4 does not fit: .*greater than 0"),
        (
            "data.crop.scale=[1,0.2]",
            r"crop\.scale=\[1, 0\.2\] does not fit: expected two numbers above 0, the smaller one first",
        ),
        ("data.crop.scale=[-1,0]", "two numbers above 0"),
        ("data.crop.scale=[0.5,1.5]", "expected shares of the image's area, at most 1"),
        ("data.crop.ratio=[0,1]", "two numbers above 0"),
        ("data.crop.ratio=[2,1]", "smaller one first"),
        ("optim.betas=[0.9,1.5]", r"optim\.betas\.1=1\.5 does not fit: .*less than 1"),
        ("optim.betas=[-0.1,0.9]", "greater than or equal to 0"),
        ("data.std=[1,0,1]", r"data\.std\.1=0 does not fit: .*greater than 0"),
        ("train.picture_images=65", "less than or equal to 64"),
        ("method.pca_whiten=true", r"^method: pca_coefficients and pca_whiten apply to target=pca; got target=norm"),
    ],
)
def test_invalid_settings_are_rejected_with_the_nearest_names(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override(find("mae_nano"), [assignment])


def test_single_number_means_a_square_and_none_unsets():
    config = override(find("mae_nano"), ["data.size=64", "method.encoder.patch=8", "train.epochs=none"])
    assert (config.data.size, config.method.encoder.patch, config.train.epochs) == ((64, 64), (8, 8), None)


def test_assignments_are_parsed_consistently():
    assert parse(["a=none", "b=null", " c =[1, 2]", "d=x=y", "a=3"]) == {"a": 3, "b": None, "c": [1, 2], "d": "x=y"}
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        parse(["a"])


def test_settings_are_frozen_and_strict():
    config = find("mae_nano")
    with pytest.raises(ValidationError):
        config.train.steps = 5
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(config.train)(stepz=5)


def test_unknown_recipes_and_methods_suggest_the_nearest():
    with pytest.raises(ConfigError, match="recipe 'mae_nanno' is not known; did you mean mae_nano"):
        find("mae_nanno")
    assert "mae" in method_names()
    assert method_class("mae").__name__ == "MAE"


@pytest.mark.parametrize(
    ("images", "size", "device", "name"),
    [
        (50_000, (32, 32), "cpu", "mae_nano"),
        (50_000, (32, 32), "cuda", "mae_nano"),
        (500, (480, 640), "cpu", "mae_nano"),
        (5_000, (480, 640), "cuda", "mae_tiny"),
        (100_000, (480, 640), "cuda", "mae_small"),
        (1_300_000, (400, 500), "cuda", "mae_base"),
        (5, (20, 24), "cpu", "mae_nano"),
    ],
)
def test_auto_chooses_by_count_size_and_device_with_reasons(images, size, device, name):
    recipe, overrides, reasons = choose(images, size, device)
    assert recipe == name
    assert reasons
    assert str(images) in reasons[0]
    config = override(find(recipe), overrides)  # raises if a proposal is invalid
    assert (
        config.data.size[0] % config.method.encoder.patch[0]
        == config.data.size[1] % config.method.encoder.patch[1]
        == 0
    )
    assert config.train.batch_size <= max(16, images)


def test_auto_keeps_the_shape_of_wide_images():
    _, overrides, _ = choose(1000, (180, 480), "cuda")
    height, width = override(find("mae_tiny"), overrides).data.size
    assert width > 2 * height
