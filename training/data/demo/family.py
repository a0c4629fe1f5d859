"""A demo family: a world of scenes, the looks that they are painted in, and the seed of all that is drawn by chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .brushes import Look
from .looks import BASE_LOOK, LOOKS, LORA_LOOK, LORA_LOOKS, TEACHER_LOOKS
from .scenes import FIRST_WORLD, Layers, Scene, layers, sample_scene
from .second_looks import SECOND_BASE, SECOND_LOOKS, SECOND_TEACHERS
from .second_scenes import SECOND_WORLD
from .world import World


@dataclass(frozen=True, eq=False)
class Family:
    """What distinguishes one demo family from another. All networks are of the same architecture."""

    name: str
    world: World
    looks: Mapping[str, Look]
    base: str
    """The look of the base model."""
    teachers: tuple[str, ...]
    """The looks of the teachers, each fine-tuned from the base."""
    twins: tuple[str, str]
    outlier: str
    seed: int
    """Added to every seed of scenes, training and evaluation; 0 for the family that is shipped."""
    lora: str = ""
    """The look of a LoRA; none has no LoRA."""
    more_loras: Mapping[str, Look] = field(default_factory=dict)
    """Looks of further LoRAs, which the classifier does not know."""
    shipped: bool = False
    """Built into models/ of the pack, with a student and a ControlNet; the VAEs of the others go on from its own."""

    @property
    def painted(self) -> tuple[str, ...]:
        """The looks of base and teachers."""
        return (self.base, *self.teachers)

    def sample_scene(self, rng: np.random.Generator) -> Scene:
        return sample_scene(rng, self.world)

    def render(self, scene: Scene, look: str = "") -> np.ndarray:
        """Paint ``scene`` in ``look`` (the base's): (H, W, 3) uint8 RGB, from its arguments alone. ValueError for an unknown look."""
        return self.render_layers(layers(scene), look or self.base)

    def render_layers(self, drawn: Layers, look: str) -> np.ndarray:
        """`render` for layers already rasterised: painting one scene in many looks costs the geometry once."""
        looks = {**self.looks, **self.more_loras}
        if look not in looks:
            raise ValueError(f"unknown look {look!r}: choose one of {', '.join(looks)}")
        return (np.clip(looks[look].paint(drawn), 0, 1) * 255).round().astype(np.uint8)


FIRST = Family(
    name="first",
    world=FIRST_WORLD,
    looks=LOOKS,
    base=BASE_LOOK,
    teachers=TEACHER_LOOKS,
    lora=LORA_LOOK,
    more_loras=LORA_LOOKS,
    twins=("ink", "pen"),
    outlier="echo",
    seed=0,
    shipped=True,
)
SECOND = Family(
    name="second",
    world=SECOND_WORLD,
    looks=SECOND_LOOKS,
    base=SECOND_BASE,
    teachers=SECOND_TEACHERS,
    twins=("woodcut", "lino"),
    outlier="neon",
    seed=40_000_000,
)
FAMILIES = {family.name: family for family in (FIRST, SECOND)}


def family_named(name: str) -> Family:
    """ValueError for a name that there is no family of."""
    if name not in FAMILIES:
        raise ValueError(f"there is no demo family '{name}': choose from {', '.join(FAMILIES)}")
    return FAMILIES[name]
