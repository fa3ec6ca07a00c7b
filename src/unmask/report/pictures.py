"""Draw a `Picture` as one PNG: a row per image, a column per panel, captions above and a note below.

Images may have any dtype and any number of channels. One channel is drawn in gray, three as red, green and blue. With
more channels, only the first three are drawn; with two channels, blue is 0. The note names the drawn channels.
Eight-bit images are drawn unchanged. For other dtypes, the 1st and 99th percentile of each channel of the first panel
(the original), over all images, become black and white, and all panels are stretched alike, so that columns can be
compared. Non-finite values are drawn in magenta, and the note explains the colour. Absent pixels (no data) are a
checkerboard in every panel.

Letters: B images, C channels, H x W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unmask.errors import UserError
from unmask.method import Picture
from unmask.system.atomic_files import replace_file

SMALLEST_CELL = 112  # smallest side of a drawn image in pixels; small images are enlarged by a whole factor
LARGEST_CELL = 320
NARROWEST_SHEET = 640  # minimum width of the sheet in pixels, so that the note is readable
GAP, MARGIN = 6, 18
PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (105, 105, 105)
NOT_FINITE = (255, 0, 255)
SQUARES, SQUARE = (200, 235), 4  # checkerboard: its two gray values, and the side of a square in pixels of the image
TITLE_SIZE, TEXT_SIZE, NAME_SIZE = 17, 13, 11
LEADING = 5

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw(picture: Picture, dtype: str, path: Path, title: str, names: Sequence[str] = ()) -> None:
    """Write `picture` to `path` as a PNG, atomically.

    dtype: dtype of the files ("uint8", "uint16" or "float32"), in whose units the panels are. names: a text for each
    image, drawn below its row (default: the names in the picture, if any). Raises UserError if the folder does not
    exist or the name does not end in .png.
    """
    require_png(path)
    file = io.BytesIO()
    compose(picture, dtype, title, names).save(file, "PNG", optimize=True)
    replace_file(path, file.getvalue())


def require_png(path: Path) -> None:
    """Raise UserError if no PNG can be written to this path. Callers check this before they begin any work."""
    if path.suffix.lower() != ".png":
        raise UserError(f"got picture file {path}; expected a name that ends in .png")
    if not path.resolve().parent.is_dir():
        raise UserError(f"the folder {path.resolve().parent} does not exist; create it, or choose another --out")


def compose(picture: Picture, dtype: str, title: str, names: Sequence[str] = ()) -> Image.Image:
    """Return the image that `draw` writes to a file."""
    columns = to_rgb(picture.panels, dtype, picture.valid)
    count, height, width, _ = next(iter(columns.values())).shape
    cell_height, cell_width = cell_size(height, width)
    heading, text, small = (ImageFont.load_default(size) for size in (TITLE_SIZE, TEXT_SIZE, NAME_SIZE))
    line = TEXT_SIZE + LEADING

    sheet_width = max(2 * MARGIN + len(columns) * (cell_width + GAP) - GAP, NARROWEST_SHEET)
    text_width = sheet_width - 2 * MARGIN
    titles = wrap(title, heading, text_width)
    numbers = wrap(in_numbers(picture.numbers), text, text_width) if picture.numbers else []
    captions = {name: wrap(name, text, cell_width) for name in columns}
    absent = [] if picture.valid is None else ["The checkerboard marks absent pixels, which do not count in the loss."]
    notes = wrap(" ".join([picture.note, *_about_channels(picture.panels), *absent]), text, text_width)
    names = names or picture.names
    name_height = NAME_SIZE + LEADING if names else 0

    top_of_captions = MARGIN + len(titles) * (TITLE_SIZE + LEADING) + len(numbers) * line + LEADING
    top = top_of_captions + max(len(lines) for lines in captions.values()) * line
    below = top + count * (cell_height + GAP + name_height) + LEADING
    sheet = Image.new("RGB", (sheet_width, below + len(notes) * line + MARGIN - LEADING), PAPER)
    pen = ImageDraw.Draw(sheet)

    y = _write(pen, titles, x=MARGIN, y=MARGIN - 2, ink=INK, font=heading, step=TITLE_SIZE + LEADING)
    _write(pen, numbers, x=MARGIN, y=y, ink=FAINT, font=text, step=line)
    for number, (name, panel) in enumerate(columns.items()):
        left = MARGIN + number * (cell_width + GAP)
        _write(pen, captions[name], x=left, y=top - len(captions[name]) * line, ink=INK, font=text, step=line)
        for row, pixels in enumerate(panel):
            cell = Image.fromarray(pixels).resize((cell_width, cell_height), resample(height, cell_height))
            sheet.paste(cell, (left, top + row * (cell_height + GAP + name_height)))
    for row, name in enumerate(names):
        y = top + row * (cell_height + GAP + name_height) + cell_height + 2
        pen.text((MARGIN, y), shorten(name, small, text_width), FAINT, small)
    _write(pen, notes, x=MARGIN, y=below, ink=FAINT, font=text, step=line)
    return sheet


def _write(
    pen: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, ink: tuple[int, int, int], font: Font, step: int
) -> int:
    """Draw lines of text from (x, y) downwards; return the y of the next line."""
    for number, words in enumerate(lines):
        pen.text((x, y + number * step), words, ink, font)
    return y + len(lines) * step


def in_numbers(numbers: Mapping[str, Tensor]) -> str:
    """Format the numbers: 'loss 0.512; baselines: patch mean 1.000, nearest visible 1.430'."""
    named = {name.replace("_", " "): f"{name.replace('_', ' ')} {float(value):.3f}" for name, value in numbers.items()}
    own, others = named.pop("loss", ""), ", ".join(named.values())
    return "; ".join(part for part in (own, f"baselines: {others}" if others else "") if part)


def _about_channels(panels: Mapping[str, Tensor]) -> list[str]:
    """Return sentences that explain how channels and non-finite values are drawn."""
    channels, notes = next(iter(panels.values())).shape[1], []
    if channels not in (1, 3):
        shown = "channels 1, 2 and 3 as red, green and blue" if channels > 3 else "channels 1 and 2 as red and green"
        notes.append(f"Images have {channels} channels; the picture shows {shown}.")
    wrong = [name for name, panel in panels.items() if not panel.isfinite().all()]
    if wrong:
        notes.append(f"Magenta marks values that are not finite ({', '.join(wrong)}).")
    return notes


def cell_size(height: int, width: int) -> tuple[int, int]:
    """Return (height, width) of a drawn image.

    Small images are enlarged by a whole factor, large images are reduced.
    """
    longer = max(height, width)
    if longer > LARGEST_CELL:
        return max(1, round(height * LARGEST_CELL / longer)), max(1, round(width * LARGEST_CELL / longer))
    factor = min(-(-SMALLEST_CELL // min(height, width)), LARGEST_CELL // longer)
    return height * factor, width * factor


def resample(before: int, after: int) -> Image.Resampling:
    return Image.Resampling.NEAREST if after >= before else Image.Resampling.LANCZOS


def to_rgb(panels: Mapping[str, Tensor], dtype: str, valid: Tensor | None = None) -> dict[str, np.ndarray]:
    """Convert panels (B, C, H, W) in units of the files to RGB (B, H, W, 3) uint8, as the module docstring describes.

    valid: (B, H, W) bool, False where a pixel is absent.
    """
    arrays = {name: panel.detach().float().cpu().numpy() for name, panel in panels.items()}
    first, absent = next(iter(arrays.values())), None if valid is None else ~valid.cpu().numpy()
    low, spread = _stretch(first if absent is None else np.where(absent[:, None], np.nan, first), dtype)
    drawn = {}
    for name, panel in arrays.items():
        finite = np.isfinite(panel)
        scaled = (np.where(finite, panel, 0) - low[:, None, None]) / spread[:, None, None] * 255
        rgb = _three(scaled.round().clip(0, 255).astype(np.uint8)).transpose(0, 2, 3, 1).copy()  # (B, H, W, 3)
        rgb[~np.all(finite, axis=1)] = NOT_FINITE
        if absent is not None and absent.shape == rgb.shape[:3]:
            rows, cols = np.indices(absent.shape[1:]) // SQUARE
            board = np.array(SQUARES, np.uint8)[(rows + cols) % 2]  # (H, W)
            rgb = np.where(absent[..., None], board[None, :, :, None], rgb)
        drawn[name] = rgb
    return drawn


def _stretch(original: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (black point, white point minus black point) of each channel, both (C,) float64."""
    channels = original.shape[1]
    low, high = np.zeros(channels), np.full(channels, 255.0)
    if dtype != "uint8":
        for channel in range(channels):
            values = original[:, channel]
            values = values[np.isfinite(values)].astype(np.float64)
            low[channel], high[channel] = np.percentile(values, (1, 99)) if len(values) else (0, 1)
            if high[channel] <= low[channel] and len(
                values
            ):  # the channel is constant except for a few pixels, which should stay visible
                low[channel], high[channel] = values.min(), values.max()
    return low, np.where(high > low, high - low, 1.0)


def _three(panel: np.ndarray) -> np.ndarray:
    """Convert panels (B, C, H, W) to RGB panels (B, 3, H, W)."""
    if panel.shape[1] == 1:
        return np.repeat(panel, 3, axis=1)
    if panel.shape[1] == 2:
        return np.concatenate([panel, np.zeros_like(panel[:, :1])], 1)
    return panel[:, :3]


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Wrap text to lines of at most `width` pixels.

    Lines break between words, or within a word that is wider than a line.
    """
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines or [""]


def shorten(text: str, font: Font, width: int) -> str:
    """Shorten text to one line of `width` pixels, keeping the end, which is the file name of a path."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    start = next(n for n in range(1, len(text) + 1) if font.getlength("..." + text[n:]) <= width or n == len(text))
    return "..." + text[start:]
