"""Latents to pictures, and labelled contact sheets of pictures (with Pillow alone)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...dmm_core.files import atomic_write
from ...dmm_core.vae import SCALE_SD, AutoencoderKL

PAPER, INK = (255, 255, 255), (32, 32, 36)
GAP = 6
LABEL_LINES = 3


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], on the device."""
    # Contiguous: a permuted view counts as channels_last, whose CPU kernels are several times slower at these widths.
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """(B, H, W, 3) in 0..1, as the host's IMAGE has them -> B pictures."""
    return [Image.fromarray(p) for p in (pixels.detach().float().cpu() * 255).round().clamp(0, 255).byte().numpy()]


def to_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """B pictures of one size -> (B, H, W, 3) float32 in 0..1, as the host's IMAGE has them."""
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB"), np.float32) for picture in pictures]) / 255)


@torch.no_grad()
def decode_to_pil(vae: AutoencoderKL, latents: Tensor, scale: float = SCALE_SD, batch: int = 8) -> list[Image.Image]:
    """Scaled latents (B, 4, h, w), as the UNet sees them, -> B pictures; ``scale`` is ``SCALE_SDXL`` for SDXL."""
    weight = vae.post_quant_conv.weight
    images = []
    for chunk in latents.split(batch):
        pixels = vae.decode((chunk / scale).to(weight.device, weight.dtype))
        pixels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte()
        images += [Image.fromarray(p.numpy()) for p in pixels.permute(0, 2, 3, 1).cpu()]  # (B, 3, H, W) -> (B, H, W, 3)
    return images


def picture_kind(path: str | os.PathLike) -> str:
    """Pillow's name of the format that a file name asks for. Raises ValueError for one that asks for none."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"'{path}' does not say what kind of picture it is: let its name end in .png, .jpg or .webp")
    return kind


def save_picture(image: Image.Image, path: str | os.PathLike, **options: Any) -> None:
    """Write a picture completely or not at all. options: of ``Image.save``. Raises OSError naming the file when the disk refuses."""
    kind = picture_kind(path)
    with atomic_write(path) as temporary:
        image.save(temporary, kind, **options)


def grid(
    images: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None = None,
    col_labels: Sequence[str] | None = None,
    *,
    title: str = "",
    font_size: int = 15,
) -> Image.Image:
    """A contact sheet of rows of pictures (None leaves a cell empty). Labels wrap to three lines at most.

    Raises ValueError when the rows or the labels differ in number.
    """
    rows = [list(row) for row in images]
    columns = len(rows[0]) if rows else 0
    present = [image for row in rows for image in row if image is not None]
    if not present or any(len(row) != columns for row in rows):
        raise ValueError(f"a grid needs pictures in rows of one length, got rows of {[len(row) for row in rows]}")
    for name, labels, count in (("row", row_labels, len(rows)), ("column", col_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"{len(labels)} {name} labels for {count} {name}s")

    font, title_font = default_font(font_size), default_font(round(1.4 * font_size))
    line, title_line = line_height(font), line_height(title_font)
    width = max(image.width for image in present)
    gutter = max(width, 6 * font_size)  # room for row labels, also beside small pictures
    wrapped_rows = [wrap(text, font, gutter) for text in row_labels or ()]
    wrapped_cols = [wrap(text, font, width) for text in col_labels or ()]
    height = max(*(image.height for image in present), *(len(lines) * line for lines in wrapped_rows), 1)
    left = GAP
    if wrapped_rows:
        left += math.ceil(max(font.getlength(text) for lines in wrapped_rows for text in lines)) + 2 * GAP
    sheet_width = left + columns * (width + GAP)
    title_lines = wrap(title, title_font, sheet_width - 2 * GAP) if title.strip() else []
    header = max((len(lines) for lines in wrapped_cols), default=0) * line
    top = GAP + (len(title_lines) * title_line + GAP if title_lines else 0) + (header + GAP if header else 0)

    sheet = Image.new("RGB", (sheet_width, top + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(title_lines):
        draw.text((GAP, GAP + i * title_line), text, INK, title_font)
    for c, lines in enumerate(wrapped_cols):  # bottom-aligned: every label sits on its picture
        x, y = left + c * (width + GAP) + width / 2, top - GAP - len(lines) * line
        for i, text in enumerate(lines):
            draw.text((x, y + i * line), text, INK, font, anchor="ma")
    for r, row in enumerate(rows):
        y = top + r * (height + GAP)
        if wrapped_rows:
            first = y + (height - len(wrapped_rows[r]) * line) / 2
            for i, text in enumerate(wrapped_rows[r]):
                draw.text((left - 2 * GAP, first + i * line), text, INK, font, anchor="ra")
        for c, image in enumerate(row):
            if image is not None:
                x = left + c * (width + GAP)
                sheet.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
    return sheet


def blend_strip(
    images: Sequence[Image.Image], start: str, end: str, weights: Sequence[float] | None = None, *, title: str = ""
) -> Image.Image:
    """One row of pictures from style ``start`` to style ``end``, each labelled with the share of ``end`` in it.

    weights: those shares, 0..1; evenly spaced if None. Raises ValueError when their number is not that of the pictures.
    """
    if weights is None:
        weights = [i / max(len(images) - 1, 1) for i in range(len(images))]
    if len(weights) != len(images):
        raise ValueError(f"{len(weights)} weights for {len(images)} pictures")
    return grid([images], col_labels=[share_label(w, start, end) for w in weights], title=title)


def share_label(weight: float, start: str, end: str) -> str:
    """A label for a blend: the name of an end, or "30% end" in between."""
    if weight in (0, 1):
        return end if weight else start
    return f"{100 * weight:.0f}% {end}"


def default_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font at a size in pixels."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "with a size, Pillow gives its scalable font"
    return font


def line_height(font: ImageFont.FreeTypeFont) -> int:
    """Pixels from one line of text to the next."""
    ascent, descent = font.getmetrics()
    return ascent + descent + 1


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = LABEL_LINES) -> list[str]:
    """Text in at most ``lines`` lines of ``width`` pixels: broken at spaces or inside long words, then cut."""
    out = [""]
    for word in text.split():
        joined = f"{out[-1]} {word}" if out[-1] else word
        if font.getlength(joined) <= width:
            out[-1] = joined
            continue
        if out[-1]:
            out.append("")
        for letter in word:
            if out[-1] and font.getlength(out[-1] + letter) > width:
                out.append("")
            out[-1] += letter
    if len(out) > lines:
        last = out[lines - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        out = [*out[: lines - 1], last.rstrip() + "…"]
    return out
