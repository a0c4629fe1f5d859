"""Painting captions whose text states are already there: for teachers, for pictures during a run, and for
evaluations."""

from __future__ import annotations

import torch
from torch import Tensor

from ...dmm_core.sampling import Callback, cfg_denoiser, sample, sigmas_for
from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.unet import UNet
from ..teachers.teacher import Teacher


def paint_rows(
    unet: UNet,
    text: Teacher,
    rows: Tensor,
    noise: Tensor,
    *,
    steps: int,
    cfg: float,
    style: Tensor | None = None,
    sampler: str = "dpmpp_2m",
    scheduler: str = "karras",
    callback: Callback | None = None,
) -> Tensor:
    """Noise (B, C, h, w) on the UNet's device -> latents (B, C, h, w) there, scaled as the UNet sees them.

    text: the teacher whose text states, parameterisation and noise schedule the UNet has; rows: (B,) captions, as rows
    of its text states. style: a style row (1, N+1) or None. steps, cfg, sampler, scheduler: as of the host's KSampler.
    """
    schedule, device = NoiseSchedule(text.zero_snr), noise.device
    # One lookup, so that captions and the empty prompt come in one length: (2B, L, d)
    context, y = text.conditioning(torch.cat([rows, torch.zeros_like(rows)]), noise.shape[2:], device)
    (context, empty), (y, empty_y) = context.chunk(2), (None, None) if y is None else y.chunk(2)
    style = None if style is None else style.to(device)
    denoiser = cfg_denoiser(
        unet, schedule, context, empty, cfg=cfg, style=style, y=y, uncond_y=empty_y, prediction=text.prediction
    )
    sigmas = sigmas_for(schedule, steps, scheduler).to(device)
    return sample(denoiser, schedule, noise, sigmas, sampler=sampler, callback=callback)
