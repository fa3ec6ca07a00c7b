"""`unmask palette` and runs that use its file: the colours are the same, and invalid palettes are rejected."""

import json

import numpy as np
import pytest
import torch
from conftest import pretrain, write_images
from PIL import Image

from unmask.console import Console
from unmask.engine import initial_weights
from unmask.engine.checkpoint import load_model
from unmask.engine.load import read_config
from unmask.engine.palette_file import draw_swatches, make_palette
from unmask.errors import UserError

SMALL = (
    *("method.encoder.width=16", "method.encoder.depth=1", "method.encoder.heads=2", "data.size=[16,16]"),
    *("train.steps=2", "train.batch_size=8", "data.workers=0"),
)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", 12)


def make(images, out, **more):
    return make_palette(str(images), **({"colours": 16, "size": 16} | more), out=out, console=Console(quiet=True))


def test_palette_file_has_colours_in_the_files_units_and_a_picture(images, tmp_path):
    found = make(images, tmp_path / "palette.json")
    assert json.loads((tmp_path / "palette.json").read_text()) == found
    assert np.array(found["colours"]).shape == (16, 3)
    assert 20 < np.array(found["colours"]).max() <= 255
    assert (found["dtype"], found["channels"], found["images"]) == ("uint8", 3, 12)
    assert found["mean_square_error"] > 0
    more = make(images, tmp_path / "more.json", colours=64)
    assert more["mean_square_error"] < 0.6 * found["mean_square_error"]
    with Image.open(tmp_path / "palette.png") as picture:
        assert picture.size[0] > 300


def test_images_with_fewer_colours_than_requested_are_reported(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(9):
        Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(tmp_path / "flat" / f"{number}.png")
    found = make(tmp_path / "flat", tmp_path / "palette.json")
    assert (len(found["colours"]), found["used"], found["mean_square_error"]) == (16, 9, 0)
    run = pretrain(tmp_path / "flat", recipe="igpt_nano", out=tmp_path / "run", palette=tmp_path / "palette.json",
                   settings=SMALL)  # fmt: skip
    assert all(0 < row["palette_used"] <= 9 / 16 for row in run.metrics())


def test_picture_shows_every_colour():
    colours = torch.arange(300.0)[:, None]
    assert set(draw_swatches(colours, 18).unique().tolist()) == set(range(300))


def test_palette_can_be_a_file_or_a_run(images, tmp_path):
    found = make(images, tmp_path / "palette.json")
    first = pretrain(images, recipe="igpt_nano", out=tmp_path / "a", palette=tmp_path / "palette.json", settings=SMALL)
    method = read_config(first).method
    assert method.encoder.colours == 16
    assert np.allclose(load_model(first)[1]["encoder.palette"].numpy(), found["colours"])
    assert len(list(first.checkpoints.glob("fixed-*.safetensors"))) == 1
    second = pretrain(images, recipe="igpt_bert_nano", out=tmp_path / "b", palette=first.path, settings=SMALL)
    assert np.allclose(load_model(second)[1]["encoder.palette"].numpy(), found["colours"])
    own = pretrain(images, recipe="igpt_nano", out=tmp_path / "c", settings=[*SMALL, "method.encoder.colours=16"])
    assert len(np.unique(load_model(own)[1]["encoder.palette"].numpy(), axis=0)) > 8, (
        "the palette is computed from the data"
    )


@pytest.mark.parametrize("recipe", ["auto", "igpt_nano"])
def test_weights_from_a_run_keep_their_palette(images, tmp_path, recipe):
    """If the palette were computed from the new images, it would not match the embeddings of the colours."""
    first = pretrain(images, recipe="igpt_nano", out=tmp_path / "a", settings=SMALL)
    others = write_images(tmp_path / "others", 12, seed=7)
    second = pretrain(others, recipe=recipe, out=tmp_path / "b", from_run=first.path, settings=SMALL)
    palettes = [load_model(run)[1]["encoder.palette"] for run in (first, second)]
    assert palettes[0].equal(palettes[1])
    own = pretrain(others, recipe="igpt_nano", out=tmp_path / "c", settings=SMALL)
    assert not load_model(own)[1]["encoder.palette"].equal(palettes[0]), (
        "a run without --from computes another palette from these images"
    )
    with pytest.raises(UserError, match="the weights of --from include their palette"):
        pretrain(others, out=tmp_path / "d", from_run=first.path, palette=first.path)


def test_principal_components_are_copied_with_the_weights(images, tmp_path):
    pca = ["method.target=pca", "method.decoder.width=16", "method.decoder.heads=2", *SMALL]
    first = pretrain(images, recipe="mae_nano", out=tmp_path / "a", settings=pca)
    others = write_images(tmp_path / "others", 12, seed=7)
    whole = pretrain(others, out=tmp_path / "b", from_run=first.path, settings=["train.steps=1"])
    encoder = pretrain(others, recipe="mae_nano", out=tmp_path / "c", from_run=first.path, settings=pca)
    bases = [load_model(run)[1]["target.basis"] for run in (first, whole, encoder)]
    assert bases[0].equal(bases[1])
    assert not bases[0].equal(bases[2]), (
        "only the encoder was copied, so the components are computed from the new images"
    )


def test_invalid_palettes_are_rejected(images, tmp_path):
    mae = [s for s in SMALL if "encoder" in s or "train" in s or "data" in s]
    other = pretrain(images, recipe="mpp_nano", out=tmp_path / "mpp", settings=mae)
    floats = tmp_path / "floats"
    floats.mkdir()
    for number in range(6):
        np.save(floats / f"{number}.npy", np.random.default_rng(number).random((16, 16, 3), np.float32))
    make(floats, tmp_path / "float.json")
    (tmp_path / "bad.json").write_text('{"colours": 3}')
    refused = {
        other.path: "is a run of mpp; expected the run of an iGPT or a file of `unmask palette`",
        tmp_path / "none.json": "does not exist; make one with",
        tmp_path / "bad.json": r"got colours = 3; expected: .* list; make one with",
        tmp_path / "float.json": "got a palette of float32 images; these images are uint8",
    }
    for path, message in refused.items():
        with pytest.raises(UserError, match=message):
            pretrain(images, recipe="igpt_nano", out=tmp_path / "run", palette=path, settings=SMALL)
    make(images, tmp_path / "palette.json")
    with pytest.raises(UserError, match=r"got both --palette and method\.encoder\.colours"):
        pretrain(images, recipe="igpt_nano", out=tmp_path / "run", palette=tmp_path / "palette.json",
                 settings=[*SMALL, "method.encoder.colours=16"])  # fmt: skip
    with pytest.raises(UserError, match="--palette was given, but mae has no setting palette"):
        pretrain(images, recipe="mae_nano", out=tmp_path / "run", palette=tmp_path / "palette.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"colours": 1}, "2 to 4096"),
        ({"colours": 100_000}, "2 to 4096"),
        ({"size": 0}, "at least 1 pixel"),
        ({"out": "x.txt"}, "ends in .json"),
    ],
)
def test_invalid_palette_arguments_are_rejected(images, tmp_path, more, message):
    out = tmp_path / more.pop("out", "palette.json")
    with pytest.raises(UserError, match=message):
        make(images, out, **more)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (["palette.json"], r"palette file .*palette\.json exists already; choose another --out, or remove it"),
        (["palette.png"], r"palette file .*palette\.png exists already"),
        (["palette.json", "palette.png"], r"palette\.json and .*palette\.png exist already; .* remove both"),
    ],
)
def test_existing_palette_file_is_rejected_before_images_are_read(tmp_path, there, message):
    for name in there:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=message):
        make(tmp_path / "no-images", tmp_path / "palette.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"] * len(there)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, "null", "[1]", '{"colours": "abc", "dtype": "uint8"}', '{"colours": [], "dtype": "uint8"}',
        '{"colours": [[NaN, 1, 2], [1, 2, 3]], "dtype": "uint8"}', '{"colours": [[1], [1, 2]], "dtype": "uint8"}',
        '{"colours": [[1, 2], [3, 4]], "dtype": "object"}', '{"colours": [[1e999], [2]], "dtype": "uint8"}',
        json.dumps({"colours": [[1, 2, 3]] * 100_000, "dtype": "uint8"}),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_malformed_palette_file_raises_a_clear_error(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(UserError, match=r"bad\.json") as error:
        initial_weights.with_palette(tmp_path / "bad.json")
    assert "\n" not in str(error.value)
