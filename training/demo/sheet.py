"""What a demo family was shown and what its models paint, side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...dmm_core.checkpoint import load_checkpoint
from ...dmm_core.unet import load_unet
from ..data.demo.family import Family
from ..data.demo.scenes import Scene, sample_scene
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
            shape=objects[2 * i % len(objects)],
            colour=colours[(2 * i + 1) % len(colours)],
            background=backgrounds[(i + 1) % len(backgrounds)],
        )
        for i in range(count)
    ]


def sheet(models: Path, family: Family) -> Image.Image:
    """A row for each look of base and teachers: scenes drawn by its rules, then its model's pictures of their captions."""
    brush = painter(load_checkpoint(whole_file(models, family)))
    scenes = shown_scenes(family)
    captions = [scene.caption for scene in scenes]
    rows = []
    for look in family.painted:
        file = "demo-base" if look == family.base else f"demo-teacher-{look}"
        plain = replace(brush, unet=load_unet(load_checkpoint(models / "dmm" / f"{file}.safetensors").unet), styles=())
        drawn = [Image.fromarray(family.render(scene, look)) for scene in scenes]
        rows.append(drawn + plain.pictures(plain.latents(captions, None, NOISE_SEED, SETTINGS)))
    title = f"The {family.name} family: scenes drawn in each look, and what its model paints from the captions"
    return grid(rows, family.painted, captions * 2, title=title)
