"""Pictures beside and above one another."""

from collections.abc import Sequence

from PIL import Image

PAPER = "white"
GAP = 4


def scaled(picture: Image.Image, factor: float) -> Image.Image:
    size = (round(picture.width * factor), round(picture.height * factor))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def rows(pictures: Sequence[Sequence[Image.Image]], factor: float = 1, gap: int = GAP) -> Image.Image:
    """Rows of pictures, from the left and from the top, of any sizes."""
    made = [[scaled(picture, factor) for picture in row] for row in pictures]
    width = max(sum(p.width for p in row) + gap * (len(row) - 1) for row in made)
    heights = [max(p.height for p in row) for row in made]
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(made) - 1)), PAPER)
    top = 0
    for row, height in zip(made, heights):
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width + gap
        top += height + gap
    return sheet


def stack(pictures: Sequence[Image.Image], width: int, gap: int = 2 * GAP) -> Image.Image:
    """Pictures under one another, each made ``width`` pixels wide."""
    return rows([[scaled(picture, width / picture.width)] for picture in pictures], gap=gap)
