"""What the scenes of a demo family are made of: its words, its objects and its backdrops."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .scenes import Scene

RGB = tuple[int, int, int]
Part = tuple[float, np.ndarray]
"""(tone, polygon (K, 2)) of an object, in units of half its longest side, y down. Tone 0 is the caption's colour, +1 a pale part, -1 a
dark part. Everything is part of the silhouette."""
Band = tuple[RGB, np.ndarray]
"""(RGB, polygon (K, 2) in fractions of the canvas) of a backdrop."""


@dataclass(frozen=True, eq=False)
class World:
    """Words, objects and backdrops. The order of each mapping is the order in which scenes are drawn by chance."""

    objects: Mapping[str, Sequence[Part]]
    upright: Collection[str]
    """Objects that look wrong lying down: half the tilt."""
    colours: Mapping[str, RGB]
    backgrounds: Mapping[str, tuple[str, ...]]
    """Name -> how a caption may say it. "plain" is not said."""
    sizes: Mapping[str, tuple[float, float]]
    """Word for small, no word, word for big -> the object's height or width over the canvas, from and to."""
    spread: tuple[float, float]
    """How far the object's centre may lie from the canvas's, x and y, in fractions of the canvas side."""
    vocabulary: Sequence[str]
    """Every word of its captions; each is one CLIP token, so a text encoder of the family needs these rows only."""
    caption: Callable[[Scene], str]
    backdrop: Callable[[Scene], tuple[RGB, list[Band]]]
    """RGB of the sky and the bands before it, from back to front."""


def ellipse(
    cx: float,
    cy: float,
    rx: float,
    ry: float | None = None,
    *,
    start: float = 0.0,
    stop: float = 2 * np.pi,
    n: int = 36,
) -> np.ndarray:
    """(n, 2) points; angles in radians, from the right, clockwise as y points down."""
    angle = np.linspace(start, stop, n)
    return np.stack([cx + rx * np.cos(angle), cy + (ry or rx) * np.sin(angle)], 1)


def below(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Everything under the line (x, y), as a polygon in fractions of the canvas: (K,), (K,) -> (K + 2, 2)."""
    return np.concatenate([np.stack([x, y], 1), [(1.02, 1.02), (-0.02, 1.02)]])
