"""Captioned scenes of the demo families: one object, one colour, one backdrop, drawn from a handful of numbers. And `FIRST_WORLD`, what
the shipped family's are made of.

A `Scene` is composition only. `layers` turns it into masks, which every look (see looks.py) paints over, so the same
scene is pixel-aligned in all looks: the teachers of the family differ in style and in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .world import RGB, Band, World, below, ellipse

SIZE = 128  # pixels; an f8 VAE turns this into 16 latents a side

COLOURS = {
    "red": (222, 40, 44),
    "orange": (246, 132, 22),
    "yellow": (250, 214, 30),
    "green": (52, 164, 70),
    "blue": (44, 98, 222),
    "purple": (132, 60, 190),
    "pink": (250, 126, 184),
}
SHAPES = ("star", "heart", "moon", "flower", "house", "fish", "mushroom", "cat")
BACKGROUNDS = {
    "plain": ("",),
    "hills": (", hills", " on the hills"),
    "sea": (", sea", " by the sea"),
    "city": (", city", " in the city"),
}  # name -> how a caption may say it
SIZES = {"small": (0.48, 0.53), "": (0.56, 0.66), "big": (0.69, 0.74)}  # word -> object height or width over the canvas

VOCABULARY = ["a", "an", "small", "big", *COLOURS, *SHAPES, ",", "on", "by", "in", "the", "hills", "sea", "city"]

_SUPERSAMPLE = 2
_UP = SIZE * _SUPERSAMPLE
_FIELD = 64  # resolution of the distance field


@dataclass(frozen=True)
class Scene:
    """One composition. Lengths are fractions of the canvas side, `tilt` is in radians."""

    shape: str
    colour: str
    background: str
    size: float = 0.58  # longest side of the object
    x: float = 0.0  # centre of the object, from the centre of the canvas
    y: float = 0.0
    tilt: float = 0.0
    flip: bool = False
    phase: float = 0.0  # 0..1, moves hills, waves and roofs
    size_word: str = ""
    article: bool = True
    phrase: int = 0  # which wording of the background
    world: World = field(default_factory=lambda: FIRST_WORLD, repr=False, compare=False)

    @property
    def caption(self) -> str:
        """The prompt of this scene, such as "a small red star by the sea"."""
        return self.world.caption(self)


def sample_scene(rng: np.random.Generator, world: World | None = None, **fixed: Any) -> Scene:
    """Draw a scene of ``world`` (the shipped family's). Keyword arguments pin fields of `Scene`; the draws do not depend on them."""
    world = world or FIRST_WORLD
    small, medium, big = world.sizes
    size_word = (small, medium, medium, medium, big)[rng.integers(5)]
    across, down = world.spread
    scene = {
        "shape": list(world.objects)[rng.integers(len(world.objects))],
        "colour": list(world.colours)[rng.integers(len(world.colours))],
        "background": list(world.backgrounds)[rng.integers(len(world.backgrounds))],
        "size": float(rng.uniform(*world.sizes[size_word])),
        "x": float(rng.uniform(-across, across)),
        "y": float(rng.uniform(-down, down)),
        "tilt": float(rng.uniform(-0.22, 0.22)),
        "flip": bool(rng.integers(2)),
        "phase": float(rng.uniform()),
        "size_word": size_word,
        "article": bool(rng.uniform() < 0.8),
        "phrase": int(rng.integers(2)),
    }
    return Scene(**{**scene, **fixed}, world=world)


# ---- the first family's objects ---------------------------------------------------------------------------------------


def _eyes(cx, cy, gap, r=0.105):
    return [(-1, ellipse(cx + side * gap, cy, r, r * 1.25)) for side in (-1, 1)]


def _star():
    angle = -np.pi / 2 + np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2, 0.54, 1.06)
    points = np.stack([radius * np.cos(angle), 0.06 + radius * np.sin(angle)], 1)
    return [(0, points), *_eyes(0, 0.0, 0.22)]


def _heart():
    t = np.linspace(0, 2 * np.pi, 60)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
    return [(0, np.stack([x, y - 0.06], 1)), *_eyes(0, -0.22, 0.3)]


def _moon():
    outer = ellipse(0.12, 0, 1.0, start=0.30 * np.pi, stop=1.70 * np.pi)
    inner = ellipse(0.62, 0, 0.83, start=1.545 * np.pi, stop=0.455 * np.pi)
    return [(0, np.concatenate([outer, inner])), (-1, ellipse(-0.56, -0.12, 0.1, 0.13))]


def _flower():
    angle = np.arange(6) * np.pi / 3 + np.pi / 6
    petals = [(0, ellipse(0.62 * np.cos(a), 0.62 * np.sin(a), 0.40)) for a in angle]
    return [*petals, (0, ellipse(0, 0, 0.6)), (1, ellipse(0, 0, 0.34))]


def _house():
    wall = np.array([(-0.70, -0.15), (0.70, -0.15), (0.70, 0.92), (-0.70, 0.92)])
    roof = np.array([(-1.0, -0.08), (0, -0.98), (1.0, -0.08)])
    door = np.array([(-0.46, 0.92), (-0.46, 0.30), (-0.06, 0.30), (-0.06, 0.92)])
    window = np.array([(0.16, 0.18), (0.54, 0.18), (0.54, 0.56), (0.16, 0.56)])
    return [(0, wall), (-0.45, roof), (-1, door), (1, window)]


def _fish():
    tail = np.array([(0.40, 0.0), (1.0, -0.56), (0.86, 0.0), (1.0, 0.56)])
    fin = np.array([(-0.42, -0.45), (0.10, -0.80), (0.34, -0.36)])
    return [
        (0, tail),
        (0, fin),
        (0, ellipse(-0.26, 0, 0.76, 0.56)),
        (1, ellipse(-0.62, -0.1, 0.19)),
        (-1, ellipse(-0.64, -0.1, 0.10)),
    ]


def _mushroom():
    stem = np.array([(-0.30, 0.05), (0.30, 0.05), (0.40, 0.92), (-0.40, 0.92)])
    cap = np.concatenate([ellipse(0, 0.12, 1.0, 1.02, start=np.pi, stop=2 * np.pi), [(0.86, 0.28), (-0.86, 0.28)]])
    spots = [(1, ellipse(x, y, r)) for x, y, r in ((-0.50, -0.16, 0.19), (0.08, -0.52, 0.2), (0.54, -0.08, 0.17))]
    return [(1, stem), (0, cap), *spots]


def _cat():
    ears = [(0, np.array([(s * 0.92, 0.0), (s * 0.84, -0.98), (s * 0.18, -0.52)])) for s in (-1, 1)]
    return [
        *ears,
        (0, ellipse(0, 0.16, 0.98, 0.76)),
        (1, ellipse(0, 0.46, 0.36, 0.24)),
        *_eyes(0, 0.02, 0.42, 0.13),
        (-1, np.array([(-0.12, 0.34), (0.12, 0.34), (0, 0.48)])),
    ]


_OBJECTS = {
    "star": _star(),
    "heart": _heart(),
    "moon": _moon(),
    "flower": _flower(),
    "house": _house(),
    "fish": _fish(),
    "mushroom": _mushroom(),
    "cat": _cat(),
}
_UPRIGHT = {"house", "mushroom", "cat", "fish"}  # half the tilt: these look wrong lying down


# ---- backdrops: light, so that the object carries the picture ------------------------------------------------------


def _backdrop(scene: Scene) -> tuple[RGB, list[Band]]:
    x = np.linspace(-0.02, 1.02, 40)
    turn = 2 * np.pi * scene.phase
    if scene.background == "plain":
        return (244, 236, 220), []
    if scene.background == "hills":
        return (212, 232, 246), [
            ((190, 222, 170), below(x, 0.58 + 0.09 * np.sin(7 * x + turn))),
            ((160, 204, 142), below(x, 0.76 + 0.06 * np.sin(5 * x + 2.1 - turn))),
        ]
    if scene.background == "sea":
        return (226, 238, 246), [
            ((166, 212, 226), below(x, 0.52 + 0 * x)),
            ((130, 190, 212), below(x, 0.66 + 0.022 * np.sin(22 * x + turn))),
            ((166, 212, 226), below(x, 0.79 + 0.022 * np.sin(22 * x - turn))),
            ((130, 190, 212), below(x, 0.91 + 0.022 * np.sin(22 * x + turn))),
        ]
    bands: list[Band] = []
    left = -0.14 * scene.phase
    for i in range(8):
        top = 0.36 + 0.22 * (0.5 + 0.5 * np.sin(2.4 * i + turn))
        right = left + 0.16
        bands.append(
            (
                ((206, 188, 216), (188, 168, 202))[i % 2],
                np.array([(left, top), (right, top), (right, 1.02), (left, 1.02)]),
            )
        )
        bands += [
            ((250, 240, 196), np.array([(wx, wy), (wx + 0.055, wy), (wx + 0.055, wy + 0.07), (wx, wy + 0.07)]))
            for wx in (left + 0.052,)
            for wy in np.arange(top + 0.06, 0.98, 0.15)
        ]
        left = right
    return (240, 224, 238), bands


def _caption(scene: Scene) -> str:
    words = [word for word in (scene.size_word, scene.colour, scene.shape) if word]
    if scene.article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    wordings = BACKGROUNDS[scene.background]
    return " ".join(words) + wordings[scene.phrase % len(wordings)]


FIRST_WORLD: World = World(
    objects=_OBJECTS,
    upright=_UPRIGHT,
    colours=COLOURS,
    backgrounds=BACKGROUNDS,
    sizes=SIZES,
    spread=(0.07, 0.06),
    vocabulary=VOCABULARY,
    caption=_caption,
    backdrop=_backdrop,
)


# ---- from a scene to what the looks paint over -----------------------------------------------------------------------


@dataclass
class Layers:
    """The masks and colours that the looks paint with. float32 in 0..1 unless said otherwise; H = W = SIZE."""

    backdrop: np.ndarray  # (H, W, 3) RGB
    mask: np.ndarray  # (H, W, 1) coverage of the object
    pale: np.ndarray  # (H, W, 1) coverage of its pale parts (spots, windows)
    dark: np.ndarray  # (H, W, 1) coverage of its dark parts (eyes, doors)
    distance: np.ndarray  # (H, W, 1) signed distance to its edge in pixels, negative inside
    colour: np.ndarray  # (3,) RGB of the caption's colour
    centre: tuple[float, float]  # pixels, x then y


def layers(scene: Scene) -> Layers:
    """Rasterise a scene. ValueError for a shape, colour or background that does not exist."""
    world = scene.world
    for name, value, known in (
        ("shape", scene.shape, world.objects),
        ("colour", scene.colour, world.colours),
        ("background", scene.background, world.backgrounds),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
    sky, bands = world.backdrop(scene)
    backdrop = Image.new("RGB", (_UP, _UP), sky)
    draw = ImageDraw.Draw(backdrop)
    for rgb, points in bands:
        draw.polygon((points * _UP).ravel().tolist(), fill=rgb)

    tilt = scene.tilt * (0.5 if scene.shape in world.upright else 1.0)
    cos, sin = np.cos(tilt), np.sin(tilt)
    mirror = np.array([-1.0 if scene.flip else 1.0, 1.0])
    turn = np.array([[cos, sin], [-sin, cos]])
    centre = np.array([0.5 + scene.x, 0.5 + scene.y])
    parts = Image.new("RGB", (_UP, _UP))  # R mask, G pale, B dark
    draw = ImageDraw.Draw(parts)
    for tone, points in world.objects[scene.shape]:
        placed = ((points * mirror) @ turn * (scene.size / 2) + centre) * _UP
        fill = (255, int(255 * max(tone, 0)), int(255 * max(-tone, 0)))
        draw.polygon(placed.ravel().tolist(), fill=fill)

    coverage = np.asarray(parts.reduce(_SUPERSAMPLE), np.float32) / 255
    return Layers(
        backdrop=np.asarray(backdrop.reduce(_SUPERSAMPLE), np.float32) / 255,
        mask=coverage[..., :1],
        pale=coverage[..., 1:2],
        dark=coverage[..., 2:],
        distance=_signed_distance(coverage[..., 0]),
        colour=np.array(world.colours[scene.colour], np.float32) / 255,
        centre=tuple(centre * SIZE),
    )


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """Euclidean distance to the half-covered contour: (H, W) coverage -> (H, W, 1) pixels, negative inside.

    Exact on a _FIELD grid, whose edge cells start from their coverage instead of from a jagged 0 or 1.
    """
    cover = np.asarray(Image.fromarray((mask * 255).astype(np.uint8)).reduce(SIZE // _FIELD), np.float32) / 255
    offset = np.arange(_FIELD, dtype=np.float32)
    square = (offset[:, None] - offset) ** 2  # (F, F)

    def distance_to(cover: np.ndarray) -> np.ndarray:  # separable: along rows, then along columns
        start = np.where(cover > 0, np.maximum(0, 0.5 - cover) ** 2, np.float32(1e6))
        rows = (start[:, None, :] + square).min(2)
        return np.sqrt((rows.T[:, None, :] + square).min(2).T)

    signed = (distance_to(cover) - distance_to(1 - cover)) * np.float32(SIZE / _FIELD)
    return np.asarray(Image.fromarray(signed).resize((SIZE, SIZE), Image.Resampling.BICUBIC))[..., None]


def control_hint(scene: Scene) -> np.ndarray:
    """The object's outline and features, white on black: (H, W, 3) uint8, what a tiny ControlNet is given."""
    drawn = layers(scene)
    line = np.clip(2.5 - np.abs(drawn.distance + 1), 0, 1)
    features = np.maximum(drawn.pale, (drawn.dark > 0.9) * drawn.dark) * np.clip(-drawn.distance - 3, 0, 1)
    image = np.maximum(line, 0.6 * features)
    return (np.repeat(image, 3, 2) * 255).round().astype(np.uint8)
