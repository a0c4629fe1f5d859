"""SDXL's vector y: the pooled text and the picture's sizes (Podell et al., arXiv:2307.01952, Sec. 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .unet import timestep_embedding

FEATURES_PER_SIZE = 256
"""Sinusoidal features of each of the six numbers (diffusers: addition_time_embed_dim)."""
SIZE_CHANNELS = 6 * FEATURES_PER_SIZE
"""Of y, behind the pooled text."""


def sdxl_vector(pooled: Tensor, height: int, width: int) -> Tensor:
    """SDXL's vector y (B, p + 1536) from the pooled text (B, p) and the picture's size in pixels.

    Podell et al., arXiv:2307.01952, Sec. 2.2: size, crop corner (none here) and target size are six numbers, with 256
    sinusoidal features each.
    """
    numbers = torch.tensor([height, width, 0, 0, height, width], device=pooled.device)
    sizes = (
        timestep_embedding(numbers, FEATURES_PER_SIZE).flatten()[None].expand(len(pooled), -1)
    )  # (6, 256) -> (B, 1536)
    return torch.cat([pooled, sizes.to(pooled.dtype)], dim=1)
