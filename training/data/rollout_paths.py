"""Samples one teacher's paths and keeps states on them, with both predictions that guidance asks for.

Every state lies exactly on an integer timestep, and its labels are what the UNet says to the float16 x_t that is kept:
x_t is rounded before the UNet sees it. So that all timesteps occur, the grid of noise levels is shifted at random from
batch to batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dmm_core.sampling import SAMPLERS, SCHEDULERS, choose, sample, sigmas_for
from ...dmm_core.schedule import NoiseSchedule, predicted_x0
from ..files.hashing import repr_sha256
from ..seeds import hash_seed
from ..teachers.teacher import Teacher

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASE_NAME = "(base)"
"""The name of the base among the owners of paths; no teacher may be called that."""

SHORTEST_FIRST_STEP = 0.25
"""Of a step: a shorter first one is left out, or the second-order sampler would extrapolate far from it."""


@dataclass(frozen=True)
class RolloutSettings:
    """The settings that the states depend on, besides models and captions.

    paths: paintings by each teacher; base_share: share of all paintings that are the base's; states: kept of each
    painting; sizes: (width, height) in pixels, in turn, none for the model family's own; batch_size: paintings at a
    time, which changes the states a little. steps, cfg, sampler, scheduler: as of the host's KSampler. "sgm_uniform"
    spaces timesteps evenly, so that they are as frequent as when pictures are noised. precision: "fp32", "bf16" or
    "fp16", of the UNets.
    """

    paths: int = 400
    base_share: float = 0.05
    states: int = 5
    sizes: tuple[tuple[int, int], ...] = ()
    steps: int = 25
    cfg: float = 7.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "sgm_uniform"
    seed: int = 0
    batch_size: int = 8
    precision: str = "fp32"

    def check(self, multiple: int) -> None:
        """Raises ValueError naming the first setting that makes no sense for models whose sizes are multiples of
        ``multiple``."""
        for name in ("paths", "states", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a whole number from 1")
        if not 0 <= self.base_share < 1:
            raise ValueError(f"base_share is {self.base_share}: expected a share from 0 to below 1")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg is {self.cfg}: expected a number")
        choose(SAMPLERS, "sampler", self.sampler)
        choose(SCHEDULERS, "scheduler", self.scheduler)
        choose(PRECISIONS, "precision", self.precision)
        if self.paths < len(self.sizes) or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(
                f"{self.paths} paths of the sizes {self.sizes}: expected different sizes, and a path for each"
            )
        for width, height in self.sizes:
            if min(width, height) < multiple or width % multiple or height % multiple:
                raise ValueError(f"size {width}x{height}: for these models both must be multiples of {multiple}")
        fewest = len(timestep_grid(NoiseSchedule(), self.steps, self.scheduler))
        if self.states > fewest:
            raise ValueError(f"{self.states} states of each painting, but it has {fewest} steps")


@dataclass(frozen=True)
class Owner:
    """A model whose paths are in the cache. ``role`` is "teacher" or "base"; unet and text: their weights' hashes."""

    role: str
    name: str
    unet: str
    text: str
    prediction: str
    zero_snr: bool
    file: str = ""
    sha256: str = ""

    @property
    def key(self) -> str:
        """16 hexadecimal digits: what its states depend on, which its name and file are not."""
        return repr_sha256(self.role, self.unet, self.text, self.prediction, self.zero_snr)[:16]


# --- noise levels -----------------------------------------------------------------------------------------------------


def timestep_grid(schedule: NoiseSchedule, steps: int, scheduler: str) -> list[int]:
    """The host's noise levels as the timesteps that its UNet is told, falling. Levels that round to one timestep become
    one."""
    told = schedule.t_from_sigma(sigmas_for(schedule, steps, scheduler)[:-1])
    return sorted(set(told.tolist()), reverse=True)


def shifted_grid(grid: Sequence[int], shift: float, top: int = 999) -> list[int]:
    """Each timestep lowered by a share ``shift`` (0 to below 1) of its distance to the next; the path still begins at
    the top.

    Over all shifts every timestep down to 0 comes up, as often as the grid is dense there.
    """
    lowered = [t - int(shift * (t - after)) for t, after in zip(grid, [*grid[1:], -1])]
    if shift < SHORTEST_FIRST_STEP:
        return [top, *lowered[1:]]
    return [top, *lowered] if lowered[0] < top else lowered


# --- painting ---------------------------------------------------------------------------------------------------------


class Recorder:
    """A denoiser under guidance (see ``dmm_core.sampling``) that keeps some of the states it is called with.

    rows: (B,) captions; keep: (steps, B) bool, which row is kept at which step. kept: the states, one row each, as
    dicts: the row's place in the batch "path", and the tensors "x_t", "cond", "null" (C, h, w) float16 and "t" ().
    """

    def __init__(self, teacher: Teacher, schedule: NoiseSchedule, rows: Tensor, *, cfg: float, keep: Tensor):
        self.teacher, self.schedule, self.cfg, self.keep = teacher, schedule, cfg, keep
        self.rows = torch.cat([rows, torch.zeros_like(rows)])  # (2B,): the captions and, for guidance, the empty prompt
        self.step = 0
        self.kept: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        t = self.schedule.t_from_sigma(sigma)
        signal, noise = self.schedule.coefficients(t, x)
        x_t = (signal * x).half()
        cond, null = self.teacher.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), self.rows).out.chunk(2)
        for row in self.keep[self.step].nonzero()[:, 0].tolist():
            state = {"x_t": x_t[row], "cond": cond[row].half(), "null": null[row].half(), "t": t[row]}
            self.kept.append({"path": row, **{name: value.cpu() for name, value in state.items()}})
        self.step += 1
        return predicted_x0(
            null + self.cfg * (cond - null), x_t.float(), signal, noise, prediction=self.teacher.prediction
        )


@torch.no_grad()
def paint_states(
    teacher: Teacher,
    owner: Owner,
    rows: Sequence[int],
    paths: Sequence[int],
    *,
    size: tuple[int, int],
    settings: RolloutSettings,
) -> list[dict[str, Any]]:
    """Paint one batch of a teacher's paths from noise to picture -> the states kept, as of ``Recorder.kept``, by path
    and then by step.

    rows: the captions of the paths, as rows of ``teacher.contexts``; paths: their numbers, from which all randomness
    follows; size: (width, height) in pixels. Raises ValueError when the teacher paints NaN or infinite numbers.
    """
    schedule = NoiseSchedule(owner.zero_snr)
    first = path_generator(settings.seed, "grid", owner.key, size, paths[0])
    grid = timestep_grid(schedule, settings.steps, settings.scheduler)
    grid = shifted_grid(grid, torch.rand((), generator=first).item(), len(schedule) - 1)
    width, height = size
    shape = (teacher.unet.config.in_channels, height // 8, width // 8)
    noise, keep = torch.empty(len(paths), *shape), torch.zeros(len(grid), len(paths), dtype=torch.bool)
    for i, path in enumerate(paths):
        g = path_generator(settings.seed, "path", owner.key, path)
        noise[i] = torch.randn(shape, generator=g)
        keep[torch.randperm(len(grid), generator=g)[: settings.states], i] = True
    recorder = Recorder(teacher, schedule, torch.tensor(rows), cfg=settings.cfg, keep=keep)
    device = next(teacher.unet.parameters()).device
    sigmas = torch.cat([schedule.sigmas[grid], torch.zeros(1)])
    picture = sample(recorder, schedule, noise.to(device), sigmas.to(device), sampler=settings.sampler)
    if not torch.isfinite(picture).all():
        raise ValueError(
            f"'{owner.name}' paints NaN or infinite numbers: use precision fp32 or bf16, a lower cfg, or look at what it paints "
            "in ComfyUI"
        )
    return sorted(recorder.kept, key=lambda state: state["path"])


def path_generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator for one purpose of the rollouts with this seed."""
    return torch.Generator().manual_seed(hash_seed(seed, "rollouts", *purpose))
