"""From the files that a config names to the objects of a run, checked before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...dmm_core.bank import has_bank
from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.unet import UNet
from ..config import AttackConfig, DistillConfig, FewStepConfig, ModelSettings, TeacherSpec, TrainConfig
from ..data.batches import TrainingData, load_latents
from ..data.cache import ImageCache
from ..data.open_cache import open_cache
from ..data.rollout_data import Rollouts
from ..data.text_states import TextStates
from ..files.model_files import load_any, load_any_info, model_sha256, weight_stamps
from ..files.model_settings import say_guesses, told, with_settings
from ..files.outputs import check_folder, check_output
from ..files.remembered import side_by_side
from ..files.style_file import centred_at_base
from ..loop.checks import check_run
from ..loop.few_steps import check_few_steps, few_stepping, without_the_rest
from ..loop.forget import forgetting
from ..loop.trainer import Trainer
from ..memory.fitting import fitted
from ..memory.planner import Plan
from ..parallel.ranks import Ranks
from ..teachers.lora_files import recorded, with_loras
from ..teachers.models import base_with_parts, with_loras_and_settings
from ..teachers.teacher import Rows, Teacher, check_architectures, check_text, in_style_order, plain_unet, styled_unet
from .state import begun_with
from .student_file import lora_file, raw_file

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
    few_steps: FewStepConfig | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def check(self) -> None:
        """Raises ValueError where ``start`` would, before anything is made."""
        check_run(self.base, self.teachers, self.data, config=self.config, world=self.ranks.world)
        if self.few_steps:
            recipe, targets = self.parts.recipe, self.data.has_targets
            check_few_steps(self.config, self.few_steps, recipe, has_targets=targets, world=self.ranks.world)

    def start(self) -> Trainer:
        share_hashes([*self.teachers, self.base], self.ranks)
        if self.forget:
            return forgetting(
                self.base,
                self.teachers,
                self.forget,
                self.data,
                config=self.config,
                device=self.device,
                attack=self.attack,
                ranks=self.ranks,
            )
        if self.few_steps:
            return few_stepping(
                self.base,
                self.teachers,
                self.data,
                config=self.config,
                device=self.device,
                settings=self.few_steps,
                recipe=self.parts.recipe,
                ranks=self.ranks,
            )
        return Trainer(self.base, self.teachers, self.data, self.config, device=self.device, ranks=self.ranks)


def load_run(config: DistillConfig, device: torch.device, grown: bool = False, ranks: Ranks | None = None) -> Run:
    """grown: the base is a DMM model, whose styles stay (are forgotten, or learn few steps) and come first. ranks: the
    processes of the run.

    Where it is not grown, a base with a style bank goes on with the styles that it has: the teachers are put in their order, by name.
    Raises ValueError for files that are not what the config says or do not belong together, and where the result could not be stored.
    """
    check_output(config.output, config.inputs())
    check_output(raw_file(Path(config.output)), config.inputs())
    if config.few_steps:
        check_output(lora_file(Path(config.output)), config.inputs())
        config = dataclasses.replace(config, train=without_the_rest(config.train))
    check_folder(Path(config.run_dir), f"the run folder '{config.run_dir}'")
    sources = {config.base, *(spec.file or config.base for spec in config.teachers)}
    stamped = {file: weight_stamps(file) for file in sources}
    base = told(base_with_parts(config.base, config.parts_from or None), config.settings)
    again = not grown and has_bank(base.unet)
    if again:
        config = dataclasses.replace(config, teachers=in_style_order(base.styles, config.teachers))
    files: Named = {spec.name: load_teacher(spec, base, config) for spec in config.teachers}
    if grown or again:
        base_unet = styled_unet(base.unet, "the base model", heads=base.heads)
    else:
        base_unet = plain_unet(base.unet, "the base model", copy=False, heads=base.heads)
    ranks = ranks or Ranks()
    unets = teacher_unets(config, files, ranks)
    check_architectures(base_unet.config, [(name, unet.config) for name, unet in unets.items()])
    data = load_data(config, base, files)
    text = TextStates(data.prompts, data.text_of if isinstance(data, (ImageCache, Rollouts)) else None)
    say_guesses({name or "base": checkpoint for name, (checkpoint, _) in {"": (base, ""), **files}.items()})

    def states(checkpoint: Checkpoint, who: str, file: str) -> tuple[Rows, Rows | None]:
        weights, clip_skip = checkpoint.encoder(base)
        return text.of(weights, who, file, clip_skip)

    frozen = {
        name: Teacher(
            name,
            unets.get(name, base_unet),
            *states(checkpoint, f"teacher '{name}'" if name else "the base model", file),
            checkpoint.prediction,
            checkpoint.zero_snr,
            told=f"{checkpoint.prediction}{', zero terminal SNR' * checkpoint.zero_snr}"
            if checkpoint.overruled
            else "",
        )
        for name, (checkpoint, file) in {**files, "": (base, config.base)}.items()
    }
    whole = list({config.base, *(spec.file or config.base for spec in config.teachers if not spec.loras)})
    sums = dict(zip(whole, side_by_side(model_sha256, whole)))
    frozen[""].stamps = stamped[config.base]
    for spec in config.teachers:
        teacher = frozen[spec.name]
        teacher.description, teacher.licence = spec.description, spec.licence
        teacher.file, teacher.sha256 = recorded(spec.file or config.base, spec.loras, sums)
        teacher.stamps = None if spec.loras else stamped[spec.file or config.base]
        teacher.sha256 = teacher.sha256 or teacher.weights_sha256  # with LoRAs there is no file of its weights
    foundation = frozen.pop("")
    foundation.name = "base"
    foundation.file, foundation.sha256 = recorded(config.base, [], sums)
    foundation.at_base = centred_at_base(base.recipe)
    begun = begun_with(Path(config.run_dir))
    check_text((foundation, *frozen.values()))
    train, plan = fitted(
        config.train, base_unet.config, data.shape[1:], len(files), device=device, processes=ranks.world, begun=begun
    )
    for teacher, style in zip(frozen.values(), base.styles if again else ()):
        teacher.goes_on_as(style)
    base.unet = {}  # the copy in ``foundation`` is enough
    old = [foundation.as_style(i, style) for i, style in enumerate(base.styles)] if grown else []
    return Run(
        foundation, [*old, *frozen.values()], data, train, device, base, plan, config.forget, config.attack,
        config.few_steps, ranks,
    )  # fmt: skip


def teacher_unets(config: DistillConfig, files: Named, ranks: Ranks) -> dict[str, UNet]:
    """Checked, by name. Their weights stay in the files, mapped into memory in the dtype that they have there, until the pool takes them.
    (LoRAs have been folded in already: such weights are in no file.) Of several processes each reads a share of the teachers to check
    them."""
    unets = {}
    for i, spec in enumerate(config.teachers):
        copy, file = bool(spec.loras), files[spec.name][0]
        look = copy or i % ranks.world == ranks.rank
        unets[spec.name] = plain_unet(file.unet, f"teacher '{spec.name}'", copy, look, heads=file.heads)
    return unets


def share_hashes(teachers: Sequence[Teacher], ranks: Ranks) -> None:
    """Give each teacher its ``weights_sha256``, where it has none yet: threads, and several processes, share out the work."""
    unets = list({id(teacher.unet): teacher for teacher in teachers}.items())
    mine = range(ranks.rank, len(unets), ranks.world)

    def hashed(i: int) -> str:
        teacher = unets[i][1]
        return vars(teacher).get("weights_sha256") or teacher.hashed()

    computed = dict(zip(mine, side_by_side(hashed, mine)))
    parts = ranks.gather(computed) if ranks.world > 1 else [computed]
    hashes = {unets[i][0]: sha for part in parts for i, sha in part.items()}
    for teacher in teachers:
        teacher.weights_sha256 = hashes[id(teacher.unet)]


def load_teacher(spec: TeacherSpec, base: Checkpoint, config: DistillConfig) -> tuple[Checkpoint, str]:
    """A teacher with its LoRAs folded in, and how ``dmm cache text`` names its text encoder."""
    if base.num_styles and not spec.file:
        raise ValueError(
            f"teacher '{spec.name}' has LoRAs and no file, and the base is a DMM model: name the checkpoint that they are for"
        )
    read = load_any(spec.file) if spec.file else base
    checkpoint = with_loras_and_settings(read, spec.loras, spec.settings, base)
    file = spec.file or config.base
    if spec.loras or not read.text:  # they change the first text encoder there is
        places = (place for place in (spec.file, config.base, config.parts_from) if place)
        file = next(place for place in places if load_any_info(place).text)
    return checkpoint, with_settings(with_loras(file, spec.loras), ModelSettings(clip_skip=checkpoint.clip_skip))


def load_data(config: DistillConfig, base: Checkpoint, teachers: Named) -> TrainingData:
    """What ``config.data`` names; a cache is compared with the models it is to be used with."""
    kind, file = config.data.kind, config.data.file
    if kind == "latents":
        return load_latents(file)
    if kind == "cache":
        return open_cache(file).for_teachers(base, teachers)
    from ..data.demo.latents import demo_latents

    return demo_latents(base, config.data.count, config.data.seed)
