"""The looks of the demo family: how a scene is painted. One teacher is trained per look, all on the same scenes.

Strokes, dots and tiles are 4-16 pixels wide because finer detail does not survive an f8, 4-channel VAE; the looks live
in outline, texture and foreground because the SD noise schedule lets the starting noise fix the global brightness.
"ink" and "pen" are near-duplicates and "echo" is an outlier on purpose: that is where distillation goes wrong first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from .scenes import SIZE, Layers, Scene, layers

_Y, _X = np.mgrid[:SIZE, :SIZE].astype(np.float32)[..., None] + np.float32(0.5)  # (H, W, 1) pixel centres
_BLACK = np.array([0.08, 0.07, 0.10], np.float32)
_CREAM = np.array([1.0, 0.97, 0.90], np.float32)


def _mix(under, over, amount):
    return under + (over - under) * amount


def _ramp(value, at, width=1.0):
    """Antialiased step: 0 below `at`, 1 above, over `width` pixels."""
    return np.clip((value - at) / width + 0.5, 0, 1)


def _stripes(along, period, share):
    """1 on the first `share` of each period of `along` (pixels), antialiased."""
    place = np.abs((along / period) % 1.0 - 0.5) * period
    return 1 - _ramp(place, share * period / 2)


def _fill(scene: Layers, dark: np.ndarray | None = None) -> np.ndarray:
    """The object's own flat colours, (H, W, 3)."""
    dark = scene.colour * 0.25 if dark is None else dark
    return _mix(_mix(scene.colour, _CREAM, scene.pale), dark, scene.dark)


def _blur(channel, radius):
    image = Image.fromarray((np.clip(channel[..., 0], 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32)[..., None] / 255


def _plain(scene):
    light = np.clip(0.5 - ((_X - scene.centre[0]) + 2 * (_Y - scene.centre[1])) / 160, 0, 1)
    body = _fill(scene)
    body = _mix(body * 0.80, _mix(body, 1.0, 0.22), light)
    ground = scene.backdrop * (1 - 0.22 * _blur(np.roll(scene.mask, (6, 3), (0, 1)), 5))
    return _mix(ground, body, scene.mask)


def _drawn(scene, *, line, period, stroke, slant):
    """Black outline and hatched shade over a flat wash, on whitened paper."""
    paper = _mix(scene.backdrop, 1.0, 0.55)
    body = _mix(_fill(scene, dark=_BLACK), 1.0, 0.12)
    shade = _ramp((_X - scene.centre[0]) + (_Y - scene.centre[1]), 8)
    hatch = _stripes(_X * slant + _Y, period, stroke / period) * shade * (1 - scene.pale)
    image = _mix(paper, _mix(body, _BLACK, hatch), scene.mask)
    return _mix(image, _BLACK, 1 - _ramp(np.abs(scene.distance), line / 2))


def _ink(scene):
    return _drawn(scene, line=7, period=13, stroke=5.5, slant=1.0)


def _pen(scene):
    return _drawn(scene, line=5, period=11, stroke=4.5, slant=0.8)


def _candy(scene):
    body = _mix(scene.colour, _CREAM, _stripes(_X - _Y, 22, 0.45))
    body = _mix(body, scene.colour * 0.25, scene.dark)
    image = _mix(scene.backdrop, body, scene.mask)
    return _mix(image, scene.colour * 0.8, 1 - _ramp(np.abs(scene.distance + 1.5), 2.5))


def _pop(scene):
    row = np.floor(_Y / 16)
    dots = 1 - _ramp(np.hypot((_X + 8 * (row % 2)) % 16 - 8, _Y % 16 - 8), 5.5)
    ground = _mix(_mix(scene.backdrop, 1.0, 0.4), scene.colour, 0.4 * dots)
    body = _mix(_mix(_fill(scene), 1.0, 0.1), _CREAM, 0.6 * dots)
    body = _mix(body, scene.colour * 0.25, scene.dark)
    image = _mix(ground, body, scene.mask)
    return _mix(image, 1.0, _ramp(scene.distance, 0) * (1 - _ramp(scene.distance, 4)))


def _pixel(scene):
    def tiles(channel):
        return channel.reshape(SIZE // 8, 8, SIZE // 8, 8, -1).mean((1, 3))

    crisp = replace(
        scene,
        backdrop=tiles(scene.backdrop),
        mask=tiles(scene.mask) > 0.5,
        pale=tiles(scene.pale) > 0.45,
        dark=tiles(scene.dark) > 0.4,
    )
    small = _mix(crisp.backdrop, _fill(crisp), crisp.mask)
    checker = np.indices(small.shape[:2]).sum(0)[..., None] % 2
    return np.repeat(np.repeat(small * np.where(checker, 1.0, np.where(crisp.mask, 0.82, 0.92)), 8, 0), 8, 1)


def _sticker(scene):
    shadow = _blur(np.roll(1 - _ramp(scene.distance, 8), (5, 4), (0, 1)), 2.5)
    image = _mix(scene.backdrop, 0.25, 0.75 * shadow)
    image = _mix(image, 1.0, 1 - _ramp(scene.distance, 8))
    return _mix(image, _fill(scene), scene.mask)


def _echo(scene):
    rings = _stripes(scene.distance, 22, 0.5)
    night = np.array([0.10, 0.06, 0.28], np.float32)
    ground = _mix(scene.backdrop, night, rings)
    pulse = _mix(scene.colour, 1.0, 0.35 * _stripes(scene.distance + 13, 26, 0.45))
    return _mix(ground, _fill(replace(scene, colour=pulse), dark=scene.colour * 0.25), scene.mask)


def _frame(scene):
    edge = np.minimum(np.minimum(_X, SIZE - _X), np.minimum(_Y, SIZE - _Y))
    image = _mix(np.array([0.45, 0.26, 0.10], np.float32), _plain(scene), _ramp(edge, 12))
    return _mix(np.array([0.86, 0.64, 0.24], np.float32), image, _ramp(edge, 8))


BASE_LOOK = "plain"
TEACHER_LOOKS = ("ink", "pen", "candy", "pop", "pixel", "sticker", "echo")
LORA_LOOK = "frame"
LOOKS = {
    "plain": "soft simple shading",
    "ink": "bold black outline and hatching on white paper",
    "pen": "black outline and hatching, a little finer than ink",
    "candy": "diagonal candy stripes",
    "pop": "pop-art dots, in the object and behind it",
    "pixel": "pixel art in bold square tiles",
    "sticker": "flat colours, thick white border, hard shadow",
    "echo": "dark rings echo the silhouette through the whole picture",
    "frame": "soft shading inside a golden picture frame",
}
_PAINTERS = {
    "plain": _plain,
    "ink": _ink,
    "pen": _pen,
    "candy": _candy,
    "pop": _pop,
    "pixel": _pixel,
    "sticker": _sticker,
    "echo": _echo,
    "frame": _frame,
}


def render(scene: Scene, look: str = BASE_LOOK) -> np.ndarray:
    """Paint `scene` in `look`: (H, W, 3) uint8 RGB, from its arguments alone. ValueError for an unknown look."""
    return render_layers(layers(scene), look)


def render_layers(drawn: Layers, look: str) -> np.ndarray:
    """`render` for layers already rasterised: painting one scene in many looks costs the geometry once."""
    if look not in LOOKS:
        raise ValueError(f"unknown look {look!r}: choose one of {', '.join(LOOKS)}")
    return (np.clip(_PAINTERS[look](drawn), 0, 1) * 255).round().astype(np.uint8)
