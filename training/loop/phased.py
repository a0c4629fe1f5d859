"""The maths of phased consistency distillation (arXiv:2405.18407, Sec. 3; cf. 2403.06807): few steps, each of them to the edge of a phase.

The probability flow of a frozen model phi runs from timestep 999 to the clean picture. It is cut into phases at the timesteps that
the sampler will visit. A student learns, from any state x_t, where that path crosses the lower edge s of t's phase:

    f(x_t) = D(x_t, out, t -> s),  one step of DDIM (eq. 12 of arXiv:2010.02502)

so that ``euler`` with as many steps as phases lands on the edges. It learns this from itself: x' is phi's own short step from x_t down
the path, and f(x_t) must be what f says of x'.

Timesteps are integers; ``CLEAN`` (-1) stands for the picture itself, below timestep 0. Pure: no network here, no random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...dmm_core.sampling import sgm_uniform_sigmas
from ...dmm_core.schedule import NoiseSchedule, check_prediction

CLEAN = -1
SAMPLER, SCHEDULER = "euler", "sgm_uniform"
"""With which a few-step model paints, as ComfyUI's KSampler calls them."""


@dataclass(frozen=True)
class Phases:
    """``count`` phases of a noise schedule, for a network that predicts ``prediction`` ("eps" or "v").

    All of it is linear in the network's output, and stays finite where a schedule ends in pure noise (zero terminal SNR) if that is v.
    """

    schedule: NoiseSchedule
    count: int
    prediction: str = "eps"

    def __post_init__(self) -> None:
        check_prediction(self.prediction)

    @cached_property
    def edges(self) -> list[int]:
        """Falling, ``count`` + 1: the timesteps that the host's ``euler`` + ``sgm_uniform`` tells the UNet in ``count`` steps, and CLEAN.
        Of 4: 999, 749, 500, 250, -1. (The host asks at 749.25, 499.5 and 249.75.)"""
        return [*self.schedule.t_from_sigma(sgm_uniform_sigmas(self.schedule, self.count)).tolist(), CLEAN]

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """alpha and sigma (x_t = alpha x0 + sigma eps) of CLEAN, 0, ..., 999: (1001,) each, float32."""
        steps = torch.arange(len(self.schedule))
        alpha, sigma = (c.flatten() for c in self.schedule.coefficients(steps, steps[:, None]))
        return torch.cat([alpha.new_ones(1), alpha]), torch.cat([sigma.new_zeros(1), sigma])

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps (B,), CLEAN among them -> alpha, sigma, float32, shaped to multiply ``like`` (B, ...)."""
        shape = (-1, *(1,) * (like.ndim - 1))
        alpha, sigma = (table[t.cpu() + 1].view(shape).to(like.device) for table in self._table)
        return alpha, sigma

    def below(self, t: Tensor) -> Tensor:
        """s: the edge below each timestep (B,), of which an edge is the top of the phase under it."""
        rising = torch.tensor(self.edges[::-1], device=t.device)
        return rising[torch.searchsorted(rising, t) - 1]

    def next(self, t: Tensor, skip: int) -> Tensor:
        """t' = max(t - skip, s): where phi's own step from t ends, in the same phase."""
        return torch.maximum(t - skip, self.below(t))

    def step(self, x_t: Tensor, out: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """D(x_t, out, t -> s) = alpha_s x0 + sigma_s eps, with the x0 and eps that the output at (x_t, t) stands for; float32."""
        alpha, sigma = self.coefficients(t, x_t)
        alpha_s, sigma_s = self.coefficients(s, x_t)
        x_t, out = x_t.float(), out.float()
        if self.prediction == "eps":
            return alpha_s * (x_t - sigma * out) / alpha + sigma_s * out
        return alpha_s * (alpha * x_t - sigma * out) + sigma_s * (sigma * x_t + alpha * out)

    def slope(self, t: Tensor, s: Tensor, like: Tensor) -> Tensor:
        """|df/dout| of ``step``, shaped to multiply ``like``: how far its result moves where the output moves by 1. Never 0 for s < t."""
        alpha, sigma = self.coefficients(t, like)
        alpha_s, sigma_s = self.coefficients(s, like)
        if self.prediction == "eps":
            return (sigma_s - alpha_s * sigma / alpha).abs()
        return (sigma_s * alpha - alpha_s * sigma).abs()


def guided(cond: Tensor, null: Tensor, cfg: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598), each row by its own cfg (B,)."""
    return null + cfg.to(null.device).view(-1, *(1,) * (null.ndim - 1)) * (cond - null)


def huber_loss(ours: Tensor, target: Tensor, slope: Tensor, c: float) -> Tensor:
    """Of two states (B, C, h, w), per row: the mean of sqrt(d^2 + c^2) - c, with d = (ours - target) / slope the error in the network's
    output. Near 0 it is d^2 / 2c, far out |d|. (B,) float32; c = 0: |d| everywhere."""
    d = (ours - target) / slope
    return ((d.square() + c * c).sqrt() - c).mean(dim=(1, 2, 3))
