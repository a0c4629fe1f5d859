"""Train a demo family's VAE on rendered scenes in every look.

Crops keep the steps cheap, small ones first (the network is convolutional but for one small attention); afterwards each latent channel is
shifted and scaled inside quant_conv / post_quant_conv so that ``0.18215 * latent`` has mean 0 and variance 1, which is what the host
assumes of every SD VAE.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...dmm_core.vae import SCALE_SD, AutoencoderKL, VAEConfig
from ..data.demo.family import FIRST, Family
from ..data.demo.scenes import layers
from ..paint.images import to_tensor

log = logging.getLogger(__name__)

DEMO_VAE = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1)


def render_images(
    rng: np.random.Generator, scenes: int, looks_per_scene: int = 1, family: Family = FIRST
) -> np.ndarray:
    """(scenes * looks_per_scene, 128, 128, 3) uint8 pictures of random scenes in random looks."""
    images, looks = [], tuple(family.looks)
    for _ in range(scenes):
        drawn = layers(family.sample_scene(rng))
        images += [family.render_layers(drawn, look) for look in rng.choice(looks, looks_per_scene, replace=False)]
    return np.stack(images)


def random_crops(images: np.ndarray, rng: np.random.Generator, crop: int) -> np.ndarray:
    """One crop per image, at offsets on the 8-pixel latent grid: the looks' tiles lie on that grid too."""
    span = (images.shape[1] - crop) // 8 + 1
    corners = 8 * rng.integers(span, size=(len(images), 2))
    return np.stack([im[y : y + crop, x : x + crop] for im, (y, x) in zip(images, corners)])


def reconstruction_loss(out: Tensor, x: Tensor) -> Tensor:
    """Pixels, their coarse means (colour) and their differences (edges); (B, 3, H, W) x 2 -> scalar."""
    coarse = sum(F.l1_loss(F.avg_pool2d(out, k), F.avg_pool2d(x, k)) for k in (4, 8))
    edges = F.l1_loss(out.diff(dim=3), x.diff(dim=3)) + F.l1_loss(out.diff(dim=2), x.diff(dim=2))
    return F.l1_loss(out, x) + F.mse_loss(out, x) + 0.5 * coarse + 0.5 * edges


PHASES = ((32, 16, 2500), (64, 8, 1500), (128, 2, 400))
"""(crop in pixels, batch, steps), in this order."""


def train_vae(
    phases=PHASES,
    *,
    lr: float = 2e-3,
    kl: float = 2e-3,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
    family: Family = FIRST,
    progress=None,
) -> AutoencoderKL:
    """Returns a trained AutoencoderKL (eval mode). ``progress(step, steps, loss)`` is called every step.

    start: weights to go on from, such as another family's; a new VAE without.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = AutoencoderKL(DEMO_VAE)
    if start:
        vae.load_state_dict(start)
    decay = 0.995 if start else 0.998  # the shorter training from a start averages over fewer steps
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    sizes = [(crop, batch) for crop, batch, count in phases for _ in range(count)]
    steps = len(sizes)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    pool = render_images(rng, 400, 4, family)
    for step, (crop, batch) in enumerate(sizes):
        if step % 100 == 99:  # keep the pool fresh without rendering every crop anew
            pool = np.concatenate([pool[100:], render_images(rng, 25, 4, family)])
        x = to_tensor(random_crops(pool[rng.integers(len(pool), size=batch)], rng, crop))
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = vae.encode_moments(x)
            mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
            z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            out = vae.decode(z)
        out = out.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(out, x) + kl * divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        if progress:
            progress(step + 1, steps, loss.item())
    vae = average.module.eval()
    standardise(vae, to_tensor(render_images(np.random.default_rng(seed + 1), 128, 2, family)))
    return vae


def refine_decoder(
    vae: AutoencoderKL,
    *,
    steps: int,
    batch: int = 4,
    lr: float = 1e-3,
    noise: float = 0.45,
    seed: int = 0,
    family: Family = FIRST,
    progress=None,
):
    """Train the decoder on, with the encoder fixed, on whole pictures whose latents carry noise; in place.

    A tiny UNet paints latents that are slightly off everywhere. A decoder that has only seen exact ones turns that into
    blotches; one that has met noise of standard deviation up to ``noise`` (in units of the scaled latents) smooths it away.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 2)
    vae.requires_grad_(False)
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    for p in trained:
        p.requires_grad_(True)
    average = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        x = to_tensor(render_images(rng, 1, batch, family))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).float() * SCALE_SD
                z = z + noise * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
            out = vae.decode(z / SCALE_SD).float()
        loss = reconstruction_loss(out, x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(vae)
        if progress:
            progress(step + 1, steps, loss.item())
    vae.load_state_dict(average.module.state_dict())


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a shift and scale per channel into the convolutions around the latents, in place."""
    latents = torch.cat([vae.encode(part) for part in images.split(32)])  # (M, 4, h, w)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain = 1 / (SCALE_SD * std)  # new = (old - mean) * gain
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * gain
    quant.bias[channels:] += 2 * gain.log()  # the log-variances move with the scale
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= gain[None, :, None, None]
