"""Plain eps-prediction training (DDPM, arXiv:2006.11239, eq. 14) for the demo family's base, teachers, ControlNet and LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dmm_core.schedule import NoiseSchedule
from ..loop.ema import PowerEMA

Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, 4, h, w), t (B,), context (B, 77, d), indices (B,) of the samples) -> eps (B, 4, h, w)"""


def fit(
    predict: Predict,
    params: Sequence[tuple[str, nn.Parameter]],
    latents: Tensor,
    context_rows: Tensor,
    *,
    contexts: Tensor,
    samples: int,
    lr: float,
    batch: int = 32,
    caption_dropout: float = 0.1,
    offset: float = 0.0,
    seed: int = 0,
    progress=None,
) -> dict[str, Tensor]:
    """Train ``params`` in place for ``samples`` samples and return their averages (name -> tensor).

    latents (M, 4, h, w) scaled; context_rows (M,) indices into contexts (U, 77, d), row 0 being the empty prompt.

    offset: standard deviation of a constant added to the noise of each channel ("offset noise"), with half of the samples
    from the noisiest 300 timesteps. Without it a network of 16x16 latents takes colour and brightness from the mean of the
    starting noise, because the schedule leaves 7% of the picture in x_999, and not from the caption.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule = NoiseSchedule()
    trainable = [p for _, p in params]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    steps = samples // batch
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=min(0.1, 200 / steps))
    ema = PowerEMA(params)
    for step in range(steps):
        index = torch.randint(len(latents), (batch,), generator=generator)
        x0 = latents[index]
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        if offset:
            eps = eps + offset * torch.randn(*x0.shape[:2], 1, 1, generator=generator)
            t = torch.where(torch.rand(batch, generator=generator) < 0.5, 700 + t * 3 // 10, t)
        rows = context_rows[index]
        rows = torch.where(torch.rand(batch, generator=generator) < caption_dropout, 0, rows)
        x_t = schedule.add_noise(x0, eps, t)
        with torch.autocast("cpu", torch.bfloat16):
            out = predict(x_t, t, contexts[rows], index)
        loss = F.mse_loss(out.float(), eps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        rate.step()
        ema.update(params)
        if progress:
            progress(step + 1, steps, loss.item())
    return ema.state_dict()
