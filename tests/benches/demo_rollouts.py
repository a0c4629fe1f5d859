"""A rollout cache of the demo family, for benches: its captions, painted by its teachers."""

from __future__ import annotations

from pathlib import Path

from ...training.config import DistillConfig
from ...training.data.demo.family import FIRST, Family
from ...training.data.demo.latents import demo_images
from ...training.data.rollout_paths import RolloutSettings
from ...training.data.rollouts import build_rollouts


def build_demo_rollouts(folder: Path, config: DistillConfig, paths: int, seed: int = 0, family: Family = FIRST) -> None:
    """``paths`` paintings by each of the config's teachers, of the captions of its scenes, into ``folder``."""
    _, captions = demo_images(family.painted, config.data.count, config.data.seed + family.seed, family)
    teachers = {spec.name: spec.file for spec in config.teachers}
    settings = RolloutSettings(paths=paths, cfg=4.0, batch_size=32, seed=seed)
    build_rollouts(
        folder, config.base, teachers, sorted(set(captions)), settings=settings, parts_from=config.parts_from
    )
