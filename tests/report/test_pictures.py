"""Test drawn pictures for all numbers of channels, dtypes and shapes, pixel by pixel."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from unmask.method import Picture
from unmask.report.pictures import (
    GAP,
    LARGEST_CELL,
    MARGIN,
    NARROWEST_SHEET,
    NOT_FINITE,
    PAPER,
    SMALLEST_CELL,
    cell_size,
    compose,
    draw,
    in_numbers,
    shorten,
    to_rgb,
    wrap,
)

PANELS = ("original", "masked 75%", "prediction", "pasted")
NUMBERS = {"loss": torch.tensor(0.5), "true_patch_mean": torch.tensor(1.0)}


def picture(count=2, channels=3, size=(16, 16), scale=255.0, offset=0.0, panels=PANELS, note="A note."):
    rng = torch.Generator().manual_seed(0)
    values = {name: torch.rand(count, channels, *size, generator=rng) * scale + offset for name in panels}
    return Picture(values, note, NUMBERS)


def cells_of(sheet, made, title="t", names=()):
    """Return the cells of a sheet, by column and row; a copy with magenta cells shows where they are."""
    height, width = cell_size(*next(iter(made.panels.values())).shape[2:])
    marker = {name: torch.full_like(panel[:, :1].float(), float("nan")) for name, panel in made.panels.items()}
    note = made.note
    plain = np.asarray(compose(Picture(marker, note, made.numbers), "uint8", title, names))
    top = int(np.flatnonzero((plain == NOT_FINITE).all(2).any(1))[0])
    step = height + GAP + (16 if names else 0)
    count = len(next(iter(made.panels.values())))
    pixels = np.asarray(sheet)
    return [
        [
            pixels[top + row * step : top + row * step + height, left : left + width]
            for row in range(count)
        ]
        for left in (MARGIN + i * (width + GAP) for i in range(len(made.panels)))
    ]  # fmt: skip


def test_eight_bit_images_are_drawn_unchanged_in_their_cells():
    made = picture(count=3)
    cells = cells_of(compose(made, "uint8", "t"), made)
    for column, panel in zip(cells, made.panels.values(), strict=True):
        for row, cell in enumerate(column):
            want = panel[row].permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
            np.testing.assert_array_equal(cell, want.repeat(7, 0).repeat(7, 1))


def test_values_outside_the_range_of_the_files_are_clipped():
    made = Picture({"original": torch.tensor([-50.0, 300.0, 127.4]).reshape(1, 1, 1, 3)}, "", {})
    assert to_rgb(made.panels, "uint8")["original"][0, 0, :, 0].tolist() == [0, 255, 127]


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 1, None]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_channels_become_gray_or_false_colour(channels, shown):
    made = picture(channels=channels)
    rgb = to_rgb(made.panels, "uint8")["prediction"]
    panel = made.panels["prediction"].round().byte().numpy()
    for place, channel in enumerate(shown):
        want = 0 if channel is None else panel[:, channel]
        np.testing.assert_array_equal(rgb[..., place], np.broadcast_to(want, rgb.shape[:3]))


def written(monkeypatch):
    """Return a list that collects all drawn texts in order."""
    from PIL import ImageDraw

    texts = []
    real = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "text",
        lambda self, xy, text, *more: texts.append((xy, text)) or real(self, xy, text, *more),
    )
    return texts


@pytest.mark.parametrize(
    ("channels", "says"), [(1, None), (2, "channels 1 and 2 as red and green"), (3, None), (5, "channels 1, 2 and 3")]
)
def test_note_explains_false_colours(monkeypatch, channels, says):
    texts = written(monkeypatch)
    compose(picture(channels=channels), "uint8", "t")
    said = " ".join(text for _, text in texts)
    assert ("Images have" in said) == (says is not None)
    assert says is None or says in said


@pytest.mark.parametrize(("dtype", "scale", "offset"), [("uint16", 3000.0, 20000.0), ("float32", 4.0, -2.0)])
def test_other_dtypes_are_stretched_by_the_range_of_the_original(dtype, scale, offset):
    made = picture(count=4, channels=3, size=(32, 32), scale=scale, offset=offset)
    made.panels["original"][:, 1] *= 0.1  # each channel has its own percentiles
    made.panels["prediction"] = made.panels["original"] * 2 - made.panels["original"].mean((0, 2, 3), keepdim=True)
    rgb = to_rgb(made.panels, dtype)
    for channel in range(3):
        low, high = np.percentile(made.panels["original"][:, channel].double().numpy(), (1, 99))
        for name in ("original", "prediction"):
            want = ((made.panels[name][:, channel].double().numpy() - low) / (high - low) * 255).clip(0, 255)
            assert np.abs(rgb[name][..., channel] - want).max() <= 0.51
    assert rgb["original"].min() == 0
    assert rgb["original"].max() == 255


def test_bright_spot_on_constant_image_is_visible_and_constant_image_is_black():
    spot = torch.full((1, 1, 32, 32), 7.0)
    spot[0, 0, 3, 3] = 9.0
    rgb = to_rgb({"original": spot}, "float32")["original"]
    assert rgb[0, 3, 3, 0] == 255
    assert rgb.sum() == 255 * 3
    assert to_rgb({"original": spot * 0 + 7}, "float32")["original"].max() == 0


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_non_finite_values_are_magenta_and_do_not_affect_other_pixels(monkeypatch, dtype):
    clean, made = picture(), picture()
    made.panels["prediction"][0, 1, 2, 3] = float("nan")
    made.panels["pasted"][1, 0, 0, 0] = float("-inf")
    rgb, plain = to_rgb(made.panels, dtype), to_rgb(clean.panels, dtype)
    assert tuple(rgb["prediction"][0, 2, 3]) == NOT_FINITE
    assert tuple(rgb["pasted"][1, 0, 0]) == NOT_FINITE
    changed = (rgb["prediction"] != plain["prediction"]).any(-1)
    assert changed.sum() <= 1
    texts = written(monkeypatch)
    compose(made, dtype, "t")
    assert "Magenta marks values that are not finite (prediction, pasted)." in " ".join(text for _, text in texts)


def test_original_without_finite_values_is_drawn():
    nothing = torch.full((1, 2, 8, 8), float("nan"))
    made = Picture(
        {"original": nothing, "prediction": torch.rand(1, 2, 8, 8)}, "", {"loss": torch.tensor(float("nan"))}
    )
    sheet = compose(made, "float32", "t")
    assert sheet.size[0] >= NARROWEST_SHEET
    nothing[0, 0] = 1  # one channel alone
    compose(made, "float32", "t")


@pytest.mark.parametrize(
    ("size", "cell"),
    [
        ((8, 8), (112, 112)),
        ((32, 32), (128, 128)),
        ((16, 32), (112, 224)),
        ((224, 224), (224, 224)),
        ((480, 640), (240, 320)),
        ((8, 160), (16, 320)),
        ((1, 1), (112, 112)),
        ((1, 4000), (1, 320)),
        ((100, 200), (100, 200)),
    ],
)
def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_reduced(size, cell):
    assert cell_size(*size) == cell
    assert cell_size(*size[::-1]) == cell[::-1]


@pytest.mark.parametrize("size", [(8, 8), (480, 640), (64, 16), (16, 64)])
@pytest.mark.parametrize("count", [1, 5])
def test_sheet_contains_all_cells_and_a_margin(size, count):
    made = picture(count=count, size=size, note="word " * 200)
    sheet = np.asarray(compose(made, "uint8", "title", names=["name"] * count))
    height, width = cell_size(*size)
    assert sheet.shape[1] == max(NARROWEST_SHEET, 2 * MARGIN + 4 * width + 3 * GAP)
    assert sheet.shape[0] > count * height
    for edge in (sheet[:8], sheet[-8:], sheet[:, :8], sheet[:, -8:]):
        assert (edge == PAPER).all(), "nothing is drawn over the edge"
    assert max(height, width) <= LARGEST_CELL
    assert min(height, width) >= min(SMALLEST_CELL, 80)


def test_long_texts_are_wrapped_without_losing_words(monkeypatch):
    caption = "a caption of many words with_one_endless_word_that_is_wider_than_a_column_of_the_picture"
    note = "The note is wide too. " * 40
    made = picture(size=(8, 8), panels=("original", caption), note=note)
    texts = written(monkeypatch)
    sheet = np.asarray(compose(made, "uint8", "a title " * 30))
    font = ImageFont.load_default(13)
    column = [text for (x, _), text in texts if x == MARGIN + 112 + GAP]
    assert "".join(column).replace(" ", "") == caption.replace(" ", "")
    assert all(font.getlength(text) <= 112 for text in column)
    assert note.split() == " ".join(text for _, text in texts).split()[-len(note.split()) :]
    assert (sheet[:, -8:] == PAPER).all()
    lines = [y for (x, y), text in texts if x == MARGIN]
    assert all(later - sooner >= 13 for sooner, later in pairwise(lines)), "lines do not overlap"


def test_wrapping_and_shortening():
    font = ImageFont.load_default(13)
    assert wrap("", font, 100) == [""]
    assert wrap("one two", font, 1000) == ["one two"]
    assert wrap("w", font, 0) == ["w"]
    assert shorten("short.png", font, 500) == "short.png"
    long = shorten("folder/" * 40 + "the_file.png", font, 200)
    assert long.startswith("...")
    assert long.endswith("the_file.png")
    assert font.getlength(long) <= 200
    assert shorten("line\nbreak", font, 500) == "line break"


def test_loss_and_baselines_are_formatted():
    assert in_numbers(NUMBERS) == "loss 0.500; baselines: true patch mean 1.000"
    assert in_numbers({"loss": torch.tensor(2.0)}) == "loss 2.000"
    assert in_numbers({"copy_nearest": torch.tensor(2.0)}) == "baselines: copy nearest 2.000"
    assert in_numbers({}) == ""


def test_rows_can_have_names(monkeypatch):
    texts = written(monkeypatch)
    made = picture(count=3)
    sheet = compose(made, "uint8", "t", names=["one.png", "two.png", "three/" * 60 + ".png"])
    named = [(y, text) for (_, y), text in texts if text.endswith(".png")]
    assert [text[:7] for _, text in named[:2]] == ["one.png", "two.png"]
    assert len(named) == 3
    cells = cells_of(sheet, made, names=["a", "b", "c"])
    want = made.panels["pasted"][2].permute(1, 2, 0).round().byte().numpy()
    np.testing.assert_array_equal(cells[3][2][::7, ::7], want)


@pytest.mark.parametrize(("channels", "dtype"), [(1, "uint8"), (2, "uint16"), (3, "float32"), (5, "uint8")])
def test_equal_pictures_give_identical_png_files(tmp_path, channels, dtype):
    made = picture(channels=channels, size=(8, 24))
    for name in ("a.png", "b.PNG"):
        draw(made, dtype, tmp_path / name, "title", ["x.png", "\udcff no text.png"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.PNG").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.PNG"], "no partial file is left"


def test_invalid_paths_are_rejected_before_drawing(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.png"):
        draw(picture(), "uint8", tmp_path / "a.jpg", "t")
    with pytest.raises(ValueError, match="does not exist; create it"):
        draw(picture(), "uint8", tmp_path / "no" / "a.png", "t")


def test_drawing_does_not_change_the_panels():
    made = picture()
    before = {name: panel.clone() for name, panel in made.panels.items()}
    compose(made, "float32", "t")
    assert all(torch.equal(before[name], panel) for name, panel in made.panels.items())
