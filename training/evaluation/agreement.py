"""How near a student is to its teachers without any feature network: PAIR, and agreement in eps over timesteps and styles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ..files.hashing import tensor_sha256
from ..loop.losses import score_loss
from ..seeds import hash_seed
from ..teachers.teacher import Teacher
from .matrix import Figure
from .model_ref import ModelRef
from .model_runner import ModelRunner, in_style
from .settings import TIMESTEPS, EvaluationSettings


@dataclass
class PerStyle:
    """One figure for each style (``own``, in the order of ``names``), and their mean over the styles."""

    names: list[str]
    own: list[Figure]
    mean: Figure

    @property
    def worst(self) -> int:
        """Index of the style with the largest figure."""
        return max(range(len(self.names)), key=lambda i: self.own[i].value)


# --- PAIR -------------------------------------------------------------------------------------------------------------


@dataclass
class PairTable(PerStyle):
    """PAIR of everyone to every teacher.

    table[i][j]: of the student in style i to teacher j, both from the same noise; own is its diagonal. other_seed[j]: of teacher j to
    itself from other noise, the value of unrelated pictures of one prompt (about 2 where the prompt says little). base[j]: of the base
    to teacher j; None without a base.
    """

    table: list[list[float]]
    other_seed: list[float]
    base: list[float] | None


def pair(latents: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """PAIR (R,): mean (z - z_teacher)^2 of latents (n, C, h, w) that began as the same noise, over the teacher's own variance.

    The variance is that of every number of the latents over the pictures, averaged. Weights (R, n) as in ``distances``.
    """
    z, reference = latents.flatten(1).double(), teacher.flatten(1).double()
    total = weights.sum(1, keepdim=True)  # (R, 1)
    error = (weights @ (z - reference).square().mean(1, keepdim=True) / total)[:, 0]
    mean = weights @ reference / total  # (R, D)
    variance = (weights @ reference.square() / total - mean.square()).mean(1) * total[:, 0] / (total[:, 0] - 1)
    return error / variance


def pair_table(
    names: Sequence[str],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    second: Sequence[Tensor],
    base: Tensor | None,
    weights: Tensor,
) -> PairTable:
    """PAIR of every style to every teacher, from latents (n, C, h, w).

    student, teacher, second: a tensor for each style; second is the teachers' batch from other noise. base: one tensor, or None.
    weights: resamples (R, n), see ``distances``; with fewer than two of them the figures have no spread.
    """
    n = len(names)
    once = torch.ones(1, len(teacher[0]), dtype=torch.float64)
    table = [[pair(student[i], teacher[j], once).item() for j in range(n)] for i in range(n)]
    own = own_pairs(names, student, teacher, weights)
    other = [pair(second[j], teacher[j], once).item() for j in range(n)]
    of_base = None if base is None else [pair(base, t, once).item() for t in teacher]
    return PairTable(own.names, own.own, own.mean, table, other, of_base)


def own_pairs(names: Sequence[str], latents: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor) -> PerStyle:
    """PAIR of each style to its own teacher, from latents (n, C, h, w), one tensor for each style.

    weights: resamples (R, n), see ``distances``; with fewer than two of them the figures have no spread.
    """
    once = torch.ones(1, len(teacher[0]), dtype=torch.float64)
    values = [pair(z, t, once).item() for z, t in zip(latents, teacher)]
    many = torch.stack([pair(z, t, weights) for z, t in zip(latents, teacher)], 1) if len(weights) > 1 else None
    own = [Figure(v, None if many is None else many[:, i].std().item()) for i, v in enumerate(values)]
    mean = Figure(sum(values) / len(values), None if many is None else many.mean(1).std().item())
    return PerStyle(list(names), own, mean)


# --- eps --------------------------------------------------------------------------------------------------------------


@dataclass
class EpsAgreement:
    """How far the student's eps are from the teachers', over timesteps and styles.

    errors[bin][style]: mean (eps - eps_teacher)^2 of the student; base[bin][style]: of the base, None without one. starts: first timestep
    of each bin. mean[style]: over the bins. share[style]: mean over the base's mean, 0 for a student that equals its teacher; None without
    a base. own, own_share: mean and share with their spreads.
    """

    names: list[str]
    starts: list[int]
    errors: list[list[float]]
    base: list[list[float]] | None
    mean: list[float]
    share: list[float] | None
    own: PerStyle
    own_share: PerStyle | None


@dataclass
class Noised:
    """Noised pictures of one teacher, for which all models predict eps: x_t (S, C, h, w) float32, t (S,) timesteps, and the prompts as
    rows (S,) of the text states. All on the CPU."""

    x_t: Tensor
    t: Tensor
    rows: Tensor

    @property
    def key(self) -> tuple:
        """Differs for other noised pictures: part of the name under which predictions are kept."""
        return tensor_sha256(self.x_t), tuple(self.t.tolist())


def noised(runner: ModelRunner, latents: Tensor, zero_snr: bool) -> Noised:
    """A teacher's latents (n, C, h, w) noised: ``bin_samples`` samples for each bin, their timesteps evenly spread over the bin.

    Which pictures are taken and what noise they get depends on the settings' seed alone. zero_snr: the teacher's noise schedule.
    """
    s = runner.settings
    count = s.bins * s.bin_samples
    g = torch.Generator().manual_seed(hash_seed(s.seed, "eps agreement"))
    t = ((torch.arange(count) + 0.5) * TIMESTEPS / count).long()
    places = torch.cat([torch.randperm(len(latents), generator=g) for _ in range(-(-count // len(latents)))])[:count]
    x0 = latents[places].float()
    eps = torch.randn(x0.shape, generator=g)
    return Noised(NoiseSchedule(zero_snr).add_noise(x0, eps, t), t, runner.rows(places.tolist()))


@torch.no_grad()
def eps_of(teacher: Teacher, x_t: Tensor, t: Tensor, rows: Tensor, *, device: torch.device) -> Tensor:
    """A model's eps for x_t (B, C, h, w), as float32 (B, C, h, w) on ``device``, where the model is; a v prediction is converted."""
    x_t, t = x_t.to(device), t.to(device)
    out = teacher.predict(x_t, t, rows).out
    return NoiseSchedule(teacher.zero_snr).to_eps(out, x_t, t, teacher.prediction)


def predictions(
    runner: ModelRunner, ref: ModelRef, load: Callable[[], Teacher], asked: Noised, *, style: int | None = None
) -> Tensor:
    """A model's eps (S, C, h, w) float32 on the CPU for the noised pictures ``asked``; from the runner's folder where they are there.

    load: gives the model, called only when something has to be computed. style: of a DMM model, None for a plain one.
    """

    def build() -> dict[str, Tensor]:
        teacher = in_style(load(), style)
        out = runner.split(
            lambda part: eps_of(teacher, asked.x_t[part], asked.t[part], asked.rows[part], device=runner.device).cpu(),
            len(asked.t),
        )
        return {"eps": out}

    prompts = [runner.prompts[row] for row in asked.rows.tolist()]
    out = runner.part(("eps", ref.key, style, str(runner.dtype), prompts, *asked.key), len(asked.t), build)["eps"]
    runner.work(len(asked.t), f"asking '{ref.name}'")
    return out


def eps_errors(guesses: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared error of every sample (N, S): a model's eps against the teachers', each a tensor (S, C, h, w) for each style."""
    return torch.stack([score_loss(a, b) for a, b in zip(guesses, teacher)])


def eps_agreement(
    names: Sequence[str], settings: EvaluationSettings, student: Tensor, base: Tensor | None
) -> EpsAgreement:
    """The table over timesteps and styles, from the errors (N, S) of the student and, where there is one, of the base."""

    def table(errors: Tensor) -> list[list[float]]:
        return errors.unflatten(1, (settings.bins, settings.bin_samples)).mean(2).T.tolist()

    errors, of_base = table(student), None if base is None else table(base)
    mean = torch.tensor(errors).mean(0)
    share = None if of_base is None else (mean / torch.tensor(of_base).mean(0)).tolist()
    starts = [i * TIMESTEPS // settings.bins for i in range(settings.bins)]
    per_style = eps_per_style(names, settings.bins, student, base)
    return EpsAgreement(list(names), starts, errors, of_base, mean.tolist(), share, *per_style)


def eps_per_style(
    names: Sequence[str], bins: int, errors: Tensor, base: Tensor | None
) -> tuple[PerStyle, PerStyle | None]:
    """(mean error of each style, the same over the base's mean error or None without a base), from errors (N, S) in the order of t.

    Spreads are the standard error of a stratified mean: within each bin of timesteps the samples count as independent draws. Sample k
    has the same picture number and the same noise for every style and model. Its errors are therefore correlated, so the spread of a mean
    over styles comes from the samples' own means over styles, and the spread of a ratio R from its linearisation
    mean(e - R e_base) / mean(e_base).
    """
    x = errors.double()
    own = _per_style(names, x.mean(1), x, bins)
    if base is None:
        return own, None
    b = base.double()
    scale = b.mean(1, keepdim=True)
    share = x.mean(1, keepdim=True) / scale
    return own, _per_style(names, share[:, 0], (x - share * b) / scale, bins)


def _per_style(names: Sequence[str], values: Tensor, samples: Tensor, bins: int) -> PerStyle:
    spreads = [*stratified_error(samples, bins), *stratified_error(samples.mean(0, keepdim=True), bins)]
    figures = [Figure(v, s) for v, s in zip([*values.tolist(), values.mean().item()], spreads)]
    return PerStyle(list(names), figures[:-1], figures[-1])


def stratified_error(samples: Tensor, bins: int) -> list[float | None]:
    """Standard error of the mean of each row of samples (N, bins * k), whose k samples of a bin count as independent; N times None where
    k is 1."""
    x = samples.unflatten(1, (bins, -1))  # (N, bins, k)
    if x.shape[2] < 2:
        return [None] * len(x)
    return ((x.var(2) / x.shape[2]).sum(1).sqrt() / bins).tolist()
