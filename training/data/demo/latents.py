"""Scenes as captioned latents: what the demo family is trained on, and the data of the demo distillation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from ....dmm_core.checkpoint import Checkpoint
from ....dmm_core.unet import unet_config_from_state_dict
from ....dmm_core.vae import SCALE_SD, AutoencoderKL, latent_scale, load_vae
from ...paint.images import to_tensor
from ..batches import CaptionedLatents
from .family import FAMILIES, FIRST, Family
from .scenes import layers


def demo_images(looks: Sequence[str], count: int, seed: int, family: Family = FIRST) -> tuple[np.ndarray, list[str]]:
    """``count`` random scenes of a family, scene i in look i mod len(looks), of any family: (count, 128, 128, 3) uint8 and their captions.

    Same seed, same scenes, whatever the looks. ValueError for a look that no family has.
    """
    rng = np.random.default_rng(seed)
    scenes = [family.sample_scene(rng) for _ in range(count)]
    painters = [next((one for one in (family, *FAMILIES.values()) if look in one.looks), family) for look in looks]
    turns = itertools.cycle(zip(painters, looks))
    images = [painter.render_layers(layers(scene), look) for scene, (painter, look) in zip(scenes, turns)]
    return np.stack(images), [scene.caption for scene in scenes]


@torch.no_grad()
def captioned_latents(
    vae: AutoencoderKL, looks: Sequence[str], count: int, seed: int, *, scale: float = SCALE_SD, family: Family = FIRST
) -> CaptionedLatents:
    """``demo_images`` as latents (count, 4, 16, 16), multiplied by ``scale``."""
    images, captions = demo_images(looks, count, seed, family)
    latents = [scale * vae.encode(to_tensor(images[i : i + 32])) for i in range(0, count, 32)]
    return CaptionedLatents(torch.cat(latents), captions)


def demo_latents(checkpoint: Checkpoint, count: int, seed: int) -> CaptionedLatents:
    """Captioned latents of scenes in the looks of base and teachers, encoded by the checkpoint's VAE. Raises ValueError
    without one."""
    if not checkpoint.vae:
        raise ValueError("no VAE to encode the demo scenes with: name a full checkpoint as parts_from")
    scale = latent_scale(unet_config_from_state_dict(checkpoint.unet))
    return captioned_latents(load_vae(checkpoint.vae), FIRST.painted, count, seed, scale=scale)
