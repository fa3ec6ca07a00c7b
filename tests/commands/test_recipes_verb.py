"""Test `unmask recipes`: the list of recipes, and all settings of one."""

import json

from unmask.config import DataConfig, TrainConfig, keys, override
from unmask.optim import OptimConfig
from unmask.recipes.catalogue import all_recipes, describe


def test_recipes_lists_recipes_or_the_settings_of_one(unmask):
    code, out, _ = unmask("recipes")
    assert code == 0
    for name in ("mae_nano", "mae_tiny", "mae_small", "mae_base", "mae_large", "mae_huge", "auto"):
        assert f"\n{name} " in f"\n{out}"
    code, out, _ = unmask("recipes", "mae_base", "--json")
    assert json.loads(out)["train"]["batch_size"] == 4096
    code, _, err = unmask("recipes", "mae_bse")
    assert code == 2
    assert "did you mean mae_base" in err


def test_settings_are_shown_with_meaning_and_range(unmask):
    code, out, _ = unmask("recipes", "mae_nano")
    assert code == 0
    assert out.startswith("Images of 32 to 64 pixels on any processor")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "# MAE's settings; the defaults are the paper's, with its best target.",
        "method.encoder.patch = [4,4] # each above 0",
        "method.mask = random # random, block, grid or pattern",
        "method.mask_ratio = 0.75 # above 0 and below 1",
        "method.smallest_block = none # above 0, or none",
        "method.pca_whiten = false # true or false",
        "method.tokenizer = none",
        "train.seed = 0 # at least 0 and below 9223372036854775808",
    ):
        assert line in lines
    for section in ("method", "data", "optim", "train"):
        assert f"\n\n# {section}:\n" in out, "an empty line separates the sections"


def test_printed_settings_are_accepted_by_set():
    for name, recipe in all_recipes().items():
        printed = [
            line.split("  # ")[0] for line in describe(name).splitlines() if line.split(" ")[0] in keys(recipe())
        ]
        assert [line.split(" ")[0] for line in printed] == keys(recipe())
        other = recipe().model_copy(update={"optim": OptimConfig(), "train": TrainConfig(), "data": DataConfig()})
        assert override(other, printed) == recipe()


def test_recipes_are_listed_in_groups(unmask):
    code, out, _ = unmask("recipes")
    assert code == 0
    lines = out.splitlines()
    names = [line.split()[0] for line in lines if line]
    assert set(all_recipes()) <= set(names)
    assert names.index("mae_huge") < names.index("crossmae_nano") < names.index("finetune_few")
    *blocks, footnote = out.strip().split("\n\n")[1:]
    assert all(len(block.splitlines()) > 1 for block in blocks)  # the title of a group and its recipes
    assert footnote.startswith("* the image size is chosen from your images")
