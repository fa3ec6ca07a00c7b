"""Files and runs of the wrong kind as sources of weights, tokenizers or masks are rejected before a run is made."""

import pytest
from conftest import pretrain, write_images

from unmask.config import ConfigError
from unmask.engine.load import read_config
from unmask.errors import UserError

SMALL = (
    *("method.encoder.width=32", "method.encoder.depth=1", "method.encoder.heads=2", "data.size=[16,16]"),
    *("method.decoder.width=16", "method.decoder.heads=2", "train.steps=2", "train.batch_size=8", "data.workers=0"),
)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", 12)


@pytest.fixture
def drawn(tmp_path):
    """A patch mask that hides the left half of 4 x 4 patches."""
    (tmp_path / "left.txt").write_text("##..\n" * 4)
    return tmp_path / "left.txt"


def test_patch_masks_from_a_file_are_stored_in_the_config(images, drawn, tmp_path):
    run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", masks=drawn, settings=SMALL)
    method = read_config(run).method
    assert (method.mask, method.mask_ratio, method.pattern) == ("pattern", 0.5, (("##..",) * 4,))
    assert run.read("status.json")["state"] == "finished"


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("mae_nano", ["method.mask=random"], "got both --masks and method.mask,"),
        ("mae_nano", ["method.mask_ratio=0.75"], "got both --masks and method.mask_ratio,"),
        ("mae_nano", ["data.size=[32,32]"], "got mask pattern 1 of 4 x 4 characters; expected 8 x 8"),
        ("mpp_nano", [], "--masks was given, but mpp has no setting mask, so it would be ignored"),
    ],
)
def test_conflicting_patch_masks_are_rejected(images, drawn, tmp_path, recipe, settings, message):
    with pytest.raises(UserError, match=message):
        pretrain(images, recipe=recipe, out=tmp_path / "run", masks=drawn, settings=settings)
    assert not (tmp_path / "run").exists()


def test_run_of_another_method_is_rejected_as_tokenizer(images, tmp_path):
    run = pretrain(images, recipe="mae_nano", out=tmp_path / "mae", settings=SMALL)
    with pytest.raises(ConfigError, match=r"is a run of mae; expected the run of a dVAE: train one with .*dvae_nano"):
        pretrain(images, recipe="beit_nano", out=tmp_path / "run", tokenizer=run.path)
    with pytest.raises(ConfigError, match="got both --tokenizer and graft"):
        pretrain(images, recipe="beit_nano", out=tmp_path / "run", tokenizer=run.path, settings=["graft=[]"])
    assert not (tmp_path / "run").exists()
