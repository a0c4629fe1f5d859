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
from .model_runner import ModelRef, ModelRunner, in_style
from .settings import TIMESTEPS, EvaluationSettings


@dataclass
class PerStyle:
    """One figure for each style, and their mean."""

    names: list[str]
    own: list[Figure]
    mean: Figure

    @property
    def worst(self) -> int:
        return max(range(len(self.names)), key=lambda i: self.own[i].value)


# --- PAIR -------------------------------------------------------------------------------------------------------------


@dataclass
class PairTable(PerStyle):
    """table[i][j]: student in style i beside teacher j, from the same noise. own: the diagonal. other_seed: two pictures of the same
    teacher and prompt from other noise, which is what chance gives (towards 2). base[j]: of the base."""

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
    """From latents by style. weights: resamples (R, n); none leave the spread out."""
    n = len(names)
    once = torch.ones(1, len(teacher[0]), dtype=torch.float64)
    table = [[pair(student[i], teacher[j], once).item() for j in range(n)] for i in range(n)]
    own = own_pairs(names, student, teacher, weights)
    other = [pair(second[j], teacher[j], once).item() for j in range(n)]
    of_base = None if base is None else [pair(base, t, once).item() for t in teacher]
    return PairTable(own.names, own.own, own.mean, table, other, of_base)


def own_pairs(names: Sequence[str], latents: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor) -> PerStyle:
    """PAIR of latents by style to the teacher of each style. weights: resamples (R, n); none leave the spread out."""
    once = torch.ones(1, len(teacher[0]), dtype=torch.float64)
    values = [pair(z, t, once).item() for z, t in zip(latents, teacher)]
    many = torch.stack([pair(z, t, weights) for z, t in zip(latents, teacher)], 1) if len(weights) > 1 else None
    own = [Figure(v, None if many is None else many[:, i].std().item()) for i, v in enumerate(values)]
    mean = Figure(sum(values) / len(values), None if many is None else many.mean(1).std().item())
    return PerStyle(list(names), own, mean)


# --- eps --------------------------------------------------------------------------------------------------------------


@dataclass
class EpsAgreement:
    """Mean (eps - eps_teacher)^2 of the student in each style, errors[bin][style], and of the base. starts: first timestep of each bin.

    share: error of the student over error of the base, 0 for a student that is its teacher; None without a base. own, own_share: the
    same with their spreads.
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
    """What models are asked about in one style: pictures by its teacher, noised. x_t (S, C, h, w), t (S,), rows (S,) of the prompts."""

    x_t: Tensor
    t: Tensor
    rows: Tensor

    @property
    def key(self) -> tuple:
        return tensor_sha256(self.x_t), tuple(self.t.tolist())


def noised(runner: ModelRunner, latents: Tensor, zero_snr: bool) -> Noised:
    """``bin_samples`` samples a bin, spread evenly over its timesteps; which pictures and what noise follow from the seed."""
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
    """What a model takes for the noise in x_t (B, C, h, w) -> (B, C, h, w) float32 on its device."""
    x_t, t = x_t.to(device), t.to(device)
    out = teacher.predict(x_t, t, rows).out
    return NoiseSchedule(teacher.zero_snr).to_eps(out, x_t, t, teacher.prediction)


def predictions(
    runner: ModelRunner, ref: ModelRef, load: Callable[[], Teacher], asked: Noised, *, style: int | None = None
) -> Tensor:
    """A model's eps for all samples of a style (S, C, h, w) float32."""

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
    """Predictions by style, as ``predictions`` gives them -> error of every sample (N, S)."""
    return torch.stack([score_loss(a, b) for a, b in zip(guesses, teacher)])


def eps_agreement(
    names: Sequence[str], settings: EvaluationSettings, student: Tensor, base: Tensor | None
) -> EpsAgreement:
    """From the errors (N, S) of the student and of the base."""

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
    """Mean error by style, and over the base's error, from errors (N, S) whose samples go up in t.

    The spread is the standard error of a stratified mean: within each bin of timesteps the samples are taken as independent draws. Sample
    k has one picture place and one noise for every style and model, so means over styles and ratios to the base keep what they share; a
    ratio's is that of its linearisation, mean(e - R e_base) / mean(e_base).
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
    """Standard error of the means of rows (N, bins * k), bin by bin; None with one sample a bin."""
    x = samples.unflatten(1, (bins, -1))  # (N, bins, k)
    if x.shape[2] < 2:
        return [None] * len(x)
    return ((x.var(2) / x.shape[2]).sum(1).sqrt() / bins).tolist()
