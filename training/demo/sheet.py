"""Contact sheets of a demo family: what its models were shown, and what they paint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...dmm_core.checkpoint import load_checkpoint
from ...dmm_core.unet import load_unet
from ..data.demo.family import Family
from ..data.demo.scenes import Scene, layers, sample_scene
from ..paint.images import grid
from ..paint.painter import painter
from .judge import SETTINGS, whole_file

SCENES = 4
NOISE_SEED = 1


def shown_scenes(family: Family, count: int = SCENES) -> list[Scene]:
    """Scenes with different objects, colours and backdrops, always the same."""
    rng, world = np.random.default_rng(family.seed), family.world
    objects, colours, backgrounds = list(world.objects), list(world.colours), list(world.backgrounds)
    return [
        sample_scene(
            rng,
            world,
            shape=objects[3 * i % len(objects)],
            colour=colours[(2 * i + 1) % len(colours)],
            background=backgrounds[(i + 1) % len(backgrounds)],
        )
        for i in range(count)
    ]


def drawn(family: Family, scenes: list[Scene]) -> list[list[Image.Image]]:
    """A row for each look of base and teachers: the scenes, drawn by the look's rules."""
    rasterised = [layers(scene) for scene in scenes]
    return [[Image.fromarray(family.render_layers(one, look)) for one in rasterised] for look in family.painted]


def looks_sheet(family: Family) -> Image.Image:
    """Scenes drawn in each look; needs no models."""
    scenes = shown_scenes(family, 2 * SCENES)
    rows, captions = drawn(family, scenes), [scene.caption for scene in scenes]
    return grid(rows, family.painted, captions, title=f"The looks of the {family.name} family, drawn by their rules")


def painted_sheet(family: Family, models: Path) -> Image.Image:
    """The same, with pictures that the family's models in ``models`` paint from the scenes' captions beside them."""
    brush = painter(load_checkpoint(whole_file(models, family)))
    scenes = shown_scenes(family)
    rows, captions = drawn(family, scenes), [scene.caption for scene in scenes]
    for look, row in zip(family.painted, rows):
        file = "demo-base" if look == family.base else f"demo-teacher-{look}"
        plain = replace(brush, unet=load_unet(load_checkpoint(models / "dmm" / f"{file}.safetensors").unet), styles=())
        row += plain.pictures(plain.latents(captions, None, NOISE_SEED, SETTINGS))
    title = f"The {family.name} family: scenes drawn in each look, and what its model paints from the captions"
    return grid(rows, family.painted, captions * 2, title=title)
