"""Sampling with the in-process host, watched: every call of the UNet is kept."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from comfyui_dmm.dmm_core.sdxl import SIZE_CHANNELS
from torch import Tensor

SIZE = 8


@dataclass
class Call:
    """One forward of the host's UNet: inputs, output, and 0 (positive) or 1 (negative) per chunk of the batch."""

    x: Tensor
    t: Tensor
    context: Tensor
    y: Tensor | None
    chunks: list[int]
    out: Tensor


@contextmanager
def watch(model):
    """Yield the list of calls that the UNet behind a MODEL gets inside the block."""
    calls = []

    def keep(module, args, kwargs, out):
        options = kwargs["transformer_options"]
        x, t, chunks = args[0].clone(), args[1].clone(), options["cond_or_uncond"]
        calls.append(Call(x, t, kwargs["context"], kwargs.get("y"), chunks, out.clone()))

    handle = model.model.diffusion_model.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def conditioning(config, seed: int, **entries) -> list:
    """A random prompt of a family, as the host's CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 77, config.context_dim, generator=generator)
    if config.adm_channels:
        entries["pooled_output"] = torch.randn(1, config.adm_channels - SIZE_CHANNELS, generator=generator)
    return [[context, entries]]


@torch.inference_mode()
def sample(model, positive, negative, cfg: float = 5.0, steps: int = 2, batch: int = 1, seed: int = 0) -> Tensor:
    """Latents (batch, 4, 8, 8) by the host's own KSampler code."""
    import comfy.sample

    latent = torch.zeros(batch, 4, SIZE, SIZE)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "normal", positive, negative, latent, disable_pbar=True, seed=seed
    )
