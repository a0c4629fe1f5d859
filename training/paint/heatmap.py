"""Tables as pictures (Pillow only): a cell's colour is its number, which is also written in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .images import GAP, INK, PAPER, default_font, line_height, wrap

CELL, ROW, FONT = 74, 34, 14
PALE, DARK = (252, 252, 238), (19, 48, 96)
SCALE = np.array([PALE, (199, 226, 205), (112, 182, 190), (48, 112, 160), DARK], float)
"""From low to high; lightness falls all the way, so that it also reads without colours."""
EMPTY = (235, 235, 235)


def heatmap(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    note: str = "",
    log: bool = False,
    digits: int = 2,
) -> Image.Image:
    """One cell for each number, None leaves it empty. log: colours follow the logarithm (numbers above 0).

    Raises ValueError when the numbers do not fit the labels.
    """
    if not rows or len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        raise ValueError(f"{len(rows)} x {len(columns)} labels for a table of rows {[len(row) for row in values]}")
    font, bold = default_font(FONT), default_font(round(1.25 * FONT))
    line = line_height(font)
    heads = [wrap(name, font, CELL - 4, 2) for name in columns]
    sides = [wrap(name, font, 2 * CELL, 1)[0] for name in rows]
    left = GAP + math.ceil(max(font.getlength(text) for text in sides)) + 2 * GAP
    width = max(left + len(columns) * CELL + GAP, 5 * CELL)
    titles, notes = wrap(title, bold, width - 2 * GAP, 3), wrap(note, font, width - 2 * GAP, 4) if note else []
    top = GAP + len(titles) * line_height(bold) + GAP + max(map(len, heads)) * line + GAP
    height = top + len(rows) * ROW + GAP + (len(notes) * line + GAP if notes else 0)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(titles):
        draw.text((GAP, GAP + i * line_height(bold)), text, INK, bold)
    for c, lines in enumerate(heads):
        for i, text in enumerate(lines):
            draw.text((left + (c + 0.5) * CELL, top - GAP - (len(lines) - i) * line), text, INK, font, anchor="ma")
    shades = shade(values, log)
    for r, row in enumerate(values):
        y = top + r * ROW
        draw.text((left - GAP, y + ROW / 2), sides[r], INK, font, anchor="rm")
        for c, value in enumerate(row):
            box = (left + c * CELL, y, left + (c + 1) * CELL - 2, y + ROW - 2)
            place = shades[r][c]
            if value is None or place is None:
                draw.rectangle(box, EMPTY)
                continue
            colour = colour_of(place)
            draw.rectangle(box, colour)
            written = PAPER if sum(colour) < 3 * 140 else INK
            draw.text((box[0] + CELL / 2 - 1, y + ROW / 2 - 1), written_as(value, digits), written, font, anchor="mm")
    for i, text in enumerate(notes):
        draw.text((GAP, top + len(rows) * ROW + GAP + i * line), text, INK, font)
    return sheet


def written_as(value: float, digits: int) -> str:
    """As short as it fits a cell: numbers too small for the digits are written with an exponent."""
    text = f"{value:.{digits}f}"
    return f"{value:.1e}" if value and float(text) == 0 or len(text) > 8 else text


def shade(values: Sequence[Sequence[float | None]], log: bool) -> list[list[float | None]]:
    """Each number's place between the smallest and the largest, 0 to 1; None for what is no number."""

    def on_scale(value: float | None) -> float | None:
        if value is None or not math.isfinite(value) or log and value <= 0:
            return None
        return math.log(value) if log else value

    scaled = [[on_scale(value) for value in row] for row in values]
    known = [value for row in scaled for value in row if value is not None]
    low, span = min(known, default=0.0), (max(known, default=1.0) - min(known, default=0.0)) or 1.0
    return [[None if value is None else (value - low) / span for value in row] for row in scaled]


def colour_of(share: float) -> tuple[int, int, int]:
    """(red, green, blue) of a place on ``SCALE``, 0 to 1; straight lines between its colours."""
    place = share * (len(SCALE) - 1)
    low = min(int(place), len(SCALE) - 2)
    red, green, blue = (SCALE[low] + (place - low) * (SCALE[low + 1] - SCALE[low])).round()
    return int(red), int(green), int(blue)


def side_by_side(pictures: Sequence[Image.Image], columns: int = 2) -> Image.Image:
    """Pictures of any sizes in rows of ``columns``, as one picture."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) + 2 * GAP for c in range(len(rows[0]))]
    heights = [max(picture.height for picture in row) + 2 * GAP for row in rows]
    sheet = Image.new("RGB", (sum(widths), sum(heights)), PAPER)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (sum(widths[:c]) + GAP, sum(heights[:r]) + GAP))
    return sheet
