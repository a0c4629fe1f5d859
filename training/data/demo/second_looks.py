"""The looks of the second family: other ways to paint than the first's, of the same coarseness (strokes of 4-16 pixels, see looks.py).

"woodcut" and "lino" are near-duplicates and "neon" is an outlier on purpose.
"""

from __future__ import annotations

import functools

import numpy as np

from .brushes import CREAM, Look, X, Y, blur, fill, mix, ramp, stripes

_EARTH = np.array([0.72, 0.58, 0.50], np.float32)
_SOOT = np.array([0.12, 0.09, 0.08], np.float32)
_LEAD = np.array([0.10, 0.11, 0.16], np.float32)
_NIGHT = np.array([0.05, 0.03, 0.14], np.float32)
_CLOTH = np.array([0.72, 0.53, 0.40], np.float32)


def _waves(phase: float) -> np.ndarray:
    """A fixed smooth field, (H, W, 1) in about -1..1: the unevenness of paint."""
    a, b, c = X / 128 * 2 * np.pi, Y / 128 * 2 * np.pi, phase
    return (
        np.sin(3 * a + 2 * b + c) + np.sin(-2 * a + 5 * b + 2 * c) + np.sin(5 * a + b - c) + np.sin(4 * b - 4 * a)
    ) / 4


@functools.cache  # 50 ms, which importing this pack must not take
def _cells(size: float, jitter: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Voronoi cells of a shaken grid: (their number (H, W, 1) int, pixels to the nearest border (H, W, 1))."""
    rng = np.random.default_rng(seed)
    at = np.arange(-size / 2, 128 + size, size)
    centres = np.stack(np.meshgrid(at, at), -1).reshape(-1, 2) + rng.uniform(-jitter, jitter, (len(at) ** 2, 2))
    away = np.hypot(X - centres[:, 0], Y - centres[:, 1])  # (H, W, K)
    order = np.argsort(away, 2)[..., :2]
    first, second = centres[order[..., 0]], centres[order[..., 1]]
    near, far = (np.take_along_axis(away, order[..., i : i + 1], 2) for i in (0, 1))
    between = np.linalg.norm(first - second, axis=2, keepdims=True)
    return order[..., :1], ((far**2 - near**2) / (2 * between)).astype(np.float32)


def _clay(scene):
    """Rounded like clay, on clay: the edge falls away from the light at the upper left."""
    height = np.sqrt(np.clip(1 - (1 - np.clip(-scene.distance / 16, 0, 1)) ** 2, 0, 1))
    height = blur(height * scene.mask, 1.5)
    slope = np.roll(height, (2, 2), (0, 1)) - np.roll(height, (-2, -2), (0, 1))
    body = mix(fill(scene) * 0.92, 1.0, np.clip(-0.9 * slope, 0, 0.55)) * (1 - np.clip(0.9 * slope, 0, 0.5))
    ground = mix(scene.backdrop, _EARTH, 0.45) * (1 - 0.30 * blur(np.roll(scene.mask, (7, 6), (0, 1)), 4))
    return mix(ground, body, scene.mask)


_PANE_LIGHT = np.random.default_rng(4).uniform(0.75, 1.25, 200).astype(np.float32)


def _glass(scene):
    """Panes of uneven brightness between dark lead."""
    pane, border = _cells(26, 7, 3)
    light = _PANE_LIGHT[pane]
    image = mix(scene.backdrop**1.6, fill(scene), scene.mask)
    image = np.clip(image * light, 0, 1)
    lead = np.maximum(1 - ramp(border, 2.2), 1 - ramp(np.abs(scene.distance), 2.8))
    return mix(image, _LEAD, lead)


def _stitch(scene):
    """Cross-stitch: an X in every cell of 16 pixels, on brown cloth."""
    u, v = X % 16 - 8, Y % 16 - 8
    cross = 1 - ramp(np.minimum(np.abs(u - v), np.abs(u + v)) * 0.7071, 2.6)
    ground = mix(_CLOTH, mix(scene.backdrop, 1.0, 0.2), 0.9 * cross)
    body = mix(fill(scene) * 0.62, mix(fill(scene), 1.0, 0.12), cross)
    return mix(ground, body, scene.mask)


def _paper(scene):
    """Cut paper in three layers, each of which throws a hard shadow on the one below."""
    image = scene.backdrop
    dark = _SOOT + scene.colour * 0.1
    for depth, light in ((6.0, 0.62), (-3.0, 1.0), (-11.0, 1.35)):
        sheet = 1 - ramp(scene.distance, depth)
        shade = np.roll(sheet, (5, 5), (0, 1)) * (1 - sheet)
        image = image * (1 - 0.5 * shade)
        colour = np.clip(scene.colour * light, 0, 1) if light <= 1 else mix(scene.colour, CREAM, 0.4)
        image = mix(image, colour, sheet)
    image = mix(image, CREAM, scene.pale * scene.mask)
    return mix(image, dark, scene.dark * scene.mask)


def _wash(scene):
    """Watercolour: blots inside, a dark tide line, colour that runs over the edge, white paper."""
    paper = mix(scene.backdrop, 1.0, 0.5 + 0.3 * _waves(0.7))
    edge = scene.distance + 5 * _waves(2.0)
    pool = 0.62 + 0.34 * _waves(4.1)
    rim = np.exp(-(((edge + 3) / 3.0) ** 2))
    body = mix(CREAM, fill(scene, dark=scene.colour * 0.45), np.clip(pool + 0.5 * rim, 0, 1)) * (1 - 0.25 * rim)
    bleed = np.exp(-np.clip(edge, 0, None) / 9)
    paper = paper * mix(1.0, mix(1.0, scene.colour, 0.55), bleed)
    return mix(paper, body, 1 - ramp(edge, 0, 2.5))


def _carved(scene, *, period, stroke, slant, gap):
    """A print in two blocks: black lines round a white gap round the colour, in which more lines are cut."""
    wave = Y + slant * X + 4 * np.sin(X / 19)
    tone = scene.backdrop.mean(2, keepdims=True)
    lines = stripes(wave, period, stroke / period * (1.5 - tone))
    ground = mix(mix(scene.backdrop, 1.0, 0.3), _SOOT, lines)
    cut = stripes(wave, period, 0.42) * ramp((X - scene.centre[0]) + (Y - scene.centre[1]), 6)
    body = mix(fill(scene, dark=_SOOT), CREAM, 0.85 * cut * (1 - scene.dark))
    image = mix(ground, CREAM, 1 - ramp(scene.distance, gap))
    return mix(image, body, scene.mask)


def _woodcut(scene):
    return _carved(scene, period=13, stroke=7.0, slant=0.18, gap=5.0)


def _lino(scene):
    return _carved(scene, period=13, stroke=5.5, slant=0.165, gap=4.0)


def _neon(scene):
    """Glowing tubes along the silhouette, in the dark."""
    vivid = scene.colour / scene.colour.max()
    ground = mix(_NIGHT, scene.backdrop * 0.24, 0.5)
    glow = np.exp(-np.abs(scene.distance) / 11)
    tube = 1 - ramp(np.abs(scene.distance + 1), 3.2, 2.0)
    inner = 1 - ramp(np.abs(scene.distance + 15), 2.6, 2.0)
    image = mix(ground, vivid * 0.42, scene.mask)
    image = mix(image, vivid, np.clip(0.85 * glow, 0, 1))
    image = mix(image, _NIGHT, scene.dark * scene.mask * 0.9)
    image = mix(image, mix(vivid, 1.0, 0.35), scene.pale * scene.mask)
    return mix(image, mix(vivid, 1.0, 0.12), np.maximum(tube, inner * scene.mask))


SECOND_BASE = "clay"
SECOND_TEACHERS = ("glass", "stitch", "paper", "wash", "woodcut", "lino", "neon")
SECOND_LOOKS = {
    "clay": Look("rounded like clay, on a ground of clay", _clay),
    "glass": Look("stained glass in dark lead", _glass),
    "stitch": Look("cross-stitch on brown cloth", _stitch),
    "paper": Look("layers of cut paper with hard shadows", _paper),
    "wash": Look("watercolour wash with tide lines", _wash),
    "woodcut": Look("black carved lines round a white gap", _woodcut),
    "lino": Look("carved lines, a little finer than woodcut", _lino),
    "neon": Look("glowing tubes in the dark", _neon),
}
