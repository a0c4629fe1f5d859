"""What the looks paint with. Pictures are float32 (H, W, 3) in 0..1, amounts (H, W, 1); lengths are pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .scenes import SIZE, Layers

Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32)[..., None] + np.float32(0.5)  # (H, W, 1) pixel centres
CREAM = np.array([1.0, 0.97, 0.90], np.float32)


@dataclass(frozen=True)
class Look:
    """How a scene is painted."""

    description: str
    paint: Callable[[Layers], np.ndarray]
    """Layers -> (H, W, 3), about 0..1."""


def mix(under, over, amount):
    return under + (over - under) * amount


def ramp(value, at, width=1.0):
    """Antialiased step: 0 below `at`, 1 above, over `width` pixels."""
    return np.clip((value - at) / width + 0.5, 0, 1)


def stripes(along, period, share):
    """1 on the first `share` of each period of `along` (pixels), antialiased."""
    place = np.abs((along / period) % 1.0 - 0.5) * period
    return 1 - ramp(place, share * period / 2)


def fill(scene: Layers, dark: np.ndarray | None = None) -> np.ndarray:
    """The object's own flat colours, (H, W, 3)."""
    dark = scene.colour * 0.25 if dark is None else dark
    return mix(mix(scene.colour, CREAM, scene.pale), dark, scene.dark)


def blur(channel, radius):
    image = Image.fromarray((np.clip(channel[..., 0], 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), np.float32)[..., None] / 255
