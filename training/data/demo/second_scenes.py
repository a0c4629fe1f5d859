"""What the second family's scenes are made of: other objects, colours, backdrops, places and captions than the first's, so that a recipe
tuned on the one is confirmed on something that it has not seen."""

from __future__ import annotations

import numpy as np

from .scenes import Scene
from .world import RGB, Band, Part, World, below, ellipse

_COLOURS = {
    "crimson": (190, 20, 60),
    "coral": (250, 122, 98),
    "gold": (216, 170, 38),
    "lime": (150, 212, 44),
    "teal": (18, 146, 148),
    "navy": (38, 56, 138),
    "violet": (172, 92, 232),
}
_BACKGROUNDS = {
    "plain": ("",),
    "desert": (", desert", " in the desert"),
    "forest": (", forest", " in the forest"),
    "mountains": (", mountains", " under mountains"),
    "room": (", room", " in the room"),
}
_SIZES = {"little": (0.46, 0.50), "": (0.54, 0.62), "large": (0.66, 0.71)}


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points)


def _boat() -> list[Part]:
    hull = _polygon((-1.0, 0.36), (1.0, 0.36), (0.66, 0.88), (-0.66, 0.88))
    sail = _polygon((-0.02, -0.98), (-0.02, 0.24), (-0.86, 0.24))
    jib = _polygon((0.12, -0.66), (0.12, 0.24), (0.76, 0.24))
    mast = _polygon((-0.06, -0.98), (0.14, -0.98), (0.14, 0.40), (-0.06, 0.40))
    return [(0, mast), (0, sail), (1, jib), (-0.5, hull)]


def _tree() -> list[Part]:
    trunk = _polygon((-0.17, 0.40), (0.17, 0.40), (0.22, 0.96), (-0.22, 0.96))
    crowns = [
        (0, ellipse(x, y, r)) for x, y, r in ((-0.46, 0.06, 0.46), (0.46, 0.06, 0.46), (0, -0.44, 0.54), (0, 0.14, 0.5))
    ]
    fruit = [(1, ellipse(x, y, 0.15)) for x, y in ((-0.42, -0.02), (0.40, 0.10), (0.06, -0.50))]
    return [(-1, trunk), *crowns, *fruit]


def _cup() -> list[Part]:
    outer = ellipse(0.46, 0.08, 0.52, 0.46, start=-1.7, stop=1.7)
    handle = np.concatenate([outer, ellipse(0.46, 0.08, 0.26, 0.22, start=1.7, stop=-1.7)])
    bowl = _polygon((-0.86, -0.62), (0.56, -0.62), (0.42, 0.74), (-0.72, 0.74))
    band = _polygon((-0.83, -0.30), (0.53, -0.30), (0.50, 0.02), (-0.80, 0.02))
    return [
        (0, handle),
        (0, bowl),
        (1, band),
        (-0.6, _polygon((-0.92, -0.78), (0.62, -0.78), (0.60, -0.56), (-0.90, -0.56))),
    ]


def _rocket() -> list[Part]:
    body = np.concatenate([ellipse(0, 0.0, 0.40, 0.98, start=np.pi, stop=2 * np.pi), [(0.36, 0.60), (-0.36, 0.60)]])
    fins = [(-0.5, _polygon((s * 0.30, 0.10), (s * 0.80, 0.66), (s * 0.30, 0.62))) for s in (-1, 1)]
    flame = _polygon((-0.24, 0.60), (0.24, 0.60), (0, 1.0))
    return [(1, flame), *fins, (0, body), (1, ellipse(0, -0.26, 0.19)), (-1, ellipse(0, -0.26, 0.10))]


def _bell() -> list[Part]:
    t = np.linspace(0, 1, 20)
    side = np.stack([0.34 + 0.46 * t**3, -0.56 + 1.1 * t], 1)  # from the shoulder down to the rim
    dome = ellipse(0, -0.50, 0.36, 0.36, start=np.pi, stop=2 * np.pi)
    body = np.concatenate([dome, side, side[::-1] * (-1, 1)])
    rim = _polygon((-0.88, 0.48), (0.88, 0.48), (0.88, 0.72), (-0.88, 0.72))
    return [(-1, ellipse(0, 0.76, 0.2)), (0, ellipse(0, -0.86, 0.14)), (0, body), (1, rim)]


def _crown() -> list[Part]:
    body = _polygon((-0.94, -0.46), (-0.48, 0.06), (0, -0.66), (0.48, 0.06), (0.94, -0.46), (0.76, 0.72), (-0.76, 0.72))
    tips = [(1, ellipse(x, y, 0.15)) for x, y in ((-0.90, -0.52), (0, -0.72), (0.90, -0.52))]
    band = _polygon((-0.80, 0.44), (0.80, 0.44), (0.76, 0.72), (-0.76, 0.72))
    return [(0, body), *tips, (-0.6, band)]


def _umbrella() -> list[Part]:
    rim = [(0.65, -0.14), (0.33, 0.02), (0, -0.14), (-0.33, 0.02), (-0.65, -0.14)]
    shade = np.concatenate([ellipse(0, 0, 0.98, 0.86, start=np.pi, stop=2 * np.pi), rim])
    middle = np.concatenate([ellipse(0, 0, 0.36, 0.86, start=np.pi, stop=2 * np.pi), rim[1:4]])
    stick = _polygon((-0.09, -0.2), (0.09, -0.2), (0.09, 0.74), (-0.09, 0.74))
    outer = ellipse(0.20, 0.68, 0.29, 0.26, start=0, stop=np.pi)
    hook = np.concatenate([outer, ellipse(0.20, 0.68, 0.11, 0.09, start=np.pi, stop=0)])
    return [(-1, stick), (-1, hook), (0, shade), (0.8, middle)]


def _butterfly() -> list[Part]:
    wings = []
    for s in (-1, 1):
        wings += [(0, ellipse(s * 0.54, -0.32, 0.45, 0.48)), (0, ellipse(s * 0.44, 0.40, 0.38, 0.40))]
    spots = [(1, ellipse(s * 0.56, -0.34, 0.2)) for s in (-1, 1)] + [
        (1, ellipse(s * 0.46, 0.42, 0.15)) for s in (-1, 1)
    ]
    return [*wings, *spots, (-1, ellipse(0, 0.02, 0.14, 0.72))]


_OBJECTS = {
    "boat": _boat(),
    "tree": _tree(),
    "cup": _cup(),
    "rocket": _rocket(),
    "bell": _bell(),
    "crown": _crown(),
    "umbrella": _umbrella(),
    "butterfly": _butterfly(),
}


def _backdrop(scene: Scene) -> tuple[RGB, list[Band]]:
    x = np.linspace(-0.02, 1.02, 80)
    turn = 2 * np.pi * scene.phase
    if scene.background == "plain":
        return (226, 232, 230), []
    if scene.background == "desert":
        return (252, 236, 206), [
            ((250, 206, 150), ellipse(0.12 + 0.76 * scene.phase, 0.18, 0.12)),
            ((238, 208, 156), below(x, 0.56 + 0.10 * np.abs(np.sin(3.3 * x + turn)))),
            ((224, 186, 128), below(x, 0.78 + 0.09 * np.sin(4 * x + 1.3 - turn))),
        ]
    if scene.background == "forest":
        firs: list[Band] = []
        for i in range(9):
            centre = (i + scene.phase) / 8 - 0.06
            top = 0.20 + 0.16 * (0.5 + 0.5 * np.sin(2.9 * i + 1))
            shade = ((176, 214, 186), (150, 196, 164))[i % 2]
            firs.append((shade, np.array([(centre - 0.1, 0.86), (centre, top), (centre + 0.1, 0.86)])))
        return (222, 238, 230), [*firs, ((130, 178, 140), below(x, 0.84 + 0 * x))]
    if scene.background == "mountains":

        def peaks(height, number, shift):  # a zigzag
            return below(x, height + 0.3 * np.abs((x * number + shift) % 1 - 0.5))

        return (216, 224, 246), [
            ((186, 190, 222), peaks(0.34, 2.6, scene.phase)),
            ((158, 166, 206), peaks(0.58, 3.4, 0.4 - scene.phase)),
            ((206, 214, 226), below(x, 0.86 + 0 * x)),
        ]
    bars = [
        ((240, 214, 206), np.array([(left, -0.02), (left + 0.07, -0.02), (left + 0.07, 0.74), (left, 0.74)]))
        for left in np.arange(-0.14 + 0.14 * scene.phase, 1.0, 0.14)
    ]
    return (250, 232, 222), [
        *bars,
        ((206, 172, 150), below(x, 0.72 + 0 * x)),
        ((222, 190, 166), below(x, 0.77 + 0 * x)),
    ]


def _caption(scene: Scene) -> str:
    """Such as "a little boat in teal under mountains": the colour behind the object, not before it."""
    words = [word for word in (scene.size_word, scene.shape) if word]
    if scene.article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    colour = ["in", scene.colour] if scene.colour else []
    wordings = _BACKGROUNDS[scene.background]
    return " ".join(words + colour) + wordings[scene.phrase % len(wordings)]


SECOND_WORLD = World(
    objects=_OBJECTS,
    upright={"boat", "tree", "cup", "crown", "umbrella"},
    colours=_COLOURS,
    backgrounds=_BACKGROUNDS,
    sizes=_SIZES,
    spread=(0.08, 0.08),
    vocabulary=[
        "a",
        "an",
        "little",
        "large",
        *_COLOURS,
        *_OBJECTS,
        ",",
        "in",
        "under",
        "the",
        "desert",
        "forest",
        "mountains",
        "room",
    ],
    caption=_caption,
    backdrop=_backdrop,
)
