"""Sampling as the host's KSampler does it: noise levels, samplers and classifier-free guidance, without the host.

Everything works on x = x0 + sigma eps (EDM, Karras et al., arXiv:2206.00364). The model call is

    model_fn(x (B, C, h, w), sigma (B,)) -> denoised (B, C, h, w)

and a network's own parameterisation (scaled input, timesteps, eps or v) ends in ``cfg_denoiser``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from .schedule import NoiseSchedule, check_prediction, predicted_x0

Denoiser = Callable[[Tensor, Tensor], Tensor]
StyleRows = Tensor | Callable[[Tensor], Tensor]
"""Style rows (B or 1, N+1), or a function of the timesteps (B,) that gives them."""
Callback = Callable[[int, Tensor, Tensor, int], object]
"""(step from 0, denoised, x, number of steps): the host's argument order. It may raise to stop the sampling."""


# --- noise levels -----------------------------------------------------------------------------------------------------


def normal_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced timesteps, both ends included."""
    return schedule.sigma_from_t(torch.linspace(len(schedule) - 1, 0, steps))


def sgm_uniform_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Evenly spaced timesteps without the last: the step to 0 is as long as the others."""
    return schedule.sigma_from_t(torch.linspace(len(schedule) - 1, 0, steps + 1)[:-1])


def simple_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Every (1000 / steps)-th timestep, counted from the top and rounded down."""
    stride = len(schedule) / steps
    return schedule.sigmas[[-1 - int(i * stride) for i in range(steps)]]


def ddim_uniform_sigmas(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Every (1000 // steps)-th timestep from 1 (arXiv:2010.02502); more than ``steps`` unless it divides 1000."""
    return schedule.sigmas[1 :: len(schedule) // steps].flip(0)


def karras_sigmas(schedule: NoiseSchedule, steps: int, rho: float = 7.0) -> Tensor:
    """Even steps in sigma^(1/rho) (eq. 5 of arXiv:2206.00364)."""
    low, high = schedule.sigma_min ** (1 / rho), schedule.sigma_max ** (1 / rho)
    return (high + torch.linspace(0, 1, steps) * (low - high)) ** rho


SCHEDULERS = {
    "normal": normal_sigmas,
    "karras": karras_sigmas,
    "simple": simple_sigmas,
    "ddim_uniform": ddim_uniform_sigmas,
    "sgm_uniform": sgm_uniform_sigmas,
}


def sigmas_for(schedule: NoiseSchedule, steps: int, scheduler: str) -> Tensor:
    """The host's noise levels: falling, then 0; (steps + 1,) float32 on the CPU ("ddim_uniform" may make more).

    Raises ValueError for an unknown scheduler and for steps outside 1..1000.
    """
    choose(SCHEDULERS, "scheduler", scheduler)
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps is {steps}: choose 1 to {len(schedule)}")
    return torch.cat([SCHEDULERS[scheduler](schedule, steps), torch.zeros(1)])


# --- samplers ---------------------------------------------------------------------------------------------------------


# A step takes x (B, C, h, w) from noise level sigmas[i] to sigmas[i + 1]. denoised: the model's answer at sigmas[i];
# last: its answer at sigmas[i - 1], None in the first step.


def euler_step(x: Tensor, denoised: Tensor, sigmas: Sequence[float], i: int, *, last: Tensor | None) -> Tensor:
    """Euler on dx/dsigma = (x - denoised) / sigma, which is deterministic DDIM (eq. 13 and 14 of arXiv:2010.02502)."""
    ratio = sigmas[i + 1] / sigmas[i]
    return ratio * x + (1 - ratio) * denoised


def dpmpp_2m_step(x: Tensor, denoised: Tensor, sigmas: Sequence[float], i: int, *, last: Tensor | None) -> Tensor:
    """DPM-Solver++(2M) (Algorithm 2 of arXiv:2211.01095) with lambda = -log sigma; first order at both ends."""
    if last is not None and sigmas[i + 1] > 0:
        h_last, h = math.log(sigmas[i - 1] / sigmas[i]), math.log(sigmas[i] / sigmas[i + 1])
        denoised = denoised + (denoised - last) * (h / (2 * h_last))
    # alpha is 1 in this space, so the exponential integrator's weights exp(-h) and 1 - exp(-h) are Euler's.
    return euler_step(x, denoised, sigmas, i, last=None)


SAMPLERS = {"dpmpp_2m": dpmpp_2m_step, "ddim": euler_step, "euler": euler_step}


@torch.no_grad()
def sample(
    model_fn: Denoiser,
    schedule: NoiseSchedule,
    noise: Tensor,
    sigmas: Tensor,
    *,
    sampler: str = "dpmpp_2m",
    callback: Callback | None = None,
) -> Tensor:
    """Standard normal noise (B, C, h, w) and falling noise levels (steps + 1,) -> latents x0 of the same shape, scaled.

    The callback runs after each model call, before the step; what it raises passes through. Raises ValueError for an
    unknown sampler and for levels that do not fall.
    """
    choose(SAMPLERS, "sampler", sampler)
    levels = sigmas.tolist()
    if len(levels) < 2 or any(not low < high for high, low in itertools.pairwise(levels)):
        raise ValueError(f"sigmas must be at least two falling noise levels, got {levels[:8]}")
    # From the schedule's top x_t is the noise itself, and x = x_t / sqrt(abar); from below, x is empty latents + noise.
    from_the_top = levels[0] > schedule.sigma_max or math.isclose(levels[0], schedule.sigma_max, rel_tol=1e-5)
    x = noise * (math.sqrt(1 + levels[0] ** 2) if from_the_top else levels[0])
    last, steps = None, len(levels) - 1
    for i in range(steps):
        denoised = model_fn(x, sigmas[i].to(x.device).expand(len(x)))
        if callback is not None:
            callback(i, denoised, x, steps)
        x = SAMPLERS[sampler](x, denoised, levels, i, last=last)
        last = denoised
    return x


# --- the model --------------------------------------------------------------------------------------------------------


def cfg_denoiser(
    unet: nn.Module,
    schedule: NoiseSchedule,
    context: Tensor,
    uncond_context: Tensor | None = None,
    *,
    cfg: float = 1.0,
    style: StyleRows | None = None,
    uncond_style: StyleRows | None = None,
    y: Tensor | None = None,
    uncond_y: Tensor | None = None,
    prediction: str = "eps",
) -> Denoiser:
    """The denoiser of a UNet under classifier-free guidance (arXiv:2207.12598), with one forward of the UNet a call.

    context and uncond_context: (B, L, d), of any two lengths; y and uncond_y: (B, adm), SDXL only; style and
    uncond_style: ``StyleRows``. Each may also be one row for all of the batch. uncond_style defaults to style, as in
    the DMM paper (pass ``no_style_row`` for none). cfg 1 leaves the unconditional half out.

    The UNet gets its own dtype; guidance happens in the dtype of x. Raises ValueError for an unknown prediction, for
    missing unconditional inputs, and, when called, for rows that do not fit the batch.
    """
    check_prediction(prediction)
    guided = not math.isclose(cfg, 1.0)
    if guided:
        if uncond_context is None:
            raise ValueError(f"cfg {cfg} needs an unconditional context: pass the empty prompt's, or cfg 1")
        if y is not None and uncond_y is None:
            raise ValueError(f"cfg {cfg} with a pooled conditioning needs uncond_y: pass the empty prompt's, or cfg 1")
        context, uncond_context = to_one_length(context, uncond_context)
    if uncond_style is None:
        uncond_style = style
    elif style is None and guided:
        style = functools.partial(_no_styles, uncond_style)
    halves: dict[str, tuple[StyleRows | None, ...]] = {
        "context": (context, uncond_context),
        "style": (style, uncond_style),
        "y": (y, uncond_y),
    }
    dtype = next(unet.parameters()).dtype

    def rows(name: str, t: Tensor) -> Tensor | None:
        """One input for the whole forward: conditional rows, then unconditional ones."""
        used = halves[name] if guided else halves[name][:1]
        if used[0] is None:
            return None
        values = [half(t) if callable(half) else half for half in used if half is not None]
        return torch.cat([fit_rows(name, value, len(t)) for value in values]).to(dtype)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        t = schedule.t_from_sigma(sigma)
        context, style, y = (rows(name, t) for name in ("context", "style", "y"))
        sigma = sigma[:, None, None, None]  # (B,) -> (B, 1, 1, 1)
        signal = (1 + sigma**2).rsqrt()
        x_t = signal * x
        x_in, t = (x_t.repeat(2, 1, 1, 1), t.repeat(2)) if guided else (x_t, t)  # (B, ...) -> (2B, ...)
        out = unet(x_in.to(dtype), t, context, y=y, style=style).to(x.dtype)
        if guided:
            cond, uncond = out.chunk(2)
            out = uncond + cfg * (cond - uncond)
        return predicted_x0(out, x_t, signal, sigma * signal, prediction=prediction)

    return denoise


def _no_styles(like: StyleRows, t: Tensor) -> Tensor:
    """Rows of "no style" in the shape of other style rows."""
    return torch.zeros_like(like(t) if callable(like) else like)


def fit_rows(name: str, value: Tensor, batch: int) -> Tensor:
    """(1 or batch, ...) -> (batch, ...). Raises ValueError for any other number of rows."""
    if len(value) not in (1, batch):
        raise ValueError(f"{name} has {len(value)} rows for a batch of {batch}: pass one row per picture, or one row")
    return value.expand(batch, *value.shape[1:])


def to_one_length(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts (B, L, d) of two lengths, each repeated to a common one: attention to repeated tokens is unchanged."""
    length = math.lcm(a.shape[1], b.shape[1])
    return a.repeat(1, length // a.shape[1], 1), b.repeat(1, length // b.shape[1], 1)


def host_noise(shape: Sequence[int], seed: int) -> Tensor:
    """The host's noise (float32, CPU) for an empty latent batch of this shape and seed, without its global generator.

    Raises ValueError for a seed outside 0..2^64 - 1.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: choose 0 to {2**64 - 1}")
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def choose(known: Collection[str], what: str, name: str) -> None:
    """Raises ValueError that lists the known names for one that is not among them; what: what they are names of."""
    if name not in known:
        raise ValueError(f"unknown {what} '{name}': choose one of {', '.join(known)}")
