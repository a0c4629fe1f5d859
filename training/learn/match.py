"""Which blend of a model's styles explains given pictures best: the model as its own classifier, for shares instead of names.

With masses m on the simplex (of the styles, and of none) the error is E ||eps - eps_th(x_t, t, c; m)||^2. Around a point m0,

    eps_th(m) ~ sum_i m_i f_i,    f_i = eps_th(m0) + (eps_th(m0 + d (e_i - m0)) - eps_th(m0)) / d

because the m_i sum to 1: the error is m^T G m with G_ij = E <eps - f_i, eps - f_j>, a small quadratic programme. The first point needs
no m0: with d = 1, f_i is what the model predicts in style i alone. From its answer on it is Gauss-Newton with finite differences, so
nothing but forwards is needed. Timesteps and noise are shared by all candidates (``evaluation.identify``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.style_value import NO_STYLE, quote_name
from ..evaluation.identify import spread_timesteps
from ..progress import ProgressCallback
from ..seeds import hash_seed
from ..teachers.teacher import Teacher
from .pictures import Examples

ROUNDS = 2
STEP = 0.25
"""d of the rounds after the first."""
LEAST = 0.03
"""Shares below this are left out of the answer."""
QUESTIONS = 192
"""(t, eps) that all pictures together are asked about, where nothing else is said."""


@dataclass(frozen=True)
class Match:
    """names: the styles, and perhaps "none". shares: of each, (K,), summing to 1. error: mean squared error in eps of the blend on draws
    that did not choose it; errors (K,): of each candidate alone."""

    names: list[str]
    shares: list[float]
    error: float
    errors: list[float]

    @property
    def text(self) -> str:
        """The blend as a style field takes it: "ink:0.62, candy:0.38"."""
        kept = {name: share for name, share in zip(self.names, self.shares) if share >= LEAST}
        total = sum(kept.values())
        parts = sorted(kept.items(), key=lambda item: -item[1])
        written = [f"{quote_name(name) if name != NO_STYLE else name}:{share / total:.2f}" for name, share in parts]
        return written[0].rpartition(":")[0] if len(parts) == 1 else ", ".join(written)

    def report(self, remarks: Sequence[str] = ()) -> str:
        """The blend, and the error of each style alone, best first; then what else is to be said."""
        best = min(self.errors)
        lines = [self.text, f"error of the blend {self.error:.5f}"]
        order = sorted(range(len(self.names)), key=self.errors.__getitem__)
        width = max(map(len, self.names))
        lines += [f"{self.names[i]:<{width}}  alone {self.errors[i]:.5f}" for i in order]
        if self.error > 0.98 * best and max(self.shares) < 0.9:
            lines.append(f"{self.names[order[0]]} alone explains the pictures about as well as the blend")
        return "\n".join([*lines, *(f"- {remark}" for remark in remarks)])

    def weights(self) -> list[float]:
        """Shares of the styles alone, in the model's order, without "none"."""
        return [share for name, share in zip(self.names, self.shares) if name != NO_STYLE]


@torch.no_grad()
def match_blend(
    model: Teacher,
    styles: Sequence[str],
    examples: Examples,
    rows: Tensor,
    *,
    draws: int = 0,
    seed: int = 0,
    with_none: bool = True,
    batch: int = 32,
    progress: ProgressCallback | None = None,
) -> Match:
    """The blend of a DMM model's ``styles`` that is nearest to the pictures.

    model: on the device where it computes. rows: (M,) captions of the pictures, as rows of its text states. draws: (t, eps) for each
    picture, 0 for so many that all pictures have ``QUESTIONS`` together, and 4 each at least. A third of the draws does not choose but
    judges. Raises ValueError where the names do not fit the model.
    """
    count = model.unet.config.num_styles
    if not count or len(styles) != count:
        raise ValueError(f"{len(styles)} names for a model with {count} styles")
    names = [*styles, NO_STYLE] if with_none else list(styles)
    draws = draws or max(4, -(-QUESTIONS // len(examples)))
    if draws < 2:
        raise ValueError(f"draws is {draws}: expected 2 or more, or 0 for as many as are usual")
    asked = Questions(model, examples, rows, draws=draws, seed=seed, batch=batch)
    corners = torch.eye(len(names), dtype=torch.float64)
    total = asked.batches * (len(names) + (ROUNDS - 1) * (len(names) + 1) + 1)
    done = 0

    def residuals(points: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """(points, values) of these batches, at masses (points, K)."""
        nonlocal done
        groups = []
        for number in numbers:
            each = []
            for point in points:
                each.append(asked.residual(number, point[:count]))
                done += 1
                if progress:
                    progress(min(done, total), total, "comparing styles")
            groups.append(torch.stack(each))
        return groups

    choosing, judging = asked.split()
    alone = dict(enumerate(residuals(corners, range(asked.batches))))
    errors = gram_of(list(alone.values())).diagonal().tolist()
    shares = simplex_minimum(gram_of([alone[number] for number in choosing]))
    for _ in range(ROUNDS - 1):
        points = torch.cat([shares[None], (1 - STEP) * shares + STEP * corners])
        groups = residuals(points, choosing)
        shares = simplex_minimum(gram_of([group[:1] + (group[1:] - group[:1]) / STEP for group in groups]))
    error = gram_of(residuals(shares[None], judging)).item()
    if progress:
        progress(total, total, "comparing styles")
    judged = gram_of([alone[number] for number in judging]).diagonal()
    best = int(judged.argmin())
    if judged[best] < error:  # what the blend gained where it was chosen, it did not keep
        shares, error = corners[best], judged[best].item()
    return Match(names, shares.tolist(), error, errors)


def gram_of(groups: Sequence[Tensor]) -> Tensor:
    """Mean products (points, points), float64, of residuals (points, values) in several batches."""
    size = sum(group.shape[1] for group in groups)
    return torch.stack([group.double() @ group.double().T for group in groups]).sum(0) / size


class Questions:
    """What a model is asked about pictures: (t, eps) for each, in batches of one size."""

    def __init__(self, model: Teacher, examples: Examples, rows: Tensor, *, draws: int, seed: int, batch: int):
        self.model, self.schedule = model, NoiseSchedule(model.zero_snr)
        self.device = next(model.unet.parameters()).device
        g = torch.Generator().manual_seed(hash_seed(seed, "match"))
        t = torch.stack([spread_timesteps(draws, g) for _ in rows])
        noise = [[torch.randn(latent.shape, generator=g) for _ in range(draws)] for latent in examples.latents]
        self.batch_list: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        # Draw by draw, so that every batch asks about many pictures.
        order = [(i, k) for k in range(draws) for i in range(len(examples))]
        for size in sorted({tuple(latent.shape) for latent in examples.latents}):
            mine = [(i, k) for i, k in order if tuple(examples.latents[i].shape) == size]
            pieces = max(min(3, len(mine)), -(-len(mine) // batch))
            for piece in range(pieces):
                part = mine[piece::pieces]
                x0 = torch.stack([examples.latents[i] for i, _ in part])
                eps = torch.stack([noise[i][k] for i, k in part])
                times = torch.stack([t[i, k] for i, k in part])
                self.batch_list.append((x0, eps, times, torch.stack([rows[i] for i, _ in part])))

    @property
    def batches(self) -> int:
        return len(self.batch_list)

    def split(self) -> tuple[list[int], list[int]]:
        """The batches that choose a blend, and every third one, which judges it; where there are fewer than three, all do both."""
        every = list(range(self.batches))
        return ([i for i in every if i % 3 != 2], every[2::3]) if self.batches > 2 else (every, every)

    def residual(self, number: int, masses: Tensor) -> Tensor:
        """eps minus what the model predicts at the styles' masses (N,), flat, float32 on the CPU."""
        x0, eps, t, rows = self.batch_list[number]
        x_t = self.schedule.add_noise(x0, eps, t).to(self.device)
        out = self.model.predict(x_t, t.to(self.device), rows, masses_row(masses)).out.float()
        found = self.schedule.to_eps(out, x_t, t.to(self.device), self.model.prediction)
        return (eps - found.cpu()).flatten()


def masses_row(masses: Tensor) -> Tensor:
    """Masses (N,) of the styles, at most 1 together, as a style row (1, N+1)."""
    strength = masses.sum()
    weights = masses / strength if strength > 1e-9 else torch.zeros_like(masses)
    return torch.cat([weights, strength[None]])[None].float()


def simplex_minimum(gram: Tensor, steps: int = 20_000) -> Tensor:
    """The w (K,), w >= 0, sum 1, with the least w^T G w, for a positive semidefinite G (K, K), float64: projected gradient with
    Nesterov's momentum, which begins anew where it points uphill (arXiv:1204.3982)."""
    gram = gram.double()
    rate = 1 / max(2 * torch.linalg.eigvalsh(gram)[-1].item(), 1e-30)
    w = torch.full((len(gram),), 1 / len(gram), dtype=torch.float64)
    y, momentum = w, 1.0
    for _ in range(steps):
        new = onto_simplex(y - rate * 2 * gram @ y)
        if (y - new) @ (new - w) > 0:  # the momentum points uphill
            momentum = 1.0
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        y = new + (momentum - 1) / after * (new - w)
        moved, w, momentum = (new - w).abs().max().item(), new, after
        if moved < 1e-12:
            break
    return w


def onto_simplex(v: Tensor) -> Tensor:
    """The nearest point (K,) with w >= 0 and sum 1 (Duchi et al., ICML 2008, Fig. 1)."""
    u = v.sort(descending=True).values
    excess = (u.cumsum(0) - 1) / torch.arange(1, len(v) + 1, dtype=v.dtype)
    last = int((u > excess).nonzero().max())
    return (v - excess[last]).clamp(min=0)
