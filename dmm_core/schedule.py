"""Stable Diffusion's noise schedule (1000 timesteps and the noise levels between them) and the parameterisations eps, v
and x0.

DDPM (Ho et al., arXiv:2006.11239) with the betas of latent diffusion (arXiv:2112.10752). Two spaces are in use:

- x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, what networks see and training makes (variance preserving);
- x = x_t / sqrt(abar_t) = x0 + sigma eps, sigma = sqrt((1 - abar_t) / abar_t), where samplers work (arXiv:2206.00364).
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("eps", "v", "x0")


class NoiseSchedule:
    """Float32 tables over the timesteps, on the CPU; those of ``coefficients`` are kept where they were read before, too.

    ``zero_snr``: the last step is pure noise (Lin et al., arXiv:2305.08891), as some v-prediction models are trained.
    ``betas``, ``alphas_cumprod`` (abar) and ``sigmas`` have shape (1000,); sigmas rise.
    """

    def __init__(self, zero_snr: bool = False):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, dim=0)
        if zero_snr:
            abar = rescale_to_zero_snr(abar)
            betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        # From float64: 1 - abar loses four of float32's seven digits at the first steps.
        sigmas = ((1 - abar) / abar).sqrt()
        self.betas = betas.float()
        self.alphas_cumprod = abar.float()
        self.sigmas = sigmas.float()
        self._log_sigmas = sigmas.log().float()
        self._signal, self._noise = abar.sqrt().float(), (1 - abar).sqrt().float()
        self._there = {self._signal.device: (self._signal, self._noise)}

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def sigma_min(self) -> float:
        """The noise level of timestep 0."""
        return self.sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        """The noise level of timestep 999."""
        return self.sigmas[-1].item()

    def t_from_sigma(self, sigma: Tensor) -> Tensor:
        """Noise levels (any shape) -> the nearest timesteps in log sigma, int64: what the host tells its UNet."""
        distances = sigma.float().log()[..., None] - self._log_sigmas.to(sigma.device)  # (...) -> (..., 1000)
        return distances.abs().argmin(dim=-1)

    def sigma_from_t(self, t: Tensor) -> Tensor:
        """Timesteps (any shape, clamped to 0..999; fractions interpolate log sigma) -> noise levels, float32."""
        t = t.float().clamp(0, len(self) - 1)
        low, high, w = t.floor().long(), t.ceil().long(), t.frac()
        logs = self._log_sigmas.to(t.device)
        return ((1 - w) * logs[low] + w * logs[high]).exp()

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Integer timesteps (B,) -> sqrt(abar_t), sqrt(1 - abar_t), float32, shaped to multiply ``like`` (B, ...)."""
        shape = (-1, *(1,) * (like.ndim - 1))
        if t.device not in self._there:
            self._there[t.device] = self._signal.to(t.device), self._noise.to(t.device)
        signal, noise = (table[t].view(shape) for table in self._there[t.device])
        return signal.to(like.device), noise.to(like.device)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (eq. 4 of DDPM), in the dtype of x0. t: (B,) integers."""
        signal, noise = self.coefficients(t, x0)
        return (signal * x0 + noise * eps).to(x0.dtype)

    def to_x0(self, out: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
        """A network's output of this parameterisation -> the clean latents it stands for (eq. 12 of arXiv:2504.12364),
        in the dtype of ``out``.

        Raises ValueError for a prediction that is not one of ``PREDICTIONS``.
        """
        return predicted_x0(out, x_t, *self.coefficients(t, x_t), prediction=prediction).to(out.dtype)

    def to_eps(self, out: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
        """A network's output of this parameterisation -> the noise it stands for, in the dtype of ``out``. ValueError
        as in ``to_x0``."""
        check_prediction(prediction)
        if prediction == "eps":
            return out
        signal, noise = self.coefficients(t, x_t)
        eps = noise * x_t + signal * out if prediction == "v" else (x_t - signal * out) / noise
        return eps.to(out.dtype)

    def to_v(self, out: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
        """A network's output of this parameterisation -> v = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv:2202.00512), in
        the dtype of ``out``.

        Raises ValueError as ``to_x0`` does.
        """
        check_prediction(prediction)
        if prediction == "v":
            return out
        signal, noise = self.coefficients(t, x_t)
        v = (out - noise * x_t) / signal if prediction == "eps" else (signal * x_t - out) / noise
        return v.to(out.dtype)


def predicted_x0(out: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor, *, prediction: str) -> Tensor:
    """x0 from a prediction at any noise level: x_t = signal * x0 + noise * eps with signal^2 + noise^2 = 1."""
    check_prediction(prediction)
    if prediction == "eps":
        return (x_t - noise * out) / signal
    return signal * x_t - noise * out if prediction == "v" else out


def check_prediction(prediction: str) -> None:
    """Raises ValueError for anything but "eps", "v" and "x0"."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction '{prediction}': choose one of {', '.join(PREDICTIONS)}")


def rescale_to_zero_snr(abar: Tensor) -> Tensor:
    """Shift and scale sqrt(abar) so that it ends at 0 and keeps its first value (Algorithm 1 of arXiv:2305.08891).

    The end is the host's number instead of 0: sigma stays finite, and equal to the host's.
    """
    root = abar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root.square()
    abar[-1] = 4.8973451890853435e-08
    return abar
