"""A judged mixing as files: figures as JSON, tables as Markdown, curves of every pair as one PNG, and strips of pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from ....dmm_core.files import atomic_write
from ...markdown import table
from ...paint.images import GAP, INK, PAPER, default_font, grid, line_height, share_label
from ..features import PixelDecoder
from ..matrix import NORMAL_95, Figure
from ..report import as_json
from .figures import FIGURES, FigureSpec
from .judge_mixing import PATHS, Mixing, PairResult

COLOURS = {"blend": (48, 112, 160), "merge": (206, 92, 36), "predictions": (92, 140, 60)}
GRID, BAND = (214, 214, 214), 46
"""Of the plots' lines, and opacity of the bands (of 255)."""
PANEL, COLUMNS, FONT, FINE = (210, 150), 4, 13, 2
"""Size of a plot and plots in a row; all is drawn FINE times as large."""
LARGEST = 256
"""Pixels a side of a strip's pictures."""


def write(mixing: Mixing, folder: Path, decoder: PixelDecoder | None = None) -> list[Path]:
    """mixing.json, mixing.md, curves.png and, with a VAE, a strip of each pair, in a folder that exists; returns the files."""
    drawn = {"curves.png": plots(mixing)}
    if decoder is not None:
        for number, pair in enumerate(mixing.pairs, start=1):
            drawn[strip_name(number, pair)] = strip(mixing, pair, decoder)
    as_data = json.dumps(as_json(dataclasses.replace(mixing, shown={})), indent=1, ensure_ascii=False)
    texts = {"mixing.json": as_data, "mixing.md": markdown(mixing, list(drawn))}
    written = []
    for name, text in texts.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        written.append(folder / name)
    for name, picture in drawn.items():
        with atomic_write(folder / name) as temporary:
            if name.endswith(".png"):
                picture.save(temporary, "PNG")
            else:
                picture.save(temporary, "JPEG", quality=85)
        written.append(folder / name)
    return written


def strip_name(number: int, pair: PairResult) -> str:
    plain = (re.sub(r"[^\w.-]+", "-", name)[:40] for name in (pair.first, pair.second))
    return f"strip-{number:02d}-{'-'.join(plain)}.jpg"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def digits_of(name: str) -> int:
    return 3 if name in ("fall", "layout", "kept") else 2


def figure_text(figure: Figure, digits: int, spread: bool = True) -> str:
    """A figure, or a dash where there is no number."""
    if not math.isfinite(figure.value):
        return "-"
    return figure.text(digits) if spread else f"{figure.value:.{digits}f}"


def markdown(m: Mixing, pictures: Sequence[str] = ()) -> str:
    parts = [f"# {m.about.get('title', 'Style mixing')}", conditions(m), "## Mean over the pairs\n\n" + summary(m)]
    order = " / ".join(PATHS[path] for path in m.paths)
    parts.append(f"## Per pair\n\nIn every cell: {order}.\n\n{per_pair(m)}")
    meanings = [f"- {spec.title} ({spec.wish}): {spec.meaning}" for spec in measured_figures(m).values()]
    parts.append("## What the figures are\n\n" + "\n".join(meanings))
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(parts)


def measured_figures(m: Mixing) -> dict[str, FigureSpec]:
    """The figures that were measured."""
    return {name: FIGURES[name] for name in m.mean[m.paths[0]]}


def conditions(m: Mixing) -> str:
    s = m.settings
    draws = f", {m.judge['draws']} draws a picture" if "draws" in m.judge else ""
    text = (
        f"{s.count} pictures of {m.prompts} prompts at each of {len(m.ratios)} ratios ({', '.join(f'{w:g}' for w in m.ratios)}), "
        f"{s.width}x{s.height}, {s.steps} steps, cfg {s.cfg:g}, {s.sampler} / {s.scheduler}, seeds from {s.seed}. "
        f"Judge: {m.judge['name']}{draws}. Captions with a shape or a colour: {m.captioned} of {s.count}."
    )
    if m.mean[m.paths[0]]["reach"].spread is not None:
        text += " ± is 95%, over resamples of the prompts."
    return text


def summary(m: Mixing) -> str:
    """Every figure's mean over the pairs, by path, and who is better by more than chance: in the mean, and in how many pairs."""
    head, *others = m.paths
    heads = ["figure", "best", *(PATHS[path] for path in m.paths)]
    for path in others:
        heads += [f"{PATHS[head]} less {PATHS[path]}", "better", f"pairs better: {PATHS[head]}, {PATHS[path]}"]
    rows = []
    for name, spec in measured_figures(m).items():
        digits = digits_of(name)
        wish = spec.wish if isinstance(spec.aim, str) else "low"
        row = [spec.measured, wish, *(figure_text(m.mean[path][name], digits) for path in m.paths)]
        for path in others:
            one = m.against[path][name]
            votes = [pair.against[path][name].better for pair in m.pairs]
            row += [
                figure_text(one.difference, digits),
                better_text(one.better),
                f"{votes.count(head)}, {votes.count(path)}",
            ]
        rows.append(row)
    return table(heads, rows)


def better_text(better: str | None) -> str:
    return PATHS[better] if better else "no telling"


def per_pair(m: Mixing) -> str:
    """One row a pair, and their mean (of the numbers themselves)."""
    rows = []
    for pair in m.pairs:
        cells = (
            " / ".join(figure_text(pair.paths[path].figures[name], digits_of(name), False) for path in m.paths)
            for name in measured_figures(m)
        )
        rows.append([f"{pair.first} > {pair.second}", *cells])
    means = []
    for name in measured_figures(m):
        every = [[pair.paths[path].figures[name].value for pair in m.pairs] for path in m.paths]
        known = [[value for value in values if math.isfinite(value)] for values in every]
        digits = digits_of(name)
        means.append(" / ".join(f"{sum(values) / len(values):.{digits}f}" if values else "-" for values in known))
    heads = ["pair", *(f"{spec.title} ({spec.wish})" for spec in measured_figures(m).values())]
    return table(heads, [*rows, ["mean", *means]])


# --- pictures ---------------------------------------------------------------------------------------------------------


def plots(m: Mixing) -> Image.Image:
    """The mean curves of every pair: the score of the second style rises, that of the first falls; bands are 95%."""
    font, small = (default_font(size * FINE) for size in (FONT, FONT - 2))
    line, gap = line_height(font), 3 * GAP * FINE
    width, height = (FINE * v for v in PANEL)
    columns = min(COLUMNS, len(m.pairs))
    cell_w, cell_h = width + 2 * gap, height + 2 * line + gap
    items = [(PATHS[path], COLOURS[path]) for path in m.paths]
    falling = " (dashed: of the first)" if "away" in m.pairs[0].paths[m.paths[0]].curves else ""
    note = f"score of the second style over its share{falling}"
    rows = -(-len(m.pairs) // columns)
    legend = max(font.getlength(note), sum(font.getlength(text) + 4 * gap for text, _ in items))
    sheet_w = round(max(columns * cell_w + gap, legend + 2 * gap))
    sheet = Image.new("RGB", (sheet_w, 2 * line + 2 * gap + rows * cell_h), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap // 2), note, INK, font)
    x: float = gap
    for text, colour in items:
        y = gap // 2 + 1.6 * line
        draw.line((x, y, x + gap, y), colour, 2 * FINE)
        draw.text((x + 1.3 * gap, y), text, INK, font, anchor="lm")
        x += font.getlength(text) + 3 * gap
    for k, pair in enumerate(m.pairs):
        left, top = gap + k % columns * cell_w + gap // 2, 2 * line + 2 * gap + k // columns * cell_h + line
        draw.text((left, top - line), f"{pair.first} > {pair.second}"[:34], INK, font)
        panel = plot(m, pair, (width, height))
        sheet.paste(panel, (left, top))
        for value in (0, 0.5, 1):
            draw.text((left + value * width, top + height + FINE), f"{value:g}", INK, small, anchor="ma")
            draw.text((left - FINE * 2, top + (1 - value) * height), f"{value:g}", INK, small, anchor="rm")
    return sheet.resize((sheet.width // FINE, sheet.height // FINE), Image.Resampling.LANCZOS)


def plot(m: Mixing, pair: PairResult, size: tuple[int, int]) -> Image.Image:
    """One pair's curves; both axes from 0 to 1."""
    width, height = size
    panel = Image.new("RGB", (width + 1, height + 1), PAPER)
    draw = ImageDraw.Draw(panel, "RGBA")
    for value in (0, 0.25, 0.5, 0.75, 1):
        draw.line((value * width, 0, value * width, height), GRID, 1)
        draw.line((0, value * height, width, value * height), GRID, 1)

    def at(w: float, value: float) -> tuple[float, float]:
        return w * width, (1 - min(max(value, 0.0), 1.0)) * height

    for path in m.paths:
        curve = pair.paths[path].curves
        rising = curve["score"]
        edges = [[f.value + sign * NORMAL_95 * (f.spread or 0) for f in rising] for sign in (-1, 1)]
        outline = [at(w, v) for w, v in zip(m.ratios, edges[0])] + [at(w, v) for w, v in zip(m.ratios, edges[1])][::-1]
        draw.polygon(outline, (*COLOURS[path], BAND))
    for path in m.paths:
        curve = pair.paths[path].curves
        draw.line([at(w, f.value) for w, f in zip(m.ratios, curve["score"])], COLOURS[path], 2 * FINE, joint="curve")
        if "away" in curve:
            dashed(draw, [at(w, 1 - f.value) for w, f in zip(m.ratios, curve["away"])], COLOURS[path])
    return panel


def dashed(draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
    step = 5 * FINE
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        for begin in range(0, math.ceil(length), 2 * step):
            a, b = begin / length, min((begin + step) / length, 1)
            ends = (x0 + a * (x1 - x0), y0 + a * (y1 - y0), x0 + b * (x1 - x0), y0 + b * (y1 - y0))
            draw.line(ends, colour, FINE)


def strip(m: Mixing, pair: PairResult, decoder: PixelDecoder) -> Image.Image:
    """The first pictures of a pair: a row for each path, a column for each ratio."""
    shown = m.shown[(pair.first, pair.second)]
    count = len(shown[m.paths[0]])
    rows = [[as_picture(z, decoder) for z in shown[path][k]] for k in range(count) for path in m.paths]
    labels = [PATHS[path] for _ in range(count) for path in m.paths]
    return grid(rows, labels, [share_label(w, pair.first, pair.second) for w in m.ratios])


def as_picture(latent: Tensor, decoder: PixelDecoder) -> Image.Image:
    """(C, h, w) -> a picture of at most ``LARGEST`` pixels a side."""
    pixels = decoder.decode(latent[None].float())[0].float().cpu()
    values = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
    image = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())  # (3, H, W) -> (H, W, 3)
    image.thumbnail((LARGEST, LARGEST))
    return image
