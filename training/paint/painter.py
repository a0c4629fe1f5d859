"""Painting without ComfyUI: prompts and styles to pictures, with the noise and the numbers that ComfyUI's KSampler
has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from ...dmm_core.bank import bank_masses, folded_bank
from ...dmm_core.checkpoint import Checkpoint
from ...dmm_core.sampling import Callback, StyleRows, cfg_denoiser, host_noise, sample, sigmas_for
from ...dmm_core.schedule import NoiseSchedule
from ...dmm_core.sdxl import sdxl_vector
from ...dmm_core.style_value import NONE, Mix, Strength, Style, mix, parse_style, progress_at, style_rows, vocabulary
from ...dmm_core.unet import UNet, load_unet
from ...dmm_core.vae import AutoencoderKL, latent_scale, load_vae
from ..text import ClipText
from .images import decode_to_pil


@dataclass
class Settings:
    """Sampling settings under the host's names. width and height in pixels; ValueError for sizes that are no multiples
    of 8."""

    steps: int = 20
    cfg: float = 4.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"
    width: int = 512
    height: int = 512
    negative: str = ""

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < 8 or value % 8:
                raise ValueError(f"{name} is {value}: it must be a multiple of 8")


@dataclass
class Painter:
    """A checkpoint ready to paint. ``text`` and ``vae`` may come from another checkpoint when the model's own file
    lacks them."""

    unet: UNet
    text: ClipText
    vae: AutoencoderKL
    styles: Sequence[str] = ()
    prediction: str = "eps"
    zero_snr: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def style(self, text: str | None) -> Style:
        """A style by its exact name or in text form (``parse_style``); None is no style.

        Raises ValueError that lists the known names for an unknown one.
        """
        if text is None:
            return NONE
        style = Mix(((text, 1.0),)) if text in self.styles else parse_style(text)
        style.check(vocabulary(self.styles))
        return style

    def style_row(self, style: str | Mapping[str, float] | None, strength: float = 1.0) -> Tensor:
        """A style by name or text, or a blend {name: weight}, as it is when the sampling begins -> (1, N+1)."""
        value = mix(style) if isinstance(style, Mapping) else self.style(style)
        return style_rows(Strength(value, strength), vocabulary(self.styles))

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        style: Tensor | Style | None,
        seed: int,
        settings: Settings,
        *,
        same_noise: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """Prompts (B) and style rows (B or 1, N+1), or a Style, which may change over the steps -> latents (B, 4, h,
        w), scaled.

        The noise is the host's for an empty latent of batch B and this seed; ``same_noise`` gives every row the first
        one's. Raises ValueError for an SDXL model with a text encoder that gives no pooled text.
        """
        count, config = len(prompts), self.unet.config
        shape = (count, config.in_channels, settings.height // 8, settings.width // 8)
        noise = host_noise((1, *shape[1:]), seed).expand(shape) if same_noise else host_noise(shape, seed)
        context, pooled = self.text.encode_pooled([*prompts, settings.negative])
        y = None
        if config.adm_channels:
            if pooled is None:
                raise ValueError(
                    "the model is an SDXL model and the text encoder is not: take it from an SDXL checkpoint"
                )
            y = sdxl_vector(pooled, settings.height, settings.width).to(self.device)
        rows: StyleRows | None = None
        if isinstance(style, Style):
            rows = self._rows_at(style, count)
        elif style is not None:
            rows = style.expand(count, -1).to(self.device)
        context = context.to(self.device)
        schedule = NoiseSchedule(self.zero_snr)
        denoiser = cfg_denoiser(
            self.unet,
            schedule,
            context[:-1],
            context[-1:].expand(count, -1, -1),
            cfg=settings.cfg,
            style=rows if self.styles else None,
            y=None if y is None else y[:-1],
            uncond_y=None if y is None else y[-1:].expand(count, -1),
            prediction=self.prediction,
        )
        sigmas = sigmas_for(schedule, settings.steps, settings.scheduler)
        noise, sigmas = noise.to(self.device), sigmas.to(self.device)
        return sample(denoiser, schedule, noise, sigmas, sampler=settings.sampler, callback=callback)

    def _rows_at(self, style: Style, count: int) -> Callable[[Tensor], Tensor]:
        """Timesteps (B,), all equal -> the style rows at that moment."""
        known = vocabulary(self.styles)

        def rows(t: Tensor) -> Tensor:
            return style_rows(style, known, progress_at(t[0].item()), count).expand(count, -1).to(self.device)

        return rows

    def in_weights(self, row: Tensor) -> Painter:
        """This painter for one style row (1, N+1) and no other: what the bank adds is in the weights, but for rounding, and no step
        computes it. Half the time at the demo family's size. Itself without a bank."""
        bank = self.unet.config.bank
        if bank is None:
            return self
        weights = folded_bank(self.unet.state_dict(), bank_masses(row.to(self.device), bank.cores)[0])
        unet = load_unet(weights, copy=False, heads=self.unet.config.num_heads)
        return replace(self, unet=unet.to(self.device).eval())

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> list[Image.Image]:
        """Scaled latents (B, 4, h, w) -> B pictures."""
        return decode_to_pil(self.vae, latents, latent_scale(self.unet.config))


def painter(checkpoint: Checkpoint, companion: Checkpoint | None = None, device: torch.device | None = None) -> Painter:
    """A Painter from a checkpoint; text encoder and VAE missing there are taken from ``companion``.

    Raises ValueError saying which of the two neither of them has.
    """
    device = device or torch.device("cpu")
    text, clip_skip = checkpoint.encoder(companion)
    vae = checkpoint.vae or (companion.vae if companion else {})
    for weights, what in ((text, "text encoder"), (vae, "VAE")):
        if not weights:
            raise ValueError(f"the checkpoint has no {what}: name a full checkpoint of the same family to take it from")
    return Painter(
        load_unet(checkpoint.unet, heads=checkpoint.heads).to(device).eval(),
        ClipText(text, clip_skip).to(device),
        load_vae(vae).to(device).eval(),
        styles=[style.name for style in checkpoint.styles],
        prediction=checkpoint.prediction,
        zero_snr=checkpoint.zero_snr,
        device=device,
    )
