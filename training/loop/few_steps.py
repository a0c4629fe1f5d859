"""A DMM model that learns from itself to paint in a few steps, in every style and without guidance: phased consistency distillation.

phi, the frozen model, is its own teacher, so a style keeps its look: each row of a batch has a style row of its own. The student is a
copy of phi, by default with adapters (``trainable: lora``), which become a LoRA for the file; its style side stays phi's. The maths and
its symbols are in ``phased``, the paths in ``own_paths``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ..config import FewStepConfig, TrainConfig
from ..data.batches import Batch, Draw, TrainingData
from ..parallel.devices import sent
from ..parallel.ranks import Ranks
from ..progress import ProgressCallback
from ..seeds import hash_seed
from ..teachers.teacher import Teacher
from .kinds import RunKind
from .losses import score_loss
from .new_student import STYLE_SIDE
from .objective import Losses
from .own_paths import OwnPaths, ask_guided, draw_cfg, random_rows
from .phased import SAMPLER, SCHEDULER, Phases, huber_loss
from .trainer import Trainer

FEW_STEPS = "few_steps"
"""Of a model's recipe: {"steps", "sampler", "scheduler", "cfg"}, with which a few-step model paints."""
CFG = 1.0
REFERENCE_STEPS = 25
"""Steps of the pictures that the student's are shown beside."""


def paints_with(steps: int) -> dict[str, Any]:
    """How a few-step model paints, in ComfyUI's words."""
    return {"steps": steps, "sampler": SAMPLER, "scheduler": SCHEDULER, "cfg": CFG}


@dataclass
class Rows:
    """What a step learns from: x_t on the device; t, caption (B,) and style (B, N+1) on the CPU. edge (B, C, h, w), on the device: where
    the model's own path crosses the edge below, for the rows marked in ``known`` (B,)."""

    x_t: Tensor
    t: Tensor
    caption: Tensor
    style: Tensor
    edge: Tensor
    known: Tensor


@dataclass(frozen=True)
class FewSteps(RunKind):
    """The base, a DMM model, learns to paint in ``settings.steps`` steps. All of its styles are teachers, in its own order."""

    settings: FewStepConfig
    phases: Phases
    paths: OwnPaths = field(default_factory=OwnPaths, compare=False)

    def identity(self) -> dict[str, str]:
        return {"few steps": json.dumps(dataclasses.asdict(self.settings), sort_keys=True)}

    def recipe_changes(self, teachers: Sequence[Teacher]) -> dict[str, Any]:
        return {FEW_STEPS: paints_with(self.settings.steps)}

    def stays(self, name: str) -> bool:
        return name.startswith(STYLE_SIDE)  # styles, blends and edited codes mean what they meant

    def paints(self, student: bool) -> dict[str, Any]:
        if student:
            return paints_with(self.settings.steps)
        return {**paints_with(REFERENCE_STEPS), "cfg": self.settings.cfg}

    def prepare(
        self, run: Trainer, folder: Path | None, tick: ProgressCallback | None, stopping: Callable[[], bool]
    ) -> bool:
        if not self.settings.paths or self.paths.sizes:
            return True
        place = folder / "own-paths" if folder else None
        return self.paths.paint(run, self.phases, self.settings, folder=place, tick=tick, stopping=stopping)

    # --- a step -------------------------------------------------------------------------------------------------------

    def losses(self, run: Trainer, batch: Batch, number: int) -> Losses:
        """Of each row: Huber((f_th(x_t) - target) / |df/dout|), the target f_th-(x') of phi's own guided step to x', x' itself where
        that is the edge, or the edge of the path that is known."""
        rows = self.rows(run, batch, number)
        phases, objective = self.phases, self.settings.objective
        s = phases.below(rows.t)
        target = rows.edge if objective == "regression" else self.targets(run, rows, batch, number)
        if objective == "both":
            target = torch.where(sent(rows.known, run.device).view(-1, 1, 1, 1), rows.edge, target)
        out = run.student.predict(rows.x_t, sent(rows.t, run.device), rows.caption, rows.style).out
        ours = phases.step(rows.x_t, out, rows.t, s)
        score = huber_loss(ours, target, phases.slope(rows.t, s, ours), self.settings.huber)
        zero = torch.zeros_like(score)
        return Losses(score, zero, zero, zero, torch.zeros(len(batch), dtype=torch.bool))

    @torch.no_grad()
    def targets(self, run: Trainer, rows: Rows, batch: Batch, number: int) -> Tensor:
        """sg f_th-(x'), (B, C, h, w): x' is a step of the frozen model under guidance."""
        phases, settings = self.phases, self.settings
        s, after = phases.below(rows.t), phases.next(rows.t, settings.skip)
        cfg = draw_cfg(len(batch.global_batch), settings, generator(run, "few-step cfg", number))[own(batch)]
        target = phases.step(
            rows.x_t, ask_guided(run, rows.x_t, rows.t, rows.caption, rows.style, cfg), rows.t, after
        )  # x'
        inside = (after > s).nonzero()[:, 0]
        if len(inside):
            there, t, s = sent(inside, run.device), after[inside], s[inside]
            x = target[there]
            ask = run.student.predict_averaged if settings.follows == "average" else run.student.predict
            out = ask(x, sent(t, run.device), rows.caption[inside], rows.style[inside])
            out = out if isinstance(out, Tensor) else out.out
            target[there] = phases.step(x, out, t, s)
        return target

    def rows(self, run: Trainer, batch: Batch, number: int) -> Rows:
        """A batch with a style row for each of its rows, and states of the model's own paths, of the same styles, in the place of some."""
        settings, paths, count = self.settings, self.paths, len(batch.global_batch)
        g, styles, mine = generator(run, "few steps", number), run.num_styles, own(batch)
        teacher = batch.global_batch.teacher
        style = random_rows(teacher, styles, settings.blends, g)[mine]
        paths_alone = settings.objective == "regression"  # also where a batch's pictures have a size without paths
        known = (torch.rand(count, generator=g) < (1.0 if paths_alone else settings.path_share))[mine]
        pick, place = (torch.rand(count, generator=g)[mine] for _ in range(2))
        x_t = batch.x_t.float()
        own_paths = paths.like(x_t, other=paths_alone)
        if own_paths is None:
            x_t = sent(x_t, run.device)
            return Rows(x_t, batch.t, batch.caption, style, x_t, torch.zeros_like(known))
        path = batch.teacher * own_paths.each + (pick * own_paths.each).long()
        steps = len(paths.t) - 1
        at = (place * steps).long()
        per_phase = steps // self.phases.count
        edge = (at // per_phase + 1) * per_phase
        states = own_paths.states[path, at].float()
        return Rows(
            sent(states if paths_alone else torch.where(known.view(-1, 1, 1, 1), states, x_t), run.device),
            torch.where(known, torch.tensor(paths.t)[at], batch.t),
            torch.where(known, own_paths.caption[path], batch.caption),
            torch.where(known[:, None], own_paths.style[path], style),
            sent(own_paths.states[path, edge].float(), run.device),
            known,
        )

    # --- the fixed check ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_error(self, run: Trainer) -> float | None:
        """Mean squared error, in the network's output, of the averaged student's jumps from edge to edge of the model's own paths: of
        ``validation`` jumps, in every style and size alike. Where there are no paths, the loss of the first batches."""
        c = run.config
        total, count = 0.0, 0
        with run.student.averaged():
            for number in range(-(-c.validation // c.batch_size)):
                if self.paths.sizes:
                    error = self.jump_errors(run, number)
                else:
                    draw = Draw(hash_seed(c.seed, "validation"), c.batch_size, run.num_styles, 0.0, 0.0, run.schedule)
                    error = self.losses(run, run.draws.local(run.data.batch(number, draw)), number).score
                total, count = total + error.sum().item(), count + len(error)
        total, count = run.ranks.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
        return total / count

    def jump_errors(self, run: Trainer, number: int) -> Tensor:
        """This process's rows of batch ``number`` of the jumps from edge to edge, (B,): the sizes take turns, in each the phases and then
        the styles do."""
        size, paths, phases = run.config.batch_size, self.paths, self.phases
        own_paths = list(paths.sizes.values())[number % len(paths.sizes)]
        turn = number // len(paths.sizes)
        places = torch.arange(turn * size, (turn + 1) * size)[run.ranks.share(size)]
        per_phase = (len(paths.t) - 1) // phases.count
        phase, of_style = places % phases.count, places // phases.count
        styles = run.num_styles + 1
        path = of_style % styles * own_paths.each + of_style // styles % own_paths.each
        at = phase * per_phase
        x_t, edge = (sent(own_paths.states[path, i].float(), run.device) for i in (at, at + per_phase))
        t = torch.tensor(paths.t)[at]
        s = phases.below(t)
        out = run.student.predict(x_t, sent(t, run.device), own_paths.caption[path], own_paths.style[path]).out
        slope = phases.slope(t, s, x_t)
        return score_loss(phases.step(x_t, out, t, s) / slope, edge / slope)


def generator(run: Trainer, what: str, number: int) -> torch.Generator:
    """Of batch ``number``: the same in every process, whatever came before."""
    return torch.Generator().manual_seed(hash_seed(run.config.seed, what, number))


def own(batch: Batch) -> slice:
    """The rows of the whole batch that are this process's."""
    return slice(batch.start, batch.start + len(batch))


def few_stepping(
    base: Teacher,
    styles: Sequence[Teacher],
    data: TrainingData,
    *,
    config: TrainConfig,
    device: torch.device,
    settings: FewStepConfig | None = None,
    recipe: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """A run in which ``base``, a DMM model, learns to paint in a few steps.

    styles: all of the base's, as ``Teacher.as_style`` gives them. recipe: of its file. Settings of the run that mean nothing here (losses
    of features and of a discriminator, a final stage, a start, adaptive sampling) are turned off. Raises ValueError for a model that is a
    few-step model already, and for what cannot be trained so.
    """
    settings, ranks = settings or FewStepConfig(), ranks or Ranks()
    check_few_steps(config, settings, recipe or {}, has_targets=data.has_targets, world=ranks.world)
    config = without_the_rest(config)
    kind = FewSteps(settings, Phases(NoiseSchedule(base.zero_snr), settings.steps, base.prediction))
    return Trainer(base, styles, data, config, device=device, kind=kind, ranks=ranks)


def check_few_steps(
    config: TrainConfig, settings: FewStepConfig, recipe: Mapping[str, Any], *, has_targets: bool, world: int
) -> None:
    """Raises ValueError for settings that make no sense here, and for a model that is a few-step model already. recipe: of its file;
    has_targets: of the data; world: the processes."""
    settings.validate()
    if already := recipe.get(FEW_STEPS):
        raise ValueError(
            f"the model is a few-step model already ({already.get('steps')} steps): start from the model that it was made from"
        )
    if config.trainable == "style":
        raise ValueError("trainable is 'style', and styles stay as they are in a few-step run: use lora, or all")
    if config.parallel == "fsdp" and world > 1:
        raise ValueError(
            "parallel is 'fsdp', which cannot learn few steps: the averaged weights are asked too; use ddp"
        )
    if has_targets:
        raise ValueError(
            "the data are rollouts: few steps are learnt from pictures (demo_scenes, latents or an image cache)"
        )


def without_the_rest(config: TrainConfig) -> TrainConfig:
    """The settings, without what a few-step run has no use for."""
    return dataclasses.replace(
        config, lambda_feat=0.0, lambda_adv=0.0, final_steps=0, init="base", sampling="uniform", warm_start=0,
        loss_weight="plain",
    )  # fmt: skip
