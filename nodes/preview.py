"""What the student paints while it learns: one picture per style, same noise and caption every time."""

from __future__ import annotations

import logging

import torch
from PIL import Image

from ..dmm_core.sampling import cfg_denoiser, host_noise, sample, sigmas_for
from ..dmm_core.style import style_row
from ..training.images import grid
from ..training.loop import Distillation

logger = logging.getLogger(__name__)

STEPS = 8
COLUMNS = 4
LARGEST = 512
"""Pixels of the longer side of what is sent to the browser."""


class PreviewPainter:
    """Paints up to 16 styles, one at a time. A preview that fails is reported once and never ends the run."""

    def __init__(self, run: Distillation, vae):
        self.run, self.vae, self.broken = run, vae, False
        rows = run.data.rows
        self.prompt = int(rows[0])

    def picture(self) -> tuple[str, Image.Image, int] | None:
        """("JPEG", picture, size limit) as the host's progress bar takes it, or None if it could not be made."""
        if self.broken:
            return None
        try:
            return ("JPEG", self._paint(), LARGEST)
        except Exception as error:  # out of memory, or a VAE of another family; an interrupt is no Exception and passes
            self.broken = True
            logger.warning("no previews from here on: %s", error)
            return None

    @torch.no_grad()
    def _paint(self) -> Image.Image:
        run = self.run
        styles = range(min(run.num_styles, 16))
        shape = (1, *run.data.latents.shape[1:])
        sigmas = sigmas_for(run.schedule, STEPS, "karras").to(run.device)
        noise = host_noise(shape, 0).to(run.device)
        y = run.base.y
        latents = []
        with run.averaged():
            for style in styles:
                denoiser = cfg_denoiser(
                    run.student,
                    run.schedule,
                    run.base.contexts[self.prompt : self.prompt + 1].to(run.device),
                    run.base.contexts[:1].to(run.device),
                    4.0,
                    style=style_row(run.num_styles, style).to(run.device),
                    y=None if y is None else y[self.prompt : self.prompt + 1].to(run.device),
                    uncond_y=None if y is None else y[:1].to(run.device),
                    prediction=run.base.prediction,
                )
                latents.append(sample(denoiser, run.schedule, noise, sigmas, "dpmpp_2m"))
        pictures = [self._decode(latent) for latent in latents]
        names = [run.teachers[i].name for i in styles]
        columns = min(COLUMNS, len(pictures))
        rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
        rows[-1] += [None] * (columns - len(rows[-1]))
        return grid(rows, [", ".join(names[i : i + columns]) for i in range(0, len(names), columns)])

    def _decode(self, latent: torch.Tensor) -> Image.Image:
        scale = 0.13025 if self.run.base.y is not None else 0.18215
        image = self.vae.decode(latent.float().cpu() / scale)[0]  # (H, W, 3) in 0..1
        return Image.fromarray((image.detach().float().cpu().numpy() * 255).clip(0, 255).astype("uint8"))
