"""The paper's tables: the published numbers, and valid configurations for all cells."""

import pytest

from unmask.comparison.paper_tables import FAMILY, TABLES, Paper, find_table
from unmask.config import override, parse
from unmask.engine.resolve import require_method
from unmask.errors import UserError
from unmask.finetuning.configure import finetuning_config
from unmask.recipes.catalogue import all_recipes, find

NANO = find("mae_nano")


def linear(name):
    return [cell.paper.linear for cell in TABLES[name].cells(NANO)]


def test_published_numbers_match_the_paper():
    assert linear("1a") == [65.5, 70.0, 71.9, 73.5, 73.3]
    assert linear("1b") == [69.1, 71.3, 73.5, 73.1, 73.1]
    assert linear("1c") == [59.6, 73.5]
    assert linear("1d") == [73.5, 73.9, 72.3, 71.6]
    assert linear("1e") == [65.7, 73.1, 73.5, 71.9]
    assert linear("1f") == [73.5, 72.3, 63.9, 66.0]
    assert linear("fig5") == [54.6, 58.9, 61.7, 67.0, 69.9, 71.8, 73.2, 73.5, 71.8, 66.1]
    assert linear("fig7") == [57.3, 64.4, 69.7, 73.5, 75.1]
    assert [cell.paper.fine_tuned for cell in TABLES["fig5"].cells(NANO)][:5] == [83.2, 83.4, 83.4, 84.7, 84.9]
    assert [cell.paper.fine_tuned for cell in TABLES["fig9"].cells(find("mae_large"))] == [
        73.5, 79.1, 81.0, 83.1, 84.2, 84.4, 84.6, 84.7, 84.9,
    ]  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_the_papers_base_row(name):
    cells = TABLES[name].cells(NANO)
    (base,) = [cell for cell in cells if cell.base]
    assert len({cell.name for cell in cells}) == len(cells)
    if name != "family":
        assert base.paper.fine_tuned == 84.9
        assert base.paper.linear == (None if name == "fig9" else 73.5)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "family"])
def test_cells_set_only_the_keys_that_the_table_varies(name):
    table = TABLES[name]
    for cell in table.cells(NANO):
        assert set(parse(cell.settings)) <= set(table.varies)


@pytest.mark.parametrize("name", ["1a", "1b", "1c", "1e", "1f", "fig5", "fig7"])
def test_every_cell_can_be_trained(name):
    table = TABLES[name]
    for cell in table.cells(NANO):
        require_method(override(NANO, [*table.base, *cell.settings]))


def test_decoder_widths_are_the_papers_shares_of_the_encoder_width():
    widths = {cell.theirs: parse(cell.settings)["method.decoder.width"] for cell in TABLES["1b"].cells(NANO)}
    assert widths == {"128": 24, "256": 48, "512": 96, "768": 144, "1024": 192}
    large = find("mae_large")
    assert [parse(cell.settings)["method.decoder.width"] for cell in TABLES["1b"].cells(large)] == [
        128, 256, 512, 768, 1024,
    ]  # fmt: skip
    for cell in TABLES["1b"].cells(override(NANO, ["method.encoder.width=40", "method.encoder.heads=2"])):
        found = parse(cell.settings)
        assert found["method.decoder.width"] % found["method.decoder.heads"] == 0
        assert found["method.decoder.width"] % 4 == 0


def test_published_numbers_of_the_family_match_the_cited_tables():
    """In the MAE paper, Table 12 has linear probes (iGPT-L 69.0 on VQ-VAE codes, BEiT-L 52.1, ViT-L 75.8); fine-tuned
    accuracies are in Table 3.
    """
    published = {cell.name: cell.paper for cell in TABLES["family"].cells(NANO)}
    assert published["igpt-equal-steps"] == Paper(None, 69.0)
    assert published["beit-equal-steps"] == Paper(85.2, 52.1)
    assert published["mae-equal-steps"] == Paper(85.9, 75.8)


def test_every_training_length_is_twice_the_one_before():
    assert [cell.length for cell in TABLES["fig7"].cells(NANO)] == [1, 2, 4, 8, 16]


def test_the_family_has_every_method_with_equal_steps_and_equal_compute():
    cells = TABLES["family"].cells(NANO)
    assert [cell.name for cell in cells if cell.equal == "steps"] == [f"{name}-equal-steps" for name in FAMILY]
    assert {cell.name for cell in cells if cell.equal == "compute"} == {
        f"{name}-equal-compute" for name in FAMILY if name != "mae"
    }


def test_every_method_of_the_family_uses_its_own_recipe():
    for name, recipe in FAMILY.items():
        if recipe in all_recipes():
            assert find(recipe).method.name == name.removesuffix("_bert")


def test_tuned_blocks_are_compared_with_the_papers_nearest_fraction_of_the_depth():
    def found(base):
        return [(parse(cell.settings)["method.last_blocks"], cell.theirs) for cell in TABLES["fig9"].cells(base)]

    assert found(NANO) == [
        (0, "0"), (0.5, "1/2"), (1, "4 of 24"), (2, "6 of 24"), (4, "18 of 24"), (6, "24 of 24"),
    ]  # fmt: skip
    assert found(override(NANO, ["method.encoder.depth=1"])) == [(0, "0"), (0.5, "1/2"), (1, "24 of 24")]
    assert [blocks for blocks, _ in found(find("mae_large"))] == [0, 0.5, 1, 2, 4, 6, 12, 18, 24]
    assert all(theirs.split()[0] in (str(blocks), "1/2") for blocks, theirs in found(find("mae_large")))


def test_every_fine_tuned_cell_can_be_trained():
    for cell in TABLES["fig9"].cells(NANO):
        require_method(override(finetuning_config(NANO, ["ant", "bee"]), cell.settings))
    with pytest.raises(UserError, match=r"got a run of dvae"):
        finetuning_config(find("dvae_nano"), ["ant", "bee"])


def test_an_unknown_table_is_rejected():
    with pytest.raises(UserError, match=r"table 'fig55' is not known; did you mean fig5"):
        find_table("fig55")
