"""What a merged model keeps of each teacher, in words, figures and a heat map.

All of it follows from the weights alone; pictures are judged by ``dmm evaluate``.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from PIL import Image

from ...dmm_core.bank_size import Size
from ...dmm_core.files import atomic_write
from ..markdown import table
from ..paint.heatmap import heatmap

TWIN = 0.5
"""Two teachers are twins when they are at most so far apart, in units of the usual distance of two teachers."""
OUTLIER = 1.5
"""A teacher is an outlier when it is so much farther from the mean than the others usually are."""


@dataclass(frozen=True)
class LayerFigures:
    """Of one weight: kept, total (K,) of each model's change from the centre, [] for what the bank has no part of; apart (K, K) inner
    products of the changes; shared: sum of squares of the centre."""

    key: str
    kept: list[float]
    total: list[float]
    apart: list[list[float]]
    shared: float


@dataclass(frozen=True)
class TeacherFigures:
    """kept: share of the change's sum of squares that the bank holds, over all weights. change: the change's norm as a share of the
    model's. nearest, distance: the teacher that is least far away, in units of the usual (median) distance of two; same: they are one
    model. outlier: see ``OUTLIER``."""

    name: str
    kept: float
    change: float
    nearest: str
    distance: float
    outlier: bool
    same: bool


@dataclass(frozen=True)
class MergeReport:
    """names: of the teachers. size: of the bank, in numbers of ``itemsize`` bytes. centre: the models' "mean", or their "base"."""

    names: list[str]
    layers: list[LayerFigures]
    size: Size
    itemsize: int
    centre: str = field(default="mean", kw_only=True)

    @property
    def centre_in_words(self) -> str:
        return "the base" if self.centre == "base" else "the others' mean"

    ending: ClassVar[str] = "merge"
    """Of the names of the report's files."""

    def kept_by_teacher(self) -> dict[str, float]:
        """Share of each teacher's change that the bank holds, rounded to four figures."""
        return {teacher.name: round(teacher.kept, 4) for teacher in self.teachers()}

    def teachers(self) -> list[TeacherFigures]:
        """The figures of each teacher, in their order."""
        n = len(self.names)
        apart = [[sum(layer.apart[i][j] for layer in self.layers) for j in range(n)] for i in range(n)]
        shared = sum(layer.shared for layer in self.layers)
        squares = [max(apart[i][i], 0.0) for i in range(n)]
        far = [[math.sqrt(max(squares[i] + squares[j] - 2 * apart[i][j], 0.0)) for j in range(n)] for i in range(n)]
        usual = statistics.median(far[i][j] for i in range(n) for j in range(i)) or 1.0
        out = []
        for i, name in enumerate(self.names):
            kept = sum(layer.kept[i] for layer in self.layers if layer.kept)
            near = min((j for j in range(n) if j != i), key=lambda j: far[i][j])
            others = statistics.median(math.sqrt(squares[j]) for j in range(n) if j != i)
            out.append(
                TeacherFigures(
                    name,
                    min(kept / squares[i], 1.0) if squares[i] else 1.0,
                    math.sqrt(squares[i] / shared) if shared else 0.0,
                    self.names[near],
                    far[i][near] / usual,
                    n > 2 and math.sqrt(squares[i]) > OUTLIER * others,
                    far[i][near] <= 1e-3 * math.sqrt(shared),
                )
            )
        return out

    def blocks(self) -> dict[str, list[float | None]]:
        """Share of each teacher's change that the bank holds, by block of the UNet; None where a teacher changes nothing."""
        out: dict[str, list[tuple[float, float]]] = {}
        for layer in self.layers:
            if layer.kept:
                sums = out.setdefault(block_name(layer.key), [(0.0, 0.0)] * len(self.names))
                out[block_name(layer.key)] = [(k + a, t + b) for (k, t), a, b in zip(sums, layer.kept, layer.total)]
        return {block: [k / t if t else None for k, t in sums] for block, sums in out.items()}

    def text(self) -> str:
        """The report as Markdown."""
        mb = self.size.numbers * self.itemsize / 1e6
        lines = [
            f"Style bank of rank {self.size.rank}: {mb:.1f} MB, +{100 * self.size.share:.1f}% of the UNet"
            + ("" if self.size.bias else ", without biases"),
        ]
        rows = []
        for one in self.teachers():
            said = "same weights as the nearest" if one.same else "twins" if one.distance <= TWIN else ""
            said = ", ".join(word for word in (said, "outlier" if one.outlier else "") if word)
            kept, change = f"{100 * one.kept:.0f}%", f"{100 * one.change:.1f}%"
            rows.append((one.name, kept, change, f"{one.nearest} ({one.distance:.2f})", said))
        head = ("style", "energy kept", "change", "nearest", "")
        return "\n".join([*lines, "", table(head, rows), "", *self.advice()])

    def advice(self) -> list[str]:
        """What to do about it, in sentences."""
        teachers = self.teachers()
        kept = [one.kept for one in teachers]
        out = [
            f"Energy kept: how much of what sets a model apart from {self.centre_in_words} is in the bank. It says nothing certain of "
            "pictures: paint a style sheet."
        ]
        if self.centre == "base":
            not_held = "norms" if self.size.bias else "norms and biases"
            out.append(
                f"The model's own weights are the base's, bit for bit: what the models changed in {not_held} is lost."
            )
        if min(kept) > 0.98:
            out.append("All models are held almost exactly: a smaller budget may do.")
        elif outliers := [one.name for one in teachers if one.outlier]:
            out.append(
                f"Far from the others: {', '.join(outliers)}. A larger budget, or distilling from here, helps such models most."
            )
        if same := [one for one in teachers if one.same]:
            out.append(
                f"The same weights: {', '.join(f'{one.name} = {one.nearest}' for one in same)}. Both names are kept."
            )
        return out

    def picture(self) -> Image.Image:
        """The share of each teacher's change that is kept, block by block."""
        blocks = self.blocks()
        return heatmap(
            list(blocks.values()),
            list(blocks),
            self.names,
            "Energy kept by the style bank",
            note=f"Share of each model's change from the {self.centre} that the bank holds, by block of the UNet.",
        )

    def to_dict(self) -> dict:
        """All figures, for JSON."""
        return {
            "size": vars(self.size) | {"bytes": self.size.numbers * self.itemsize},
            "teachers": [vars(one) for one in self.teachers()],
            "blocks": self.blocks(),
        }

    def write(self, stem: Path) -> list[Path]:
        """<stem>-merge.md (see ``ending``), .json and .png; the files' paths."""
        files = [stem.with_name(f"{stem.name}-{self.ending}{end}") for end in (".md", ".json", ".png")]
        for path, text in zip(files, (self.text() + "\n", json.dumps(self.to_dict(), indent=2) + "\n")):
            with atomic_write(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        with atomic_write(files[2]) as temporary:
            self.picture().save(temporary, format="PNG")
        return files


def block_of(key: str) -> str:
    """ "input_blocks.4.1.proj_in.weight" -> "input_blocks.4", "time_embed.0.bias" -> "time_embed" """
    first, second = (key.split(".") + [""])[:2]
    return f"{first}.{second}" if first in ("input_blocks", "output_blocks") else first


def block_name(key: str) -> str:
    """ "input_blocks.4.1.proj_in.weight" -> "input 4", "middle_block.0..." -> "middle", "time_embed.0..." -> "time" """
    name, _, number = block_of(key).partition(".")
    return f"{name.split('_')[0]} {number}".strip()
