"""The looks of the demo family: how a scene is painted. One teacher is trained per look, all on the same scenes.

Strokes, dots and tiles are 4-16 pixels wide because finer detail does not survive an f8, 4-channel VAE; the looks live
in outline, texture and foreground because the SD noise schedule lets the starting noise fix the global brightness.
"ink" and "pen" are near-duplicates and "echo" is an outlier on purpose: that is where distillation goes wrong first.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .brushes import CREAM, Look, X, Y, blur, fill, mix, ramp, stripes
from .scenes import SIZE

_BLACK = np.array([0.08, 0.07, 0.10], np.float32)


def _plain(scene):
    light = np.clip(0.5 - ((X - scene.centre[0]) + 2 * (Y - scene.centre[1])) / 160, 0, 1)
    body = fill(scene)
    body = mix(body * 0.80, mix(body, 1.0, 0.22), light)
    ground = scene.backdrop * (1 - 0.22 * blur(np.roll(scene.mask, (6, 3), (0, 1)), 5))
    return mix(ground, body, scene.mask)


def _drawn(scene, *, line, period, stroke, slant):
    """Black outline and hatched shade over a flat wash, on whitened paper."""
    paper = mix(scene.backdrop, 1.0, 0.55)
    body = mix(fill(scene, dark=_BLACK), 1.0, 0.12)
    shade = ramp((X - scene.centre[0]) + (Y - scene.centre[1]), 8)
    hatch = stripes(X * slant + Y, period, stroke / period) * shade * (1 - scene.pale)
    image = mix(paper, mix(body, _BLACK, hatch), scene.mask)
    return mix(image, _BLACK, 1 - ramp(np.abs(scene.distance), line / 2))


def _ink(scene):
    return _drawn(scene, line=7, period=13, stroke=5.5, slant=1.0)


def _pen(scene):
    return _drawn(scene, line=5, period=11, stroke=4.5, slant=0.8)


def _candy(scene):
    body = mix(scene.colour, CREAM, stripes(X - Y, 22, 0.45))
    body = mix(body, scene.colour * 0.25, scene.dark)
    image = mix(scene.backdrop, body, scene.mask)
    return mix(image, scene.colour * 0.8, 1 - ramp(np.abs(scene.distance + 1.5), 2.5))


def _pop(scene):
    row = np.floor(Y / 16)
    dots = 1 - ramp(np.hypot((X + 8 * (row % 2)) % 16 - 8, Y % 16 - 8), 5.5)
    ground = mix(mix(scene.backdrop, 1.0, 0.4), scene.colour, 0.4 * dots)
    body = mix(mix(fill(scene), 1.0, 0.1), CREAM, 0.6 * dots)
    body = mix(body, scene.colour * 0.25, scene.dark)
    image = mix(ground, body, scene.mask)
    return mix(image, 1.0, ramp(scene.distance, 0) * (1 - ramp(scene.distance, 4)))


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
    small = mix(crisp.backdrop, fill(crisp), crisp.mask)
    checker = np.indices(small.shape[:2]).sum(0)[..., None] % 2
    return np.repeat(np.repeat(small * np.where(checker, 1.0, np.where(crisp.mask, 0.82, 0.92)), 8, 0), 8, 1)


def _sticker(scene):
    shadow = blur(np.roll(1 - ramp(scene.distance, 8), (5, 4), (0, 1)), 2.5)
    image = mix(scene.backdrop, 0.25, 0.75 * shadow)
    image = mix(image, 1.0, 1 - ramp(scene.distance, 8))
    return mix(image, fill(scene), scene.mask)


def _echo(scene):
    rings = stripes(scene.distance, 22, 0.5)
    night = np.array([0.10, 0.06, 0.28], np.float32)
    ground = mix(scene.backdrop, night, rings)
    pulse = mix(scene.colour, 1.0, 0.35 * stripes(scene.distance + 13, 26, 0.45))
    return mix(ground, fill(replace(scene, colour=pulse), dark=scene.colour * 0.25), scene.mask)


def _frame(scene):
    edge = np.minimum(np.minimum(X, SIZE - X), np.minimum(Y, SIZE - Y))
    image = mix(np.array([0.45, 0.26, 0.10], np.float32), _plain(scene), ramp(edge, 12))
    return mix(np.array([0.86, 0.64, 0.24], np.float32), image, ramp(edge, 8))


def _stamp(scene):
    """A white border with the holes of a postage stamp."""
    edge = np.minimum(np.minimum(X, SIZE - X), np.minimum(Y, SIZE - Y))
    along = np.where(np.minimum(X, SIZE - X) < np.minimum(Y, SIZE - Y), Y, X)
    hole = np.hypot(along % 16 - 8, edge)
    paper = mix(np.array([0.98, 0.97, 0.93], np.float32), _plain(scene), ramp(edge, 13))
    return mix(np.array([0.30, 0.33, 0.40], np.float32), paper, ramp(hole, 5.5))


def _rays(scene):
    """Rays of light from behind the object."""
    angle = np.arctan2(Y - scene.centre[1], X - scene.centre[0]) / (2 * np.pi) * 12
    beam = ramp(np.abs(angle % 1 - 0.5), 0.25, 0.06)
    lit = mix(mix(scene.backdrop, 1.0, 0.15), np.array([1.0, 0.86, 0.35], np.float32), 0.75 * beam)
    return mix(lit, _plain(scene), scene.mask)


BASE_LOOK = "plain"
TEACHER_LOOKS = ("ink", "pen", "candy", "pop", "pixel", "sticker", "echo")
LORA_LOOK = "frame"
LOOKS = {
    "plain": Look("soft simple shading", _plain),
    "ink": Look("bold black outline and hatching on white paper", _ink),
    "pen": Look("black outline and hatching, a little finer than ink", _pen),
    "candy": Look("diagonal candy stripes", _candy),
    "pop": Look("pop-art dots, in the object and behind it", _pop),
    "pixel": Look("pixel art in bold square tiles", _pixel),
    "sticker": Look("flat colours, thick white border, hard shadow", _sticker),
    "echo": Look("dark rings echo the silhouette through the whole picture", _echo),
    "frame": Look("soft shading inside a golden picture frame", _frame),
}
LORA_LOOKS = {
    "stamp": Look("soft shading on a postage stamp with a white, perforated border", _stamp),
    "rays": Look("soft shading, golden rays behind the object", _rays),
}
"""Of further LoRAs. The classifier does not know them."""
