"""A `Picture` as one PNG: a row per image, a column per panel, captions above and the note below.

Any number of channels and any dtype can be drawn. One channel is gray, three are red, green and blue; of two, or of more
than three, the first three stand for them (a missing one is black), and the caption says so. Eight-bit images are drawn
as they are; others are stretched so that the 1st and 99th percentile of the ORIGINAL panel, over all images drawn and
channel by channel, become black and white, and every other panel is stretched by the same two numbers, so that columns
can be compared.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unmask.method import Picture
from unmask.run import replace_file

SMALLEST_CELL = 112  # pixels of the shorter side on paper: small images are enlarged by a whole factor
LARGEST_CELL = 320
GAP, MARGIN = 6, 14
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (105, 105, 105)
TEXT_SIZE, TITLE_SIZE = 13, 15


def draw(picture: Picture, dtype: str, path: Path, title: str) -> None:
    """Write `picture` to `path` as a PNG, whole or not at all.

    dtype: of the files ("uint8", "uint16", "float32"), whose units the panels are in. Raises ValueError when the folder
    does not exist or the name does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"picture file {path} came; a name that ends in .png was expected")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"the folder {path.resolve().parent} does not exist; make it first, or choose another --out")
    sheet = compose(picture, dtype, title)
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    replace_file(path, file.getvalue())


def compose(picture: Picture, dtype: str, title: str) -> Image.Image:
    """The sheet that `draw` writes."""
    columns = to_rgb(picture.panels, dtype)
    channels = next(iter(picture.panels.values())).shape[1]
    note = picture.note
    if channels not in (1, 3):
        shown = "channels 1, 2 and 3 as red, green and blue" if channels > 3 else "channels 1 and 2 as red and green"
        note += f" Images have {channels} channels; drawn are {shown}."
    count, height, width, _ = next(iter(columns.values())).shape
    cell = cell_size(height, width)
    text, heading = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TITLE_SIZE)
    captions = {name: wrap(name, text, cell[1]) for name in columns}
    caption_lines = max(len(lines) for lines in captions.values())
    line = TEXT_SIZE + 4
    sheet_width = max(2 * MARGIN + len(columns) * (cell[1] + GAP) - GAP, 460)
    note_lines = wrap(note, text, sheet_width - 2 * MARGIN)
    top = MARGIN + TITLE_SIZE + 8 + caption_lines * line
    bottom = top + count * (cell[0] + GAP)
    sheet = Image.new("RGB", (sheet_width, bottom + 4 + len(note_lines) * line + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 4), title, INK, heading)
    for column, (name, panel) in enumerate(columns.items()):
        left = MARGIN + column * (cell[1] + GAP)
        for number, words in enumerate(captions[name]):
            y = top - (len(captions[name]) - number) * line
            pen.text((left, y), words, INK, text)
        for row, pixels in enumerate(panel):
            enlarged = Image.fromarray(pixels).resize((cell[1], cell[0]), resample(height, cell[0]))
            sheet.paste(enlarged, (left, top + row * (cell[0] + GAP)))
    for number, words in enumerate(note_lines):
        pen.text((MARGIN, bottom + 4 + number * line), words, FAINT, text)
    return sheet


def cell_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) on paper: small images enlarged by a whole factor so that pixels stay square, large ones reduced."""
    factor = max(1, -(-SMALLEST_CELL // min(height, width)))
    if max(height, width) * factor > LARGEST_CELL:
        factor = max(1, LARGEST_CELL // max(height, width))
    scale = min(factor, LARGEST_CELL / max(height, width)) if factor == 1 else factor
    return max(1, round(height * scale)), max(1, round(width * scale))


def resample(before: int, after: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if after >= before else Image.Resampling.LANCZOS


def to_rgb(panels: Mapping[str, Tensor], dtype: str) -> dict[str, np.ndarray]:
    """Panels (B, C, H, W) in the files' units -> (B, H, W, 3) uint8 by the rules of the module docstring."""
    arrays = {name: panel.detach().float().cpu().numpy() for name, panel in panels.items()}
    first = next(iter(arrays.values()))
    if dtype == "uint8":
        low, high = np.zeros(first.shape[1]), np.full(first.shape[1], 255.0)
    else:
        low, high = np.percentile(first, (1, 99), axis=(0, 2, 3))  # (C,)
    spread = np.where(high > low, high - low, 1.0)
    drawn = {}
    for name, panel in arrays.items():
        scaled = (panel - low[:, None, None]) / spread[:, None, None]
        bytes_ = np.nan_to_num(scaled * 255, nan=0.0, posinf=255.0, neginf=0.0).round().clip(0, 255).astype(np.uint8)
        drawn[name] = _three(bytes_).transpose(0, 2, 3, 1)
    return drawn


def _three(panel: np.ndarray) -> np.ndarray:
    """(B, C, H, W) -> (B, 3, H, W)."""
    if panel.shape[1] == 1:
        return np.repeat(panel, 3, axis=1)
    if panel.shape[1] == 2:
        return np.concatenate([panel, np.zeros_like(panel[:, :1])], 1)
    return panel[:, :3]


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines no wider than `width` pixels, as far as its words allow."""
    letters = max(8, int(width / max(1.0, font.getlength("abcdefghij klmnopqrst") / 21)))
    return textwrap.wrap(text, letters) or [""]
