"""The recipes that ``benches.merge`` compares, and how one of them is trained and looked at on the way."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...dmm_core.unet import UNet, load_unet
from ...dmm_core.vae import load_vae
from ...training.config import DataSpec, DistillConfig
from ...training.config_file import load_config
from ...training.data.batches import Batch, Draw
from ...training.data.demo.family import FIRST, Family
from ...training.data.demo.latents import captioned_latents
from ...training.demo.ship import RECIPE
from ...training.demo.tour import HELD_OUT_SEED
from ...training.evaluation.agreement import eps_of
from ...training.loop.adversary import View
from ...training.loop.losses import score_loss
from ...training.loop.objective import Losses, Objective
from ...training.loop.trainer import Trainer
from ...training.presets import preset
from ...training.run.load import load_run
from ...training.seeds import hash_seed
from ...training.teachers.teacher import Prediction, Teacher
from ...training.text import ClipText
from .demo_rollouts import build_demo_rollouts
from .family_files import FamilyFiles, family_files

PATHS = 160
"""Paintings by each teacher, for rollouts."""
LEVEL_ENDS = (2, 3, 4, 6, 8)
"""The ends of the levels among the nine blocks of the demo UNet, as diffusers' classes have them: input_blocks.2 and .3, the middle,
output_blocks.1 and .3."""
LOOKS = 10
"""How often an arm is looked at until it has seen its samples."""
SHARES = {"untrained": 0.0, "a tenth of the samples": 0.1, "a fifth of the samples": 0.2}
"""When an arm's weights are kept on the way."""

PLAIN = {
    "init": "base", "sampling": "uniform", "ema_gamma": None, "style_lr_scale": 1.0, "warmup": 0, "betas": (0.9, 0.999),
    "lr_schedule": "constant", "lambda_feat": 0.001, "lambda_adv": 0.01, "validation": 0, "save_every": 10**9,
}  # fmt: skip
"""Plain DMM: the paper's three losses, uniform t, equal teacher share, constant rate, no average, start from the base."""
SOUP = {"init": "soup", "ema_gamma": 6.94, "sampling": "adaptive", "lambda_adv": 0.0, "betas": (0.9, 0.99)}
STANDARD = {k: v for k, v in preset("standard").items() if k not in ("steps", "batch_size", "accumulate", "lr")}
"""The preset is the recipe: the arm has its own rate only, as networks of this size learn at another."""
ARMS: dict[str, dict] = {
    "plain": {},
    "release": {"lambda_adv": 0.0, "lambda_feat": 0.002},
    "no adversary": {"lambda_adv": 0.0},
    "C average": {"ema_gamma": 6.94},
    "C cosine": {"lr_schedule": "cosine"},
    "D soup": {"init": "soup"},
    "D low-rank": {"init": "soup", "trainable": "lora", "lora_rank": 8},
    "B adaptive": {"sampling": "adaptive"},
    "B adaptive, not corrected": {"sampling": "adaptive", "adaptive_correct": False},
    "B v weights": {"loss_weight": "v"},
    "B x0 weights": {"loss_weight": "x0"},
    "A rollouts": {"data": "rollouts", "lambda_feat": 0.0, "lambda_adv": 0.0},
    "style rate x3": {"style_lr_scale": 3.0},
    "Muon": {"optimizer": "muon"},
    "soup Muon": {**SOUP, "optimizer": "muon", "style_lr_scale": 1.5, "warmup": 30},
    "standard": STANDARD,
    "standard Muon": {**STANDARD, "optimizer": "muon", "style_lr_scale": 1.5, "betas": (0.9, 0.99)},
    "standard zero cores": {**STANDARD, "cores": "zero"},
    "standard bank only": {**STANDARD, "trainable": "bank"},
    "standard bank 60%": {**STANDARD, "bank": "60%"},
    "standard 4 a step": {**STANDARD, "teachers_per_step": 4},
    "standard 2 a step": {**STANDARD, "teachers_per_step": 2},
    "standard 2 a step beta .95": {**STANDARD, "teachers_per_step": 2, "betas": (0.95, 0.999)},
    "standard 2 a step beta .98": {**STANDARD, "teachers_per_step": 2, "betas": (0.98, 0.999)},
    "standard 1 a step": {**STANDARD, "teachers_per_step": 1},
}  # fmt: skip
"""What is changed of ``PLAIN``. release: the authors' trainer, without a discriminator, with its own feature loss (``ReleasedObjective``),
and with empty captions drawn separately for student and teacher. data "rollouts": a cache of 160 paintings by each teacher, five states of
each, whose making counts as time. cores "zero": a bank of the same size that starts with nothing in it, the teachers' mean alone: what
more numbers do without the start. "4 a step": of the seven teachers and the base. "soup Muon" was called standard until 2026-11-28."""
OWN_SETTINGS = ("data", "cores")
"""Of an arm, and not of the trainer."""
RATES = {"plain": 2e-3, "Muon": 4e-3, "soup Muon": 4e-3, "standard Muon": 4e-3}
"""Learning rates as tuned (``--tune``); an arm without one has plain's. The discriminator's is the student's, as in the paper."""


class ReleasedTargets:
    """A run's ``targets`` as in the authors' released trainer, which drops captions separately for student and teacher: they may see
    different ones."""

    def __init__(self, run: Trainer):
        self.run, self.plain = run, run.targets
        self.pool, self.prefetch = run.targets.pool, run.targets.prefetch

    def __call__(self, batch: Batch, x_t: Tensor, t: Tensor, features: bool = False) -> Prediction:
        c = self.run.config
        draw = Draw(c.seed, len(batch), self.run.num_styles, c.base_share, 0.0, self.run.schedule)
        number = self.run.step * c.accumulate
        undropped = self.run.data.batch(number, draw)
        if not torch.equal(undropped.x_t, batch.x_t):
            raise RuntimeError("the batch without dropout is another one")
        g = torch.Generator().manual_seed(hash_seed(c.seed, "the teachers' own dropout", number))
        drop = torch.rand(len(batch), generator=g) < c.caption_dropout
        return self.plain(dataclasses.replace(batch, caption=torch.where(drop, 0, undropped.caption)), x_t, t, features)


class ReleasedObjective(Objective):
    """The objective with the authors' feature loss: the mean over ``LEVEL_ENDS``, where eq. 10 has the sum over all blocks."""

    def losses(self, batch: Batch, student: Prediction, teacher: Prediction, view: View | None = None) -> Losses:
        losses = super().losses(batch, level_ends(student), level_ends(teacher), view)
        return dataclasses.replace(losses, feature=losses.feature / len(LEVEL_ENDS))


def level_ends(said: Prediction) -> Prediction:
    return said._replace(features=[said.features[block] for block in LEVEL_ENDS])


@torch.no_grad()
def empty_cores(student: UNet) -> None:
    """Take out of a fresh student's bank what sets its styles apart (in place)."""
    for _, layer in student.style_bank.layers():
        layer.cores.weight.zero_()
        if layer.bias is not None:
            layer.bias.weight.zero_()


def settings(arm: str, steps: int, seed: int, rate: float | None, files: FamilyFiles | None = None) -> DistillConfig:
    """A demo family's models and data (the shipped one's), the recipe of configs/demo.yaml, and an arm's settings."""
    config, recipe = load_config((files or family_files()).config), load_config(RECIPE)
    rate = rate or RATES.get(arm, RATES["plain"])
    changes = {**PLAIN, **{k: v for k, v in ARMS[arm].items() if k not in OWN_SETTINGS}, "lr": rate, "adv_lr": rate}
    config.train = dataclasses.replace(recipe.train, steps=steps, seed=seed, **changes)
    return config


@dataclass
class HeldOut:
    """Scenes that no arm has seen, noised to timesteps that are spread evenly, and what every teacher says to them."""

    x_t: Tensor
    t: Tensor
    rows: Tensor
    contexts: Tensor
    said: list[Tensor]

    @classmethod
    def of(cls, run: Trainer, vae, text: ClipText, count: int, family: Family = FIRST) -> HeldOut:
        data = captioned_latents(vae, family.painted, count, HELD_OUT_SEED + family.seed, family=family)
        g = torch.Generator().manual_seed(hash_seed(1, "bench merge"))
        t = ((torch.arange(count) + 0.5) * 1000 / count).long()[torch.randperm(count, generator=g)]
        x0 = data.buckets[0][torch.arange(count)]
        x_t = run.schedule.add_noise(x0, torch.randn(x0.shape, generator=g), t)
        held = cls(x_t, t, data.rows, text.encode(data.prompts), [])
        held.said = [held.ask(teacher, run.device) for teacher in run.teachers]
        return held

    @torch.no_grad()
    def ask(self, teacher: Teacher, device: torch.device) -> Tensor:
        """(S, C, h, w)"""
        teacher = dataclasses.replace(teacher, contexts=self.contexts)
        return eps_of(teacher, self.x_t, self.t, self.rows, device=device).cpu()

    def answers(self, run: Trainer) -> list[Tensor]:
        """The averaged student's, by style, in float32 and with adapters folded in, as its file has them."""
        student = load_unet(run.student_weights(), copy=False).to(run.device)
        asked = Teacher("student", student, self.contexts)
        return [self.ask(dataclasses.replace(asked, style=i), run.device) for i in range(run.num_styles)]

    def errors(self, answers: list[Tensor]) -> Tensor:
        """(N, N) mean eps error of the student in style i to teacher j."""
        return torch.stack([torch.stack([score_loss(a, s).mean() for s in self.said]) for a in answers])

    def contrast(self, answers: list[Tensor], first: int, second: int) -> float:
        """How far two styles are apart, in the direction and the size in which their teachers are: 1 as they are, 0 the same style."""
        own, true = answers[first] - answers[second], self.said[first] - self.said[second]
        return ((own * true).sum() / true.square().sum()).item()


def train_arm(
    arm: str,
    steps: int,
    seed: int,
    device: torch.device,
    rate: float | None = None,
    at_least: float = 0.0,
    *,
    files: FamilyFiles,
) -> tuple[dict, dict[int, dict[str, Tensor]]]:
    """(figures, weights of the averaged student, by step): at the start, after the ``SHARES`` of ``steps``, and after all.

    at_least: seconds to train, beyond ``steps`` where they were fewer. Seconds are of this process (it computes on one thread) or, on a
    GPU, of the clock, and of the training alone.
    """
    family = files.family
    config = settings(
        arm, 2 * steps, seed, rate, files
    )  # the rate is constant: what comes after ``steps`` changes nothing before
    if config.train.warmup < 1:
        config.train = dataclasses.replace(config.train, warmup=round(config.train.warmup * steps))
    if config.train.lr_schedule != "constant":
        config.train, at_least = dataclasses.replace(config.train, steps=steps), 0.0
    clock = Clock(device)
    if ARMS[arm].get("data") == "rollouts":
        # Made anew for every run, for its time counts; gone when this returns.
        made = tempfile.TemporaryDirectory(prefix="dmm-rollouts-")
        clock.start()
        build_demo_rollouts(Path(made.name) / "cache", config, PATHS, seed, family)
        clock.stop()
        config.data = DataSpec("cache", str(Path(made.name) / "cache"))
    loaded = load_run(config, device)
    clock.start()
    run = loaded.start()
    clock.stop()  # the start out of the teachers' weights counts as time
    if arm == "release":
        run.targets = ReleasedTargets(run)
        run.objective = ReleasedObjective(**vars(run.objective))
    if ARMS[arm].get("cores") == "zero":
        empty_cores(run.student.unet)
    vae, text = load_vae(loaded.parts.vae), ClipText(loaded.parts.text)
    few, many = (HeldOut.of(run, vae, text, count, family) for count in (32, 128))
    names = [teacher.name for teacher in run.teachers]
    every, curve, weights, figures = max(1, steps // LOOKS), [], {}, {}
    marks = {*(round(share * steps) for share in SHARES.values()), steps}

    def look() -> None:
        if run.step % every == 0 or run.step == steps:
            own = few.errors(few.answers(run)).diagonal()
            curve.append((run.step, clock.seconds, own.mean().item(), own.max().item()))
        if run.step in marks:
            weights[run.step] = run.student_weights()
            answers = many.answers(run)
            figures[run.step] = {
                "errors": many.errors(answers).tolist(),
                "contrast": many.contrast(answers, *(names.index(name) for name in family.twins)),
                "seconds": clock.seconds,
            }

    look()
    while run.step < config.train.steps and (run.step < steps or clock.seconds < at_least):
        clock.start()
        run.train_step()
        clock.stop()
        look()
    run.targets.pool.close()
    about = {
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "lr": config.train.lr,
        "batch": config.train.batch_size,
        "names": names,
    }
    return {**about, "curve": curve, "at": figures}, weights


class Clock:
    def __init__(self, device: torch.device):
        self.device, self.seconds, self._from = device, 0.0, 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()  # other processes on the machine do not count

    def start(self) -> None:
        self._from = self.now()

    def stop(self) -> None:
        self.seconds += self.now() - self._from
