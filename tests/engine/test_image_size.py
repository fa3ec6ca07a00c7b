"""The input size of a method is chosen from the images unless a paper fixes it, and its effect is reported."""

import pytest
from conftest import SMALL_RUN, pretrain, write_images

from unmask.config import Config, override
from unmask.console import Console
from unmask.engine.image_size import candidates, consequence, dense_size, follows_images
from unmask.engine.resolve import patch_of
from unmask.finetuning.configure import finetuning_config
from unmask.recipes import catalogue

PHOTO = (375, 500)
TINY = [setting for setting in SMALL_RUN if not setting.startswith("data.size")]


def test_only_recipes_without_a_fixed_size_choose_it_for_the_images():
    names = {name for name in catalogue.all_recipes() if follows_images(name)}
    assert names >= {"mae_nano", "mae_tiny", "mae_small", "simmim_nano", "igpt_nano", "ae_nano", "crossmae_nano"}
    fixed = {"mae_base", "mae_huge", "igpt_s", "beit_base", "ae_hinton", "demo_shapes", "finetune_nano", "dvae_nano"}
    assert not names & fixed


@pytest.mark.parametrize("name", [name for name in catalogue.all_recipes() if follows_images(name)])
@pytest.mark.parametrize("median", [(375, 500), (24, 24), (240, 180), (100, 900), (33, 33), (1, 1)])
def test_recipe_fits_images_of_every_size(name, median):
    found = next(iter(candidates(name, median)))
    config = override(catalogue.find(name), found)
    assert min(config.data.size) <= max(64, *catalogue.find(name).data.size)
    if (patch := patch_of(config)) is not None:
        assert all(side % step == 0 for side, step in zip(config.data.size, patch, strict=True))
    if min(median) >= 64:
        wide, tall = median[1] > 1.25 * median[0], median[0] > 1.25 * median[1]
        assert (config.data.size[1] > config.data.size[0]) == wide
        assert (config.data.size[0] > config.data.size[1]) == tall
        assert min(config.data.size) >= 64


def test_named_recipe_uses_the_same_size_as_auto():
    for median in ((375, 500), (24, 24), (28, 56), (500, 500)):
        _, proposals, _ = catalogue.choose(5000, median, "cpu")
        ours = override(catalogue.find("mae_nano"), next(iter(candidates("mae_nano", median))))
        theirs = override(catalogue.find("mae_nano"), [p for p in proposals if p.startswith(("data.", "method."))])
        assert (ours.data.size, patch_of(ours)) == (theirs.data.size, patch_of(theirs))


@pytest.mark.parametrize("set_by_hand", ["data.size=[32,32]", "method.encoder.patch=[4,4]", None])
def test_pretrain_with_a_named_recipe_chooses_the_size_unless_it_is_set(tmp_path, set_by_hand):
    images, said = write_images(tmp_path / "images", 10, size=PHOTO), []
    console = Console(quiet=True)
    console.print = said.append
    settings = [*TINY, "train.steps=2", *([] if set_by_hand is None else [set_by_hand])]
    run = pretrain(images, recipe="mae_nano", out=tmp_path / "run", settings=settings, console=console)
    size = "64 x 88" if set_by_hand is None else "32 x 32"
    line = next(number for number, text in enumerate(said) if f"resampled to {size} pixels" in text)
    assert said[line].startswith("images of 375 x 500 (median) are resampled")
    assert not any(text.startswith("recipe ") for text in said[:line]), (
        "the message is printed before anything is measured or planned"
    )
    assert sum("are resampled to" in text for text in said) == 1
    assert run.read("plan.json")["reasons"][0] == said[line]
    assert " x ".join(map(str, run.read("config.json")["data"]["size"])) == size
    assert any("has no fixed size" in reason for reason in run.read("plan.json")["reasons"]) == (set_by_hand is None)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((32, 32), "13.5 times smaller, so detail finer than about 14 pixels is lost; 8 x 8 patches of 4 x 4"),
        ((384, 512), "about their own size; 96 x 128 patches"),
        ((750, 1000), "2.0 times larger, which adds no detail"),
    ],
)
def test_effect_of_a_size_is_described(size, words):
    assert words in consequence(PHOTO, size, (4, 4))
    assert "--set data.size=[H,W]" in consequence(PHOTO, size, None)


@pytest.mark.parametrize(
    ("median", "size"),
    [
        ((180, 240), (96, 128)),
        ((64, 64), (64, 64)),
        ((80, 90), (64, 64)),
        ((90, 110), (88, 112)),
        ((1000, 1000), (112, 112)),
    ],
)
def test_masks_and_boxes_use_the_size_of_the_images_up_to_the_recipe_size(median, size):
    base = override(catalogue.find("mae_nano"), ["data.size=[64,64]", "method.encoder.patch=[8,8]"])
    config: Config = finetuning_config(base, ("one", "other"), "segment_nano")
    assert dense_size(config, median, catalogue.find("segment_nano").data.size) == size
