"""From the files that a config names to the objects of a run, checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..dmm_core.checkpoint import Checkpoint, load_checkpoint
from ..dmm_core.files import file_sha256
from .config import AttackConfig, DistillConfig, TrainConfig
from .data import TrainingData, load_latents
from .dataset.cache import ImageCache, base_with_parts
from .dataset.open_cache import open_cache
from .dataset.rollout_data import Rollouts
from .forget import Forgetting
from .hashing import weights_hash
from .loop import Distillation
from .memory.fitting import fitted
from .memory.planner import Plan
from .teacher import Rows, Teacher, check_architectures, plain_unet, styled_unet
from .text import ClipText

Named = Mapping[str, tuple[Checkpoint, str]]
"""(checkpoint, file) by teacher name."""


@dataclass
class Run:
    """All of a run, not yet on its device. ``parts``: what the student inherits; ``plan``: how it fits the memory, if it was planned."""

    base: Teacher
    teachers: list[Teacher]
    data: TrainingData
    config: TrainConfig
    device: torch.device
    parts: Checkpoint
    plan: Plan | None
    forget: Sequence[str] = ()
    attack: AttackConfig = field(default_factory=AttackConfig)

    def start(self) -> Distillation:
        if self.forget:
            return Forgetting(
                self.base, self.teachers, self.forget, self.data, self.config, self.device, self.attack
            )
        return Distillation(self.base, self.teachers, self.data, self.config, self.device)


def load_run(config: DistillConfig, device: torch.device, grown: bool = False) -> Run:
    """grown: the base is a DMM model, whose styles stay (or are forgotten) and come first.

    Raises ValueError for files that are not what the config says or do not belong together.
    """
    base = base_with_parts(config.base, config.parts_from or None)
    files: Named = {spec.name: (load_checkpoint(spec.file), spec.file) for spec in config.teachers}
    base_unet = styled_unet(base.unet, "the base model") if grown else plain_unet(base.unet, "the base model")
    unets = {name: plain_unet(checkpoint.unet, f"teacher '{name}'") for name, (checkpoint, _) in files.items()}
    check_architectures(base_unet.config, [(name, unet.config) for name, unet in unets.items()])
    data = load_data(config, base, files)
    text = Texts(base, data)
    frozen = {
        name: Teacher(
            name,
            unets.get(name, base_unet),
            *text.of(checkpoint, name, file),
            checkpoint.prediction,
            checkpoint.zero_snr,
            file=Path(file).name,
            sha256=file_sha256(file),
        )
        for name, (checkpoint, file) in {**files, "": (base, config.base)}.items()
    }
    for spec in config.teachers:
        frozen[spec.name].description, frozen[spec.name].licence = spec.description, spec.licence
    foundation = frozen.pop("")
    foundation.name = "base"
    train, plan = fitted(config.train, base_unet.config, data.shape[1:], len(files), device)
    base.unet = {}  # the copy in ``foundation`` is enough
    old = [foundation.as_style(i, style) for i, style in enumerate(base.styles)] if grown else []
    return Run(
        foundation, [*old, *frozen.values()], data, train, device, base, plan, config.forget, config.attack
    )


def load_data(config: DistillConfig, base: Checkpoint, teachers: Named) -> TrainingData:
    """What ``config.data`` names; a cache is compared with the models it is to be used with."""
    kind, file = config.data.kind, config.data.file
    if kind == "latents":
        return load_latents(file)
    if kind == "cache":
        return open_cache(file).for_teachers(base, teachers)
    from .demo.bank import demo_latents

    return demo_latents(base, config.data.count, config.data.seed)


class Texts:
    """The captions' states under each model's text encoder: out of the data's cache, or encoded once per encoder."""

    def __init__(self, base: Checkpoint, data: TrainingData):
        self.base, self.data = base, data
        self._made: dict[str, tuple[Tensor, Tensor | None]] = {}

    def of(self, checkpoint: Checkpoint, name: str, file: str) -> tuple[Rows, Rows | None]:
        """Contexts and, for SDXL, pooled texts; a model without a text encoder uses the base's."""
        weights = checkpoint.text or self.base.text
        if isinstance(self.data, (ImageCache, Rollouts)):
            return self.data.text_of(weights, f"teacher '{name}'" if name else "the base model", file)
        key = weights_hash(weights)  # most fine-tunes share the base's
        if key not in self._made:
            self._made[key] = ClipText(weights).encode_pooled(self.data.prompts)
        return self._made[key]
